"""Tile configurations: which there are, which a chip can run, and which one is predicted to be best for a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

MAX_PARTS = 8
# Up to so many rows, one block has them all, and the kernel for few rows is faster than the one-pass kernel.
_ROWS_OF_A_BLOCK = 64
# Up to so many, it is where there are few tiles.
MOST_FEW_ROWS = 256
LEAST_WIDE_ROWS = 512


@dataclass(frozen=True)
class OnePassTiles:
    """A configuration of the one-pass kernel. `rate` is its speed per output element, relative to the best one's."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    use_tma: bool
    rate: float
    group_m: int = 8

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the stages of the main loop take, and half a tile of output on its way out."""
        stage = (self.block_m + self.block_n) * self.block_k * itemsize
        return self.num_stages * stage + self.block_m * self.block_n // 2 * itemsize


@dataclass(frozen=True)
class FewRowsTiles:
    """A configuration of the product for few rows."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradTiles:
    """A configuration of the adapter-gradient kernel."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Chip:
    """What tile choices depend on. `capability` is (0, 0) in Triton's interpreter; `has_tma`: whether we use it there."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    has_tma: bool


INTERPRETER = Chip((0, 0), 4, 1 << 20, False)

_HOPPER = (
    OnePassTiles(128, 256, 64, 8, 3, True, 1.0),
    OnePassTiles(64, 256, 64, 4, 4, True, 0.88),
    OnePassTiles(128, 128, 64, 8, 4, True, 0.86),
    OnePassTiles(64, 128, 64, 4, 4, True, 0.57),
    OnePassTiles(64, 64, 64, 4, 8, True, 0.3),
)
# Of products as narrow as a rank, on their own: one wave of programs at most, each of which waits for memory.
_HOPPER_NARROW = (
    OnePassTiles(128, 256, 64, 8, 4, True, 1.0),
    OnePassTiles(128, 128, 64, 8, 6, True, 0.86),
    OnePassTiles(64, 128, 64, 4, 8, True, 0.57),
    OnePassTiles(64, 64, 64, 4, 8, True, 0.3),
)
# few_rows_tiles says which rows take which.
_HOPPER_FEW_ROWS = (
    FewRowsTiles(16, 64, 128, 4, 4),
    FewRowsTiles(32, 64, 128, 4, 4),
    FewRowsTiles(64, 64, 64, 4, 5),
    FewRowsTiles(128, 64, 128, 4, 4),
)
_POINTERS = (
    OnePassTiles(128, 128, 32, 8, 4, False, 0.8),
    OnePassTiles(128, 128, 32, 8, 3, False, 0.75),
    OnePassTiles(64, 128, 32, 4, 4, False, 0.6),
    OnePassTiles(64, 64, 32, 4, 3, False, 0.45),
)
# float32 tiles are twice as large and, without tensor cores, live in registers.
_POINTERS_FP32 = (OnePassTiles(64, 64, 32, 4, 3, False, 0.5),)
_INTERPRETED = (OnePassTiles(32, 32, 32, 4, 2, False, 1.0),)


@cache
def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    # Later chips have TMA as well, but Triton 3.9 does not compile the flat loop over it for them.
    has_tma = torch.version.cuda is not None and capability[0] == 9
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Chip(capability, properties.multi_processor_count, shared, has_tma)


def candidates(chip: Chip, itemsize: int, use_tma: bool) -> tuple[OnePassTiles, ...]:
    """The configurations that a chip can run for elements of `itemsize` bytes."""
    if chip == INTERPRETER:
        return _INTERPRETED
    if itemsize == 4:
        return _POINTERS_FP32
    table = _HOPPER if use_tma and chip.has_tma else _POINTERS
    return tuple(t for t in table if t.shared_memory(itemsize) <= chip.shared_memory)


def shipped_tiles(chip: Chip, itemsize: int, use_tma: bool, M: int, N: int) -> OnePassTiles:
    """The configuration with the least predicted time: waves of tiles, times a tile's elements, over its rate."""
    return group_tiles(chip, itemsize, use_tma, M, [N])


def group_tiles(chip: Chip, itemsize: int, use_tma: bool, M: int, Ns: Sequence[int]) -> OnePassTiles:
    """As shipped_tiles, for outputs [M, N] of several N whose tiles share the waves."""
    return _fastest(candidates(chip, itemsize, use_tma), chip, M, Ns)


def group_input_tiles(chip: Chip, itemsize: int, use_tma: bool, M: int, K: int) -> OnePassTiles:
    """As shipped_tiles, for dx [M, K] of a group, whose reduction goes through all members.

    In one wave of 64 x 256, of four warps, a step takes half as long again as in a layer's dx; why is not known. In several
    it does not.
    """
    table = candidates(chip, itemsize, use_tma)
    chosen = _fastest(table, chip, M, [K])
    flat = (chosen.block_m, chosen.block_n) == (64, 256)
    if flat and -(-M // chosen.block_m) * -(-K // chosen.block_n) <= chip.multiprocessors:
        return _fastest([tiles for tiles in table if tiles != chosen], chip, M, [K])
    return chosen


def narrow_table(chip: Chip) -> tuple[OnePassTiles, ...]:
    """The configurations of products as narrow as a rank, in 16 bits."""
    return _HOPPER_NARROW if chip.has_tma else candidates(chip, 2, False)


def narrow_tiles(chip: Chip, M: int, ranks: Sequence[int]) -> OnePassTiles:
    """As group_tiles, for S [M, R] of several R on its own."""
    return _fastest(narrow_table(chip), chip, M, ranks)


def _fastest(table: Sequence[OnePassTiles], chip: Chip, M: int, Ns: Sequence[int]) -> OnePassTiles:
    def cost(tiles: OnePassTiles) -> float:
        count = -(-M // tiles.block_m) * sum(-(-N // tiles.block_n) for N in Ns)
        return -(-count // chip.multiprocessors) * tiles.block_m * tiles.block_n / tiles.rate

    return min(table, key=cost)


def is_wide_rank(rows: int, rank: int, members: int = 1) -> bool:
    """Whether a rank is so large that S gets a launch of its own, and S U goes through the main loop (wide_ranks.py).

    The one-pass kernel takes up to 64 in one chunk; those of groups are slower from 33 on. With fewer rows, S has too few
    programs to be faster than its shares.
    """
    return rank > (64 if members == 1 else 32) and rows >= LEAST_WIDE_ROWS


def few_rows_table(chip: Chip) -> tuple[FewRowsTiles, ...]:
    """The configurations of the kernel for few rows, the least first; none where the one-pass kernel takes them."""
    return _HOPPER_FEW_ROWS if chip.has_tma else ()


def few_rows_tiles(chip: Chip, M: int, C: int, L: int, R: int, precision: str) -> FewRowsTiles | None:
    """The configuration for M rows of 16 bits, C columns, a reduction over L and a rank; None: the one-pass kernel's.

    Beyond one block of rows, that kernel has work for the chip as well. It is the slower one where the columns are so few
    that whole parts of tiles, and S in one chunk, find places in one wave.
    """
    table = few_rows_table(chip)
    if not table or M > MOST_FEW_ROWS:
        return None
    if M <= _ROWS_OF_A_BLOCK:
        return next(tiles for tiles in table if tiles.block_m >= M)
    *_, narrow, wide = table
    if rank_block(R, precision) < R:
        return None
    # Of shorter reductions nothing was measured.
    if _parts_beside_s(chip.multiprocessors, narrow, M, C) > 1 and L >= 2048:
        return narrow
    # With a smaller X, the one-pass kernel was as fast (docs/kernels.md).
    much = M * L > 1 << 19
    return wide if much and _parts_beside_s(chip.multiprocessors, wide, M, C) > 0 else None


def few_rows_parts(programs: int, tiles: FewRowsTiles, M: int, C: int, L: int) -> tuple[int, int]:
    """Into how many parts the reduction over L is cut for a tile, and for S: each program then has one, if there are so many.

    In one block of rows, S goes beside: there, two programs fit a multiprocessor. Elsewhere it gets places of its own.
    """
    row_tiles, column_tiles, steps = -(-M // tiles.block_m), -(-C // tiles.block_n), -(-L // tiles.block_k)
    tile_count, of_s = row_tiles * column_tiles, share_parts(steps)
    beside = M <= _ROWS_OF_A_BLOCK
    most = programs // tile_count if beside else _parts_beside_s(programs, tiles, M, C)
    parts = max(1, min(most, steps // 2, 16))
    left = (programs - parts * tile_count) // row_tiles
    return parts, of_s if beside else max(1, min(of_s, left))


def _parts_beside_s(programs: int, tiles: FewRowsTiles, M: int, C: int) -> int:
    """Into how many parts tiles are cut, with as many of S for each block of rows, for each to have a program: 0 if none has."""
    return programs // (-(-M // tiles.block_m) * (-(-C // tiles.block_n) + 1))


def share_parts(steps: int) -> int:
    """Into how many parts S is cut beside a product by parts: four steps of the reduction for each or more."""
    return max(1, min(MAX_PARTS, steps // 4))


def rank_block(rank: int, precision: str) -> int:
    """The columns of one chunk of the rank: a power of two from 16, the least of a tensor core's product, to 64.

    Split adapters take four times the shared memory, so theirs stays at 16.
    """
    return 16 if precision == "split" else min(64, max(16, 1 << (rank - 1).bit_length()))


def own_columns(block_r: int, shared: bool) -> int:
    """How many columns of S a tile computes at a time that cannot have it from others.

    Where S is shared out, that is rare, and many would take registers from the main loop around it.
    """
    return 16 if shared else block_r


def shipped_grad_tiles(chip: Chip, itemsize: int) -> GradTiles:
    if chip == INTERPRETER:
        return GradTiles(32, 32, 4, 2)
    return GradTiles(64, 128, 4, 4) if itemsize == 2 else GradTiles(32, 64, 4, 3)


def group_grad_tiles(chip: Chip, itemsize: int, sums: int, masked: bool) -> GradTiles:
    """The configuration for a group, whose blocks of x have `sums` columns of sums: many need more threads to hold them."""
    tiles = shipped_grad_tiles(chip, itemsize)
    if chip == INTERPRETER or not (masked or sums > 64):
        return tiles
    few_bytes = chip.shared_memory < 128 * 1024
    return replace(tiles, num_stages=3 if few_bytes else tiles.num_stages, num_warps=8)


def share_out(
    programs: int, row_tiles: int, column_tiles: int, k_tiles: int, rank_chunks: int
) -> tuple[int, int]:
    """(parts of K that a chunk of S is summed from, sharing tiles of a row block).

    As many sharing tiles as there are programs in the first wave, so that the extra work is spread over all. No
    sharing where the rank has more chunks than a row block has tiles.
    """
    if rank_chunks > column_tiles:
        return 1, 0
    parts = programs // (row_tiles * rank_chunks)
    parts = max(1, min(parts, MAX_PARTS, column_tiles // rank_chunks, k_tiles))
    return parts, parts * rank_chunks


def sharers(
    programs: int, row_tiles: int, column_tiles: int, k_tiles: int, rank_chunks: int
) -> tuple[int, int]:
    """(parts of K that a chunk of S is summed from, programs that compute S before their first tile, if any).

    Those that have a tile less than others, if they are done when the others are done with one: a step of a share, which
    waits for X alone, takes about half as long as a tile's.
    """
    spare = programs - row_tiles * column_tiles % programs
    items = row_tiles * rank_chunks
    if spare == programs or items > 2 * spare:
        return 1, 0
    return max(1, min(spare // items, MAX_PARTS, k_tiles)), spare


def group_sharers(
    programs: int, row_tiles: int, column_tiles: int, steps: Sequence[int], rank_chunks: int
) -> tuple[int, int]:
    """As sharers, for shares of members that have different steps; the parts are of each member's own.

    They are handed out in turns. A number of sharers that the members of a row block divide would leave the longest member to the
    same few, so a little fewer may be done earlier.
    """
    parts, spare = sharers(programs, row_tiles, column_tiles, min(steps), rank_chunks)
    parts = max(1, parts // len(steps))
    of_a_row = [-(-n // parts) for n in steps for _ in range(parts * rank_chunks)]
    lengths = of_a_row * row_tiles

    def longest(own: int) -> int:
        return max(sum(lengths[first::own]) for first in range(own))

    own = min(range(spare, max(0, spare - len(of_a_row)), -1), key=longest, default=0)
    return (parts, own) if own and longest(own) <= 2 * sum(steps) else (1, 0)


def share_stages(tiles: OnePassTiles, block_r: int) -> int:
    """Stages of the loop over X and D alone: up to six, which the main loop's shared memory has room for."""
    return min(6, tiles.num_stages * (tiles.block_m + tiles.block_n) // (tiles.block_m + block_r))


def group_share_out(
    programs: int, row_tiles: int, column_tiles: int, steps: Sequence[int], rank_chunks: int
) -> tuple[tuple[int, ...], int]:
    """(parts of each member's steps that its chunks of T are summed from, sharing tiles of a row block).

    As share_out, but a member's parts are cut from its own steps: the longest are cut first.
    """
    parts = [1] * len(steps)
    if len(steps) * rank_chunks > column_tiles:
        return tuple(parts), 0
    most = min(programs // row_tiles, column_tiles)
    while (sum(parts) + 1) * rank_chunks <= most:
        longest = max(range(len(steps)), key=lambda i: steps[i] / parts[i])
        if parts[longest] == min(MAX_PARTS, steps[longest]):
            break
        parts[longest] += 1
    return tuple(parts), sum(parts) * rank_chunks


def row_parts(chip: Chip, tiles: GradTiles, M: int, blocks: int) -> tuple[int, int]:
    """(parts of M, rows of each) of the adapter gradients.

    One wave of programs, two on a multiprocessor, each with two steps or more.
    """
    steps = -(-M // tiles.block_m)
    parts = max(1, min(2 * chip.multiprocessors // blocks, -(-steps // 2), 32))
    rows = -(-steps // parts) * tiles.block_m
    return -(-M // rows), rows


def tail_grad_tiles(chip: Chip, itemsize: int) -> GradTiles:
    """The configuration behind a product: its program has the multiprocessor to itself, and takes twice the rows."""
    tiles = shipped_grad_tiles(chip, itemsize)
    return tiles if chip == INTERPRETER else replace(tiles, block_m=2 * tiles.block_m)


def tail_parts(chip: Chip, tiles: GradTiles, M: int, blocks: int) -> tuple[int, int]:
    """(parts of M, rows of each) of the adapter gradients behind a product: two parts for each multiprocessor."""
    steps = -(-M // tiles.block_m)
    parts = max(1, min(round(2 * chip.multiprocessors / blocks), -(-steps // 4), 32))
    rows = -(-steps // parts) * tiles.block_m
    return -(-M // rows), rows
