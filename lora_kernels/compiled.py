"""The same computation as operators of torch.library, which torch.compile takes without a graph break.

Eager calls do not come here: an operator call costs tens of microseconds of dispatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd import Needs, Saved, as_rows, backward
from lora_kernels.backends import Backend, Precision, Problem, Scale
from lora_kernels.dispatch import choose, requested
from lora_kernels.dropout import Dropout


def apply(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    backend: str | None,
) -> Tensor:
    """What LoRALinearFunction.apply computes, as a traceable operator.

    A `backend` of None is resolved when the operator runs, so that use_backend also reaches compiled code.
    """
    is_tensor = isinstance(scale, Tensor)
    y, _ = _forward(
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        scale if is_tensor else None,
        1.0 if is_tensor else float(scale),
        None if dropout is None else dropout.seed,
        0.0 if dropout is None else dropout.p,
        precision,
        backend,
    )
    return y


@torch.library.custom_op("lora_kernels::forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = _backend(x, weight, lora_A, precision, backend)
    dropout = None if seed is None else Dropout(dropout_p, seed)
    y, s = chosen.forward(
        as_rows(x, x.dtype),
        weight,
        lora_A,
        lora_B,
        bias,
        scale if scale_tensor is None else scale_tensor,
        dropout,
        precision,  # type: ignore[arg-type]
        want_s=True,
    )
    assert s is not None
    return y, s


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    s_dtype = torch.float32 if precision == "split" else x.dtype
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0], dtype=s_dtype)


@torch.library.custom_op("lora_kernels::backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    backend: str | None,
    needs: list[bool],
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(
        dy.device,
        dtype,
        precision,  # type: ignore[arg-type]
        in_features,
        dy.shape[1],
        rank,
        weight is not None and 1 not in weight.stride(),
    )
    gradients = backward(
        choose(problem, requested(backend)).backend,
        Needs(*needs),
        Saved(x, weight, lora_A, lora_B, s, seed),
        as_rows(dy, dtype),
        scale if scale_tensor is None else scale_tensor,
        dropout_p,
        precision,  # type: ignore[arg-type]
        adapter_dtype,
    )
    dx, dA, dB, db = (dy.new_empty(0) if g is None else g for g in gradients)
    # The sum of a one-row dy may be a view of it; an operator must not return one.
    return dx, dA, dB, db.to(bias_dtype).clone() if needs[3] else db


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    backend: str | None,
    needs: list[bool],
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, out_features = dy.shape
    none = dy.new_empty(0)
    return (
        dy.new_empty(rows, in_features, dtype=dtype) if needs[0] else none,
        dy.new_empty(rank, in_features, dtype=adapter_dtype) if needs[1] else dy.new_empty(0),
        dy.new_empty(out_features, rank, dtype=adapter_dtype) if needs[2] else dy.new_empty(0),
        dy.new_empty(out_features, dtype=bias_dtype) if needs[3] else dy.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_A, lora_B, bias, scale_tensor, scale, seed, dropout_p, precision, backend = inputs
    wanted = ctx.needs_input_grad
    needs = Needs(wanted[0], wanted[2], wanted[3], wanted[4])
    dropout = None if seed is None else Dropout(dropout_p, seed)
    saved = Saved.select(needs, x, weight, lora_A, lora_B, output[1], dropout)
    ctx.save_for_backward(*saved, scale_tensor)
    ctx.constants = (scale, dropout_p, precision, backend, needs)
    ctx.shape = (x.shape[1], lora_A.shape[0])
    ctx.dtypes = (x.dtype, lora_A.dtype, None if bias is None else bias.dtype)


def _compose(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, s, seed, scale_tensor = ctx.saved_tensors
    scale, dropout_p, precision, backend, needs = ctx.constants
    gradients = _backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        s,
        scale_tensor,
        scale,
        seed,
        dropout_p,
        precision,
        backend,
        list(needs),
        *ctx.shape,
        *ctx.dtypes,
    )
    dx, dA, dB, db = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (dx, None, dA, dB, db, None, None, None, None, None, None)


_forward.register_autograd(_compose, setup_context=_setup_context)


def _backend(x: Tensor, weight: Tensor, lora_A: Tensor, precision: str, backend: str | None) -> Backend:
    problem = Problem(
        x.device,
        x.dtype,
        precision,  # type: ignore[arg-type]
        weight.shape[1],
        weight.shape[0],
        lora_A.shape[0],
        1 not in weight.stride(),
    )
    return choose(problem, requested(backend)).backend
