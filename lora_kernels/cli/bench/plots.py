"""The pictures of a run, each from the figures that it has; none where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from lora_kernels.cli.bench.cases import Case
from lora_kernels.cli.bench.providers import FLOOR, PROVIDERS
from lora_kernels.cli.bench.results import Measurement, ModelMeasurement, Results
from lora_kernels.cli.files import writing

matplotlib.use("Agg")  # Before pyplot is imported: this one needs no display.
from matplotlib import pyplot

_COLORS = {
    FLOOR: "black",
    "bitsandbytes": "C1",
    "peft": "C0",
    "peft-float32": "C9",
    "peft-compile": "C4",
    "peft-exact": "C5",
    "eager": "C2",
    "cuda": "C6",
    "triton": "C3",
    "triton-float32": "C8",
    "auto": "C7",
}
# Ratios of short batches say more about launches than about layers: those have a picture of their own.
_LONG = 1024
# More lines than these and the floor's are a tangle.
_AGAINST_M = ("bitsandbytes", "peft", "cuda", "triton", "auto")
# Fewer steps are no curve.
_LEAST_STEPS = 10


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Draws what the results allow and says which files it wrote.

    Raises:
        UserError: one cannot be written.
    """
    written = []
    for regime, launches in dict.fromkeys((m.regime, m.launches) for m in results.measurements):
        timed = [m for m in results.measurements if (m.regime, m.launches) == (regime, launches) and m.times]
        where, name = f"{_machine(results)}, {regime}, {launches}", f"{regime}-{launches}".replace(" ", "-")
        for figure, kind in (
            (_ratios(timed, where), "ratios"),
            (_roofline(timed, results, f"{regime}, {launches}", where), "roofline"),
            (_against_m(timed, where), "time-against-m"),
        ):
            if figure is not None:
                written.append(_save(figure, folder / f"{kind}-{name}.png"))
    if any(m.times for m in results.models):
        written.append(_save(_models(results.models, _machine(results)), folder / "models.png"))
    losses = _losses(results.models, _machine(results))
    if losses is not None:
        written.append(_save(losses, folder / "losses.png"))
    return written


def _machine(results: Results) -> str:
    return str(results.environment.get("device")).partition(",")[0]


def _save(figure: Any, path: Path) -> Path:
    with writing(path):
        figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _ratios(timed: Sequence[Measurement], where: str) -> Any:
    """The step of each provider as a multiple of the floor's, a row for each case."""
    steps = {(m.case, m.provider): m.times.median for m in timed if m.part == "step" and m.times}
    every = [case for case in dict.fromkeys(m.case for m in timed) if (case, FLOOR) in steps]
    cases = [case for case in every if case.M >= _LONG] or every
    providers = [name for name in PROVIDERS if name != FLOOR and any((case, name) in steps for case in cases)]
    if not providers:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.3 * len(cases)), layout="constrained")
    for name in providers:
        rows = {row: steps[case, name] for row, case in enumerate(cases) if (case, name) in steps}
        values = [time / steps[cases[row], FLOOR] for row, time in rows.items()]
        axes.plot(values, list(rows), "o", label=name, color=_COLORS[name])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [str(case) for case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("forward and backward, as a multiple of the frozen linear's")
    axes.set_title(where, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _roofline(timed: Sequence[Measurement], results: Results, key: str, where: str) -> Any:
    """What each step computes per second against what it must compute per byte, under the run's own ceilings."""
    ceilings = results.ceilings.get(key)
    points = [
        (m.provider, m.flops / m.bytes, m.flops / m.times.median / 1e6)
        for m in timed
        if m.part == "step" and m.bytes and m.flops and m.times
    ]
    if ceilings is None or not points:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    intensities = [intensity for _, intensity, _ in points]
    left, right = min(intensities) / 2, max(intensities) * 2
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    bends = sorted({left, right, *([ridge] if left < ridge < right else [])})
    roof = [min(ceilings.flops_per_second, x * ceilings.bytes_per_second) / 1e12 for x in bends]
    axes.plot(bends, roof, color="black", label="measured copy bandwidth and matrix product")
    for name in PROVIDERS:
        own = [point for provider, *point in points if provider == name]
        if own:
            axes.plot(*zip(*own, strict=True), "o", label=name, color=_COLORS[name], alpha=0.7, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte that must move")
    axes.set_ylabel("TFLOP/s of forward and backward")
    axes.set_title(where, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _against_m(timed: Sequence[Measurement], where: str) -> Any:
    """Forward time against M, a panel for each layer that was measured at three or more; NF4 dashed."""
    forward = [m for m in timed if m.part == "forward"]
    layers = [
        layer
        for layer in dict.fromkeys(_layer(m.case) for m in forward)
        if len({m.case.M for m in forward if _layer(m.case) == layer}) > 2
    ]
    if not layers:
        return None
    size = (5.5 * len(layers), 5)
    figure, panels = pyplot.subplots(1, len(layers), figsize=size, layout="constrained", squeeze=False)
    for axes, layer in zip(panels[0], layers, strict=True):
        own = [m for m in forward if _layer(m.case) == layer]
        for label, style, color, line in _lines(own):
            axes.plot(*zip(*sorted(line.items()), strict=True), style, color=color, label=label, markersize=3)
        for M in _crossovers(own):
            axes.axvline(M, color="grey", linestyle=":")
            place = (M, axes.get_ylim()[1])
            axes.annotate(f"bf16 wins from M = {M}", place, rotation=90, va="top", ha="right", fontsize=7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{layer[0]} -> {layer[1]}, rank {layer[2]}", fontsize=10)
        axes.set_xlabel("M (tokens)")
        axes.grid(alpha=0.3)
    figure.suptitle(where, fontsize=9)
    panels[0][0].set_ylabel("forward, microseconds")
    panels[0][0].legend(fontsize=7)
    return figure


def _layer(case: Case) -> tuple[int, str, int, float]:
    return case.K, case.outputs, case.rank, case.dropout


def _lines(measurements: Sequence[Measurement]) -> Iterator[tuple[str, str, str, dict[int, float]]]:
    floor = _floor(measurements)
    if floor:
        yield FLOOR, "o-", _COLORS[FLOOR], floor
    for name in _AGAINST_M:
        for nf4, style in ((False, "o-"), (True, "s--")):
            line = {
                m.case.M: m.times.median
                for m in measurements
                if m.times and m.provider == name and m.case.nf4 == nf4
            }
            if line:
                yield f"{name}{', NF4' if nf4 else ''}", style, _COLORS[name], line


def _floor(measurements: Sequence[Measurement]) -> dict[int, float]:
    """The frozen 16-bit layer at each M. It is an NF4 case's floor too, and the one that took turns with NF4 counts."""
    frozen = [m for m in measurements if m.provider == FLOOR and m.times]
    return {m.case.M: m.times.median for m in sorted(frozen, key=lambda m: m.case.nf4) if m.times}


def _crossovers(measurements: Sequence[Measurement]) -> list[int]:
    """The M from which our NF4 layer is slower than the frozen 16-bit one."""
    floor, best = _floor(measurements), dict[int, float]()
    for m in measurements:
        if m.times and m.case.nf4 and m.provider in ("triton", "cuda", "auto"):
            best[m.case.M] = min(best.get(m.case.M, m.times.median), m.times.median)
    return [M for M in sorted(best) if M in floor and best[M] > floor[M]][:1]


def _models(models: Sequence[ModelMeasurement], machine: str) -> Any:
    """Tokens per second and peak memory of each provider, a row of panels for each model and setting."""
    settings = list(dict.fromkeys(_setting(m) for m in models if m.times))
    figure, rows = pyplot.subplots(
        len(settings), 2, figsize=(11, 1 + 2.6 * len(settings)), layout="constrained", squeeze=False
    )
    for (speed, memory), setting in zip(rows, settings, strict=True):
        own = [m for m in models if _setting(m) == setting and m.times]
        names = [m.provider for m in own]
        bars = speed.barh(names, [m.tokens_per_second for m in own], color=[_COLORS.get(n, "grey") for n in names])
        speed.bar_label(bars, [f"{m.tokens_per_second:,.0f}" for m in own], fontsize=8)
        speed.set_title(f"{setting}, {machine}", fontsize=9, loc="left")
        speed.set_xlabel("tokens per second")
        bars = memory.barh(names, [(m.peak_bytes or 0) / 2**30 for m in own], color="grey")
        known = ["not measured" if m.peak_bytes is None else f"{m.peak_bytes / 2**30:.1f}" for m in own]
        memory.bar_label(bars, known, fontsize=8)
        memory.set_xlabel("peak memory (GiB)")
        for axes in (speed, memory):
            axes.invert_yaxis()
            axes.margins(x=0.15)
    return figure


def _losses(models: Sequence[ModelMeasurement], machine: str) -> Any:
    """The loss of each provider at each step, a panel for each model and setting; the floor trains nothing."""
    trained = [m for m in models if m.provider != FLOOR and len(m.losses) >= _LEAST_STEPS]
    settings = list(dict.fromkeys(map(_setting, trained)))
    if not settings:
        return None
    size = (7, 4 * len(settings))
    figure, panels = pyplot.subplots(len(settings), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, setting in zip(panels[:, 0], settings, strict=True):
        for m in trained:
            if _setting(m) == setting:
                # Lines that lie on each other are the point: they are thin enough to be seen through.
                axes.plot(m.losses, label=m.provider, color=_COLORS.get(m.provider, "grey"), linewidth=1, alpha=0.7)
        axes.set_title(f"{setting}, {machine}", fontsize=9, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _setting(m: ModelMeasurement) -> str:
    layers = "" if m.layers == m.all_layers else f" ({m.layers} of {m.all_layers} layers)"
    base = m.quantize or "bf16"
    if m.generate:
        return f"{m.model}{layers}, {m.generate} tokens behind {m.batch} x {m.seq}, {base}"
    checkpointing = "checkpointing" if m.checkpointing else "no checkpointing"
    dropout = f", dropout {m.dropout:g}" if m.dropout else ""
    return f"{m.model}{layers}, {m.batch} x {m.seq}, {base}{dropout}, {checkpointing}"
