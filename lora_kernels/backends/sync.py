"""The zeros that kernels count in, and put back: a piece of memory for each stream and each captured graph."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import torch
from torch import Tensor

_SLAB = 1 << 20
_PIECE = 1 << 12

# By device, stream and capture (0 outside of one).
_pieces: dict[tuple[int, int, int], Tensor] = {}
_slabs: dict[int, Tensor] = {}
_lock = threading.Lock()


def zeros_for(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros that no launch on another stream uses at the same time.

    Kernels leave them zero, so launches of one stream share them and none needs a memset. A captured graph may be
    replayed on any stream, beside any other: each capture takes a piece that no one else ever gets. Where there is
    none to take (a capture before the first eager call, or the 256th), the zeros are made inside the graph, by a
    memset at every launch.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    # What torch.cuda.is_current_stream_capturing calls.
    capturing = torch._C._cuda_isCurrentStreamCapturing()
    key = (device.index, stream, _capture_id(stream) if capturing else 0)
    piece = _pieces.get(key)
    if piece is None or piece.numel() < count:
        # No two streams may ever get the same piece.
        with _lock:
            piece = _cut(device, count, capturing)
            if capturing and (piece is None or key[2] == 0):
                return torch.zeros(count, dtype=torch.int32, device=device)
            assert piece is not None
            _pieces[key] = piece
    return piece


def _cut(device: torch.device, count: int, capturing: bool) -> Tensor | None:
    """A piece off the device's slab; None if a new slab is needed while a capture forbids it."""
    size = -(-count // _PIECE) * _PIECE
    slab = _slabs.get(device.index)
    if slab is None or slab.numel() < size:
        if capturing:
            return None
        slab = _new_slab(device, max(_SLAB, size))
    piece, _slabs[device.index] = slab[:size], slab[size:]
    return piece


class _DeviceMemory:
    """Zeroed int32 memory for the life of the process, in no memory pool of PyTorch's."""

    def __init__(self, count: int) -> None:
        driver, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
        errors = (
            driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(4 * count)),
            driver.cuMemsetD32_v2(address, ctypes.c_uint(0), ctypes.c_size_t(count)),
            driver.cuCtxSynchronize(),
        )
        if any(errors):
            raise RuntimeError(f"the CUDA driver refused {4 * count} bytes of device memory with errors {errors}")
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<i4",
            "data": (address.value, False),
            "version": 2,
        }


def _new_slab(device: torch.device, count: int) -> Tensor:
    if torch.version.cuda is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    # The first call may be one that a compiled model makes inside a graph's private pool, where whatever stays
    # alive is an error.
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        return torch.as_tensor(_DeviceMemory(count), device=device)


def _capture_id(stream: int) -> int:
    """The driver's number of the capture that a stream is in; 0 where the driver cannot be asked."""
    query = _capture_query()
    if query is None:
        return 0
    status, capture = ctypes.c_int(0), ctypes.c_uint64(0)
    error = query(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(capture), None, None, None)
    return 0 if error else capture.value


@cache
def _capture_query() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if torch.version.cuda is None:
        return None
    return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
