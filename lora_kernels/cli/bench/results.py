"""What a run leaves behind: every figure, with the machine and the versions it was measured on, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lora_kernels
from lora_kernels.cli.bench.cases import Case
from lora_kernels.cli.bench.clock import CPU, Times
from lora_kernels.cli.bench.roofline import Ceilings
from lora_kernels.cli.environment import gpu_names, versions
from lora_kernels.cli.errors import UserError
from lora_kernels.cli.files import writing

FORMAT = 1
RESULTS_FILE = "results.json"
_GPU_STATE = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Measurement:
    """One figure: a provider's part ("forward" or "step") of a case, or the reason why it has none.

    `peak_bytes` is the memory that the part takes beyond what was there before it; `bytes` and `flops` are what
    it must move and compute, `roofline_us` what that takes at the ceilings of the run. None: not measured.
    """

    case: Case
    provider: str
    part: str
    regime: str
    launches: str
    times: Times | None = None
    reason: str | None = None
    peak_bytes: int | None = None
    bytes: float | None = None
    flops: float | None = None
    roofline_us: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What it is a figure of."""
        return self.case, self.provider, self.part, self.regime, self.launches


@dataclass(frozen=True)
class Setting:
    """A training step of a whole model, by whichever provider; or with `generate` that many tokens behind a prompt."""

    model: str
    layers: int
    all_layers: int
    batch: int
    seq: int
    rank: int
    quantize: str | None
    checkpointing: bool
    dropout: float = field(default=0.0, kw_only=True)
    generate: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class ModelMeasurement(Setting):
    """A provider's training step, or token of each sequence, or the reason why it has no figure."""

    provider: str
    times: Times | None = None
    peak_bytes: int | None = None
    reason: str | None = None
    losses: tuple[float, ...] = ()
    gradient_error: float | None = None
    logits_error: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the model that was measured, with as many layers as it had."""
        if self.times is None:
            return None
        return 1e6 * self.batch * (1 if self.generate else self.seq) / self.times.median

    @property
    def key(self) -> tuple[object, ...]:
        """What it is a figure of."""
        how = self.batch, self.seq, self.rank, self.quantize, self.checkpointing, self.dropout, self.generate
        return self.model, self.layers, *how, self.provider


@dataclass
class Results:
    """One run. `ceilings` has those of each "regime, launches"; `gpu_states` what nvidia-smi said, and when: while
    the GPU was at work in the warm regime, and idle otherwise. `left_out` says why a provider was not even tried.
    """

    environment: dict[str, Any]
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    models: list[ModelMeasurement] = field(default_factory=list)
    gpu_states: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def has_figures(self) -> bool:
        """Whether anything was measured: a model that was interrupted before its first step has neither."""
        figures: list[Measurement | ModelMeasurement] = [*self.measurements, *self.models]
        return any(figure.times is not None or figure.peak_bytes is not None for figure in figures)

    def note_gpu(self, when: str) -> None:
        """Remembers clocks, power and temperature of this moment."""
        self.gpu_states.append({"when": when} | gpu_state())

    def write(self, folder: Path) -> None:
        """All at once, so that a run that is killed, or meets a full disk, leaves what it had written before.

        Raises:
            UserError: the file cannot be written.
        """
        data = dataclasses.asdict(self) | {"format": FORMAT}
        path = folder / RESULTS_FILE
        with writing(path), _unfinished(folder) as unfinished:
            with unfinished.open("w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
                file.write("\n")
            unfinished.chmod(0o644)
            unfinished.replace(path)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A new file, which is gone afterwards unless it was given a name."""
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def read_results(path: Path) -> Results:
    """What an earlier run wrote.

    Raises:
        UserError: the file cannot be read, or is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: not a file of results, its JSON is damaged") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a file of results of format {FORMAT}")
    try:
        return Results(
            environment=data["environment"],
            ceilings={name: Ceilings(**values) for name, values in data["ceilings"].items()},
            measurements=[_measurement(values) for values in data["measurements"]],
            models=[_model(values) for values in data["models"]],
            gpu_states=data["gpu_states"],
            interrupted=data["interrupted"],
            # Runs from before a provider could be left out say nothing of it.
            left_out=data.get("left_out", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a file of results of format {FORMAT} ({error})") from None


def _measurement(values: dict[str, Any]) -> Measurement:
    return Measurement(**values | {"case": _case(values["case"]), "times": _times(values["times"])})


def _case(values: dict[str, Any]) -> Case:
    # Runs from before there were groups say nothing of others.
    return Case(**values | {"others": tuple(values.get("others", ()))})


def _model(values: dict[str, Any]) -> ModelMeasurement:
    return ModelMeasurement(**values | {"times": _times(values["times"]), "losses": tuple(values["losses"])})


def _times(values: dict[str, Any] | None) -> Times | None:
    return None if values is None else Times(**values)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code: the device, versions, commit, command line."""
    return {
        "command": shlex.join(["python", "-m", "lora_kernels", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions(),
        "device": CPU if device.type == "cpu" else gpu_names()[device.index or 0],
        "gpu_state": gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU, or why they are not known."""
    if not torch.cuda.is_available():
        return {"unknown": "there is no GPU"}
    # Not by number: the machine's is not torch's where CUDA_VISIBLE_DEVICES says otherwise.
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--query-gpu={_GPU_STATE}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": f"nvidia-smi: {error}"}
    return dict(zip(_GPU_STATE.split(","), done.stdout.strip().split(", "), strict=False))


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, and whether it was changed; None where it is none."""
    try:
        # An installed copy may lie inside of somebody else's checkout, which does not track it.
        _git("ls-files", "--error-unmatch", "__init__.py")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")
        return _git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    folder = Path(lora_kernels.__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
