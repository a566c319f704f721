"""Groups and gated MLPs as torch.compile takes them: as operators, without a graph break.

As compiled.py does for one layer. A gated MLP is the operator of its gate and up, PyTorch's own operations for h,
which the compiler makes again in the backward where it finds that cheaper than keeping it, and the operator of one
layer for the down projection.

An operator takes lists of tensors, never lists with gaps: biases, scales and weights come as those that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import compiled
from lora_kernels.autograd import Saved, as_rows, split_scale
from lora_kernels.autograd_group import Constants, GroupSaved, Plan, backward, forward, needs_of
from lora_kernels.backends import Activation, Member, Precision, Problem
from lora_kernels.backends.eager import gated_product
from lora_kernels.dispatch import BackendName, choose
from lora_kernels.dispatch_group import group_choice
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.nf4_codec import Form

# Of each member: the block size of its NF4 weight (0 for a dense one), how many tensors its weight is, whether it has
# a bias (_BASE or _FLOAT32, by its dtype) and whether its scale is a tensor.
_FIELDS = 4
_BASE, _FLOAT32 = 1, 2


def apply(x: Tensor, members: Sequence[Member], backend: BackendName) -> list[Tensor]:
    """What LoRAGroupFunction.apply computes, as a traceable operator."""
    weights, biases, scale_tensors, seeds = [], [], [], []
    As, Bs, scales, layout, p = [], [], [], [], 0.0
    for weight, lora_A, lora_B, bias, scale, dropout in members:
        assert weight is not None and lora_A is not None and lora_B is not None
        if isinstance(weight, NF4Weight):
            parts, block_size = list(weight.tensors()), weight.block_size
        else:
            parts, block_size = [weight], 0
        number, scale_tensor = split_scale(scale)
        bias_code = 0 if bias is None else _BASE if bias.dtype == x.dtype else _FLOAT32
        layout += [block_size, len(parts), bias_code, int(scale_tensor is not None)]
        weights += parts
        As.append(lora_A)
        Bs.append(lora_B)
        scales.append(number)
        biases += [] if bias is None else [bias]
        scale_tensors += [] if scale_tensor is None else [scale_tensor]
        if dropout is not None:
            seeds.append(dropout.seed)
            p = dropout.p
    precisions = [_precision(x, member) for member in members]
    results: list[Tensor] = _forward(
        x, As, Bs, biases, weights, scale_tensors, seeds, scales, layout, p, ",".join(precisions), backend
    )
    return results[: len(members)]


def apply_gated(x: Tensor, members: Sequence[Member], activation: Activation, backend: BackendName) -> Tensor:
    """What GatedMLPFunction.apply computes, of traceable operators."""
    g, u = apply(x, members[:2], backend)
    h, down = gated_product(g, u, activation), members[2]
    precision = _precision(x, down)
    # Most blocks end here. In float32, S would cost more than a library's narrow product.
    return compiled.apply(h, *down, precision, backend, keep_s=precision == "split")  # type: ignore[arg-type]


@torch.library.custom_op("lora_kernels::group_forward", mutates_args=())
def _forward(
    x: Tensor,
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    weights: list[Tensor],
    scale_tensors: list[Tensor],
    seeds: list[Tensor],
    scales: list[float],
    layout: list[int],
    dropout_p: float,
    precisions: str,
    backend: str,
) -> list[Tensor]:
    members = _members(x, lora_As, lora_Bs, biases, weights, scale_tensors, seeds, scales, layout, dropout_p)
    shapes = [(lora_B.shape[0], lora_B.shape[1]) for lora_B in lora_Bs]
    plan = _plan(x, x.shape[1], shapes, layout, precisions, backend)
    ys, ss = forward(plan, as_rows(x), members, [True] * len(members))
    return [*ys, *(s for s in ss if s is not None)]


@_forward.register_fake
def _(
    x: Tensor,
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    weights: list[Tensor],
    scale_tensors: list[Tensor],
    seeds: list[Tensor],
    scales: list[float],
    layout: list[int],
    dropout_p: float,
    precisions: str,
    backend: str,
) -> list[Tensor]:
    dtypes = [torch.float32 if precision == "split" else x.dtype for precision in precisions.split(",")]
    ys = [x.new_empty(x.shape[0], lora_B.shape[0]) for lora_B in lora_Bs]
    return ys + [x.new_empty(x.shape[0], A.shape[0], dtype=d) for A, d in zip(lora_As, dtypes, strict=True)]


@torch.library.custom_op("lora_kernels::group_backward", mutates_args=())
def _backward(
    dys: list[Tensor],
    saved: list[Tensor],
    present: list[bool],
    needs: list[bool],
    in_features: int,
    ranks: list[int],
    scales: list[float],
    layout: list[int],
    dropout_p: float,
    precisions: str,
    backend: str,
) -> list[Tensor]:
    wanted = needs_of(needs[0], needs[1:])
    shapes = [(dy.shape[1], rank) for dy, rank in zip(dys, ranks, strict=True)]
    plan = _plan(dys[0], in_features, shapes, layout, precisions, backend)
    tensors = iter(saved)
    filled = [next(tensors) if there else None for there in present]
    forms: list[tuple[int, Form | None]] = []
    for (block_size, parts, _, _), dy in zip(_each(layout), dys, strict=True):
        nf4 = block_size > 0 and needs[0]
        form = (block_size, torch.Size((dy.shape[1], in_features)), dy.dtype) if nf4 else None
        forms.append((len(Saved._fields) + (parts if nf4 else 0), form))
    constants = [
        Constants(scale, dropout_p, precision, adapter_dtype, bias_dtype)  # type: ignore[arg-type]
        for scale, precision, (adapter_dtype, bias_dtype) in zip(
            scales, precisions.split(","), _dtypes(dys[0].dtype, layout, precisions), strict=True
        )
    ]
    dx, gradients = backward(plan, wanted, GroupSaved.of(filled, tuple(forms)), dys, constants)
    flat = (dx, *(g for gradient in gradients for g in gradient))
    return [dys[0].new_empty(0) if g is None else g for g in flat]


@_backward.register_fake
def _(
    dys: list[Tensor],
    saved: list[Tensor],
    present: list[bool],
    needs: list[bool],
    in_features: int,
    ranks: list[int],
    scales: list[float],
    layout: list[int],
    dropout_p: float,
    precisions: str,
    backend: str,
) -> list[Tensor]:
    first = dys[0]
    results = [first.new_empty(first.shape[0], in_features) if needs[0] else first.new_empty(0)]
    dtypes = _dtypes(first.dtype, layout, precisions)
    for need, dy, rank, (adapter, bias) in zip(needs_of(needs[0], needs[1:]), dys, ranks, dtypes, strict=True):
        shapes = ((rank, in_features), (dy.shape[1], rank), (dy.shape[1],))
        for flag, shape, dtype in zip(need[1:], shapes, (adapter, adapter, bias), strict=True):
            results.append(first.new_empty(*shape, dtype=dtype) if flag else first.new_empty(0))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, lora_As, lora_Bs, biases, weights, scale_tensors, seeds, scales, layout, dropout_p, precisions, backend = inputs
    members = _members(x, lora_As, lora_Bs, biases, weights, scale_tensors, seeds, scales, layout, dropout_p)
    # Autograd sees each tensor of a list as an argument, and so does this.
    wanted = iter(ctx.needs_input_grad)
    needs_x = next(wanted)
    As, Bs = [next(wanted) for _ in lora_As], [next(wanted) for _ in lora_Bs]
    flags = [[A, B, member.bias is not None and next(wanted)] for A, B, member in zip(As, Bs, members, strict=True)]
    needs = [needs_x, *(flag for three in flags for flag in three)]
    saved, _ = GroupSaved.select(needs_of(needs_x, needs[1:]), x, members, output[len(members) :]).flat()
    ctx.save_for_backward(*(t for t in saved if t is not None))
    ranks = [lora_A.shape[0] for lora_A in lora_As]
    ctx.constants = ([t is not None for t in saved], needs, x.shape[1], ranks, scales, layout, dropout_p)
    ctx.names = (precisions, backend)
    ctx.counts = [len(tensors) for tensors in (biases, weights, scale_tensors, seeds)]


def _compose(ctx: Any, outputs: list[Tensor]) -> tuple[Any, ...]:
    needs, ranks = ctx.constants[1], ctx.constants[3]
    count = len(ranks)
    results = _backward(outputs[:count], list(ctx.saved_tensors), *ctx.constants, *ctx.names)
    dx, *rest = (g if needed else None for g, needed in zip(results, needs, strict=True))
    biases = [rest[3 * i + 2] for i, (_, _, bias, _) in enumerate(_each(ctx.constants[5])) if bias]
    nothing = [[None] * length for length in ctx.counts[1:]]
    return (dx, rest[0::3], rest[1::3], biases, *nothing, *(None,) * 5)


_forward.register_autograd(_compose, setup_context=_setup_context)


def _members(
    x: Tensor,
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    biases: list[Tensor],
    weights: list[Tensor],
    scale_tensors: list[Tensor],
    seeds: list[Tensor],
    scales: list[float],
    layout: list[int],
    dropout_p: float,
) -> list[Member]:
    """The members that `apply` took apart."""
    parts, rest, tensors = iter(weights), iter(biases), iter(scale_tensors)
    dropouts = [Dropout(dropout_p, seed) for seed in seeds]
    members = []
    for i, (block_size, count, bias, scale_is_tensor) in enumerate(_each(layout)):
        own = [next(parts) for _ in range(count)]
        shape = torch.Size((lora_Bs[i].shape[0], x.shape[1]))
        weight = NF4Weight.of(own, (block_size, shape, x.dtype)) if block_size else own[0]
        scale = next(tensors) if scale_is_tensor else scales[i]
        dropout = dropouts[i] if dropouts else None
        members.append(Member(weight, lora_As[i], lora_Bs[i], next(rest) if bias else None, scale, dropout))
    return members


def _each(layout: list[int]) -> list[tuple[int, int, int, int]]:
    fields = [layout[i : i + _FIELDS] for i in range(0, len(layout), _FIELDS)]
    return [(block_size, parts, bias, scale) for block_size, parts, bias, scale in fields]


def _dtypes(base: torch.dtype, layout: list[int], precisions: str) -> list[tuple[torch.dtype, torch.dtype | None]]:
    """Of each member, that of its adapter and that of its bias."""
    of_bias = {0: None, _BASE: base, _FLOAT32: torch.float32}
    adapters = [base if precision == "native" else torch.float32 for precision in precisions.split(",")]
    return [(adapter, of_bias[bias]) for adapter, (_, _, bias, _) in zip(adapters, _each(layout), strict=True)]


def _plan(
    t: Tensor, in_features: int, shapes: list[tuple[int, int]], layout: list[int], precisions: str, backend: str
) -> Plan:
    choices = []
    for (out_features, rank), (block_size, *_), precision in zip(
        shapes, _each(layout), precisions.split(","), strict=True
    ):
        problem = Problem.of(t.device, t.dtype, precision, in_features, out_features, rank, block_size > 0)  # type: ignore[arg-type]
        choices.append(choose(problem, backend))  # type: ignore[arg-type]
    return group_choice(choices).plan


def _precision(x: Tensor, member: Member) -> Precision:
    """How a member's adapter meets its base, in whose dtype x is."""
    assert member.lora_A is not None
    if member.lora_A.dtype == x.dtype:
        return "native"
    return "rounded" if torch.is_autocast_enabled(x.device.type) else "split"
