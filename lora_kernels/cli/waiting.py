"""What a terminal shows while something takes long; where standard error is none, nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_CLEAR_LINE = "\033[K"


def bar(items: Iterable[T], unit: str, desc: str | None = None, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar as long as they are."""
    from tqdm import tqdm

    # disable=None: none where standard error is no terminal.
    shown: Iterable[T] = tqdm(items, desc=desc, unit=unit, total=total, dynamic_ncols=True, disable=None)
    return shown


@contextmanager
def elapsed(what: str, interval: float = 1.0) -> Iterator[None]:
    """Counts the seconds of what has no measure of its progress. Packages that may be missing are not needed."""
    if not sys.stderr.isatty():
        yield
        return
    start, over = time.monotonic(), threading.Event()

    def count() -> None:
        while not over.wait(interval):
            # The cursor goes back to the start of the line, so that whoever else writes does it over this.
            print(f"{what}: {time.monotonic() - start:.0f} s{_CLEAR_LINE}\r", end="", file=sys.stderr, flush=True)

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    try:
        yield
    finally:
        over.set()
        counter.join()
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
