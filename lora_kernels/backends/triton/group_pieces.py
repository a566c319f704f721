"""Device functions of the group kernels: what belongs to a member, and which member something belongs to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def member_number(member, first, second, third, MEMBERS: tl.constexpr):
    """The member's own of what each has one: numbers or pointers."""
    chosen = first
    if MEMBERS > 1:
        chosen = tl.where(member == 1, second, chosen)
    if MEMBERS > 2:
        chosen = tl.where(member == 2, third, chosen)
    return chosen


@triton.jit
def member_ref(member, first, second, third, MEMBERS: tl.constexpr):
    """The member's own descriptor (or pointer): the choice is one of addresses, and copies none."""
    chosen = first
    if member == 1:
        chosen = second
    if MEMBERS > 2:
        if member == 2:
            chosen = third
    return chosen


@triton.jit
def member_of(index, length0, length1, MEMBERS: tl.constexpr):
    """(member, its first index), where the members' indices follow one another; the first two have these many."""
    member, first = 0, 0
    if MEMBERS > 1:
        beyond = index >= length0
        member, first = beyond.to(tl.int32), tl.where(beyond, length0, 0)
    if MEMBERS > 2:
        beyond = index >= length0 + length1
        member, first = tl.where(beyond, 2, member), tl.where(beyond, length0 + length1, first)
    return member, first
