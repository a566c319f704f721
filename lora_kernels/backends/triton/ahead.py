"""Compiles the kernels of a backward while those of its forward are being compiled.

Triton takes seconds for a kernel, nearly all of them outside of Python's lock, and a first training step meets one
kernel after the other. So whoever launches a forward says what its backward will be (`followed_by`), and where a kernel
of the forward has to be compiled, the backward is rehearsed before that: it runs on memory that nobody has filled, and
its launches are not made, but their kernels compiled on other threads.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

_MOST_THREADS = 8

_local = threading.local()
_compiling: dict[tuple[object, ...], Future[None]] = {}


class StandIn:
    """What Triton asks of a tensor when it compiles a kernel for it, without its memory."""

    def __init__(self, t: Tensor) -> None:
        self.dtype, self.shape = t.dtype, t.shape
        self._stride, self._address = t.stride(), t.data_ptr()

    def stride(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self._stride

    def data_ptr(self) -> int:
        """Where the tensor lay: whether on 16 bytes is what counts."""
        return self._address


@contextmanager
def followed_by(backward: Callable[[], object] | None) -> Iterator[None]:
    """What this thread compiles inside of the `with` block will be followed by `backward`, if by anything."""
    before = getattr(_local, "backward", None)
    _local.backward = backward
    try:
        yield
    finally:
        _local.backward = before


@contextmanager
def rehearsal() -> Iterator[None]:
    """This thread's launches inside of the `with` block are not made, but prepared, and with them what follows."""
    before = rehearsing()
    _local.rehearsing = True
    try:
        yield
    finally:
        _local.rehearsing = before


def rehearsing() -> bool:
    """Whether this thread's launches are not to be made, but to be prepared."""
    return getattr(_local, "rehearsing", False)


def prepare(
    kernel: Any, kind: tuple[object, ...], device: torch.device, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Has a kernel compiled on another thread, for arguments whose tensors are StandIns."""
    if kind not in _compiling:
        _compiling[kind] = _threads().submit(_compile, kernel, device, arguments, options)


def rehearse_what_follows(kernel: Any) -> None:
    """The rehearsal of what follows a kernel that is new."""
    backward, _local.backward = getattr(_local, "backward", None), None
    if backward is None or not isinstance(kernel, triton.JITFunction) or not compiles_in_threads():
        return
    # Without room for it, its kernels will be compiled where they are launched, if it comes to that.
    with rehearsal(), suppress(torch.OutOfMemoryError):
        backward()


def wait_for(kind: tuple[object, ...]) -> None:
    """Waits if another thread is compiling a kernel."""
    future = _compiling.pop(kind, None)
    if future is not None:
        # If it failed, so will this thread, and say why.
        wait([future])


def forget() -> None:
    """Gives up what no thread has begun to compile: the interpreter would wait for all of it before it ends."""
    for kind, future in list(_compiling.items()):
        if future.cancel():
            _compiling.pop(kind, None)


def _compile(kernel: Any, device: torch.device, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with torch.cuda.device(device):
        kernel.warmup(*arguments, grid=(1,), **options)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="lora_kernels compiles")


@cache
def compiles_in_threads() -> bool:
    """Whether this Triton is meant to: older releases have nothing that does."""
    return importlib.util.find_spec("triton.runtime._async_compile") is not None
