"""The elementwise part of a gated MLP: one launch for h, one for dg, du and h again.

    h = act(g) * u        dg = dh * u * act'(g)        du = dh * act(g)

All in float32 and rounded once. Each program takes a block of the flattened matrices, which are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends import Activation, GatedBackend
from lora_kernels.backends.triton.launches import Launch, alignment, remember

_BLOCK = 1024


@triton.jit
def _activated(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g)."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(g)
        return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    else:
        # 0.5 (1 + tanh z) is sigmoid(2 z); the factor is 2 sqrt(2 / pi).
        square = g * g
        gate = tl.sigmoid(1.5957691216057308 * g * (1 + 0.044715 * square))
        return g * gate, gate * (1 + 1.5957691216057308 * g * (1 + 3 * 0.044715 * square) * (1 - gate))


@triton.jit
def gated_forward_kernel(g_ptr, u_ptr, h_ptr, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    g = tl.load(g_ptr + offs, mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    activated, _ = _activated(g, ACTIVATION)
    tl.store(h_ptr + offs, (activated * u).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def gated_backward_kernel(
    dh_ptr, g_ptr, u_ptr, du_ptr, h_ptr, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dg takes the place of dh: a program reads of it only what it writes."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    dh = tl.load(dh_ptr + offs, mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offs, mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    activated, slope = _activated(g, ACTIVATION)
    tl.store(du_ptr + offs, (dh * activated).to(du_ptr.dtype.element_ty), mask)
    tl.store(dh_ptr + offs, (dh * u * slope).to(dh_ptr.dtype.element_ty), mask)
    if h_ptr is not None:
        tl.store(h_ptr + offs, (activated * u).to(h_ptr.dtype.element_ty), mask)


def forward(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """h."""
    g, u = g.contiguous(), u.contiguous()
    h = torch.empty_like(g)
    _launch(gated_forward_kernel, "gated_forward", (g, u, h), activation)
    return h


def backward(
    dh: Tensor, g: Tensor, u: Tensor, activation: Activation, want_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg, which takes dh's place, du, and h where it is wanted."""
    dh, g, u = dh.contiguous(), g.contiguous(), u.contiguous()
    du, h = torch.empty_like(u), torch.empty_like(g) if want_h else None
    _launch(gated_backward_kernel, "gated_backward", (dh, g, u, du, h), activation)
    return dh, du, h


_launches: dict[tuple[object, ...], Launch] = {}


def _launch(kernel: object, name: str, tensors: tuple[Tensor | None, ...], activation: Activation) -> None:
    first = tensors[0]
    assert first is not None
    elements = first.numel()
    if elements == 0:
        return
    key = (name, first.device, first.dtype, activation, elements, tensors[-1] is None, alignment(*tensors))
    launch = _launches.get(key)
    if launch is None:
        # Triton compiles another kernel where a number is 1, a multiple of 16 or no 32-bit one.
        size = (elements == 1, elements % 16 == 0, elements >= 2**31)
        options = {"ACTIVATION": activation, "BLOCK": _BLOCK, "num_warps": 4}
        grid = (triton.cdiv(elements, _BLOCK), 1, 1)
        launch = Launch(kernel, (*key[:4], *size, *key[5:]), grid, options, None, 0, 0, (elements,))
        remember(_launches, key, launch)
    launch(first.device, tensors)


GATED = GatedBackend(forward, backward)
