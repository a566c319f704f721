"""Runs every backend once and says what is wrong with each: what `python -m lora_kernels doctor` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_kernels.dispatch import PREFERENCE, BackendName, BackendRefused
from lora_kernels.functional import explain, lora_linear
from lora_kernels.reference import lora_linear_reference


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend ran a small forward and backward and agreed with the reference, and if not, why.

    `automatic`: whether it is the one that this forward and backward would have got without a name.
    """

    name: str
    works: bool
    reason: str | None
    automatic: bool = False


def backend_report(device: torch.device | None = None) -> list[BackendStatus]:
    """Runs every backend on the best device there is, in the order of automatic preference."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (48, 64), "weight": (80, 64), "lora_A": (8, 64), "lora_B": (80, 8)}
    tensors = {key: torch.randn(shape, generator=generator).div(8).to(device, dtype) for key, shape in shapes.items()}
    try:
        automatic = explain(*tensors.values(), backend="auto").backend.name
    except failures():
        # The backend that is to blame gives its reason below.
        automatic = ""
    report = []
    for name in PREFERENCE:
        fault = _fault(name, tensors)
        report.append(BackendStatus(name, fault is None, fault, name == automatic))
    return report


def _fault(name: BackendName, tensors: dict[str, Tensor]) -> str | None:
    """What is wrong with a backend, from a forward and a backward of `tensors` in it; None if nothing is."""
    def run(call: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {key: t.to(dtype, copy=True).requires_grad_(key != "weight") for key, t in tensors.items()}
        y = call(**leaves, scaling=2.0)
        torch.autograd.backward(y.square().sum())
        return {"y": y.detach()} | {f"gradient of {key}": t.grad for key, t in leaves.items() if t.grad is not None}

    try:
        got = run(partial(lora_linear, backend=name), tensors["x"].dtype)
    except BackendRefused as refusal:
        return refusal.reason
    except failures() as error:
        return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
    for key, expected in run(lora_linear_reference, torch.float64).items():
        if key not in got:
            return f"there is no {key}"
        distance = float((got[key].double() - expected).norm() / expected.norm())
        if not distance < 0.02:
            return f"its {key} is off by {distance:.1e}"
    return None


def failures() -> tuple[type[Exception], ...]:
    """What a broken driver, a broken compiler or a version that does not fit may raise."""
    builtin = (
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return builtin
    return (*builtin, TritonError)
