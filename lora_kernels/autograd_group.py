"""Gradients of a group as one node: what they are composed of, and what is kept for them.

What each member needs and keeps is the table of autograd.py; x is kept once, for whichever lora_A needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import autograd
from lora_kernels.autograd import Needs, Saved, as_matrix, as_rows, once, outside_autocast, split_scale, with_leading
from lora_kernels.backends import Backend, GroupBackend, Member, Precision
from lora_kernels.dropout import Dropout
from lora_kernels.nf4_codec import Form

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Layout = tuple[tuple[int, Form | None], ...]


class Plan(NamedTuple):
    """How a group runs: through `group`, or where that is None member by member, each on its own backend."""

    group: GroupBackend | None
    backends: tuple[Backend, ...]
    precisions: tuple[Precision, ...]


class Constants(NamedTuple):
    """What a member's backward reads beside its tensors."""

    scale: float
    dropout_p: float
    precision: Precision
    adapter_dtype: torch.dtype
    bias_dtype: torch.dtype | None

    @staticmethod
    def of(member: Member, precision: Precision) -> Constants:
        assert member.lora_A is not None
        p = 0.0 if member.dropout is None else member.dropout.p
        bias_dtype = None if member.bias is None else member.bias.dtype
        return Constants(split_scale(member.scale)[0], p, precision, member.lora_A.dtype, bias_dtype)


class GroupSaved(NamedTuple):
    """What the backward of a group may read. The x of the members stands here alone."""

    x: Tensor | None
    members: tuple[Saved, ...]

    @staticmethod
    def select(needs: Sequence[Needs], x: Tensor, members: Sequence[Member], ss: Sequence[Tensor | None]) -> GroupSaved:
        kept = x if any(need.lora_A for need in needs) else None
        return GroupSaved(
            kept, tuple(saved_of(need, member, s) for need, member, s in zip(needs, members, ss, strict=True))
        )

    def flat(self) -> tuple[tuple[Tensor | None, ...], Layout]:
        """All as tensors, for autograd to watch; and where each member's end, and the form of its NF4 weight."""
        parts = [saved.flat() for saved in self.members]
        tensors = (self.x, *(t for part, _ in parts for t in part))
        return tensors, tuple((len(part), form) for part, form in parts)

    @staticmethod
    def of(tensors: Sequence[Tensor | None], layout: Layout) -> GroupSaved:
        """What `flat` made flat."""
        members, start = [], 1
        for count, form in layout:
            members.append(Saved.of(tensors[start : start + count], form))
            start += count
        return GroupSaved(tensors[0], tuple(members))


def saved_of(needs: Needs, member: Member, s: Tensor | None) -> Saved:
    """What one member's backward may read, but for x."""
    assert member.lora_A is not None and member.lora_B is not None
    seed = None if member.dropout is None else member.dropout.seed
    scale = split_scale(member.scale)[1]
    # `select` asks for an x, which the group keeps.
    saved = Saved.select(needs, member.lora_A, member.weight, member.lora_A, member.lora_B, s, seed, scale)
    return saved._replace(x=None)


def forward(
    plan: Plan, x: Tensor, members: Sequence[Member], want_s: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each member's y, and its S where it is wanted. x is as for autograd.forward."""
    if plan.group is not None:
        with outside_autocast(x.device.type):
            ys, ss = plan.group.forward(x, members, plan.precisions[0], any(want_s))
        return ys, [s if wanted else None for s, wanted in zip(ss, want_s, strict=True)]
    results = [
        autograd.forward(backend, x, *member, precision, wanted)  # type: ignore[arg-type]
        for backend, member, precision, wanted in zip(plan.backends, members, plan.precisions, want_s, strict=True)
    ]
    return [y for y, _ in results], [s for _, s in results]


def backward(
    plan: Plan,
    needs: Sequence[Needs],
    saved: GroupSaved,
    dys: Sequence[Tensor | None],
    constants: Sequence[Constants],
) -> tuple[Tensor | None, list[Gradients]]:
    """dx, and each member's dA, dB and db; None where it is not needed, or no output that leads to it has a dy.

    The dys and x have any number of leading dimensions, which dx has too.
    """
    leading = next(dy.shape[:-1] for dy in dys if dy is not None)
    if len(leading) != 1:
        dys = [None if dy is None else as_matrix(dy) for dy in dys]
        saved = saved._replace(x=None if saved.x is None else as_matrix(saved.x))
    dx, gradients = _backward_of_rows(plan, needs, saved, dys, constants)
    return None if dx is None else dx.view(*leading, dx.shape[1]), gradients


def _backward_of_rows(
    plan: Plan,
    needs: Sequence[Needs],
    saved: GroupSaved,
    dys: Sequence[Tensor | None],
    constants: Sequence[Constants],
) -> tuple[Tensor | None, list[Gradients]]:
    given = [dy for dy in dys if dy is not None]
    # The functions on a group take all members or none.
    alike = needs[0].x or len({need.lora_A for need in needs}) == 1
    if plan.group is not None and alike and len(given) == len(dys):
        with outside_autocast(given[0].device.type):
            return _together(plan.group, needs, saved, [as_rows(dy) for dy in given], constants)
    dx: Tensor | None = None
    gradients: list[Gradients] = []
    for backend, need, kept, dy, constant in zip(plan.backends, needs, saved.members, dys, constants, strict=True):
        if dy is None:
            gradients.append((None, None, None))
            continue
        kept = kept._replace(x=saved.x if need.lora_A else None)
        part, *rest = autograd.backward(backend, need, kept, dy, *constant)
        gradients.append((rest[0], rest[1], rest[2]))
        if part is not None:
            dx = part if dx is None else dx.add_(part)
    return dx, gradients


def _together(
    group: GroupBackend,
    needs: Sequence[Needs],
    saved: GroupSaved,
    dys: list[Tensor],
    constants: Sequence[Constants],
) -> tuple[Tensor | None, list[Gradients]]:
    members = [backward_member(kept, constant) for kept, constant in zip(saved.members, constants, strict=True)]
    dropouts = [member.dropout for member in members]
    dx: Tensor | None = None
    ts: Sequence[Tensor | None] = [None] * len(dys)
    dAs = dBs = ts
    if needs[0].x or needs[0].lora_A:
        dx, ts = group.backward_input(dys, members, constants[0].precision, needs[0].x)
    if any(need.lora_A or need.lora_B for need in needs):
        wanted = [t if need.lora_A else None for t, need in zip(ts, needs, strict=True)]
        # Hooks for saved tensors may have brought them back with other strides.
        x = None if saved.x is None else as_rows(saved.x)
        ss = [None if kept.s is None else kept.s.contiguous() for kept in saved.members]
        dtype = constants[0].adapter_dtype
        dAs, dBs = group.backward_adapters(x, dys, ss, wanted, dropouts, dtype)
    dbs = [
        dy.sum(0, dtype=constant.bias_dtype) if need.bias else None
        for dy, need, constant in zip(dys, needs, constants, strict=True)
    ]
    return dx, list(zip(dAs, dBs, dbs, strict=True))


def backward_member(saved: Saved, constants: Constants) -> Member:
    """The member as a backend's backward takes it."""
    scale = constants.scale if saved.scale is None else saved.scale
    dropout = None if saved.seed is None else Dropout(constants.dropout_p, saved.seed)
    return Member(saved.weight, saved.lora_A, saved.lora_B, None, scale, dropout)


class LoRAGroupFunction(torch.autograd.Function):
    """LoRALinearFunction's equation for each member of a group, on one x as autograd.as_input gives it.

    Behind x, the plan and the members come lora_A, lora_B and bias of each, for autograd to see.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Plan, members: Sequence[Member], *leaves: Tensor | None
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad
        needs = needs_of(wanted[0], wanted[3:])
        ys, ss = forward(plan, as_matrix(x), members, [need.lora_B for need in needs])
        tensors, ctx.layout = GroupSaved.select(needs, x, members, ss).flat()
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.needs = plan, needs
        ctx.constants = [Constants.of(member, p) for member, p in zip(members, plan.precisions, strict=True)]
        return tuple(with_leading(y, x.shape) for y in ys)

    @staticmethod
    @once
    def backward(ctx: Any, tensors: Sequence[Tensor | None], *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = GroupSaved.of(tensors, ctx.layout)
        dx, gradients = backward(ctx.plan, ctx.needs, saved, dys, ctx.constants)
        return (dx, None, None, *(g for gradient in gradients for g in gradient))


def needs_of(x: bool, leaves: Sequence[bool]) -> list[Needs]:
    """What is needed of each member, by the flags of its lora_A, lora_B and bias in a row."""
    return [Needs(x, *leaves[i : i + 3]) for i in range(0, len(leaves), 3)]


def leaves_of(members: Sequence[Member]) -> list[Tensor | None]:
    """What autograd must see of the members, in the order of `needs_of`."""
    return [t for member in members for t in (member.lora_A, member.lora_B, member.bias)]
