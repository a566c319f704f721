"""The launch path in C++: calls of lora_linear that are like one that Python has made before.

Python checks, chooses, plans and has Triton compile. Where a kind of call comes again, what was found is handed to the
extension of csrc/host/, by which the next such call allocates, launches and makes its autograd node, and its backward
runs, without Python. The bits are the same. Calls that are not covered (NF4, float32, subclasses of tensors, modes,
tracing, a profiler that asked Triton for its launches) stay in Python, as do all of them where the extension is not
compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd import TWICE, Needs, Saved, as_matrix, as_rows, backward_of
from lora_kernels.backends import Backend, Precision, Scale
from lora_kernels.dropout import Dropout, inverse_keep
from lora_kernels.switches import is_on

# 0 leaves every call to Python.
VARIABLE = "LORA_KERNELS_NATIVE"
NOT_COMPILED = "the launch path is not compiled"

# Whether calls should be learned: until it turns out that they cannot be.
enabled = is_on(VARIABLE) and torch.version.cuda is not None
# lora_linear by positional arguments, the last of them a backend's name: y, or None for a call that should be learned,
# or False for any other that is Python's. There is none before the first call that could be learned.
linear: Callable[..., Tensor | bool | None] | None = None
_device_type = "cuda"
# Triton unloads kernels that nobody holds; the extension holds their addresses.
_kernels: set[Any] = set()


def learn(
    given: tuple[Any, ...],
    name: str,
    backend: Backend,
    x: Tensor,
    precision: Precision,
    scale: Scale,
    dropout: Dropout | None,
) -> None:
    """Has the next call with arguments like these made in C++.

    Args:
        given: the arguments that `linear` takes, but the backend's name.
        x, precision, scale, dropout: what the call was made with after all.
    """
    if backend.name != "triton" or x.device.type != _device_type:
        return
    extension = _extension()
    if extension is None:
        return
    from lora_kernels.backends.triton import launch

    _, weight, lora_A, lora_B, bias, *_ = given
    made = None
    if isinstance(weight, Tensor) and weight.dtype == x.dtype and x.numel() > 0 and 1 in weight.stride():
        # Not a reshape, which gives a single row another stride.
        rows = as_matrix(x)
        views = (weight.T, lora_A.T, lora_B.T)
        made = _launch(extension, launch.one_pass_launch(rows, *views, bias, scale, dropout, True, precision))
    p = 0.0 if dropout is None else dropout.p
    constants = (backend, p, precision, lora_A.dtype, None if bias is None else bias.dtype)
    extension.learn(*given, name, made, inverse_keep(p) if p else 1.0, constants)


def _backward(
    constants: tuple[Backend, float, Precision, torch.dtype, torch.dtype | None],
    needs: tuple[bool, bool, bool, bool],
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    dy: Tensor,
    scale: float,
    learn: bool,
) -> tuple[Any, ...]:
    """dx, dA, dB and db of a node that was made in C++, and the launches that they took if those are to be learned."""
    backend, p, precision, adapter_dtype, bias_dtype = constants
    wanted, saved = Needs(*needs), Saved(x, weight, lora_A, lora_B, s, seed, None)
    gradients = backward_of(backend, wanted, saved, dy, scale, p, precision, adapter_dtype, bias_dtype)
    return (*gradients, _launches(constants, wanted, saved, dy, scale) if learn else None)


def _launches(
    constants: tuple[Backend, float, Precision, torch.dtype, torch.dtype | None],
    needs: Needs,
    saved: Saved,
    dy: Tensor,
    scale: float,
) -> tuple[Any, Any] | None:
    """The launches of a backward; None where they are not the driver's."""
    from lora_kernels.backends.triton import launch

    _, p, precision, adapter_dtype, _ = constants
    extension = _extension()
    assert extension is not None
    dy, x = _rows(dy), None if saved.x is None else _rows(saved.x)
    dropout = None if saved.seed is None else Dropout(p, saved.seed)
    dx = grads = t = None
    if needs.x:
        assert isinstance(saved.weight, Tensor) and saved.lora_A is not None and saved.lora_B is not None
        plan = launch.one_pass_launch(
            dy, saved.weight, saved.lora_B, saved.lora_A, None, scale, dropout, False, precision
        )
        dx = _launch(extension, plan)
        if dx is None:
            return None
        dtype = torch.float32 if precision == "split" else dy.dtype
        t = torch.empty(dy.shape[0], saved.lora_A.shape[0], dtype=dtype, device=dy.device)
    if needs.lora_A or needs.lora_B:
        t, s = t if needs.lora_A else None, None if saved.s is None else saved.s.contiguous()
        grads = _launch(extension, launch.adapter_grads_launch(x, dy, s, t, dropout, adapter_dtype))
        if grads is None:
            return None
    return dx, grads


def _rows(t: Tensor) -> Tensor:
    return as_rows(as_matrix(t))


def _launch(extension: ModuleType, launch: Any) -> Any:
    """A launch of launch.py in C++; None if Triton makes it."""
    bound = launch.bound
    if bound is None:
        return None
    kernel = bound.kernel
    _kernels.add(kernel)
    parameters = [tuple(parameter) for parameter in kernel.parameters]
    return extension.Launch(
        kernel.function,
        bound.grid,
        kernel.threads,
        kernel.shared,
        parameters,
        bound.numbers,
        [tuple(shape) for shape in bound.maps],
        launch.workspace_size,
        launch.counters,
    )


@cache
def _extension() -> ModuleType | None:
    """The extension, ready to be called; None, and nothing is learned any more, where there is none."""
    global enabled
    if why_not() is not None:
        enabled = False
        return None
    from lora_kernels.backends import native_build

    extension = native_build.load()
    assert extension is not None
    start(extension, [ctypes.cast(f, ctypes.c_void_p).value for f in _functions()], "cuda")
    return extension


def start(extension: ModuleType, addresses: list[int | None], device_type: str) -> None:
    """Makes the extension ready, with the functions that it calls for tensors of a kind of device."""
    global linear, _device_type
    import triton

    from lora_kernels.backends import sync

    extension.use_driver(*addresses, device_type)
    knobs = getattr(triton, "knobs", None)
    extension.use_python(_backward, sync.zeros_for, None if knobs is None else knobs.runtime, TWICE)
    linear, _device_type = extension.linear, device_type


def _functions() -> list[Any]:
    """What the extension calls of the CUDA driver and of PyTorch, in the order of launch.h's Driver.

    Raises:
        AttributeError: one is missing.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    pytorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    return [
        driver.cuLaunchKernel,
        driver.cuTensorMapEncodeTiled,
        driver.cuStreamIsCapturing,
        pytorch.aoti_torch_get_current_cuda_stream,
    ]


def why_not() -> str | None:
    """Why calls are launched from Python here; None if they are launched from C++."""
    from lora_kernels.backends import native_build

    if not is_on(VARIABLE):
        return f"{VARIABLE} is 0"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        if native_build.load() is None:
            return NOT_COMPILED
        _functions()
    except (ImportError, OSError, AttributeError) as error:
        return f"the compiled launch path cannot be used: {error}"
    return None
