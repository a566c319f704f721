"""A kernel's launches: the first of a kind through Triton, which compiles it, and the next straight through the driver."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends import tf32_allowed
from lora_kernels.backends.triton import ahead
from lora_kernels.backends.triton.direct import BoundLaunch, DirectKernel, direct_kernel

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Of a group, what its kernels have arguments for.
MOST_MEMBERS = 3
_MOST_PLANS = 4096
# Of the leading arguments of a kernel: None for one that is not there.
Blocks = tuple[tuple[int, int] | None, ...]
_notes = threading.local()
_direct_kernels: dict[tuple[object, ...], DirectKernel | None] = {}


class Foreign(NamedTuple):
    """A launch that another extension makes: the address of what does, and the memory that it works and counts in."""

    name: str
    address: int
    workspace_size: int
    counters: int


class Launch:
    """A launch without its tensors: everything that shapes, strides, dtypes and alignment decide."""

    def __init__(
        self,
        kernel: Any,
        kind: tuple[object, ...],
        grid: tuple[int, int, int],
        options: dict[str, Any],
        blocks: Blocks | None,
        workspace_size: int,
        counters: int,
        numbers: tuple[int, ...],
    ) -> None:
        self._kernel, self._kind, self._grid, self._options, self._blocks = kernel, kind, grid, options, blocks
        self.name = str(kind[0])
        self.workspace_size, self.counters = workspace_size, counters
        self._numbers = numbers
        # Known after the first launch; None also where Triton has to launch every time.
        self.bound: BoundLaunch | None = None

    @property
    def needs_views(self) -> bool:
        """Whether Triton will look at the tensors, and not only at where they lie."""
        return self.bound is None or _has_hooks()

    def __call__(self, device: torch.device, tensors: tuple[Any, ...]) -> None:
        """Launches with the arguments of the kernel up to its integers."""
        if ahead.rehearsing():
            if self.bound is None:
                self._launch(tensors)
            return
        note(lambda: self)
        if self.bound is not None and not _has_hooks():
            self.bound(_stream(device), tensors)
            return
        direct = self._launch(tensors)
        if direct is not None and self.bound is None:
            self.bound = BoundLaunch(direct, self._grid, (*tensors, *self._numbers))

    def _launch(self, tensors: tuple[Any, ...]) -> DirectKernel | None:
        arguments = (*tensors, *self._numbers)
        return launch_kernel(self._kernel, self._kind, self._grid, arguments, self._options, self._blocks)


def note(launch: Callable[[], Launch | Foreign]) -> None:
    """Notes a launch, which is asked for only if somebody wants to know."""
    noted = getattr(_notes, "launches", None)
    if noted is not None:
        noted.append(launch())


@contextmanager
def noting() -> Iterator[list[Launch | Foreign]]:
    """The launches that this thread makes inside the `with` block, in their order."""
    before = getattr(_notes, "launches", None)
    made: list[Launch | Foreign] = []
    _notes.launches = made
    try:
        yield made
    finally:
        _notes.launches = before


def launch_kernel(
    kernel: Any,
    kind: tuple[object, ...],
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    blocks: Blocks | None,
) -> DirectKernel | None:
    """Through the driver where a launch of this kind has gone through Triton before, which compiles it.

    In a rehearsal (ahead.py) nothing is launched, and what Triton would have to compile is compiled elsewhere.

    Args:
        kind: everything that Triton's specialization of the arguments depends on.
        blocks: the tiles of the leading arguments, which are to be TMA descriptors where they are not None.
    Returns:
        What launches the next of this kind; None where that is Triton.
    """
    kind = (*kind, options.get("PRECISION"))
    new = kind not in _direct_kernels
    if new:
        ahead.rehearse_what_follows(kernel)
    if ahead.rehearsing():
        if new:
            stand_ins = tuple(ahead.StandIn(a) if isinstance(a, Tensor) else a for a in arguments)
            device: Any = kind[1]
            ahead.prepare(kernel, kind, device, _described(stand_ins, blocks), options)
        return None
    direct = _direct_kernels.get(kind)
    if direct is not None and not _has_hooks():
        direct(grid, _stream(kind[1]), arguments)  # type: ignore[arg-type]
        return direct
    if new:
        ahead.wait_for(kind)
    compiled = kernel[grid](*_described(arguments, blocks), **options)
    if new:
        direct = direct_kernel(compiled)
        remember(_direct_kernels, kind, direct)
    return direct


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)  # type: ignore[attr-defined,no-any-return]


def _has_hooks() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    knobs = getattr(triton, "knobs", None)
    hook = None if knobs is None else knobs.runtime.launch_enter_hook
    # Newer releases keep a chain of hooks there, which is false while it is empty.
    return bool(getattr(hook, "calls", hook))


def remember(memory: dict[tuple[object, ...], Any], key: tuple[object, ...], value: Any) -> None:
    if len(memory) >= _MOST_PLANS:
        memory.clear()
    memory[key] = value


def alignment(*tensors: Tensor | None) -> int:
    """Which of the tensors do not start on 16 bytes, as bits: Triton compiles other loads for them."""
    bits = 0
    for t in tensors:
        bits = 2 * bits + (t is not None and t.data_ptr() % 16 != 0)
    return bits


def divisor(*numbers: int) -> int:
    """What divides all numbers, 8 at most: of 16-bit ones as many as one load takes. Triton itself asks only about 16."""
    return math.gcd(8, *numbers)


def filled(values: Sequence[Any], filler: Any = None, length: int = MOST_MEMBERS) -> tuple[Any, ...]:
    """As many as a kernel has arguments for."""
    return (*values, *[filler] * (length - len(values)))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products take the tensor cores' short mantissa only where the user allowed it to PyTorch as well."""
    if dtype == torch.float32 and not tf32_allowed():
        return "ieee"
    return "tf32"


def fits_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe a two-dimensional tensor: rows that start on 16 bytes."""
    stride = t.stride(0)
    return (
        t.dtype != torch.float32
        and t.data_ptr() % 16 == 0
        and stride * t.element_size() % 16 == 0
        and stride >= t.shape[1]
        and t.stride(1) == 1
    )


def _described(arguments: tuple[Any, ...], blocks: Blocks | None) -> tuple[Any, ...]:
    """The arguments, the leading ones as TMA descriptors of tiles, if any are given."""
    if blocks is None:
        return arguments
    from triton.tools.tensor_descriptor import TensorDescriptor

    pairs = zip(arguments, blocks, strict=False)
    maps = (block and TensorDescriptor(t, list(t.shape), list(t.stride()), list(block)) for t, block in pairs)
    return (*maps, *arguments[len(blocks) :])
