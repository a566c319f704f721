"""The picture of a run, or of two side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from lora_kernels.cli.finetune.training import Run

matplotlib.use("Agg")  # Before pyplot is imported: this one needs no display.
from matplotlib import pyplot

WINDOW = 10


def write_plot(runs: Sequence[Run], path: Path) -> None:
    """Draws the loss curves and, for more than one run, bars of speed and memory beside them."""
    if len(runs) == 1:
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        _draw_losses(axes, runs)
    else:
        figure, (losses, speed, memory) = pyplot.subplots(
            1, 3, figsize=(12, 4.5), layout="constrained", width_ratios=(3, 1, 1)
        )
        _draw_losses(losses, runs)
        _draw_bars(speed, runs, "tokens per second", [run.tokens_per_second for run in runs], ",.0f")
        gib = [None if run.peak_memory_bytes is None else run.peak_memory_bytes / 2**30 for run in runs]
        _draw_bars(memory, runs, "peak memory (GiB)", gib, ".2f")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        color = f"C{index}"
        style = "-" if index == 0 else "--"
        losses = [step.loss for step in run.steps]
        numbers = range(1, len(losses) + 1)
        axes.plot(numbers, losses, color=color, alpha=0.25, linewidth=1)
        axes.plot(
            numbers, _running_mean(losses), style, color=color, label=f"{run.name}, mean of {WINDOW} steps"
        )
        held_out = [(0, run.loss_before), (len(run.steps), run.loss_after)]
        measured = [(step, loss) for step, loss in held_out if loss is not None]
        axes.plot(*zip(*measured, strict=True), "o:", color=color, alpha=0.6, label=f"{run.name}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the last WINDOW values: steps of a few sequences differ more than training changes them."""
    windows = (values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _draw_bars(axes: Any, runs: Sequence[Run], title: str, values: list[float | None], spec: str) -> None:
    bars = axes.bar(
        [run.name for run in runs],
        [value or 0 for value in values],
        color=[f"C{index}" for index in range(len(runs))],
    )
    axes.bar_label(bars, ["not measured" if value is None else format(value, spec) for value in values])
    axes.set_title(title)
