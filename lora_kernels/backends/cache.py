"""The folder where this package keeps what was made on this machine: compiled extensions and tuned tables."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Under XDG_CACHE_HOME, or else ~/.cache; None where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    except RuntimeError:
        return None


def is_there(path: Path) -> bool:
    """Whether a file can be seen. HOME may be another user's, who lets nobody look."""
    try:
        return path.exists()
    except PermissionError:
        return False
