"""A progress bar that moves within a case, and names what is under way: one case may take minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_kernels.cli.bench.cases import Case

# Told what begins or goes on, and how much of the case is done by then, from 0 to 1.
Stage = Callable[[str, float], None]


def silent(what: str, done: float) -> None:
    """Where nobody looks."""


def within(stage: Stage, what: str, start: float, share: float) -> Callable[[float], None]:
    """A stage that begins at `start` and is `share` of its case, to be told how much of itself is done."""
    return lambda done: stage(what, start + share * done)


class Progress:
    """Iterated over, it gives the cases; in between `stage` moves its bar. Where there is no terminal it shows none."""

    def __init__(self, cases: Sequence[Case], desc: str | None = None) -> None:
        from tqdm import tqdm

        # miniters: stages differ too much in length for tqdm to learn how many are worth a look at the clock.
        # disable=None: no bar where standard error is no terminal.
        self._bar: Any = tqdm(
            total=len(cases),
            desc=desc,
            miniters=0,
            dynamic_ncols=True,
            disable=None,
            bar_format="{l_bar}{bar}| {n:.1f}/{total} cases [{elapsed}<{remaining}{postfix}]",
        )
        self._cases = cases
        self._index = 0
        self._what = ""

    def __iter__(self) -> Iterator[Case]:
        with self._bar:
            for index, case in enumerate(self._cases):
                self._index = index
                yield case
                self._move(1.0)

    def stage(self, what: str, done: float) -> None:
        """What begins or goes on with the case, and how much of it is done by now."""
        begins = what != self._what
        self._what = what
        self._bar.set_postfix_str(f"{self._cases[self._index]}, {what}", refresh=False)
        self._move(done)
        if begins:
            self._bar.refresh()

    def _move(self, done: float) -> None:
        self._bar.update(self._index + done - self._bar.n)
