"""The zeros that kernels count in, and put back: one buffer for each stream and each captured graph."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

_MINIMUM = 1 << 14

_buffers: dict[tuple[object, ...], Tensor] = {}
_captured: dict[tuple[object, ...], Tensor] = {}


def zeros_for(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros that no launch on another stream uses at the same time.

    Kernels leave them zero, so launches of one stream share a buffer and none of them needs a memset. A captured
    graph may be replayed on any stream: each capture gets its own, zeroed at the start of each replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if torch.cuda.is_current_stream_capturing():
        return _zeros_for_capture(device, stream, count)
    key = (device.index, stream)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < count:
        buffer = torch.zeros(max(_MINIMUM, 2 * count), dtype=torch.int32, device=device)
        _buffers[key] = buffer
    return buffer


def _zeros_for_capture(device: torch.device, stream: int, count: int) -> Tensor:
    capture = _capture_id(stream)
    if capture is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (capture, device.index, stream)
    buffer = _captured.get(key)
    if buffer is None or buffer.numel() < count:
        # The graph's own memory pool keeps what earlier captures used alive for their replays.
        for other in [k for k in _captured if k[0] != capture]:
            del _captured[other]
        buffer = torch.zeros(max(_MINIMUM, 2 * count), dtype=torch.int32, device=device)
        _captured[key] = buffer
    return buffer


def _capture_id(stream: int) -> int | None:
    """The driver's number of the capture that a stream is in; None where the driver cannot be asked."""
    query = _capture_query()
    if query is None:
        return None
    status, capture = ctypes.c_int(0), ctypes.c_uint64(0)
    error = query(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(capture), None, None, None
    )
    return capture.value if error == 0 else None


@cache
def _capture_query() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if torch.version.cuda is None:
        return None
    return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
