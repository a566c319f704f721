"""The best that a chain of library matrix products can do. Runs on any device.

S is computed once and kept, S B^T is accumulated into the output in place, and dY B is computed once. An NF4
weight is decoded into a temporary for each of the two products that it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends import Backend, Precision, Problem, Scale
from lora_kernels.dropout import Dropout
from lora_kernels.weights import Weight, dense


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
    s = _masked(x, dropout).to(_branch_dtype(x, precision)) @ _branch(lora_A, x, precision).T
    s *= scale
    y = _linear(x, dense(weight, x.dtype), bias)
    return _accumulate(y, s, _branch(lora_B, x, precision).T), s if want_s else None


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
    t = dy.to(_branch_dtype(dy, precision)) @ _branch(lora_B, dy, precision)
    t *= scale
    if not want_dx:
        return None, t
    assert weight is not None
    assert lora_A is not None
    dx = dy @ dense(weight, dy.dtype)
    up = _branch(lora_A, dy, precision)
    if dropout is None:
        return _accumulate(dx, t, up), t
    branch = _masked(t @ up, dropout)
    # Out of place where the branch is wider than dx, so that the sum is rounded once.
    return (dx.add_(branch) if branch.dtype == dx.dtype else (dx + branch).to(dx.dtype)), t


def backward_adapters(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """dA = T^T mask(x) where T and x are given, dB = dy^T S where S is given, both in `dtype`."""
    dA = None if t is None or x is None else _product(t.T, _masked(x, dropout), dtype)
    dB = None if s is None else _product(dy.T, s, dtype)
    return dA, dB


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)


def _masked(x: Tensor, dropout: Dropout | None) -> Tensor:
    # Not a product with the mask: an infinity that is dropped is 0, and not NaN.
    return x if dropout is None else torch.where(dropout.keep(x.shape[0], x.shape[1]), x, 0.0)


def _branch_dtype(x: Tensor, precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "split" else x.dtype


def _branch(adapter: Tensor, x: Tensor, precision: Precision) -> Tensor:
    return adapter.to(_branch_dtype(x, precision))


def _accumulate(y: Tensor, s: Tensor, up: Tensor) -> Tensor:
    """y + s up, in place where the dtypes agree, else in the wider dtype and rounded once."""
    return y.addmm_(s, up) if s.dtype == y.dtype else torch.addmm(y.to(s.dtype), s, up).to(y.dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, which a float32 adapter's gradient reaches without a stop in 16 bits."""
    wide = torch.promote_types(left.dtype, right.dtype)
    if wide == dtype:
        return left.to(wide) @ right.to(wide)
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _never(problem: Problem) -> str | None:
    return None


def _describe(problem: Problem) -> str | None:
    products = "library matrix products: 3 forward, 5 backward"
    return f"{products}; the NF4 weight is decoded into a temporary before one of each" if problem.nf4 else products


BACKEND = Backend("eager", _never, _never, forward, backward_input, backward_adapters, _describe)
