"""Problem -> backend, with the reason for each refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_kernels.backends import Backend, Problem, eager

BackendName = Literal["auto", "triton", "cuda", "eager"]
# The order in which the automatic choice asks.
PREFERENCE: tuple[BackendName, ...] = ("triton", "cuda", "eager")

_NAMES: tuple[BackendName, ...] = get_args(BackendName)
# Each thread has its own. Not a ContextVar, which torch.compile cannot read: this it reads, and compiles
# again when the name is another.
_requested = threading.local()


class BackendRefused(RuntimeError):
    """A backend that was named cannot run a call; `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"backend={self.name!r} cannot run this call: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The backend that a problem gets, and why every other one does not."""

    problem: Problem
    backend: Backend
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend.name}: {self.backend.describe(self.problem)}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Every call inside the `with` block takes this backend, unless its own `backend=` says otherwise.

    It holds for the thread that runs the block. The backward of a call takes the backend of its forward,
    wherever it runs; but what activation checkpointing computes again on a GPU, it computes on a thread of
    autograd's, which is in no block: there, name the backend by `backend=`.

    Args:
        name: "eager", "triton", "cuda" or "auto".
    Raises:
        ValueError: there is no backend of that name.
    """
    before = requested(None)
    _requested.name = _checked_name(name)
    try:
        yield
    finally:
        _requested.name = before


def _checked_name(name: str) -> BackendName:
    if name not in _NAMES:
        raise ValueError(f"backend was {name!r}, but must be one of {', '.join(_NAMES)}")
    return name  # type: ignore[return-value]


def requested(backend: str | None) -> BackendName:
    """The backend that a call asks for: its own argument, else the enclosing use_backend."""
    return getattr(_requested, "name", "auto") if backend is None else _checked_name(backend)


@cache
def choose(problem: Problem, name: BackendName) -> Choice:
    """The backend for a problem.

    Raises:
        BackendRefused: a backend was named and refuses; automatic choice alone falls back.
    """
    refusals: dict[str, str] = {}
    if name != "auto":
        backend, reason = _load(name)
        reason = reason or (backend.refuses(problem) if backend else None)
        if reason or backend is None:
            raise BackendRefused(name, str(reason))
        return Choice(problem, backend, {other: f"{name} was asked for" for other in PREFERENCE if other != name})
    chosen: Backend | None = None
    for candidate in PREFERENCE:
        backend, reason = _load(candidate)
        if backend is not None:
            reason = backend.refuses(problem) or backend.declines(problem)
        if backend is not None and reason is None and chosen is None:
            chosen = backend
        elif chosen is not None:
            refusals[candidate] = reason or f"{chosen.name} is preferred"
        else:
            refusals[candidate] = str(reason)
    assert chosen is not None, "the eager backend takes everything"
    return Choice(problem, chosen, refusals)


@cache
def _load(name: BackendName) -> tuple[Backend | None, str | None]:
    """The backend's record, imported on first use, or the reason why it cannot be had."""
    if name == "eager":
        return eager.BACKEND, None
    if name == "triton":
        try:
            from lora_kernels.backends.triton import BACKEND
        except ImportError as error:
            return (
                None,
                f"Triton cannot be imported: {error} (PyTorch's CUDA builds for Linux bring one that fits)",
            )
        return BACKEND, None
    return None, "this version of lora_kernels has no CUDA C++ backend"


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
    from lora_kernels.functional import explain

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (48, 64), "weight": (80, 64), "lora_A": (8, 64), "lora_B": (80, 8)}
    tensors = {key: torch.randn(shape, generator=generator).div(8).to(device, dtype) for key, shape in shapes.items()}
    try:
        automatic = explain(*tensors.values(), backend="auto").backend.name
    except _failures():
        # The backend that is to blame gives its reason below.
        automatic = ""
    report = []
    for name in PREFERENCE:
        fault = _fault(name, tensors)
        report.append(BackendStatus(name, fault is None, fault, name == automatic))
    return report


def _fault(name: BackendName, tensors: dict[str, Tensor]) -> str | None:
    """What is wrong with a backend, from a forward and a backward of `tensors` in it; None if nothing is."""
    from lora_kernels.functional import lora_linear
    from lora_kernels.reference import lora_linear_reference

    def run(call: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {key: t.to(dtype, copy=True).requires_grad_(key != "weight") for key, t in tensors.items()}
        y = call(**leaves, scaling=2.0)
        torch.autograd.backward(y.square().sum())
        return {"y": y.detach()} | {f"gradient of {key}": t.grad for key, t in leaves.items() if t.grad is not None}

    try:
        got = run(partial(lora_linear, backend=name), tensors["x"].dtype)
    except BackendRefused as refusal:
        return refusal.reason
    except _failures() as error:
        return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
    for key, expected in run(lora_linear_reference, torch.float64).items():
        if key not in got:
            return f"there is no {key}"
        distance = float((got[key].double() - expected).norm() / expected.norm())
        if not distance < 0.02:
            return f"its {key} is off by {distance:.1e}"
    return None


def _failures() -> tuple[type[Exception], ...]:
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
