"""The one place where gradients are composed and where what is saved is decided.

    needs gradient    computes          keeps from the forward
    x                 T, dx             weight, lora_A, lora_B, the dropout seed
    lora_A            T, dA             x, lora_B, the dropout seed
    lora_B            dB                S
    bias              sum of dy         nothing
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.backends import Backend, Precision, Scale
from lora_kernels.dropout import Dropout


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    lora_A: bool
    lora_B: bool
    bias: bool


class Saved(NamedTuple):
    """What the backward may read; None where no needed gradient uses it."""

    x: Tensor | None
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    s: Tensor | None
    seed: Tensor | None

    @staticmethod
    def select(
        needs: Needs,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        s: Tensor | None,
        dropout: Dropout | None,
    ) -> Saved:
        needs_t = needs.x or needs.lora_A
        return Saved(
            x=x if needs.lora_A else None,
            weight=weight if needs.x else None,
            lora_A=lora_A if needs.x else None,
            lora_B=lora_B if needs_t else None,
            s=s if needs.lora_B else None,
            seed=dropout.seed if dropout is not None and needs_t else None,
        )


def backward(
    backend: Backend,
    needs: Needs,
    saved: Saved,
    dy: Tensor,
    scale: Scale,
    dropout_p: float,
    precision: Precision,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and db, each None where it is not needed. dy is [M, N] in the base's dtype."""
    dropout = None if saved.seed is None else Dropout(dropout_p, saved.seed)
    dx = t = None
    if saved.lora_B is not None:
        dx, t = backend.backward_input(
            dy, saved.weight, saved.lora_A, saved.lora_B, scale, dropout, precision, needs.x
        )
    dA = dB = None
    if needs.lora_A or needs.lora_B:
        dA, dB = backend.backward_adapters(
            saved.x, dy, saved.s, t if needs.lora_A else None, dropout, adapter_dtype
        )
    return dx, dA, dB, dy.sum(0) if needs.bias else None


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + scaling * (D(x) A^T) B^T + b on a two-dimensional x; never a gradient for the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: Scale,
        dropout: Dropout | None,
        precision: Precision,
        backend: Backend,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[0], wanted[2], wanted[3], wanted[4])
        y, s = backend.forward(x, weight, lora_A, lora_B, bias, scale, dropout, precision, needs.lora_B)
        ctx.save_for_backward(*Saved.select(needs, x, weight, lora_A, lora_B, s, dropout))
        ctx.set_materialize_grads(False)
        ctx.needs = needs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.constants = (
            scale,
            0.0 if dropout is None else dropout.p,
            precision,
            lora_A.dtype,
        )
        ctx.dtype = x.dtype
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        dy = as_rows(dy, ctx.dtype)
        dx, dA, dB, db = backward(ctx.backend, ctx.needs, Saved(*ctx.saved_tensors), dy, *ctx.constants)
        return dx, None, dA, dB, db if db is None else db.to(ctx.bias_dtype), None, None, None, None


def as_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype` with contiguous rows: what every backend takes as x or dy."""
    if t.dtype != dtype:
        t = t.to(dtype)
    columns = t.shape[1]
    if t.stride(1) != 1 and columns > 1 or t.stride(0) < columns and t.shape[0] > 1:
        t = t.contiguous()
    return t
