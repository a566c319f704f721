"""Problem -> backend, with the reason for each refusal."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

from lora_kernels.backends import Backend, Problem, eager

BackendName = Literal["auto", "triton", "cuda", "eager"]
# The order in which the automatic choice asks.
PREFERENCE: tuple[BackendName, ...] = ("triton", "cuda", "eager")

_requested: ContextVar[BackendName] = ContextVar("lora_kernels_backend", default="auto")


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

    Args:
        name: "eager", "triton", "cuda" or "auto".
    Raises:
        ValueError: there is no backend of that name.
    """
    token = _requested.set(checked_name(name))
    try:
        yield
    finally:
        _requested.reset(token)


def checked_name(name: str) -> BackendName:
    if name not in get_args(BackendName):
        raise ValueError(f"backend was {name!r}, but must be one of {', '.join(get_args(BackendName))}")
    return name  # type: ignore[return-value]


def requested(backend: str | None) -> BackendName:
    """The backend that a call asks for: its own argument, else the enclosing use_backend."""
    return _requested.get() if backend is None else checked_name(backend)


@cache
def choose(problem: Problem, name: BackendName) -> Choice:
    """The backend for a problem.

    Raises:
        RuntimeError: a backend was named and refuses; automatic choice alone falls back.
    """
    refusals: dict[str, str] = {}
    if name != "auto":
        backend, reason = _load(name)
        reason = reason or (backend.refuses(problem) if backend else None)
        if reason or backend is None:
            raise RuntimeError(f"backend={name!r} cannot run this call: {reason}")
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
        if importlib.util.find_spec("triton") is None:
            return None, "Triton is not installed (PyTorch's CUDA builds for Linux bring it; or: pip install triton)"
        from lora_kernels.backends.triton import BACKEND

        return BACKEND, None
    return None, "this version of lora_kernels has no CUDA C++ backend"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend ran a small forward and backward and agreed with the reference, and if not, why."""

    name: str
    works: bool
    reason: str | None


def backend_report(device: torch.device | None = None) -> list[BackendStatus]:
    """Runs every backend on the best device there is, in the order of automatic preference."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_try(name, device) for name in PREFERENCE]


def _try(name: BackendName, device: torch.device) -> BackendStatus:
    from lora_kernels.functional import lora_linear
    from lora_kernels.reference import lora_linear_reference

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (48, 64), "weight": (80, 64), "lora_A": (8, 64), "lora_B": (80, 8)}
    tensors = {
        key: torch.randn(shape, generator=generator).div(8).to(device, dtype).requires_grad_(key != "weight")
        for key, shape in shapes.items()
    }
    exact = {key: t.detach().double().requires_grad_(t.requires_grad) for key, t in tensors.items()}
    try:
        y = lora_linear(**tensors, scaling=2.0, backend=name)
        y.square().sum().backward()
    # What a broken Triton, compiler or driver raises is not ours to enumerate, and this is the report of it.
    except (RuntimeError, ValueError, TypeError, OSError, ImportError) as error:
        return BackendStatus(name, False, str(error).strip().splitlines()[0])
    expected = lora_linear_reference(**exact, scaling=2.0)
    expected.square().sum().backward()
    for key, got, want in [("y", y, expected)] + [
        (f"gradient of {key}", tensors[key].grad, exact[key].grad) for key in ("x", "lora_A", "lora_B")
    ]:
        if got is None or want is None:
            return BackendStatus(name, False, f"there is no {key}")
        error = float((got.double() - want).norm() / want.norm())
        if not error < 0.02:
            return BackendStatus(name, False, f"its {key} is off by {error:.1e}")
    return BackendStatus(name, True, None)
