"""Files that commands write: refused before the work where they cannot be, and one clear line where writing fails."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_kernels.cli.errors import UserError

# As much as the results and the pictures of a run take.
_PROBE_BYTES = 4 << 20


def require_writable(folder: Path, size: int = 0) -> None:
    """Refuses a folder that cannot be written, or has no room for `size` bytes, before the work begins.

    Raises:
        UserError: it cannot be written.
    """
    with writing(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(folder)
        # Some file systems tell nothing.
        if disk.total and disk.free < size:
            room, needed = f"{disk.free / 2**20:.0f} MiB", f"{size / 2**20:.0f} MiB"
            raise UserError(f"--out {folder}: there is room for {room}, and {needed} are needed")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Around code that writes a file.

    Raises:
        UserError: the system refused.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror or error})") from None
