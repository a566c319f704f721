"""Types of command-line arguments: each refuses what is out of range, in words."""

import argparse
from collections.abc import Callable


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` up, or to `maximum`."""
    wanted = f"from {minimum} up" if maximum is None else f"from {minimum} to {maximum}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"must be a whole number {wanted}, not {text!r}")
        return value

    return parse


def number(
    *, above: float | None = None, from_: float | None = None, below: float = float("inf")
) -> Callable[[str], float]:
    """An argparse type: a number inside the bounds (`above` and `below` excluded, `from_` included)."""
    wanted = f"above {above:g}" if above is not None else f"from {from_:g} up"
    if below != float("inf"):
        wanted += f" and below {below:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        large_enough = value > above if above is not None else value >= (from_ or 0)
        if not (large_enough and value < below):
            raise argparse.ArgumentTypeError(f"must be a number {wanted}, not {text!r}")
        return value

    return parse
