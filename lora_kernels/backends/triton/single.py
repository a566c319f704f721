"""One layer's forward and its input gradient, for a weight of either kind."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_kernels.backends import Precision, Scale, eager
from lora_kernels.backends.triton import ahead, backward_launch, launch, nf4_launch
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import Weight


def forward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    want_s: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + S B^T + b and S = scale * mask(x) A^T."""
    down, up = lora_A.T, lora_B.T
    rehearsal = partial(_rehearse_backward, x, weight, lora_A, lora_B, scale, dropout, precision) if want_s else None
    with ahead.followed_by(rehearsal):
        if isinstance(weight, NF4Weight):
            y, s = nf4_launch.one_pass(x, weight, down, up, bias, scale, dropout, True, precision)
        else:
            y, s = launch.one_pass(x, _strided(weight).T, down, up, bias, scale, dropout, True, precision)
    return y, s if want_s else None


def backward(
    dy: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx = dy W + mask(T A), and of dA = T^T mask(x) and dB = dy^T S what has an operand."""
    if isinstance(weight, NF4Weight):
        if nf4_launch.flies(dy, weight, forward=False):
            dx, t = nf4_launch.one_pass(dy, weight, lora_B, lora_A, None, scale, dropout, False, precision)
            return dx, *backward_launch.adapter_grads(x, dy, s, None if x is None else t, dropout, dtype)
        weight = nf4_launch.dequantize(weight, dy.dtype)
    return backward_launch.backward(dy, _strided(weight), lora_A, lora_B, x, s, scale, dropout, precision, dtype)


def backward_input(
    dy: Tensor,
    weight: Weight | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    want_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """T = scale * dy B and dx = dy W + mask(T A)."""
    if not want_dx:
        # No big product to share a pass with: what is left is a library's business.
        return eager.backward_input(dy, None, None, lora_B, scale, None, precision, want_dx=False)
    assert weight is not None and lora_A is not None
    if isinstance(weight, NF4Weight):
        return nf4_launch.one_pass(dy, weight, lora_B, lora_A, None, scale, dropout, False, precision)
    return launch.one_pass(dy, _strided(weight), lora_B, lora_A, None, scale, dropout, False, precision)


def _rehearse_backward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
) -> None:
    """The launches of a backward with every gradient: at once, and as a gated MLP has them, dx before x is there again."""
    (M, _), (N, R) = x.shape, lora_B.shape
    dy, s = x.new_empty(M, N), x.new_empty(M, R, dtype=torch.float32 if precision == "split" else x.dtype)
    backward(dy, weight, lora_A, lora_B, x, s, scale, dropout, precision, lora_A.dtype)
    _, t = backward_input(dy, weight, lora_A, lora_B, scale, dropout, precision, True)
    backward_launch.adapter_grads(x, dy, s, t, dropout, lora_A.dtype)


def _strided(weight: Tensor) -> Tensor:
    """The kernels read weights stored as [N, K] or as [K, N]; any other is copied."""
    return weight if 1 in weight.stride() else weight.contiguous()
