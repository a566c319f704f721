"""The same computation as operators of torch.library, which torch.compile takes without a graph break.

Eager calls do not come here: an operator call costs tens of microseconds of dispatch.

A weight is a list of tensors: a dense one alone, with block size 0, or those of an NF4 weight.

PyTorch's compile caches on disk know an operator by its name alone: one whose arguments change needs a new
name with the next release.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd import Needs, Saved, as_rows, backward, forward, outside_autocast, rebuilt, split_scale
from lora_kernels.backends import Backend, Precision, Problem, Scale, eager
from lora_kernels.dispatch import BackendName, choose
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import Weight


def apply(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    backend: BackendName,
    keep_s: bool = True,
) -> Tensor:
    """What LoRALinearFunction.apply computes, as a traceable operator.

    The backend's name is part of the graph, and so the same in the backward, which may run on another thread.

    Args:
        keep_s: False, and the backward makes S again, unless there is dropout. It reads x once more for that. But where
            activation checkpointing needs this product for nothing but its S, it does not compute the product again
            (deferred.py does that for calls that are not compiled).
    """
    number, scale_tensor = split_scale(scale)
    p, seed = (0.0, None) if dropout is None else (dropout.p, dropout.seed)
    y: Tensor
    if isinstance(weight, NF4Weight):
        tensors, block_size = list(weight.tensors()), weight.block_size
    else:
        tensors, block_size = [weight], 0
    y, _ = _forward(
        x, lora_A, lora_B, bias, scale_tensor, number, seed, p, precision, backend, block_size, keep_s, tensors
    )
    return y


@torch.library.custom_op("lora_kernels::forward", mutates_args=())
def _forward(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    backend: str,
    block_size: int,
    keep_s: bool,
    weight: list[Tensor],
) -> tuple[Tensor, Tensor]:
    out_features, in_features = lora_B.shape[0], x.shape[1]
    y, s = forward(
        _backend(x.device, x.dtype, precision, in_features, out_features, lora_A.shape[0], block_size, backend),
        as_rows(x),
        _weight(weight, block_size, out_features, in_features, x.dtype),
        lora_A,
        lora_B,
        bias,
        scale if scale_tensor is None else scale_tensor,
        None if seed is None else Dropout(dropout_p, seed),
        precision,  # type: ignore[arg-type]
        want_s=True,
    )
    assert s is not None
    return y, s


@_forward.register_fake
def _(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    backend: str,
    block_size: int,
    keep_s: bool,
    weight: list[Tensor],
) -> tuple[Tensor, Tensor]:
    s_dtype = torch.float32 if precision == "split" else x.dtype
    return x.new_empty(x.shape[0], lora_B.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0], dtype=s_dtype)


@torch.library.custom_op("lora_kernels::backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    dropout_p: float,
    precision: str,
    backend: str,
    needs: list[bool],
    in_features: int,
    rank: int,
    adapter_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    block_size: int,
    weight: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_features, wanted = dy.shape[1], Needs(*needs)
    if wanted.lora_B and s is None:
        assert x is not None
        assert lora_A is not None
        with outside_autocast(dy.device.type):
            s = eager.branch(as_rows(x), lora_A, scale if scale_tensor is None else scale_tensor, None, precision)  # type: ignore[arg-type]
    base = _weight(weight, block_size, out_features, in_features, dy.dtype) if weight else None
    gradients = backward(
        _backend(dy.device, dy.dtype, precision, in_features, out_features, rank, block_size, backend),
        wanted,
        Saved(x, base, lora_A, lora_B, s, seed, scale_tensor),
        dy,
        scale,
        dropout_p,
        precision,  # type: ignore[arg-type]
        adapter_dtype,
        bias_dtype,
    )
    dx, dA, dB, db = (dy.new_empty(0) if g is None else g for g in gradients)
    return dx, dA, dB, db


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    dropout_p: float,
    precision: str,
    backend: str,
    needs: list[bool],
    in_features: int,
    rank: int,
    adapter_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    block_size: int,
    weight: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, out_features = dy.shape
    wanted = Needs(*needs)
    return (
        dy.new_empty(rows, in_features) if wanted.x else dy.new_empty(0),
        dy.new_empty(rank, in_features, dtype=adapter_dtype) if wanted.lora_A else dy.new_empty(0),
        dy.new_empty(out_features, rank, dtype=adapter_dtype) if wanted.lora_B else dy.new_empty(0),
        dy.new_empty(out_features, dtype=bias_dtype) if wanted.bias else dy.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_A, lora_B, bias, scale_tensor, scale, seed, dropout_p, precision, backend, *layout = inputs
    block_size, keep_s, weight = layout
    # The weight comes last because autograd sees each of its tensors as an argument.
    needs = Needs(*ctx.needs_input_grad[:4])
    saved = Saved.select(needs, x, None, lora_A, lora_B, output[1], seed, scale_tensor)
    # A mask would have to be drawn for it as well.
    if not keep_s and seed is None and None not in (saved.x, saved.lora_A):
        saved = saved._replace(s=None)
    ctx.save_for_backward(*saved, *(weight if needs.x else ()))  # type: ignore[misc]
    ctx.base = (block_size, len(weight))
    ctx.constants = (scale, dropout_p, precision, backend, list(needs))
    ctx.shape = (x.shape[1], lora_A.shape[0])
    ctx.dtypes = (lora_A.dtype, None if bias is None else bias.dtype)


def _compose(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | list[None] | None, ...]:
    count = len(Saved._fields)
    # Once: activation checkpointing forgets what it handed out.
    tensors = ctx.saved_tensors
    x, _, *others = tensors[:count]
    block_size, parts = ctx.base
    gradients = _backward(
        dy, x, *others, *ctx.constants, *ctx.shape, *ctx.dtypes, block_size, list(tensors[count:])
    )
    needs = ctx.constants[-1]
    dx, dA, dB, db = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (dx, dA, dB, db, *[None] * 8, [None] * parts)


_forward.register_autograd(_compose, setup_context=_setup_context)


def _weight(tensors: list[Tensor], block_size: int, out_features: int, in_features: int, dtype: torch.dtype) -> Weight:
    """The weight that was taken apart, because an operator takes nothing but tensors and numbers."""
    if block_size == 0:
        return tensors[0]
    return rebuilt(tensors, (block_size, torch.Size((out_features, in_features)), dtype))


def _backend(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    in_features: int,
    out_features: int,
    rank: int,
    block_size: int,
    name: str,
) -> Backend:
    nf4 = block_size > 0
    problem = Problem.of(device, dtype, precision, in_features, out_features, rank, nf4)  # type: ignore[arg-type]
    return choose(problem, name).backend  # type: ignore[arg-type]
