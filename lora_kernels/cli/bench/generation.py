"""Tokens that a whole model generates with its adapters not merged, as in rollouts and evaluations."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lora_kernels.cli.bench.models import MODEL_PROVIDERS, Trained
from lora_kernels.cli.bench.providers import Missing
from lora_kernels.cli.bench.turns import Turns, synchronized


class Generation(Turns):
    """The time of a token of each provider in turn, by transformers' generate. Its answers are logits.

    A token's time is what so many more take, over their number: neither the prompt's nor that of starting.
    """

    answers_are, error_figure = "the logits of", "logits_error"

    def rounds(self, count: int) -> Iterator[int]:
        """What each provider generates in turn, `count` times; all have the same prompts in a round."""
        more = self.setting.generate
        for index in range(count):
            prompts = self._tokens(index)
            for entry in self.entries.values():
                if entry.trained is not None:
                    took = []
                    for tokens in (1, 1 + more):
                        start = synchronized(self.device)
                        entry.trained.generate(prompts, tokens)
                        took.append(synchronized(self.device) - start)
                    entry.microseconds.append((took[1] - took[0]) / more * 1e6)
            yield index

    def _build(self, name: str) -> Trained:
        if MODEL_PROVIDERS[name].compiled:
            raise Missing("generation is measured of models that are not compiled")
        trained = Trained(MODEL_PROVIDERS[name], self.base, self.setting.rank, checkpointing=False)
        trained.model.eval()
        return trained

    def _answers(self, trained: Trained) -> dict[str, Tensor]:
        prompts = self._tokens(0)
        return {"the prompt": trained.logits(prompts).float(), "a token": trained.logits(prompts[:, :1]).float()}

    def _once(self, trained: Trained, number: int) -> Tensor:
        return trained.generate(self._tokens(number), 1 + self.setting.generate)
