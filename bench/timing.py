"""How everything here is timed: providers interleaved in one run, L2 flushed before each sample, medians.

Two regimes, because one chip has two speeds. "cool" lets it rest before each sample, so it boosts; "warm" keeps it
at full load, so its power limit sets the clock, as in a training run. A ratio holds for the regime it came from.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def interleaved(steps: dict[str, Step], regime: str, graph: bool = False, samples: int = 30) -> dict[str, float]:
    """Median microseconds of each step; with `graph`, of its replay, where launches cost nothing."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    heater = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") if regime == "warm" else None
    make = _graph_sample if graph else _eager_sample
    takers = {name: make(step, flush) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    if heater is not None:
        _heat(heater, 2.0)
    for _ in range(samples):
        for name, take in takers.items():
            torch.cuda.synchronize()
            if heater is None:
                time.sleep(0.01)
            else:
                torch.mm(heater, heater)
            times[name].append(take())
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def _eager_sample(step: Step, flush: torch.Tensor) -> Callable[[], float]:
    for _ in range(3):
        step()

    def take() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000

    return take


def _graph_sample(step: Step, flush: torch.Tensor) -> Callable[[], float]:
    """The events are nodes of the graph, so that the launch of the graph itself is outside of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flush.zero_()
        start.record()
        step()
        end.record()

    def take() -> float:
        graph.replay()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000

    return take


def cpu_microseconds(step: Step, samples: int = 200) -> float:
    """Median CPU time from the call to its return, with the GPU never in the way."""
    values = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        values.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return sorted(values)[len(values) // 2]


def _heat(heater: torch.Tensor, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(heater, heater)
        torch.cuda.synchronize()
