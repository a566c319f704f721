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
from typing import Any

import torch
from torch import Tensor

_SCALARS = {"i32": ("i", 4), "i64": ("q", 8), "fp32": ("f", 4)}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
# CUtensorMapDataType, CUtensorMapL2promotion_enum of cuda.h.
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_L2_PROMOTION_128B = 2
_MOST_MAPS = 4096


class DirectKernel:
    """A compiled kernel and the buffer that its parameters are written to."""

    def __init__(self, compiled: Any, driver: ctypes.CDLL) -> None:
        self._driver = driver
        self._function = ctypes.c_void_p(compiled.function)
        self._threads = 32 * compiled.metadata.num_warps
        self._shared = compiled.metadata.shared
        self._boxes: list[Any] = list(compiled.metadata.tensordesc_meta or ())
        self._maps: dict[tuple[int, ...], tuple[int, Any]] = {}
        self._lock = threading.Lock()
        self._lay_out(list(compiled.src.signature.values()))

    def _lay_out(self, signature: list[str]) -> None:
        """Decides where each parameter lives: pointers, 8-byte and then 4-byte numbers, and maps by address."""
        by_kind: dict[str, list[int]] = {"Q": [], "q": [], "i": [], "f": []}
        sizes: list[int] = []
        order: list[tuple[str, int]] = []
        self._described: list[int] = []
        for index, kind in enumerate(signature):
            if kind.startswith("*"):
                order.append(("Q", len(by_kind["Q"])))
                by_kind["Q"].append(index)
                sizes.append(8)
            elif kind.startswith("tensordesc"):
                order.append(("map", len(self._described)))
                self._described.append(index)
                # The map, the two sizes and the two strides, which the kernels do not read.
                sizes += [_MAP_BYTES, 4, 4, 8, 8]
                order += [("zero", 0)] * 4
            elif kind != "constexpr":
                letter, size = _SCALARS[kind]
                order.append((letter, len(by_kind[letter])))
                by_kind[letter].append(index)
                sizes.append(size)
        self.parameter_sizes = sizes
        self._pointers, self._numbers = by_kind["Q"], by_kind["q"] + by_kind["i"] + by_kind["f"]
        self._pack = struct.Struct("=" + "".join(f"{len(by_kind[k])}{k}" for k in "Qqif" if by_kind[k]))
        starts, offset = {}, 0
        for letter, width in (("Q", 8), ("q", 8), ("i", 4), ("f", 4)):
            starts[letter] = (offset, width)
            offset += width * len(by_kind[letter])
        self._buffer = ctypes.create_string_buffer(offset + 16)
        base = ctypes.addressof(self._buffer)
        # Two more for the scratch pointers that Triton appends, both null.
        self._parameters = (ctypes.c_void_p * (len(order) + 2))()
        self._map_slots: list[int] = []
        for position, (letter, rank) in enumerate(order):
            if letter == "map":
                self._map_slots.append(position)
            elif letter == "zero":
                self._parameters[position] = base + offset
            else:
                start, width = starts[letter]
                self._parameters[position] = base + start + rank * width
        for extra in range(2):
            self._parameters[len(order) + extra] = base + offset

    def __call__(self, grid: tuple[int, int, int], stream: int, args: tuple[Any, ...]) -> None:
        """Launches with the arguments of the Triton kernel in order, constexprs left out."""
        with self._lock:
            self._pack.pack_into(
                self._buffer,
                0,
                *[args[i].data_ptr() for i in self._pointers],
                *[args[i] for i in self._numbers],
            )
            for rank, slot in enumerate(self._map_slots):
                self._parameters[slot] = self._map_of(rank, args[self._described[rank]])
            error = self._driver.cuLaunchKernel(
                self._function,
                *grid,
                self._threads,
                1,
                1,
                self._shared,
                ctypes.c_void_p(stream),
                self._parameters,
                None,
            )
        if error:
            raise RuntimeError(f"the CUDA driver refused a kernel launch with error {error}")

    def _map_of(self, rank: int, tensor: Tensor) -> int:
        """The address of the descriptor of a two-dimensional tensor. Allocators hand out the same places again."""
        rows, columns = tensor.shape
        key = (rank, tensor.data_ptr(), rows, columns, tensor.stride(0))
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= _MOST_MAPS:
                self._maps.clear()
            found = self._maps[key] = self._encode(self._boxes[rank], tensor)
        return found[0]

    def _encode(self, box: Any, tensor: Tensor) -> tuple[int, Any]:
        storage = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        address = -(-ctypes.addressof(storage) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        (rows, columns), (box_rows, box_columns) = tensor.shape, box["block_size"]
        error = self._driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(address),
            _MAP_TYPES[tensor.dtype],
            2,
            ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(tensor.stride(0) * tensor.element_size()),
            (ctypes.c_uint32 * 2)(box_columns, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            box["swizzle"],
            _L2_PROMOTION_128B,
            0,
        )
        if error:
            raise RuntimeError(f"the CUDA driver refused a tensor map for {list(tensor.shape)} with error {error}")
        return address, storage


def direct_kernel(compiled: Any) -> DirectKernel | None:
    """The kernel for direct launches; None where its layout cannot be checked and Triton has to launch it."""
    driver = _driver()
    metadata, signature = compiled.metadata, getattr(compiled.src, "signature", None)
    if driver is None or not isinstance(signature, dict) or getattr(metadata, "num_ctas", 1) != 1:
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


def _parameter_sizes(driver: ctypes.CDLL, function: int) -> list[int]:
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
def _driver() -> ctypes.CDLL | None:
    """The CUDA driver, if it is one that can be asked for a kernel's parameters (12.4 and later)."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    driver = ctypes.CDLL("libcuda.so.1")
    return driver if hasattr(driver, "cuFuncGetParamInfo") else None
