"""Which tile configuration a problem gets: the shipped one, or that of a table which was measured on this machine.

The table is what `python -m lora_kernels tune` writes. One that is there is used, or refused with the reason: nobody should
wonder which configurations ran.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lora_kernels.backends.cache import cache_folder, is_there
from lora_kernels.backends.triton.tiles import (
    INTERPRETER,
    Chip,
    GradTiles,
    OnePassTiles,
    shipped_grad_tiles,
    shipped_tiles,
)

FORMAT = 1
# A file to use instead of the one in the cache directory; empty for none.
VARIABLE = "LORA_KERNELS_TUNED"
# A measurement holds for numbers of tokens up to this factor away; beyond, the shipped formula knows better.
_REACH = 1.5
_WARPS = (1, 2, 4, 8, 16)


class TableRefused(RuntimeError):
    """A tuned table that cannot be used; the message says which and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; remove it, or make another with `python -m lora_kernels tune`")


@dataclass(frozen=True)
class OnePassEntry:
    """The configuration that was fastest for outputs [M, N]."""

    itemsize: int
    use_tma: bool
    M: int
    N: int
    tiles: OnePassTiles


@dataclass(frozen=True)
class GradEntry:
    """The configuration of the adapter gradients that was fastest over all measured shapes."""

    itemsize: int
    tiles: GradTiles


@dataclass(frozen=True)
class TunedTable:
    """What was measured on a chip; `made` says when and with which versions."""

    chip: Chip
    made: str
    one_pass: tuple[OnePassEntry, ...]
    adapter_grads: tuple[GradEntry, ...]

    def one_pass_tiles(self, itemsize: int, use_tma: bool, M: int, N: int) -> OnePassTiles | None:
        """The configuration of the nearest M that was measured, if it is near."""
        same = [e for e in self.one_pass if (e.itemsize, e.use_tma, e.N) == (itemsize, use_tma, N)]
        distances = {abs(math.log(e.M / M)): e.tiles for e in same}
        nearest = min(distances, default=math.inf)
        return distances[nearest] if nearest <= math.log(_REACH) else None

    def grad_tiles(self, itemsize: int) -> GradTiles | None:
        """The configuration for elements of a size, if it was measured."""
        return next((entry.tiles for entry in self.adapter_grads if entry.itemsize == itemsize), None)

    def over(self, earlier: TunedTable) -> TunedTable:
        """This table, and of an earlier one of the same chip what was not measured again."""
        outputs = {(e.itemsize, e.use_tma, e.M, e.N) for e in self.one_pass}
        sizes = {e.itemsize for e in self.adapter_grads}
        kept = [e for e in earlier.one_pass if (e.itemsize, e.use_tma, e.M, e.N) not in outputs]
        kept_grads = [e for e in earlier.adapter_grads if e.itemsize not in sizes]
        return replace(self, one_pass=(*kept, *self.one_pass), adapter_grads=(*kept_grads, *self.adapter_grads))

    def write(self, path: Path) -> None:
        """Writes the table where `read_table` finds it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)


def one_pass_tiles(chip: Chip, itemsize: int, use_tma: bool, M: int, N: int) -> OnePassTiles:
    """The configuration that was measured to be best on this machine, else the one that shipped_tiles predicts."""
    table = tuned_table(chip)
    tuned = None if table is None else table.one_pass_tiles(itemsize, use_tma, M, N)
    return tuned or shipped_tiles(chip, itemsize, use_tma, M, N)


@cache
def grad_tiles(chip: Chip, itemsize: int) -> GradTiles:
    """The configuration that was measured to be best on this machine, else the shipped one."""
    table = tuned_table(chip)
    tuned = None if table is None else table.grad_tiles(itemsize)
    return tuned or shipped_grad_tiles(chip, itemsize)


def table_path(chip: Chip) -> Path | None:
    """Where a chip's table is or would be; None where the user wants none, or has no home."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    folder = cache_folder()
    major, minor = chip.capability
    return None if folder is None else folder / f"tiles-{major}.{minor}-{chip.multiprocessors}.json"


@cache
def tuned_table(chip: Chip) -> TunedTable | None:
    """The table in use on a chip, read once; None where there is none.

    Raises:
        TableRefused: it is damaged, from another chip, or holds what this chip cannot run.
    """
    path = None if chip == INTERPRETER else table_path(chip)
    if path is None or (VARIABLE not in os.environ and not is_there(path)):
        return None
    return read_table(path, chip)


def describe(chip: Chip) -> str:
    """Which configurations a chip gets, for the doctor.

    Raises:
        TableRefused: there is a table, and it cannot be used.
    """
    table = tuned_table(chip)
    if table is not None:
        return f"tuned on this GPU ({table.made}): {table_path(chip)}"
    if chip.has_tma:
        major, minor = chip.capability
        return (
            f"shipped ones for Hopper, which were measured on an H100 with 132 multiprocessors (this is a {major}.{minor} "
            f"with {chip.multiprocessors}); `python -m lora_kernels tune` measures on this GPU"
        )
    return "shipped defaults, not measured on this GPU; `python -m lora_kernels tune` does that"


def read_table(path: Path, chip: Chip) -> TunedTable:
    """The table of a file, checked for use on `chip`.

    Raises:
        TableRefused: it is damaged, from another chip, or holds what this chip cannot run.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableRefused(path, f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise TableRefused(path, "its JSON is damaged") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TableRefused(path, f"not a table of format {FORMAT}")
    try:
        table = _parsed(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableRefused(path, f"an entry is damaged ({error})") from None
    if table.chip != chip:
        raise TableRefused(path, f"measured on {table.chip}, but this is {chip}")
    for entry in _entries(table.one_pass, table.adapter_grads):
        fault = _fault(entry, chip)
        if fault:
            raise TableRefused(path, f"{entry.tiles} cannot run here: {fault}")
    return table


def _parsed(data: dict[str, Any]) -> TunedTable:
    chip = Chip(**data["chip"] | {"capability": tuple(data["chip"]["capability"])})
    one_pass = tuple(OnePassEntry(**e | {"tiles": OnePassTiles(**e["tiles"])}) for e in data["one_pass"])
    grads = tuple(GradEntry(**e | {"tiles": GradTiles(**e["tiles"])}) for e in data["adapter_grads"])
    for entry in _entries(one_pass, grads):
        for name, value in (*vars(entry).items(), *vars(entry.tiles).items()):
            valid = type(value) is bool if name == "use_tma" else type(value) is int and value > 0
            if name not in ("tiles", "rate") and not valid:
                raise ValueError(f"{name} is {value!r}")
    return TunedTable(chip, str(data["made"]), one_pass, grads)


def _entries(
    one_pass: tuple[OnePassEntry, ...], grads: tuple[GradEntry, ...]
) -> tuple[OnePassEntry | GradEntry, ...]:
    return (*one_pass, *grads)


def _fault(entry: OnePassEntry | GradEntry, chip: Chip) -> str | None:
    tiles = entry.tiles
    blocks = [value for name, value in vars(tiles).items() if name.startswith("block")]
    if any(block & (block - 1) or block < 16 for block in blocks) or tiles.num_warps not in _WARPS:
        return "blocks must be powers of two from 16 and warps one of 1, 2, 4, 8, 16"
    if isinstance(entry, OnePassEntry):
        if entry.tiles.shared_memory(entry.itemsize) > chip.shared_memory:
            return f"it takes {entry.tiles.shared_memory(entry.itemsize)} of {chip.shared_memory} bytes of shared memory"
        if entry.tiles.use_tma and not (entry.use_tma and chip.has_tma):
            return "TMA is not used for it"
    return None
