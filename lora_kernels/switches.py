"""Environment variables that switch a part of the package off."""

from __future__ import annotations

import os


def is_on(variable: str) -> bool:
    """Whether an environment variable is 1, which it is where nobody set it, or 0.

    Raises:
        ValueError: it is neither.
    """
    value = os.environ.get(variable, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{variable} in the environment was {value!r}, but must be 0 or 1")
    return value == "1"
