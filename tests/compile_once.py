"""Triton's cache for tests that run in several processes: what one of them compiles, the others wait for.

Neighbouring tests need the same kernels, and different processes get them at the same time: each would compile them.
"""

from __future__ import annotations

from contextlib import suppress

import triton
from filelock import FileLock, Timeout
from triton.runtime.cache import FileCacheManager

# Beyond what any kernel takes: whoever holds a lock for longer has failed to compile, and is still being looked at.
_MOST_SECONDS = 90


class CompileOnce(FileCacheManager):
    """One kernel's place in the cache."""

    _lock: FileLock | None = None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The compiled files; where there are none, only one process is told so at a time."""
        found: dict[str, str] | None = super().get_group(filename)
        if found is None and self._lock is None:
            self._lock = FileLock(self._make_path("compiling"))
            with suppress(Timeout):
                self._lock.acquire(timeout=_MOST_SECONDS)
            found = super().get_group(filename)
            if found is not None:
                self._lock.release()
        return found

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        """Writes down which files there are, which ends the compilation."""
        path: str = super().put_group(filename, group)
        if self._lock is not None:
            self._lock.release()
        return path


def use() -> None:
    """From now on, in this process."""
    triton.knobs.cache.manager_class = CompileOnce
