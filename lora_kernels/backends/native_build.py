"""How the launch path in C++ is compiled: csrc/host/, by a C++ compiler alone, and never unless somebody asks.

`python -m lora_kernels build` compiles it into the cache, and setup.py into the installation, from the same definition.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

from lora_kernels.backends import cuda_build
from lora_kernels.backends.cache import is_there

PREBUILT = "lora_kernels._native"
_NAME = "lora_kernels_native"


def sources() -> list[Path]:
    """What is compiled."""
    return sorted(_source_folder().glob("*.cpp"))


def flags() -> list[str]:
    """The options of the C++ compiler; the extension says by them what it was made of."""
    return ["-O2", "-fvisibility=hidden", f"-DLORA_KERNELS_SOURCES={_source_digest()}"]


def has_prebuilt() -> bool:
    """Whether the installation holds the compiled extension."""
    return importlib.util.find_spec(PREBUILT) is not None


def is_built() -> bool:
    """Whether there is something to load."""
    return has_prebuilt() or (cuda_build.nowhere() is None and is_there(folder() / cuda_build.COMPLETE))


def load() -> ModuleType | None:
    """The extension: the installation's, else the one compiled before; None if there is neither.

    Raises:
        ImportError: the installation's cannot be loaded here, or was compiled against another PyTorch, or from other
            sources.
    """
    if not has_prebuilt():
        return cuda_build.load_compiled(_NAME, folder()) if is_built() else None
    return cuda_build.load_prebuilt(PREBUILT, _source_digest())


def build() -> ModuleType:
    """The extension, compiled now if it was not before, which takes about a minute.

    Raises:
        RuntimeError: it cannot be compiled here, or the compiler failed; its output is in the message.
    """
    made = load()
    if made is not None:
        return made
    missing = cuda_build.missing_compiler() or cuda_build.cannot_keep()
    if missing is not None:
        raise RuntimeError(f"it cannot be compiled here: {missing}")
    return cuda_build.compile_once(_NAME, folder(), "the launch path", sources(), extra_cflags=flags())


@cache
def folder() -> Path:
    """Where the extension from these sources and for this PyTorch is kept."""
    root = cuda_build.root_folder()
    assert root is not None, "nowhere() says so first"
    return root / f"{_NAME}_{cuda_build.digest_of(_source_folder(), [*cuda_build.versions(), *flags()])}"


def _source_folder() -> Path:
    return cuda_build.source_folder() / "host"


def _source_digest() -> str:
    # The one file beside the folder that its files include.
    return cuda_build.digest_of(_source_folder(), [(cuda_build.source_folder() / "problem.h").read_text()])
