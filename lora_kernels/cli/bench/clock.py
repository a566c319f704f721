"""How everything here is timed: providers interleaved in one run, L2 flushed before each sample, medians.

Two regimes, because one chip has two speeds. "cool" lets it rest before each sample, so it boosts; "warm" keeps it
at full load, so its power limit sets the clock, as in a training run. A ratio holds for the regime it came from.

Two kinds of launches. "graph" replays a CUDA graph: the time of the GPU alone. "eager" starts from an idle GPU, so
that the time of the CPU counts wherever the GPU has to wait for it. A training step lies between the two.

On a CPU there is one regime, called "cpu", and launches are eager.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lora_kernels.selftest import failures

Step = Callable[[], object]
Sample = Callable[[], float]

REGIMES = ("warm", "cool")
LAUNCHES = ("graph", "eager")
CPU, CPU_TIME = "cpu", "cpu time"
FLUSH_BYTES = 256 << 20
_REST_SECONDS = 0.01
_HEATING_SECONDS = 2.0
_SECOND_OF_PRODUCTS = 600
# Half an interquartile range is 0.674 deviations, and a median's error 1.253 of them over the root of the samples.
_ERROR_OF_SPREAD = 1.253 / 0.674


@dataclass(frozen=True)
class Times:
    """Microseconds of one step: the median and the quartiles of its samples."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(values: list[float]) -> Times:
        """Quartiles, because one interrupted sample in thirty says nothing about the others."""
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        return Times(median, low, high, len(values))

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median."""
        return (self.high - self.low) / (2 * self.median)

    @property
    def error(self) -> float:
        """The standard error of the median, relative to it, as of normally distributed samples."""
        return _ERROR_OF_SPREAD * self.spread / math.sqrt(self.samples)


class Clock(Protocol):
    """`prepare` warms a step up and returns what takes one sample of it; `between` comes before every sample."""

    regime: str
    launches: str

    def prepare(self, step: Step) -> Sample: ...

    def start(self) -> None: ...

    def load(self) -> None: ...

    def between(self) -> None: ...


def interleaved(
    steps: dict[str, Step], clock: Clock, samples: int, progress: Callable[[float], None] = lambda done: None
) -> dict[str, Times | str]:
    """The times of each step, one sample of each in turn; or what its preparation raised, as text.

    `progress` is told from 0 to 1 how many of the samples are taken.
    """
    progress(0.0)
    takers: dict[str, Sample] = {}
    result: dict[str, Times | str] = {}
    for name, step in steps.items():
        try:
            takers[name] = clock.prepare(step)
        except failures() as error:
            result[name] = first_line(error)
    values: dict[str, list[float]] = {name: [] for name in takers}
    clock.start()
    for taken in range(samples):
        for name, take in takers.items():
            clock.between()
            values[name].append(take())
        progress((taken + 1) / samples)
    return result | {name: Times.of(own) for name, own in values.items()}


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


class GpuClock:
    """CUDA events around a step, in one regime and with one kind of launches."""

    def __init__(self, regime: str, launches: str) -> None:
        self.regime, self.launches = regime, launches
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        heated = regime == "warm"
        self._heater = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") if heated else None
        self._hot_until = 0.0

    def prepare(self, step: Step) -> Sample:
        return self._graph_sample(step) if self.launches == "graph" else self._eager_sample(step)

    def start(self) -> None:
        """Heats the chip for as long as it has rested, within reason."""
        torch.cuda.synchronize()
        if self._heater is not None:
            rested = time.perf_counter() - self._hot_until
            end = time.perf_counter() + min(rested, _HEATING_SECONDS)
            while time.perf_counter() < end:
                for _ in range(20):
                    torch.mm(self._heater, self._heater)
                torch.cuda.synchronize()

    def load(self) -> None:
        """Hands the GPU a second of work, in which others can look at its clocks; none where it is to rest."""
        if self._heater is not None:
            for _ in range(_SECOND_OF_PRODUCTS):
                torch.mm(self._heater, self._heater)

    def between(self) -> None:
        torch.cuda.synchronize()
        if self._heater is None:
            time.sleep(_REST_SECONDS)
        else:
            torch.mm(self._heater, self._heater)
            self._hot_until = time.perf_counter()

    def _eager_sample(self, step: Step) -> Sample:
        for _ in range(3):
            step()

        def take() -> float:
            start, end = _events()
            self._flush.zero_()
            # Else the CPU would launch the step while the GPU is still busy with the flush, and cost nothing.
            torch.cuda.synchronize()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            return _microseconds(start, end)

        return take

    def _graph_sample(self, step: Step) -> Sample:
        """The events are nodes of the graph, so that the launch of the graph itself is outside of them."""
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        start, end = _events(external=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._flush.zero_()
            start.record()
            step()
            end.record()

        def take() -> float:
            graph.replay()
            torch.cuda.synchronize()
            return _microseconds(start, end)

        return take


class CpuClock:
    """Time from the call to its return, with no GPU in the way: all there is of a step on a CPU."""

    launches = "eager"

    def __init__(self, regime: str) -> None:
        self.regime = regime

    def prepare(self, step: Step) -> Sample:
        for _ in range(3):
            step()

        def take() -> float:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e6

        return take

    def start(self) -> None: ...

    def load(self) -> None: ...

    def between(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _events(external: bool = False) -> list[torch.cuda.Event]:
    make: Any = torch.cuda.Event
    return [make(enable_timing=True, external=external) for _ in range(2)]


def _microseconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end)) * 1000
