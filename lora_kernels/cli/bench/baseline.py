"""Whether a run is slower, or takes more memory, than an earlier one: beyond what both runs say is noise."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_kernels.cli.bench.clock import Times
from lora_kernels.cli.bench.providers import FLOOR
from lora_kernels.cli.bench.results import Measurement, ModelMeasurement, Results
from lora_kernels.cli.errors import UserError

# Two runs of the same thing differ by about as much even where samples within a run do not.
LEAST_NOISE = 0.01
# Worse by chance is then one figure in several hundred, from about five samples on.
_DEVIATIONS = 3.0
# The allocator hands memory out in blocks of 2 MiB.
_MEMORY_NOISE = 2 << 20

Figure = Measurement | ModelMeasurement


@dataclass
class Comparison:
    """Against a baseline: lines for what got worse and what got better, and how much was comparable.

    `gone` counts, for each provider, the figures of the baseline that this run has not.
    """

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    compared: int = 0
    not_compared: int = 0
    gone: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        whose = f" ({', '.join(f'{name} {count}' for name, count in self.gone.items())})" if self.gone else ""
        lines = [
            f"against the baseline: {self.compared} figures compared, {self.not_compared} have no counterpart, "
            f"{self.gone.total()} of the baseline are gone{whose}"
        ]
        lines += [f"  better: {line}" for line in self.better]
        lines += [f"  WORSE:  {line}" for line in self.worse]
        return "\n".join([*lines, f"  {len(self.worse)} got worse, {len(self.better)} better, beyond the noise"])


def require_comparable(baseline: Results, environment: Mapping[str, object]) -> None:
    """Refuses a baseline from another GPU before anything is measured.

    Raises:
        UserError: the devices differ.
    """
    before, now = baseline.environment.get("device"), environment["device"]
    if before != now:
        raise UserError(f"--baseline: it was measured on {before}, but this is {now}")


def compare(baseline: Results, now: Results) -> Comparison:
    """Compares ratios to the floor of each run, so that a slower clock of the whole chip is no regression.

    Raises:
        UserError: no figure is in both.
    """
    comparison = Comparison()
    _compare_figures(comparison, baseline.measurements, now.measurements)
    _compare_figures(comparison, baseline.models, now.models)
    if comparison.compared == 0:
        raise UserError(
            f"--baseline: nothing could be compared: {comparison.not_compared} figures of this run are not in it, "
            f"and {comparison.gone.total()} of its figures are not in this run"
        )
    return comparison


def _compare_figures(comparison: Comparison, baseline: Sequence[Figure], now: Sequence[Figure]) -> None:
    earlier, floors_before, floors_now = _by_key(baseline), _floors(baseline), _floors(now)
    for figure in now:
        before = earlier.get(figure.key)
        if figure.provider == FLOOR:
            continue
        if before is None or not _has_figure(before):
            comparison.not_compared += 1
            continue
        comparison.compared += 1
        _compare_memory(comparison, before, figure)
        lost = _lost(before, figure)
        if lost:
            why = f": {figure.reason}" if figure.reason else ""
            comparison.worse.append(f"{_name(figure)}: has no {' and no '.join(lost)} any more{why}")
        if before.times is None or figure.times is None:
            continue
        floor_before, floor_now = floors_before.get(_place(figure)), floors_now.get(_place(figure))
        if floor_before is not None and floor_now is not None:
            _compare_times(comparison, figure, (before.times, floor_before), (figure.times, floor_now))
        else:
            _compare_times(comparison, figure, (before.times,), (figure.times,))
    found = {figure.key for figure in now}
    comparison.gone.update(
        before.provider
        for before in baseline
        if before.provider != FLOOR and _has_figure(before) and before.key not in found
    )


def _has_figure(figure: Figure) -> bool:
    return figure.times is not None or figure.peak_bytes is not None


def _lost(before: Figure, figure: Figure) -> list[str]:
    pairs = {"time": (before.times, figure.times), "peak memory": (before.peak_bytes, figure.peak_bytes)}
    return [name for name, (earlier, now) in pairs.items() if earlier is not None and now is None]


def _compare_times(
    comparison: Comparison, figure: Figure, before: tuple[Times, ...], now: tuple[Times, ...]
) -> None:
    """Of a time alone, or of a time and its floor."""
    old, new = (times[0].median / (times[1].median if len(times) > 1 else 1.0) for times in (before, now))
    noise = old * max(_DEVIATIONS * math.hypot(*(times.error for times in (*before, *now))), LEAST_NOISE)
    if abs(new - old) > noise:
        line = f"{_name(figure)}: {old:.3f} -> {new:.3f}, noise ±{noise:.3f}"
        (comparison.worse if new > old else comparison.better).append(line)


def _compare_memory(comparison: Comparison, before: Figure, figure: Figure) -> None:
    if before.peak_bytes is None or figure.peak_bytes is None:
        return
    if figure.peak_bytes > before.peak_bytes * (1 + LEAST_NOISE) + _MEMORY_NOISE:
        old, new = before.peak_bytes / 2**20, figure.peak_bytes / 2**20
        comparison.worse.append(f"{_name(figure)}: peak memory {old:.1f} -> {new:.1f} MiB")


def _by_key(figures: Sequence[Figure]) -> dict[tuple[object, ...], Figure]:
    return {figure.key: figure for figure in figures}


def _floors(figures: Sequence[Figure]) -> dict[tuple[object, ...], Times]:
    return {_place(f): f.times for f in figures if f.provider == FLOOR and f.times is not None}


def _place(figure: Figure) -> tuple[object, ...]:
    """Which figures share a floor: all of the key but the provider."""
    return dataclasses.replace(figure, provider=FLOOR).key


def _name(figure: Figure) -> str:
    return ", ".join(str(part) for part in figure.key)
