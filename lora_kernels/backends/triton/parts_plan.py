"""The plan of a product by parts (by_parts.py), with a dense weight or one in NF4."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from lora_kernels.backends import Precision
from lora_kernels.backends.triton.tiles import rank_block


@dataclass(frozen=True)
class PartsPlan:
    """Everything about a launch that its shapes and dtypes decide."""

    block_m: int
    block_c: int
    row_tiles: int
    column_tiles: int
    parts: int
    rank_block: int
    rank_chunks: int
    s_parts: int

    @property
    def programs(self) -> int:
        return self.row_tiles * (self.s_parts * self.rank_chunks + self.column_tiles * self.parts)

    @property
    def workspace_size(self) -> int:
        shares = self.s_parts * self.rank_chunks * self.rank_block
        tiles = self.column_tiles * self.parts * self.block_c if self.parts > 1 else 0
        return self.row_tiles * self.block_m * (shares + tiles)

    @property
    def counters(self) -> int:
        return 3 + self.row_tiles * (1 + self.rank_chunks + self.column_tiles)


def plan_by_parts(
    M: int, C: int, block_m: int, block_c: int, parts: int, s_parts: int, R: int, precision: Precision
) -> PartsPlan:
    """The plan for an output [M, C] whose reduction is cut into `parts`, and that of S into `s_parts`."""
    block_r = rank_block(R, precision)
    return PartsPlan(
        block_m,
        block_c,
        triton.cdiv(M, block_m),
        triton.cdiv(C, block_c),
        parts,
        block_r,
        triton.cdiv(R, block_r),
        s_parts,
    )
