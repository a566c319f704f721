"""The results in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median

from lora_kernels.cli.bench.cases import Case
from lora_kernels.cli.bench.clock import Times
from lora_kernels.cli.bench.models import EXACT, stock_of
from lora_kernels.cli.bench.providers import FLOOR, PROVIDERS
from lora_kernels.cli.bench.results import Measurement, ModelMeasurement, Results

_MIB, _GIB = 1 << 20, 1 << 30
_NONE = "-"
_HEADINGS = ("", "forward", "step", "of roofline", "peak MiB", "must move MiB")
_WIDTHS = (16, 20, 20, 14, 18, 18)
_MODEL_WIDTHS = (12, 8, 10, 10, 20, 10, 20, 20)


def layer_tables(results: Results) -> str:
    """A block for each regime and kind of launches, a line for each provider of each case."""
    blocks = []
    by_clock: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in results.measurements:
        by_clock.setdefault((measurement.regime, measurement.launches), []).append(measurement)
    for (regime, launches), measurements in by_clock.items():
        blocks.append("\n".join(_block(f"{regime}, {launches}", measurements, results)))
    return "\n\n".join(blocks + _reasons(results.measurements, results.left_out if blocks else {}))


def ratio(times: Times, floor: Times) -> tuple[float, float]:
    """A time as a multiple of the floor's, and how far that may be off: half the interquartile ranges of both."""
    value = times.median / floor.median
    return value, value * (times.spread + floor.spread)


def _block(title: str, measurements: list[Measurement], results: Results) -> Iterator[str]:
    yield f"{title}: microseconds of {FLOOR}, ratios to it; forward / step in the last three columns"
    ceilings = results.ceilings.get(title)
    if ceilings is not None:
        yield (
            f"this run's ceilings: {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
            f"{ceilings.flops_per_second / 1e12:.1f} TFLOP/s"
        )
    yield _line(_HEADINGS)
    for case, of_case in groupby(measurements, key=lambda m: m.case):
        yield str(case)
        yield from _case_lines(list(of_case))


def _case_lines(measurements: list[Measurement]) -> Iterator[str]:
    found = {(m.provider, m.part): m for m in measurements}
    # Who has no figure at all is listed at the end, with the reason.
    shown = {m.provider for m in measurements if m.reason is None}
    for provider in sorted(shown, key=list(PROVIDERS).index):
        forward, step = (found.get((provider, part)) for part in ("forward", "step"))
        floors = (found.get((FLOOR, part)) for part in ("forward", "step"))
        times = [_time(m, floor) for m, floor in zip((forward, step), floors, strict=True)]
        pair = [m for m in (forward, step) if m is not None]
        yield _line((f"  {provider}", *times, _pair(pair, _roofline), _pair(pair, _peak), _pair(pair, _moved)))


def _line(cells: Sequence[str]) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _time(measurement: Measurement | None, floor: Measurement | None) -> str:
    if measurement is None or measurement.times is None:
        return _NONE
    times = measurement.times
    if measurement.provider == FLOOR or floor is None or floor.times is None:
        return f"{times.median:.1f} us ±{100 * times.spread:.1f}%"
    value, error = ratio(times, floor.times)
    return f"{value:.2f} ±{error:.2f}"


def _pair(measurements: list[Measurement], text: Callable[[Measurement], str]) -> str:
    return " / ".join(text(m) for m in measurements)


def _roofline(m: Measurement) -> str:
    return _NONE if m.times is None or m.roofline_us is None else f"{100 * m.roofline_us / m.times.median:.0f}%"


def _peak(m: Measurement) -> str:
    return _NONE if m.peak_bytes is None else f"{m.peak_bytes / _MIB:.1f}"


def _moved(m: Measurement) -> str:
    return _NONE if m.bytes is None else f"{m.bytes / _MIB:.1f}"


def _reasons(measurements: Sequence[Measurement], left_out: Mapping[str, str]) -> list[str]:
    """Why figures are missing, each reason once for all cases that share it; and who was left out of all."""
    missing: dict[tuple[str, str], set[Case]] = {}
    for m in measurements:
        if m.reason is not None:
            missing.setdefault((m.provider, m.reason), set()).add(m.case)
    if not missing and not left_out:
        return []
    lines = [
        f"  {provider:<14}{reason} ({len(cases)} case{'s' if len(cases) > 1 else ''})"
        for (provider, reason), cases in missing.items()
    ]
    lines += [f"  {provider:<14}{reason}" for provider, reason in left_out.items()]
    return ["\n".join(["no figure:", *lines])]


def model_table(measurements: Sequence[ModelMeasurement], left_out: Mapping[str, str]) -> str:
    """A line for each provider of each whole model; docs/benchmarks.md says what its columns are."""
    lines: list[str] = []
    for title, group in groupby(measurements, key=_model_title):
        members = {m.provider: m for m in group}
        cells = ["tokens/s", "± %", "of floor", "peak GiB"]
        if any(m.generate for m in members.values()):
            cells += ["logits"]
        else:
            cells += ["loss", "gradient", "loss gap", *(["from float32"] if EXACT in members else [])]
        lines += [title, _model_cells("", *cells)]
        lines += [_model_line(m, members) for m in members.values()]
        lines += [f"  {provider:<18}{_NONE:>12}  {reason}" for provider, reason in left_out.items()]
    return "\n".join(lines)


def loss_gap(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The median and the largest distance of a step's loss from another's at that step, relative to it."""
    gaps = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, others, strict=False)]
    # A NaN has no place in an order, and is worse than any number.
    return (math.nan, math.nan) if any(map(math.isnan, gaps)) else (median(gaps), max(gaps))


def _model_title(m: ModelMeasurement) -> str:
    reduced = "" if m.layers == m.all_layers else f", REDUCED to {m.layers} of {m.all_layers} layers"
    base = m.quantize or "bfloat16"
    if m.generate:
        return f"{m.model}{reduced}: {m.generate} tokens behind {m.batch} x {m.seq}, rank {m.rank}, {base}"
    checkpointing = "checkpointing" if m.checkpointing else "no checkpointing"
    dropout = f", dropout {m.dropout:g}" if m.dropout else ""
    return f"{m.model}{reduced}: {m.batch} x {m.seq} tokens, rank {m.rank}{dropout}, {base}, {checkpointing}"


def _model_line(m: ModelMeasurement, members: Mapping[str, ModelMeasurement]) -> str:
    if m.times is None or m.tokens_per_second is None:
        return f"  {m.provider:<18}{_NONE:>12}  {m.reason}"
    floor, exact, stock = (members.get(name) for name in (FLOOR, EXACT, stock_of(m.provider) or ""))
    per_second = None if floor is None else floor.tokens_per_second
    cells = [
        f"{m.tokens_per_second:,.{0 if m.tokens_per_second >= 1000 else 1}f}",
        f"{100 * m.times.spread:.1f}",
        _NONE if per_second is None else f"{m.tokens_per_second / per_second:.3f}",
        _NONE if m.peak_bytes is None else f"{m.peak_bytes / _GIB:.2f}",
    ]
    if m.generate:
        return _model_cells(m.provider, *cells, _NONE if m.logits_error is None else f"{m.logits_error:.1e}")
    return _model_cells(
        m.provider,
        *cells,
        f"{m.losses[0]:.3f} -> {m.losses[-1]:.3f}" if m.losses else _NONE,
        _NONE if m.gradient_error is None else f"{m.gradient_error:.1e}",
        _gap(m, stock),
        *([] if exact is None else [_NONE if m is floor else _gap(m, exact)]),
    )


def _gap(m: ModelMeasurement, other: ModelMeasurement | None) -> str:
    if other is None or other is m or not m.losses or not other.losses:
        return _NONE
    middle, largest = loss_gap(m.losses, other.losses)
    return f"{middle:.1e} to {largest:.1e}"


def _model_cells(name: str, *cells: str) -> str:
    return f"  {name:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, _MODEL_WIDTHS, strict=False))
