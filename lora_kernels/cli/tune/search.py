"""Which configurations are tried, and which of them a table gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lora_kernels.backends.triton.tiles import (
    INTERPRETER,
    Chip,
    GradTiles,
    OnePassTiles,
    candidates,
    shipped_grad_tiles,
)
from lora_kernels.cli.bench.clock import Times

# Blocks of M, N and K, warps, stages; the shipped ones come on top.
_TMA = (
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 5),
    (256, 128, 64, 8, 3),
    (128, 64, 64, 4, 5),
    # What waits for W: many bytes under way.
    (64, 128, 64, 4, 6),
)
_POINTERS = (
    (128, 256, 32, 8, 3),
    (128, 128, 32, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 64, 32, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
)
_GRADS = ((64, 128, 4, 3), (64, 256, 8, 3), (128, 128, 8, 3), (128, 64, 4, 4), (32, 128, 4, 4))

Tiles = TypeVar("Tiles", OnePassTiles, GradTiles)
# The times of configurations on one problem; a text says why one has none.
Measured = Mapping[Tiles, Times | str]


def one_pass_candidates(chip: Chip, itemsize: int, use_tma: bool) -> tuple[OnePassTiles, ...]:
    """The shipped configurations and others that fit the chip."""
    shipped = candidates(chip, itemsize, use_tma)
    if chip == INTERPRETER or itemsize == 4:
        return shipped
    use_tma = use_tma and chip.has_tma
    more = (OnePassTiles(*sizes, use_tma, 1.0) for sizes in (_TMA if use_tma else _POINTERS))
    fitting = (tiles for tiles in more if tiles.shared_memory(itemsize) <= chip.shared_memory)
    return tuple(dict.fromkeys((*shipped, *fitting)))


def grad_candidates(chip: Chip, itemsize: int) -> tuple[GradTiles, ...]:
    """The shipped configuration and others."""
    shipped = shipped_grad_tiles(chip, itemsize)
    others = () if chip == INTERPRETER else (GradTiles(*sizes) for sizes in _GRADS)
    return tuple(dict.fromkeys((shipped, *others)))


def choose(
    problems: Sequence[Measured[Tiles]], shipped: Tiles, holds: Callable[[Tiles], bool]
) -> tuple[Tiles, float] | None:
    """The configuration with the least sum of times, each relative to its problem's best; None if none ran all.

    It must hold as well, which is asked from the best down. The number is what the shipped one takes over what
    this one takes; nan if the shipped one did not run.
    """
    sums = {tiles: 0.0 for tiles in problems[0]}
    for measured in problems:
        ran = {tiles: times.median for tiles, times in measured.items() if isinstance(times, Times)}
        sums = {tiles: total + ran[tiles] / min(ran.values()) for tiles, total in sums.items() if tiles in ran}
    for best in sorted(sums, key=sums.__getitem__):
        if holds(best):
            return best, sums.get(shipped, float("nan")) / sums[best]
    return None
