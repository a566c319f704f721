"""Launches of compiled kernels straight through the CUDA driver.

Triton's launcher looks at each argument anew at every call and encodes every TMA descriptor: several hundred
microseconds for a kernel with this many arguments. Here a kernel is compiled by an ordinary Triton call, and its
later launches with arguments of the same kind fill a prepared parameter buffer. The layout of that buffer is checked
against what the driver says of the kernel; where it cannot be checked, launches go on through Triton.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SCALARS = {"i32": ("i", 4), "i64": ("q", 8), "fp32": ("f", 4)}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
# CUtensorMapDataType, CUtensorMapL2promotion_enum of cuda.h.
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_L2_PROMOTION_128B = 2
_MOST_MAPS = 4096
# CUDA_ERROR_INVALID_CONTEXT: what a thread is told that has not called CUDA yet, as autograd's may not have.
_NO_CONTEXT = 201


class Parameter(NamedTuple):
    """A parameter of a kernel: a pointer "Q", a number "q", "i" or "f", a tensor map "map", or "zero"."""

    kind: str
    argument: int


class MapShape(NamedTuple):
    """All of a tensor map but the address."""

    argument: int
    type: int
    rows: int
    columns: int
    row_bytes: int
    box_rows: int
    box_columns: int
    swizzle: int


class DirectKernel:
    """A compiled kernel and the buffer that its parameters are written to."""

    def __init__(self, compiled: Any, driver: Any) -> None:
        # The function lives as long as its module, which Triton unloads with this object.
        self._compiled, self._driver = compiled, driver
        self.function: int = compiled.function
        # Triton has just launched it, so the current context is the one that it was loaded into.
        context = ctypes.c_void_p()
        driver.cuCtxGetCurrent(ctypes.byref(context))
        self.context: int = context.value or 0
        self.threads: int = 32 * compiled.metadata.num_warps
        self.shared: int = compiled.metadata.shared
        self._boxes: list[Any] = list(compiled.metadata.tensordesc_meta or ())
        self.parameters: list[Parameter] = []
        self.parameter_sizes: list[int] = []
        self._read(list(compiled.src.signature.values()))
        self._described = [p.argument for p in self.parameters if p.kind == "map"]
        self._buffer = _Buffer(self.parameters)
        self._numbers = self._buffer.fixed + self._buffer.floats
        self._lock = threading.Lock()
        self._maps: dict[tuple[int, ...], tuple[int, Any]] = {}

    def _read(self, signature: list[str]) -> None:
        for index, kind in enumerate(signature):
            if kind.startswith("*"):
                self.parameters.append(Parameter("Q", index))
                self.parameter_sizes.append(8)
            elif kind.startswith("tensordesc"):
                # The map, the two sizes and the two strides, which the kernels do not read.
                self.parameters += [Parameter("map", index), *[Parameter("zero", index)] * 4]
                self.parameter_sizes += [_MAP_BYTES, 4, 4, 8, 8]
            elif kind != "constexpr":
                letter, size = _SCALARS[kind]
                self.parameters.append(Parameter(letter, index))
                self.parameter_sizes.append(size)

    def __call__(self, grid: tuple[int, int, int], stream: int, args: tuple[Any, ...]) -> None:
        """Launches with the arguments of the Triton kernel in order, constexprs left out."""
        buffer = self._buffer
        with self._lock:
            buffer.set_fixed([args[i] for i in buffer.fixed])
            buffer.set_changing([args[i].data_ptr() for i in buffer.pointers], [args[i] for i in buffer.floats])
            for rank, argument in enumerate(self._described):
                tensor = args[argument]
                key = (rank, tensor.data_ptr(), *tensor.shape, tensor.stride(0))
                found = self._maps.get(key)
                if found is None:
                    found = _kept(self._maps, key, self.encode(self.map_shape(rank, tensor), tensor.data_ptr()))
                buffer.set_map(rank, found[0])
            self.launch(grid, stream, buffer)

    def launch(self, grid: tuple[int, int, int], stream: int, buffer: _Buffer) -> None:
        """Launches with the parameters of a buffer."""
        arguments = (
            ctypes.c_void_p(self.function), *grid, self.threads, 1, 1, self.shared, ctypes.c_void_p(stream),
            buffer.parameters, None,
        )  # fmt: skip
        error = self._in_context(self._driver.cuLaunchKernel, *arguments)
        if error:
            raise RuntimeError(f"the CUDA driver refused a kernel launch with error {error}")

    def _in_context(self, function: Any, *arguments: Any) -> int:
        """What a function of the driver returns in a thread that has a context by then."""
        error: int = function(*arguments)
        if error == _NO_CONTEXT:
            self._driver.cuCtxSetCurrent(ctypes.c_void_p(self.context))
            error = function(*arguments)
        return error

    def map_shape(self, rank: int, tensor: Tensor) -> MapShape:
        """The map of a two-dimensional tensor as the kernel's rank-th one."""
        (rows, columns), box = tensor.shape, self._boxes[rank]
        box_rows, box_columns = box["block_size"]
        row_bytes, kind = tensor.stride(0) * tensor.element_size(), _MAP_TYPES[tensor.dtype]
        argument = self._described[rank]
        return MapShape(argument, kind, rows, columns, row_bytes, box_rows, box_columns, box["swizzle"])

    def encode(self, shape: MapShape, data: int) -> tuple[int, Any]:
        """The address of a tensor map, and what keeps it."""
        storage = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        address = -(-ctypes.addressof(storage) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        error = self._in_context(
            self._driver.cuTensorMapEncodeTiled,
            ctypes.c_void_p(address),
            shape.type,
            2,
            ctypes.c_void_p(data),
            (ctypes.c_uint64 * 2)(shape.columns, shape.rows),
            (ctypes.c_uint64 * 1)(shape.row_bytes),
            (ctypes.c_uint32 * 2)(shape.box_columns, shape.box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            shape.swizzle,
            _L2_PROMOTION_128B,
            0,
        )
        if error:
            raise RuntimeError(f"the CUDA driver refused a tensor map for {shape} with error {error}")
        return address, storage


class BoundLaunch:
    """A launch whose grid, numbers and shapes are settled: what changes is where the tensors lie, and a float."""

    def __init__(self, kernel: DirectKernel, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        self.kernel, self.grid = kernel, grid
        self._buffer = _Buffer(kernel.parameters)
        self.numbers: dict[int, int] = {i: args[i] for i in self._buffer.fixed}
        self._buffer.set_fixed(list(self.numbers.values()))
        described = [p.argument for p in kernel.parameters if p.kind == "map"]
        self.maps = [kernel.map_shape(rank, args[argument]) for rank, argument in enumerate(described)]
        self._encoded: list[dict[int, tuple[int, Any]]] = [{} for _ in self.maps]
        self._lock = threading.Lock()

    def __call__(self, stream: int, args: tuple[Any, ...]) -> None:
        """Launches. Of `args`, those are read that are tensors or a float where `bound` had such."""
        buffer, kernel = self._buffer, self.kernel
        addresses = [args[i].data_ptr() for i in buffer.pointers]
        with self._lock:
            buffer.set_changing(addresses, [args[i] for i in buffer.floats])
            for rank, shape in enumerate(self.maps):
                encoded, data = self._encoded[rank], args[shape.argument].data_ptr()
                found = encoded.get(data)
                if found is None:
                    found = _kept(encoded, data, kernel.encode(shape, data))
                buffer.set_map(rank, found[0])
            kernel.launch(self.grid, stream, buffer)


class _Buffer:
    """Memory for the parameters of a kernel, and the array of their addresses that the driver takes."""

    def __init__(self, layout: list[Parameter]) -> None:
        by_kind: dict[str, list[int]] = {
            kind: [p.argument for p in layout if p.kind == kind] for kind in ("Q", "f", "q", "i")
        }
        self.pointers, self.floats = by_kind["Q"], by_kind["f"]
        self.fixed = by_kind["q"] + by_kind["i"]
        self._changing = struct.Struct(f"={len(self.pointers)}Q{len(self.floats)}f")
        # Numbers of 8 bytes come first in the rest, so that each lies on a multiple of its size.
        self._fixed = struct.Struct(f"={len(by_kind['q'])}q{len(by_kind['i'])}i")
        self._fixed_at = -(-self._changing.size // 8) * 8
        zeros_at = self._fixed_at + self._fixed.size
        self._memory = ctypes.create_string_buffer(zeros_at + 16)
        base = ctypes.addressof(self._memory)
        places = {"Q": (base, 8), "f": (base + 8 * len(self.pointers), 4)}
        places["q"] = (base + self._fixed_at, 8)
        places["i"] = (places["q"][0] + 8 * len(by_kind["q"]), 4)
        # Two more for the scratch pointers that Triton appends, both null.
        self.parameters = (ctypes.c_void_p * (len(layout) + 2))(*[base + zeros_at] * (len(layout) + 2))
        self._maps_at: list[int] = []
        for position, (kind, argument) in enumerate(layout):
            if kind == "map":
                self._maps_at.append(position)
            elif kind != "zero":
                start, width = places[kind]
                self.parameters[position] = start + width * by_kind[kind].index(argument)

    def set_changing(self, addresses: list[int], floats: list[float]) -> None:
        self._changing.pack_into(self._memory, 0, *addresses, *floats)

    def set_fixed(self, numbers: list[int]) -> None:
        self._fixed.pack_into(self._memory, self._fixed_at, *numbers)

    def set_map(self, rank: int, address: int) -> None:
        self.parameters[self._maps_at[rank]] = address


def _kept(maps: dict[Any, tuple[int, Any]], key: Any, value: tuple[int, Any]) -> tuple[int, Any]:
    """Remembers a map. Allocators hand out the same places again."""
    if len(maps) >= _MOST_MAPS:
        maps.clear()
    maps[key] = value
    return value


def direct_kernel(compiled: Any) -> DirectKernel | None:
    """The kernel for direct launches; None where its layout cannot be checked and Triton has to launch it."""
    driver = _driver()
    metadata, signature = getattr(compiled, "metadata", None), getattr(getattr(compiled, "src", None), "signature", None)
    if driver is None or metadata is None or not isinstance(signature, dict) or getattr(metadata, "num_ctas", 1) != 1:
        return None
    if metadata.global_scratch_size or getattr(metadata, "profile_scratch_size", 0):
        return None
    described = sum(kind.startswith("tensordesc") for kind in signature.values())
    if described != len(getattr(metadata, "tensordesc_meta", None) or ()):
        return None
    kernel = DirectKernel(compiled, driver)
    sizes = _parameter_sizes(driver, compiled.function)
    # What follows the arguments must be the scratch pointers.
    known = len(kernel.parameter_sizes)
    if sizes[:known] != kernel.parameter_sizes or sizes[known:] not in ([], [8], [8, 8]):
        return None
    return kernel


def _parameter_sizes(driver: Any, function: int) -> list[int]:
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while True:
        error = driver.cuFuncGetParamInfo(
            ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)
        )
        if error:
            return sizes
        sizes.append(size.value)


@cache
def _driver() -> Any:
    """The CUDA driver, if it is one that can be asked for a kernel's parameters (12.4 and later)."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    driver = ctypes.CDLL("libcuda.so.1")
    return driver if hasattr(driver, "cuFuncGetParamInfo") else None
