"""Problem -> backend, with the reason for each refusal."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from lora_kernels.backends import Backend, NF4Path, Problem, eager

BackendName = Literal["auto", "triton", "cuda", "eager"]
# The order in which the automatic choice asks.
PREFERENCE: tuple[BackendName, ...] = ("triton", "cuda", "eager")

_NAMES: tuple[BackendName, ...] = get_args(BackendName)


class _Requested(threading.local):
    """The name that the enclosing use_backend gave, of each thread.

    Not a ContextVar, which torch.compile cannot read: this it reads, and compiles again when the name is another.
    """

    def __init__(self) -> None:
        # From the first look on: that it is there at all would be a change, too.
        self.name: BackendName = "auto"


_requested = _Requested()


class BackendRefused(RuntimeError):
    """A backend that was named cannot run a call; `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"backend={self.name!r} cannot run this call: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The backend that a problem gets, and why every other one does not.

    `nf4_paths`, of the forward and of the backward, are those of a single call: explain() alone knows them.
    """

    problem: Problem
    backend: Backend
    refusals: dict[str, str]
    nf4_paths: tuple[NF4Path, NF4Path] | None = None

    def __str__(self) -> str:
        lines = [f"{self.backend.name}: {self.backend.describe(self.problem)}"]
        for product, path in zip(("forward", "backward"), self.nf4_paths or (), strict=False):
            lines.append(f"{product} of this call: the NF4 weight is decoded {path.where}, because {path.why}")
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
    return _requested.name if backend is None else _checked_name(backend)


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
    if chosen.name == "triton" and problem.nf4:
        from lora_kernels.backends import few_tokens

        chosen, refusals["cuda"] = few_tokens.beside(chosen, problem, refusals["cuda"])
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
    from lora_kernels.backends import cuda

    return cuda.BACKEND, None
