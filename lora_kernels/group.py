"""lora_linear_group: layers that read the same x, in one call and one node of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import native
from lora_kernels.autograd import as_input, as_matrix, as_rows, with_leading
from lora_kernels.autograd_group import LoRAGroupFunction, Plan, forward, leaves_of
from lora_kernels.backends import Member
from lora_kernels.dispatch import BackendName, BackendRefused, Choice, requested
from lora_kernels.dispatch_group import GroupChoice, group_choice
from lora_kernels.dropout import Dropout
from lora_kernels.functional import _cached_choice, _check, _require, _scale, _unify_dtypes
from lora_kernels.weights import Weight


class GroupMember(NamedTuple):
    """One layer of a group: the arguments of lora_linear that are its own."""

    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None


Members = Sequence[tuple[Any, ...]]
_FORM = "(weight, lora_A, lora_B, scaling, bias)"


def lora_linear_group(
    x: Tensor,
    members: Members,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> list[Tensor]:
    """Linear layers with low-rank adapters that read the same x, in one pass over it.

        y_i = x W_i^T + scaling_i * (D_i(x) A_i^T) B_i^T + b_i

    The same as lora_linear of one member after the other, in their order, masks included: every D_i is a draw of
    its own. What is shared is the work: x is read once, and dx is one sum over the members. An output that is
    not used costs its forward and nothing in the backward.

    Args:
        x: [..., K], as for lora_linear.
        members: one or more of (weight, lora_A, lora_B, scaling, bias), or GroupMember, of which the last two
            may be left out. Each as for lora_linear, with its own N, rank and kind of weight.
        dropout_p, training, backend: as for lora_linear; one for all members.
    Returns:
        The y_i, [..., N_i] each, in the order of the members.
    Raises:
        ValueError, TypeError: as lora_linear, naming the member, as "members[1]: lora_A had ..."; or members is
            empty or not a sequence of such tuples.
        RuntimeError: the backend that was named cannot run a member; or a backward is differentiated again.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    name = requested(backend)
    compiling = torch.compiler.is_compiling()
    learn = not compiling and native.enabled
    given = (x, members, dropout_p, training, name)
    if learn and native.group is not None:
        found = native.group(*given)
        if isinstance(found, list):
            return found
        learn = found is None
    layers = members_of(members)
    names = [f"members[{i}]" for i in range(len(layers))]
    x, operands, choices = checked(x, layers, names, dropout_p, training, name)
    if compiling:
        from lora_kernels.compiled_group import apply

        return [as_given(y, x) for y in apply(as_rows(as_matrix(x)), operands, name)]
    plan, rows = group_choice(choices).plan, as_input(x)
    with native.noting(learn, plan.backends[0], rows) as made:
        ys = _compute(plan, rows, operands)
    native.learn_group(given, made, plan, operands)
    return [with_leading(y, x.shape) for y in ys]


def _compute(plan: Plan, x: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """Each member's y, with a node where anything may be differentiated."""
    if torch.is_grad_enabled():
        return [*LoRAGroupFunction.apply(x, plan, members, *leaves_of(members))]  # type: ignore[no-untyped-call]
    return [with_leading(y, x.shape) for y in forward(plan, as_matrix(x), members, [False] * len(members))[0]]


def explain_group(
    x: Tensor,
    members: Members,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> GroupChoice:
    """Whether lora_linear_group would take these arguments as one group, or why member by member, and on what.

    Takes the arguments of lora_linear_group and raises what it raises; computes nothing. Print the result.
    """
    given = members_of(members)
    names = [f"members[{i}]" for i in range(len(given))]
    return group_choice(checked(x, given, names, dropout_p, False, requested(backend))[2])


def members_of(members: Members) -> list[GroupMember]:
    """The members as such, or an error that says which of them is none."""
    if not isinstance(members, (list, tuple)):
        raise TypeError(f"members was a {type(members).__name__}, but must be a list or a tuple")
    if not members:
        raise ValueError("members was empty, but must have at least one member")
    return [member_of(member, f"members[{i}]") for i, member in enumerate(members)]


def member_of(member: object, name: str) -> GroupMember:
    """One member by the name that errors give it."""
    if not isinstance(member, tuple):
        raise TypeError(f"{name} was a {type(member).__name__}, but must be a tuple {_FORM}")
    if not 3 <= len(member) <= len(GroupMember._fields):
        raise ValueError(
            f"{name} had {len(member)} elements, but must be {_FORM}, of which the last two may be left out"
        )
    return GroupMember(*member)


def checked(
    x: Tensor,
    members: Sequence[GroupMember],
    names: Sequence[str],
    dropout_p: float,
    training: bool,
    backend: BackendName,
) -> tuple[Tensor, list[Member], list[Choice]]:
    """x and the members in the dtypes in which they meet, each with a mask of its own; and each member's choice.

    While torch.compile traces there are no choices: they are made when the operator runs.
    """
    operands, choices = [], []
    for member, name in zip(members, names, strict=True):
        try:
            x, operand, choice = _checked_member(x, member, dropout_p, training, backend)
        except BackendRefused as error:
            raise BackendRefused(error.name, f"{name}: {error.reason}") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        operands.append(operand)
        if choice is not None:
            choices.append(choice)
    # Drawn when all is known to fit, in the order in which calls of lora_linear would draw.
    p = float(dropout_p) if training else 0.0
    # One by one: torch.compile of PyTorch 2.8 looks into neither _replace nor slices of named tuples.
    masked = [Member(w, A, B, bias, scale, Dropout.draw(p, x.device)) for w, A, B, bias, scale, _ in operands]
    return x, masked, choices


def _checked_member(
    x: Tensor, member: GroupMember, dropout_p: float, training: bool, backend: BackendName
) -> tuple[Tensor, Member, Choice | None]:
    weight, lora_A, lora_B, scaling, bias = member
    _require(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    x, weight, lora_A, lora_B, bias, precision = _unify_dtypes(x, weight, lora_A, lora_B, bias)
    choice = None
    if torch.compiler.is_compiling():
        _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    else:
        choice = _cached_choice(x, weight, lora_A, lora_B, bias, scaling, dropout_p, precision, backend)
    scale = _scale(scaling, float(dropout_p) if training else 0.0)
    return x, Member(weight, lora_A, lora_B, bias, scale, None), choice


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """y, [M, N], with the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
