"""What a run ends with: the summary, the comparison, and both as JSON."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_kernels import native
from lora_kernels.cli.environment import gpu_names, versions
from lora_kernels.cli.finetune.options import Options
from lora_kernels.cli.finetune.training import Run

UNKNOWN = "not measured"


def summary(run: Run) -> str:
    """One run in words: loss, speed, memory, and the same prompt continued before and after."""
    steps = f"{len(run.steps)} of {run.planned_steps}" if run.planned_steps is not None else "none"
    lines = [
        f"{run.name}{', interrupted' if run.interrupted else ''}",
        *_fused_layers(run),
        f"  steps                {steps}",
        *(f"  {label:<21}{_text(value, spec)}" for label, value, spec in _measurements(run)),
    ]
    if run.prompt is not None:
        lines += [
            f"  prompt               {run.prompt!r}",
            f"    before             {_quoted(run.text_before)}",
            f"    after              {_quoted(run.text_after)}",
        ]
    return "\n".join(lines)


def comparison(ours: Run, stock: Run) -> str:
    """Two runs side by side, with the ratio of what they took."""
    lines = [f"{'':<24}{ours.name:>16}{stock.name:>16}{'ratio':>10}"]
    for (label, value, spec), (_, other, _) in zip(_measurements(ours), _measurements(stock), strict=True):
        ratio = f"{value / other:.3f}" if value is not None and other else "-"
        lines.append(f"{label:<24}{_text(value, spec):>16}{_text(other, spec):>16}{ratio:>10}")
    return "\n".join(lines)


def write_results(options: Options, runs: Sequence[Run], path: Path) -> None:
    """Everything that was measured, with what it was measured on, as JSON."""
    results = {
        "options": dataclasses.asdict(options),
        "versions": versions(),
        "gpus": gpu_names(),
        "runs": [dataclasses.asdict(run) | {"tokens_per_second": run.tokens_per_second} for run in runs],
    }
    path.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def _fused_layers(run: Run) -> list[str]:
    if not run.layers:
        return []
    reasons = Counter(run.layers.values())
    fused = reasons.pop(None, 0)
    lines = [f"  fused LoRA layers    {fused} of {len(run.layers)}"]
    lines += [f"    {count} not fused: {reason}" for reason, count in reasons.items()]
    if fused:
        lines.append(f"  backend              {run.backend}")
        if (advice := native.advice()) is not None:
            lines.append(f"  advice               {advice}")
    return lines


def _measurements(run: Run) -> list[tuple[str, float | None, str]]:
    memory = None if run.peak_memory_bytes is None else run.peak_memory_bytes / 2**30
    return [
        ("held-out loss before", run.loss_before, ".4f"),
        ("held-out loss after", run.loss_after, ".4f"),
        ("last training loss", run.steps[-1].loss if run.steps else None, ".4f"),
        ("tokens per second", run.tokens_per_second, ",.0f"),
        ("peak memory (GiB)", memory, ".2f"),
        ("seconds of training", run.train_seconds, ".1f"),
    ]


def _text(value: float | None, spec: str) -> str:
    return UNKNOWN if value is None else format(value, spec)


def _quoted(text: str | None) -> str:
    return UNKNOWN if text is None else repr(text)
