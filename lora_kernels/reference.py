"""The LoRA linear by definition: the specification of the package, and the oracle of every test.

Nothing here is fast. Run it in float64 and let autograd differentiate it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.dropout import inverse_keep
from lora_kernels.weights import Weight, dense


def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x W^T + scaling * (D(x) A^T) B^T + b, where D(x) = x / (1 - p) where `keep` is true, else 0.

    This p is the probability that a mask really has: `dropout_p` rounded to a multiple of 2^-16 (dropout.py).

    Args:
        x: [..., K].
        weight: [N, K]; an NF4Weight is decoded to x's dtype.
        lora_A: [r, K].
        lora_B: [N, r].
        bias: [N] or None.
        keep: bool mask of x's shape, or None where nothing is dropped.
        dropout_p: the probability that the mask was drawn with.
    Returns:
        y: [..., N].

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3.
    """
    y = x @ dense(weight, x.dtype).T
    dropped = x if keep is None else _drop(x, keep, dropout_p)
    y = y + scaling * ((dropped @ lora_A.T) @ lora_B.T)
    return y if bias is None else y + bias


def _drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return torch.where(keep, x * inverse_keep(p), torch.zeros_like(x))
