"""Providers of a whole model, each checked before it is timed: what training and generating have in common."""

from __future__ import annotations

import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.cli.bench.clock import Times, first_line
from lora_kernels.cli.bench.models import MODEL_PROVIDERS, REFERENCE, Trained
from lora_kernels.cli.bench.providers import Missing, WrongAnswer
from lora_kernels.cli.bench.results import ModelMeasurement, Setting
from lora_kernels.dispatch import BackendRefused
from lora_kernels.selftest import failures

# Two computations in bfloat16 differ by a few per cent after many layers: gradients by 0.03 in the models of 32 layers
# that were measured, and by 0.05 in one of 80. A scaling that is wrong by a tenth makes more than this.
ERROR_LIMIT = 0.1


@dataclass
class Entry:
    """A provider, and what is known of it so far."""

    trained: Trained | None = None
    reason: str | None = None
    error: float | None = None
    peak_bytes: int | None = None
    microseconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Turns(ABC):
    """One setting, all providers. Whatever has been measured when it is interrupted is in `measurements`.

    What they compute is compared with what `reference` does: EXACT, or stock PEFT.
    """

    # What the answers are, and the figure that their error is in the results.
    answers_are: str
    error_figure: str

    def __init__(self, setting: Setting, base: nn.Module, vocabulary: int, reference: str = REFERENCE) -> None:
        self.setting, self.base, self.vocabulary = setting, base, vocabulary
        self.device = next(base.parameters()).device
        self.entries: dict[str, Entry] = {}
        self._reference_name = reference
        self._base_bytes = _allocated(self.device)
        self._reference: dict[str, Tensor] | str | None = None

    @abstractmethod
    def rounds(self, count: int) -> Iterator[int]:
        """A measured turn of each provider, `count` times."""

    @abstractmethod
    def _build(self, name: str) -> Trained: ...

    @abstractmethod
    def _answers(self, trained: Trained) -> dict[str, Tensor]:
        """What is compared between providers, in float32."""

    @abstractmethod
    def _once(self, trained: Trained, number: int) -> Any:
        """What is measured, once."""

    def prepare(self, name: str) -> None:
        """Builds a provider, checks its answers, warms it up and measures its memory."""
        entry = self.entries[name] = Entry()
        try:
            if MODEL_PROVIDERS[name].lora:
                reference = self._reference_answers()
            before = _allocated(self.device)
            entry.trained = trained = self._build(name)
            if trained.provider.lora:
                entry.error = check(self._answers(trained), reference, self.answers_are)
            # The first time makes what stays: the optimizer's state, and what is compiled.
            self._once(trained, 0)
            own_bytes = _allocated(self.device) - before
            entry.peak_bytes = self._peak(trained, own_bytes)
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
        """The answers that others are compared with are in the way of the measurement."""
        self._reference = None
        _free()

    def measurements(self) -> list[ModelMeasurement]:
        """What is known of every provider by now."""
        found: list[dict[str, Any]] = [
            {
                "provider": name,
                "times": Times.of(entry.microseconds) if entry.microseconds else None,
                "peak_bytes": entry.peak_bytes,
                "reason": entry.reason or (None if entry.microseconds else "interrupted before its first step"),
                "losses": tuple(entry.losses),
                self.error_figure: entry.error,
            }
            for name, entry in self.entries.items()
        ]
        return [ModelMeasurement(**vars(self.setting), **figures) for figures in found]

    def _tokens(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (self.setting.batch, self.setting.seq)
        return torch.randint(self.vocabulary, size, generator=generator, device=self.device)

    def _reference_answers(self) -> dict[str, Tensor]:
        if self._reference is None:
            try:
                self._reference = self._answers(self._build(self._reference_name))
            except Missing as missing:
                self._reference = str(missing)
            except failures() as error:
                self._reference = first_line(error)
            _free()
        if isinstance(self._reference, str):
            raise Missing(f"cannot be checked, because {self._reference_name} fails: {self._reference}")
        return self._reference

    def _peak(self, trained: Trained, own_bytes: int) -> int | None:
        """The peak as if the other providers were not there: frozen weights, its own state, and what is measured."""
        if self.device.type != "cuda":
            self._once(trained, 1)
            return None
        before = _allocated(self.device)
        torch.cuda.reset_peak_memory_stats()
        self._once(trained, 1)
        torch.cuda.synchronize()
        return self._base_bytes + own_bytes + torch.cuda.max_memory_allocated() - before


def check(got: dict[str, Tensor], reference: dict[str, Tensor], what: str) -> float:
    """The worst relative error of an answer, against the reference's: float64 has no room for a whole model.

    Raises:
        WrongAnswer: it is too large to be rounding.
    """
    errors = {name: float((got[name] - t).norm() / t.norm()) for name, t in reference.items()}
    # A NaN compares as nothing, and is worse than any number.
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    if not errors[worst] < ERROR_LIMIT:
        raise WrongAnswer(f"wrong answer: {what} {worst} is off by {errors[worst]:.1e}")
    return errors[worst]


def synchronized(device: torch.device) -> float:
    """The time, once the device is done with everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
