"""Training steps of a whole model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lora_kernels.cli.bench.models import MODEL_PROVIDERS, Trained
from lora_kernels.cli.bench.turns import Turns, synchronized

_WARM_UP = 2
# So few that a run goes through them often enough to learn them: the loss of tokens that never come again stays.
BATCHES = 4


class Training(Turns):
    """Steps of each provider in turn. Its answers are the gradients of the adapters."""

    answers_are, error_figure = "the gradient of", "gradient_error"

    def rounds(self, count: int) -> Iterator[int]:
        """A step of each provider in turn, `count` times; all see the same tokens in a round.

        The rounds go through the same BATCHES batches of random tokens again and again, so that the loss falls as it
        does in training and one provider's can be held against another's. A step's time does not depend on what the
        tokens are, and they are drawn before it begins.
        """
        for index in range(count):
            tokens = self._tokens((_WARM_UP + index) % BATCHES)
            for entry in self.entries.values():
                if entry.trained is not None:
                    start = synchronized(self.device)
                    loss = entry.trained.step(tokens)
                    entry.microseconds.append((synchronized(self.device) - start) * 1e6)
                    entry.losses.append(float(loss))
            yield index

    def _build(self, name: str) -> Trained:
        setting = self.setting
        return Trained(MODEL_PROVIDERS[name], self.base, setting.rank, setting.checkpointing, setting.dropout)

    def _answers(self, trained: Trained) -> dict[str, Tensor]:
        # Providers draw masks of their own: without them their gradients are the same.
        with trained.without_dropout():
            trained.loss(self._tokens(0))
        gradients = {n: p.grad.float() for n, p in trained.adapters.items() if p.grad is not None}
        trained.drop_gradients()
        return gradients

    def _once(self, trained: Trained, number: int) -> Tensor:
        return trained.step(self._tokens(number))
