"""Training steps of a whole model: the providers take turns, each checked before it is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_kernels.cli.bench.clock import Times, first_line
from lora_kernels.cli.bench.models import MODEL_PROVIDERS, REFERENCE, Trained
from lora_kernels.cli.bench.providers import Missing, WrongAnswer
from lora_kernels.cli.bench.results import ModelMeasurement, Setting
from lora_kernels.dispatch import BackendRefused
from lora_kernels.selftest import failures

# Two computations in bfloat16 differ by a few per cent after many layers: 0.03 in the models of 32 layers that were
# measured, 0.05 in one of 80. A scaling that is wrong by a tenth makes more than this.
GRADIENT_LIMIT = 0.1
_WARM_UP = 2
# So few that a run goes through them often enough to learn them: the loss of tokens that never come again stays.
BATCHES = 4


@dataclass
class Entry:
    """A provider, and what is known of it so far."""

    trained: Trained | None = None
    reason: str | None = None
    gradient_error: float | None = None
    peak_bytes: int | None = None
    microseconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Training:
    """One setting, all providers. Whatever has been measured when it is interrupted is in `measurements`.

    Gradients are compared with those of `reference`: EXACT, or stock PEFT's.
    """

    def __init__(self, setting: Setting, base: nn.Module, vocabulary: int, reference: str = REFERENCE) -> None:
        self.setting, self.base, self.vocabulary = setting, base, vocabulary
        self.device = next(base.parameters()).device
        self.entries: dict[str, Entry] = {}
        self._reference_name = reference
        self._base_bytes = _allocated(self.device)
        self._reference: dict[str, Tensor] | str | None = None

    def prepare(self, name: str) -> None:
        """Builds a provider, checks its gradients, warms it up and measures its memory."""
        entry = self.entries[name] = Entry()
        try:
            if MODEL_PROVIDERS[name].lora:
                reference = self._reference_gradients()
            before = _allocated(self.device)
            entry.trained = trained = self._build(name)
            if trained.provider.lora:
                entry.gradient_error = _check(self._gradients(trained), reference)
            # The first step makes the optimizer's state.
            trained.step(self._tokens(0))
            own_bytes = _allocated(self.device) - before
            entry.peak_bytes = self._peak_of_a_step(trained, own_bytes)
        except (Missing, WrongAnswer) as refusal:
            entry.reason = str(refusal)
        except BackendRefused as refusal:
            entry.reason = refusal.reason
        except failures() as error:
            entry.reason = first_line(error)
        if entry.reason is not None:
            entry.trained = entry.peak_bytes = None
            _free()

    def forget_reference(self) -> None:
        """The gradients that others are compared with are in the way of the measurement."""
        self._reference = None
        _free()

    def rounds(self, count: int) -> Iterator[int]:
        """A step of each provider in turn, `count` times; all see the same tokens in a round.

        The rounds go through the same BATCHES batches of random tokens again and again, so that the loss falls as it
        does in training and one provider's can be held against another's. A step's time does not depend on what the
        tokens are, and they are drawn before it begins.
        """
        for index in range(count):
            tokens = self._tokens(_WARM_UP + index)
            for entry in self.entries.values():
                if entry.trained is not None:
                    start = _synchronized(self.device)
                    loss = entry.trained.step(tokens)
                    entry.microseconds.append((_synchronized(self.device) - start) * 1e6)
                    entry.losses.append(float(loss))
            yield index

    def measurements(self) -> list[ModelMeasurement]:
        """What is known of every provider by now."""
        return [
            ModelMeasurement(
                **vars(self.setting),
                provider=name,
                times=Times.of(entry.microseconds) if entry.microseconds else None,
                peak_bytes=entry.peak_bytes,
                reason=entry.reason or (None if entry.microseconds else "interrupted before its first step"),
                losses=tuple(entry.losses),
                gradient_error=entry.gradient_error,
            )
            for name, entry in self.entries.items()
        ]

    def _build(self, name: str) -> Trained:
        setting = self.setting
        return Trained(MODEL_PROVIDERS[name], self.base, setting.rank, setting.checkpointing, setting.dropout)

    def _tokens(self, step: int) -> Tensor:
        """The batch of a step, counted from the first one of the warm-up."""
        generator = torch.Generator(self.device).manual_seed(step % BATCHES)
        size = (self.setting.batch, self.setting.seq)
        return torch.randint(self.vocabulary, size, generator=generator, device=self.device)

    def _reference_gradients(self) -> dict[str, Tensor]:
        if self._reference is None:
            try:
                self._reference = self._gradients(self._build(self._reference_name))
            except Missing as missing:
                self._reference = str(missing)
            except failures() as error:
                self._reference = first_line(error)
            _free()
        if isinstance(self._reference, str):
            raise Missing(f"cannot be checked, because {self._reference_name} fails: {self._reference}")
        return self._reference

    def _gradients(self, trained: Trained) -> dict[str, Tensor]:
        # Providers draw masks of their own: without them their gradients are the same.
        with trained.without_dropout():
            trained.loss(self._tokens(0))
        gradients = {n: p.grad.float() for n, p in trained.adapters.items() if p.grad is not None}
        trained.drop_gradients()
        return gradients

    def _peak_of_a_step(self, trained: Trained, own_bytes: int) -> int | None:
        """The peak as if the other providers were not there: the frozen weights, its own state, and the step."""
        if self.device.type != "cuda":
            trained.step(self._tokens(1))
            return None
        before = _allocated(self.device)
        torch.cuda.reset_peak_memory_stats()
        trained.step(self._tokens(1))
        torch.cuda.synchronize()
        return self._base_bytes + own_bytes + torch.cuda.max_memory_allocated() - before


def _check(got: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The worst relative error of a gradient, against the reference's: float64 has no room for a whole model."""
    errors = {name: float((got[name] - t).norm() / t.norm()) for name, t in reference.items()}
    worst = max(errors, key=errors.__getitem__)
    # Not `errors[worst] < GRADIENT_LIMIT`: a NaN compares as nothing.
    if not all(error < GRADIENT_LIMIT for error in errors.values()):
        raise WrongAnswer(f"wrong answer: the gradient of {worst} is off by {errors[worst]:.1e}")
    return errors[worst]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
