"""What the group kernels are called with: the members' tensors in one form, and the plan of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_kernels.backends import Member, Precision
from lora_kernels.backends.triton.launch import NUMBERS_THAT_STAY
from lora_kernels.backends.triton.mask_launch import bits_of
from lora_kernels.backends.triton.tiles import (
    OnePassTiles,
    group_share_out,
    group_sharers,
    rank_block,
    share_out,
    sharers,
)
from lora_kernels.dropout import Dropout

# Of the members' ranks side by side: the columns of a share.
_MOST_JOINT = 64


class Weights(NamedTuple):
    """The weights of a group as a kernel reads them: all as [N, K] by rows, or all transposed, as [K, N] by rows."""

    stored: list[Tensor]
    by_rows: bool

    @staticmethod
    def of(members: Sequence[Member]) -> Weights:
        weights = [member.weight for member in members if isinstance(member.weight, Tensor)]
        assert len(weights) == len(members)
        if all(weight.stride(1) == 1 for weight in weights):
            return Weights(weights, True)
        if all(weight.stride(0) == 1 for weight in weights):
            return Weights([weight.T for weight in weights], False)
        # One kernel has one layout.
        return Weights([weight.contiguous() for weight in weights], True)


def adapters_of(members: Sequence[Member]) -> tuple[list[Tensor], list[Tensor]]:
    lora_As = [member.lora_A.contiguous() for member in members if member.lora_A is not None]
    lora_Bs = [member.lora_B.contiguous() for member in members if member.lora_B is not None]
    assert len(lora_As) == len(lora_Bs) == len(members)
    return lora_As, lora_Bs


def narrow_of(left: Tensor, lora_As: list[Tensor], precision: Precision) -> list[Tensor]:
    dtype = torch.float32 if precision == "split" else left.dtype
    return [torch.empty(left.shape[0], a.shape[0], dtype=dtype, device=left.device) for a in lora_As]


def biases_of(members: Sequence[Member]) -> list[Tensor | None]:
    """One for each member or for none: a kernel has them or has not, in one dtype."""
    given = [member.bias for member in members if member.bias is not None]
    if not given:
        return [None] * len(members)
    dtype = given[0].dtype if len({bias.dtype for bias in given}) == 1 else torch.float32
    biases: list[Tensor | None] = []
    for member in members:
        assert member.lora_B is not None
        if member.bias is None:
            biases.append(torch.zeros(member.lora_B.shape[0], dtype=dtype, device=member.lora_B.device))
        else:
            biases.append(member.bias.to(dtype).contiguous())
    return biases


def masks_of(dropouts: Sequence[Dropout | None], rows: int, columns: int) -> list[Tensor | None]:
    """The bits of each member's mask [rows, columns]; None where nothing is dropped."""
    assert len({None if dropout is None else dropout.p for dropout in dropouts}) <= 1, "the members of a group share dropout_p"
    return [bits_of(dropout, rows, columns) for dropout in dropouts]


def scales_of(members: Sequence[Member]) -> tuple[list[Tensor | None], list[float]]:
    """What is known of each member's scale on the device, and what on the host: their product is the scale."""
    tensors = [member.scale if isinstance(member.scale, Tensor) else None for member in members]
    return tensors, [1.0 if isinstance(member.scale, Tensor) else float(member.scale) for member in members]


@dataclass(frozen=True)
class GroupPlan:
    """What shapes and dtypes decide about a launch of the forward's or the input gradient's kernel."""

    tiles: OnePassTiles
    row_tiles: int
    programs: int
    rank_block: int
    rank_chunks: int
    k_parts: tuple[int, ...]
    shares: int
    sharers: int
    left_stays: bool

    @property
    def shared(self) -> bool:
        """Whether S is computed in shares at all, and not by every tile."""
        return self.shares + self.sharers > 0

    @property
    def joint_block(self) -> int:
        """The columns of all members' ranks side by side, a power of two."""
        return 1 << (len(self.k_parts) * self.rank_chunks * self.rank_block - 1).bit_length()

    @property
    def workspace_size(self) -> int:
        return max(self.k_parts) * self.joint_block * self.row_tiles * self.tiles.block_m

    @property
    def counters(self) -> int:
        """Enough for a set of its own for each member (forward) and for a common one (input gradient)."""
        return 1 + len(self.k_parts) * (1 + self.row_tiles * (1 + self.rank_chunks))


def plan_forward(
    M: int, K: int, Ns: Sequence[int], rank: int, precision: Precision, tiles: OnePassTiles, programs: int, alone: bool
) -> GroupPlan:
    """alone: whether S may be computed by programs that have fewer tiles."""
    row_tiles, column_tiles = triton.cdiv(M, tiles.block_m), sum(triton.cdiv(N, tiles.block_n) for N in Ns)
    block_r = rank_block(rank, precision)
    chunks = triton.cdiv(rank, block_r)
    k_tiles = triton.cdiv(K, tiles.block_k)
    # They have all members' S in one share.
    alone = alone and len(Ns) * block_r * chunks <= _MOST_JOINT
    k_parts, own = sharers(programs, row_tiles, column_tiles, k_tiles, 1) if alone else (1, 0)
    shares = 0
    if not own:
        programs = min(programs, row_tiles * column_tiles)
        k_parts, shares = share_out(programs, row_tiles, column_tiles, k_tiles, len(Ns) * chunks)
    stays = M * K <= NUMBERS_THAT_STAY
    return GroupPlan(tiles, row_tiles, programs, block_r, chunks, (k_parts,) * len(Ns), shares, own, stays)


def plan_input(
    M: int, K: int, Ns: Sequence[int], rank: int, precision: Precision, tiles: OnePassTiles, programs: int, alone: bool
) -> GroupPlan:
    """alone: as in plan_forward."""
    row_tiles, column_tiles = triton.cdiv(M, tiles.block_m), triton.cdiv(K, tiles.block_n)
    block_r = rank_block(rank, precision)
    chunks = triton.cdiv(rank, block_r)
    steps = [triton.cdiv(N, tiles.block_k) for N in Ns]
    parts, own = group_sharers(programs, row_tiles, column_tiles, steps, chunks) if alone else (1, 0)
    k_parts, shares = (parts,) * len(Ns), 0
    if not own:
        programs = min(programs, row_tiles * column_tiles)
        k_parts, shares = group_share_out(programs, row_tiles, column_tiles, steps, chunks)
    return GroupPlan(tiles, row_tiles, programs, block_r, chunks, k_parts, shares, own, M * sum(Ns) <= NUMBERS_THAT_STAY)


def up_block(columns: int, precision: Precision) -> int:
    """The columns of all ranks side by side that the input gradient's epilogue multiplies with at once."""
    return 16 if precision == "split" else min(64, 1 << (columns - 1).bit_length())
