"""Files that commands write: refused before the work where they cannot be, and one clear line where writing fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_kernels.cli.errors import UserError

# As much as the results and the pictures of a run take.
_PROBE_BYTES = 4 << 20


def require_writable(folder: Path) -> None:
    """Refuses a folder that cannot be written before anything is measured, a full disk included.

    Raises:
        UserError: it cannot be written.
    """
    with writing(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
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
