"""Gradients of a gated MLP as one node: down(act(gate(x)) * up(x)), where gate and up are a group.

needs gradient            computes            keeps from the forward
anything before h         dh, dg, du          g, u, and of the down projection what its x needs
down's lora_A             T, h once more      g, u, lora_B
the rest                  as in autograd.py and autograd_group.py

h = act(g) * u is never kept: the pass that makes dg and du from dh makes it again. Where hooks take what is saved, h
and the down projection are computed after that: deferred.py says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import autograd, autograd_group
from lora_kernels.autograd import Needs, Saved, as_matrix, as_rows, once, outside_autocast, with_leading
from lora_kernels.autograd_group import (
    Constants,
    Gradients,
    GroupSaved,
    Plan,
    backward_member,
    leaves_of,
    needs_of,
    saved_of,
)
from lora_kernels.backends import Activation, Backend, GatedBackend, Member, Precision
from lora_kernels.backends.eager import GATED
from lora_kernels.deferred import Deferred, applied


class GatedPlan(NamedTuple):
    """How a gated MLP runs: gate and up as a group, h, and the down projection on it."""

    group: Plan
    activation: Activation
    gated: GatedBackend
    down: Backend
    precision: Precision

    @staticmethod
    def of(group: Plan, activation: Activation, down: Backend, precision: Precision) -> GatedPlan:
        """With the elementwise part of the down projection's backend; PyTorch's, where it has none."""
        return GatedPlan(group, activation, down.gated or GATED, down, precision)


def forward(plan: GatedPlan, x: Tensor, members: Sequence[Member]) -> Tensor:
    """y, where nothing is differentiated."""
    (g, u), _ = autograd_group.forward(plan.group, as_matrix(x), members[:2], [False] * 2)
    return with_leading(_down(plan, g, u, members[2], want_s=False)[0], x.shape)


def gated_mlp(plan: GatedPlan, x: Tensor, members: Sequence[Member]) -> Tensor:
    """GatedMLPFunction's y, with its node."""
    return applied(GatedMLPFunction, x, plan, members, *leaves_of(members))


def _down(plan: GatedPlan, g: Tensor, u: Tensor, member: Member, want_s: bool) -> tuple[Tensor, Tensor | None]:
    h = plan.gated.forward(g, u, plan.activation)
    return autograd.forward(plan.down, h, *member, plan.precision, want_s)  # type: ignore[arg-type]


class GatedMLPFunction(torch.autograd.Function):
    """y = down(act(gate(x)) * up(x)) on an x as autograd.as_input gives it.

    Behind all else come lora_A, lora_B and bias of gate, up and down, for autograd to see.
    """

    @staticmethod
    def forward(
        ctx: Any,
        later: Deferred | None,
        x: Tensor,
        plan: GatedPlan,
        members: Sequence[Member],
        *leaves: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        *group_needs, down = needs_of(wanted[1], wanted[4:])
        needs = [*group_needs, down._replace(x=any(flag for need in group_needs for flag in need))]
        wanted_s = [need.lora_B for need in group_needs]
        (g, u), ss = autograd_group.forward(plan.group, as_matrix(x), members[:2], wanted_s)
        product = partial(_down, plan, g, u, members[2], down.lora_B)
        y, s = product() if later is None else (later(product, x, _out_features(members[2])), None)
        group, ctx.layout = GroupSaved.select(group_needs, x, members[:2], ss).flat()
        own, ctx.form = saved_of(needs[2], members[2], s).flat()
        kept = (g, u) if needs[2].x or needs[2].lora_A else (None, None)
        ctx.save_for_backward(*kept, *group, *own)
        ctx.split = len(group) + 2
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.needs, ctx.later = plan, needs, later
        precisions = (*plan.group.precisions, plan.precision)
        ctx.constants = [Constants.of(member, p) for member, p in zip(members, precisions, strict=True)]
        return with_leading(y, x.shape)

    @staticmethod
    @once
    def backward(ctx: Any, tensors: Sequence[Tensor | None], dy: Tensor) -> tuple[Tensor | None, ...]:
        g, u, *others = tensors
        saved = Saved.of(others[ctx.split - 2 :], ctx.form)
        if ctx.later is not None:
            saved = saved._replace(s=ctx.later.s())
        group = GroupSaved.of(others[: ctx.split - 2], ctx.layout)
        dx, gradients = backward(ctx.plan, ctx.needs, group, saved, g, u, dy, ctx.constants)
        return (None, dx, None, None, *(t for gradient in gradients for t in gradient))


def backward(
    plan: GatedPlan,
    needs: Sequence[Needs],
    group: GroupSaved,
    saved: Saved,
    g: Tensor | None,
    u: Tensor | None,
    dy: Tensor,
    constants: Sequence[Constants],
) -> tuple[Tensor | None, list[Gradients]]:
    """dx, and dA, dB and db of gate, up and down, each None where it is not needed.

    dy and x have any number of leading dimensions, which dx has too; g and u are matrices.
    """
    dgu, down = _through_down(plan, needs[2], saved, as_rows(as_matrix(dy)), g, u, constants[2])
    dx: Tensor | None = None
    gradients: list[Gradients] = [(None, None, None)] * 2
    if dgu is not None:
        group = group._replace(x=None if group.x is None else as_matrix(group.x))
        dx, gradients = autograd_group.backward(plan.group, needs[:2], group, dgu, constants[:2])
    return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), [*gradients, down]


def _out_features(member: Member) -> int:
    assert member.weight is not None
    return member.weight.shape[0]


def _through_down(
    plan: GatedPlan, needs: Needs, saved: Saved, dy: Tensor, g: Tensor | None, u: Tensor | None, constants: Constants
) -> tuple[tuple[Tensor, Tensor] | None, Gradients]:
    """dg and du where they are needed, and the down projection's dA, dB and db."""
    dgu = dh = h = t = dA = dB = None
    member = backward_member(saved, constants)
    with outside_autocast(dy.device.type):
        if needs.x or needs.lora_A:
            weight, lora_A, lora_B, _, scale, dropout = member
            assert lora_B is not None
            dh, t = plan.down.backward_input(dy, weight, lora_A, lora_B, scale, dropout, constants.precision, needs.x)
        if dh is not None:
            assert g is not None and u is not None
            *dgu, h = plan.gated.backward(dh, g, u, plan.activation, needs.lora_A)
        elif needs.lora_A:
            assert g is not None and u is not None
            h = plan.gated.forward(g, u, plan.activation)
        if needs.lora_A or needs.lora_B:
            wanted = t if needs.lora_A else None
            # Hooks for saved tensors may have brought it back with other strides; g and u may have any.
            s = None if saved.s is None else saved.s.contiguous()
            dA, dB = plan.down.backward_adapters(h, dy, s, wanted, member.dropout, constants.adapter_dtype)
        db = dy.sum(0, dtype=constants.bias_dtype) if needs.bias else None
    return None if dgu is None else (dgu[0], dgu[1]), (dA, dB, db)
