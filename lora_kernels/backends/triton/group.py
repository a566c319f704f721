"""Groups with weights of either kind. The kernels read dense ones: NF4 weights are decoded right before a launch.

All of a group's decoded weights live until its launch is made, where members one by one hold one at a time. In 16
bits, gate and up of Llama-3.1-8B take 235 MB for that long, and 940 MB in the shape of 70B; q, k and v 50 and 168.

At few rows, where products with NF4 weights decode on the fly, a group's members go one by one: a quarter of the
bytes is worth more than reading x once. dA and dB need no weight and are one launch at any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from lora_kernels.backends import BackwardInput, GroupBackend, Member, Precision, Problem
from lora_kernels.backends.triton import ahead, group_launch, nf4_launch, single, wide_ranks
from lora_kernels.backends.triton.group_operands import adapters_of
from lora_kernels.backends.triton.nf4_tiles import path_for
from lora_kernels.backends.triton.tiles import chip_of
from lora_kernels.nf4 import NF4Weight


def forward(
    x: Tensor, members: Sequence[Member], precision: Precision, want_s: bool, *, together: bool | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """group_launch.forward, where W_i is what an NF4 weight decodes to in x's dtype, bit for bit.

    Args:
        together: forced by tests and by tuning; False for one by one.
    """
    if together is None:
        together = not any(_on_the_fly(x, member, forward=True) for member in members)
    if together:
        rehearsal = partial(_rehearse_backward, x, members, precision) if want_s else None
        with ahead.followed_by(rehearsal):
            return group_launch.forward(x, _decoded(members, x), precision, want_s)
    results = [single.forward(x, *member, precision, want_s) for member in members]  # type: ignore[arg-type]
    return [y for y, _ in results], [s for _, s in results]


def backward_input(
    dys: list[Tensor],
    members: Sequence[Member],
    precision: Precision,
    want_dx: bool,
    *,
    together: bool | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """group_launch.backward_input, where W_i is what an NF4 weight decodes to in dy's dtype, bit for bit.

    Args:
        together: as in forward.
    """
    if not want_dx:
        return group_launch.backward_input(dys, members, precision, want_dx)
    if together is None:
        pairs = zip(dys, members, strict=True)
        together = not any(_on_the_fly(dy, member, forward=False) for dy, member in pairs)
    if together:
        return group_launch.backward_input(dys, _decoded(members, dys[0]), precision, want_dx)
    return one_by_one(single.backward_input, dys, members, precision)


def one_by_one(
    of_member: BackwardInput, dys: list[Tensor], members: Sequence[Member], precision: Precision
) -> tuple[Tensor, list[Tensor]]:
    """A group's dx and Ts by a function on one member."""
    dx: Tensor | None = None
    ts = []
    for dy, (weight, lora_A, lora_B, _, scale, dropout) in zip(dys, members, strict=True):
        assert lora_B is not None
        part, t = of_member(dy, weight, lora_A, lora_B, scale, dropout, precision, True)
        assert part is not None
        ts.append(t)
        dx = part if dx is None else dx.add_(part)
    assert dx is not None
    return dx, ts


def describe(problems: Sequence[Problem]) -> str | None:
    """What explain_group() says of NF4 weights, and of large ranks."""
    notes = [wide_ranks.describe(problems)]
    if any(problem.nf4 for problem in problems):
        notes.append("where its NF4 weights are decoded inside of products, member by member but for dA and dB")
    return "; ".join(note for note in notes if note is not None) or None


def _rehearse_backward(x: Tensor, members: Sequence[Member], precision: Precision) -> None:
    """The launches of a backward with every gradient."""
    lora_As, lora_Bs = adapters_of(members)
    dys = [x.new_empty(x.shape[0], lora_B.shape[0]) for lora_B in lora_Bs]
    _, ts = backward_input(dys, members, precision, True)
    narrow: list[Tensor | None] = [*ts]
    dropouts = [member.dropout for member in members]
    group_launch.backward_adapters(x, dys, narrow, narrow, dropouts, lora_As[0].dtype)


def _on_the_fly(left: Tensor, member: Member, forward: bool) -> bool:
    weight = member.weight
    return isinstance(weight, NF4Weight) and path_for(chip_of(left.device), left, weight, forward)[0] == "fly"


def _decoded(members: Sequence[Member], left: Tensor) -> list[Member]:
    """The members with dense weights in the dtype of what they are multiplied with."""
    return [
        member._replace(weight=nf4_launch.dequantize(member.weight, left.dtype))
        if isinstance(member.weight, NF4Weight)
        else member
        for member in members
    ]


GROUP = GroupBackend(group_launch.refuses, forward, backward_input, group_launch.backward_adapters, describe)
