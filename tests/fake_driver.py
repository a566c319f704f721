"""A CUDA driver for machines without one: kernels are "compiled" and launched, and compute in plain PyTorch.

What reaches a kernel comes out of the parameter buffer that a launch hands over, byte by byte, so a wrong layout, a
stale address or a number of another call gives wrong values here as it would on a GPU.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fake_kernels import KERNELS
from torch import Tensor

_ADDRESS, _UINT, _INT, _SIZE = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_size_t
_POINTER, _U64, _U32 = ctypes.POINTER, ctypes.c_uint64, ctypes.c_uint32
_LAUNCH = ctypes.CFUNCTYPE(_INT, _ADDRESS, *[_UINT] * 7, _ADDRESS, _POINTER(_ADDRESS), _ADDRESS)
_ENCODE = ctypes.CFUNCTYPE(
    _INT, _ADDRESS, _INT, _UINT, _ADDRESS, _POINTER(_U64), _POINTER(_U64), _POINTER(_U32), _POINTER(_U32), *[_INT] * 4
)
_PARAMETER_INFO = ctypes.CFUNCTYPE(_INT, _ADDRESS, _SIZE, _POINTER(_SIZE), _POINTER(_SIZE))
_IS_CAPTURING = ctypes.CFUNCTYPE(_INT, _ADDRESS, _POINTER(_INT))
_SET_CONTEXT = ctypes.CFUNCTYPE(_INT, _ADDRESS)
_GET_CONTEXT = ctypes.CFUNCTYPE(_INT, _POINTER(_ADDRESS))
_CURRENT_STREAM = ctypes.CFUNCTYPE(_INT, ctypes.c_int32, _POINTER(_ADDRESS))
# What the kernels are loaded into.
CONTEXT = 0xC0
_MAP = struct.Struct("<QQQQII")
_FORMATS = {"i32": ("<i", 4), "fp32": ("<f", 4), "*": ("<Q", 8)}


@dataclass
class Launched:
    """A launch: the kernel's name, and its arguments, pointers as addresses."""

    name: str
    arguments: dict[int, Any]
    stream: int


@dataclass
class Compiled:
    """What Triton knows of a compiled kernel, as far as direct.py asks; and the arguments that it was compiled for."""

    function: int
    name: str
    options: dict[str, Any]
    constants: dict[int, Any]
    dtypes: dict[int, torch.dtype]
    signature: dict[str, str]
    boxes: list[Any]
    # Pointers that lay on 16 bytes, as Triton takes for granted from then on.
    aligned: set[int]

    @property
    def metadata(self) -> SimpleNamespace:
        return SimpleNamespace(num_warps=4, shared=1024, tensordesc_meta=self.boxes, global_scratch_size=0)

    @property
    def src(self) -> SimpleNamespace:
        return SimpleNamespace(signature=self.signature)


class FakeKernel:
    """A kernel of Triton's as launches.py calls it: kernel[grid](*arguments, **options)."""

    def __init__(self, driver: FakeDriver, name: str, unspecialized: tuple[int, ...]) -> None:
        self._driver, self._name, self._unspecialized = driver, name, unspecialized

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return self._run

    def _run(self, *arguments: Any, **options: Any) -> Compiled:
        compiled = Compiled(len(self._driver.kernels) + 1, self._name, options, {}, {}, {}, [], set())
        values: dict[int, Any] = {}
        for index, value in enumerate(arguments):
            kind = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, Tensor):
                compiled.dtypes[index], kind, values[index] = value.dtype, "*x", value.data_ptr()
                # A seed is one number, loaded by itself.
                if value.data_ptr() % 16 == 0 and value.dtype != torch.int64:
                    compiled.aligned.add(index)
            elif hasattr(value, "block_shape"):
                compiled.dtypes[index], kind, values[index] = value.base.dtype, "tensordesc<x>", value.base.data_ptr()
                compiled.boxes.append({"block_size": value.block_shape, "swizzle": 3})
            elif value is None or (value == 1 and kind == "i32" and index not in self._unspecialized):
                compiled.constants[index], kind = value, "constexpr"
            else:
                values[index] = value if kind == "i32" else struct.unpack("<f", struct.pack("<f", value))[0]
            compiled.signature[f"argument {index}"] = kind
        self._driver.kernels.append(compiled)
        self._driver.compute(compiled, values, stream=-1)
        return compiled


class FakeDriver:
    """The functions of the driver, which serve Python and, by their addresses, C++."""

    def __init__(self) -> None:
        self.kernels: list[Compiled] = []
        self.launches: list[Launched] = []
        self.encoded = 0
        self.capturing = False
        # The context that is current; 0 in a thread that has not called CUDA yet.
        self.context = CONTEXT
        self.mask = FakeKernel(self, "mask", (2, 3))
        self.one_pass = FakeKernel(self, "one_pass", (12, 13, 17, 18, 19, 20))
        self.few_rows = FakeKernel(self, "few_rows", (12, 16, 17))
        self.products = FakeKernel(self, "products", (24, *range(34, 40)))
        self.adapter_grads = FakeKernel(self, "adapter_grads", (9, 15, 16))
        self.backward = FakeKernel(self, "backward", (16, 17, *range(21, 27)))
        self.group_forward = FakeKernel(self, "group_forward", (30, 31, 39, 40, 41, 42))
        self.group_input = FakeKernel(self, "group_input", (27, 28, 36, 37, 38, 39, 40, 41))
        self.group_grads = FakeKernel(self, "group_grads", (21, 36, 37))
        self.gated_forward = FakeKernel(self, "gated_forward", ())
        self.gated_backward = FakeKernel(self, "gated_backward", ())
        self.dequantize = FakeKernel(self, "dequantize", ())
        self.nf4_product = FakeKernel(self, "nf4_product", (16, 20, 21))
        self.cuLaunchKernel = _LAUNCH(self._launch)
        self.cuTensorMapEncodeTiled = _ENCODE(self._encode)
        self.cuFuncGetParamInfo = _PARAMETER_INFO(self._parameter_info)
        self.cuStreamIsCapturing = _IS_CAPTURING(self._is_capturing)
        self.cuCtxSetCurrent = _SET_CONTEXT(self._set_context)
        self.cuCtxGetCurrent = _GET_CONTEXT(self._get_context)
        self.current_stream = _CURRENT_STREAM(self._current_stream)

    def addresses(self) -> list[int | None]:
        functions = (
            self.cuLaunchKernel,
            self.cuTensorMapEncodeTiled,
            self.cuStreamIsCapturing,
            self.cuCtxSetCurrent,
            self.current_stream,
        )
        return [ctypes.cast(function, ctypes.c_void_p).value for function in functions]

    def compute(self, compiled: Compiled, values: dict[int, Any], stream: int) -> None:
        arguments = {i: values.get(i, compiled.constants.get(i)) for i in range(len(compiled.signature))}
        self.launches.append(Launched(compiled.name, arguments, stream))
        KERNELS[compiled.name](compiled.dtypes, compiled.options, arguments)

    def _launch(self, function: int, *others: Any) -> int:
        if self.context != CONTEXT:
            return 201
        *_, stream, parameters, _ = others
        compiled, values, position = self.kernels[function - 1], {}, 0
        for index, kind in enumerate(compiled.signature.values()):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                address, columns, rows, row_bytes, *_ = _MAP.unpack(ctypes.string_at(parameters[position], _MAP.size))
                values[index] = (address, rows, columns, row_bytes)
                position += 5
                continue
            form, size = _FORMATS["*" if kind.startswith("*") else kind]
            (values[index],) = struct.unpack(form, ctypes.string_at(parameters[position], size))
            position += 1
        if any(values[index] % 16 for index in compiled.aligned):
            return 716
        self.compute(compiled, values, stream or 0)
        return 0

    def _encode(
        self, target: int, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, *_: int
    ) -> int:
        if self.context != CONTEXT:
            return 201
        assert target % 64 == 0
        assert (rank, steps[0], steps[1]) == (2, 1, 1)
        if address % 16 or strides[0] % 16:
            return 1
        self.encoded += 1
        ctypes.memmove(target, _MAP.pack(address, sizes[0], sizes[1], strides[0], box[0], box[1]), _MAP.size)
        return 0

    def _parameter_info(self, function: int, index: int, offset: Any, size: Any) -> int:
        sizes: list[int] = []
        for kind in self.kernels[function - 1].signature.values():
            if kind.startswith("tensordesc"):
                sizes += [128, 4, 4, 8, 8]
            elif kind != "constexpr":
                sizes.append(_FORMATS["*" if kind.startswith("*") else kind][1])
        sizes += [8, 8]
        if index >= len(sizes):
            return 1
        size[0] = sizes[index]
        return 0

    def _set_context(self, context: int | None) -> int:
        self.context = context or 0
        return 0

    def _get_context(self, context: Any) -> int:
        context[0] = self.context
        return 0

    def _is_capturing(self, stream: int, status: Any) -> int:
        status[0] = int(self.capturing)
        return 0

    def _current_stream(self, device: int, stream: Any) -> int:
        stream[0] = 77
        return 0
