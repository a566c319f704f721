"""How everything here is timed: providers interleaved in one run, L2 flushed before each sample, medians.

Two regimes, because one chip has two speeds. "cool" lets it rest before each sample, so it boosts; "warm" keeps it
at full load, so its power limit sets the clock, as in a training run. A ratio holds for the regime it came from.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def graphed(step: Step) -> Step:
    """The same work as the replay of a CUDA graph: the time of the GPU alone, without launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def interleaved(steps: dict[str, Step], regime: str, samples: int = 30) -> dict[str, float]:
    """Median microseconds of each step."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    heater = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") if regime == "warm" else None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    if heater is not None:
        _heat(heater, 2.0)
    for _ in range(samples):
        for name, step in steps.items():
            if heater is None:
                torch.cuda.synchronize()
                time.sleep(0.01)
            else:
                torch.mm(heater, heater)
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1000)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


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
