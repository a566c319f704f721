"""How a product with an NF4 weight runs: which path, and which configuration on the path that decodes on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_kernels.backends import NF4Path
from lora_kernels.backends.triton.tiles import INTERPRETER, Chip
from lora_kernels.nf4 import NF4Weight

# "fly": decoded inside of the product. "scratch": decoded by a launch of its own, right before a dense product.
Path = Literal["fly", "scratch"]
_WORDS: dict[Path, str] = {"fly": "inside of the product", "scratch": "by a launch of its own"}


@dataclass(frozen=True)
class NF4Tiles:
    """A configuration of the product that decodes on the fly: steps of block_l, block_c columns of the output.

    resident: programs that a multiprocessor holds at once, if max_registers are what a thread may take.
    """

    block_m: int
    block_c: int
    block_l: int
    num_warps: int
    num_stages: int
    resident: int
    max_registers: int | None = None


@dataclass(frozen=True)
class FlyTable:
    """Configurations by block_m, and M up to which they cost less than a scratch copy and a dense product."""

    most_rows: int
    tiles: tuple[NF4Tiles, ...]


# By whether the product is the forward one.
_HOPPER = {
    True: FlyTable(
        256,
        (
            NF4Tiles(16, 128, 64, 4, 4, 5, 96),
            NF4Tiles(32, 64, 128, 4, 3, 5, 96),
            NF4Tiles(64, 128, 128, 8, 3, 2),
            NF4Tiles(64, 64, 128, 4, 3, 3),
            NF4Tiles(128, 128, 128, 8, 3, 1),
        ),
    ),
    False: FlyTable(
        128,
        (
            NF4Tiles(16, 64, 128, 4, 4, 5, 96),
            NF4Tiles(32, 64, 128, 4, 3, 4, 128),
            NF4Tiles(64, 64, 128, 4, 3, 2),
            NF4Tiles(128, 128, 128, 8, 3, 1),
        ),
    ),
}
# Elsewhere the tensor cores take 16 rows of W from each warp, and with wider tiles of x Triton has several warps decode
# the same weights.
_OTHERS = {
    True: FlyTable(32, (NF4Tiles(16, 64, 128, 4, 4, 6), NF4Tiles(32, 64, 128, 4, 3, 4))),
    False: FlyTable(32, (NF4Tiles(16, 128, 64, 4, 4, 4), NF4Tiles(32, 128, 64, 4, 4, 3))),
}
_NOWHERE = FlyTable(0, ())
_INTERPRETED = FlyTable(64, (NF4Tiles(16, 32, 64, 4, 2, 1), NF4Tiles(32, 64, 32, 4, 2, 1)))


def fly_table(chip: Chip, forward: bool) -> FlyTable:
    if chip == INTERPRETER:
        return _INTERPRETED
    if not _multiplies_registers(chip):
        return _NOWHERE
    return (_HOPPER if chip.capability[0] == 9 else _OTHERS)[forward]


def _multiplies_registers(chip: Chip) -> bool:
    """Whether the tensor cores take the left operand from registers, into which weights are decoded."""
    return chip.capability[0] not in (10, 11)


def path_for(chip: Chip, left: Tensor, weight: NF4Weight, forward: bool) -> tuple[Path, str]:
    """The path of a product of `left`, x [M, K] forward or dy [M, N] backward, with `weight`, and why."""
    reason = cannot_fly(chip, left, weight)
    if reason is not None:
        return "scratch", reason
    M, most = left.shape[0], fly_table(chip, forward).most_rows
    if most >= M:
        return "fly", f"{M} rows are at most {most}"
    return "scratch", f"{M} rows are more than {most}"


def cannot_fly(chip: Chip, left: Tensor, weight: NF4Weight) -> str | None:
    """Why a product cannot decode on the fly; None if it can."""
    if chip != INTERPRETER and torch.version.cuda is None:
        return "looking codes up in the lanes of a warp is written for CUDA"
    if not _multiplies_registers(chip):
        return "the tensor cores of this chip take no operand from registers"
    if left.dtype == torch.float32 and chip != INTERPRETER:
        return "float32 products are not written for tensor cores"
    if weight.shape[1] % weight.block_size != 0:
        return f"{weight.shape[1]} columns are no multiple of the block size, {weight.block_size}"
    if weight.packed.data_ptr() % 16 != 0:
        return "the packed codes do not start on 16 bytes"
    if (left.data_ptr() | left.stride(0) * left.element_size()) % 16 != 0:
        return "the rows of the left operand do not start on 16 bytes"
    return None


def product_tiles(chip: Chip, M: int, C: int, forward: bool) -> NF4Tiles:
    """The configuration for an output [M, C] with the least block_m that takes all rows, else the one with the most.

    Of two such the table has the wider one first, which is taken where its tiles alone give most of the chip work.
    """
    table = fly_table(chip, forward).tiles
    least = next((t.block_m for t in table if t.block_m >= M), table[-1].block_m)
    fitting = [t for t in table if t.block_m == least]
    return next((t for t in fitting if C // t.block_c > chip.multiprocessors // 2), fitting[-1])


def product_parts(chip: Chip, tiles: NF4Tiles, tile_count: int, steps: int) -> int:
    """Into how many parts the reduction is split: the number with the least predicted time.

    That is steps one after the other on a multiprocessor, each program with two more for its beginning and end; four
    programs at once hide the latencies of one another. Each part more is one more to be written, and waited for by
    whoever adds them up: as long as three steps, by which the numbers come out that were the best of a sweep (docs/kernels.md).
    """

    def cost(parts: int) -> float:
        programs = -(-tile_count * parts // chip.multiprocessors)
        at_once = min(programs, tiles.resident, 4)
        return programs * (-(-steps // parts) + 2) / at_once + 3 * parts

    return min(range(1, min(16, steps) + 1), key=cost)


def describe(chip: Chip, dtype: torch.dtype, columns: int) -> str:
    """What explain() says of an NF4 weight; its block size is not known there."""
    forward, backward = (fly_table(chip, direction).most_rows for direction in (True, False))
    if dtype == torch.float32 or forward == 0 or (chip != INTERPRETER and torch.version.cuda is None):
        return "the NF4 weight is decoded by a launch of its own"
    return (
        f"the NF4 weight is decoded inside of the product up to {forward} rows forward and {backward} backward if its "
        f"block size divides {columns}, else by a launch of its own"
    )


def describe_paths(chip: Chip, x: Tensor, weight: NF4Weight) -> tuple[NF4Path, NF4Path]:
    """What explain() says of one call: the paths of its forward and of its backward, where dy starts on 16 bytes."""
    dy = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="meta")
    found = (path_for(chip, left, weight, forward) for left, forward in ((x, True), (dy, False)))
    forward, backward = (NF4Path(_WORDS[path], why) for path, why in found)
    return forward, backward
