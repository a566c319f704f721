"""How the CUDA C++ backend is compiled: the sources, the flags, and the cache of what was compiled on first use.

setup.py compiles it from the same definition when LORA_KERNELS_BUILD_CUDA=1 asks for it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from lora_kernels.backends.cache import cache_folder, is_there

Capability = tuple[int, int]

PREBUILT = "lora_kernels._cuda"
# What an extension made ahead of time holds. Other chips from 8.0 on take the first one's code, or its PTX.
PREBUILT_CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0))
_PACKAGE = Path(__file__).parents[1]


def source_folder() -> Path:
    """csrc: a part of the package where it was installed, beside it in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def sources() -> list[Path]:
    """What is compiled, each file on its own."""
    return sorted(path for path in source_folder().iterdir() if path.suffix in (".cu", ".cpp"))


def nvcc_flags(capabilities: tuple[Capability, ...], ptx: bool = False) -> list[str]:
    """The options of nvcc for these chips; `ptx` adds the first one's code in a form for chips to come."""
    flags = ["-O3"]
    for major, minor in capabilities:
        # The instructions that only Hopper has are not in its plain target.
        chip = f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"
        flags.append(f"-gencode=arch=compute_{chip},code=sm_{chip}")
    if ptx:
        major, minor = capabilities[0]
        flags.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
    return flags


def has_prebuilt() -> bool:
    """Whether the installation holds the compiled extension."""
    return importlib.util.find_spec(PREBUILT) is not None


def is_built(capability: Capability) -> bool:
    """Whether `load` would compile nothing."""
    return has_prebuilt() or (nowhere() is None and is_there(_marker(capability)))


def missing() -> str | None:
    """What stands in the way of compiling on this machine; None if nothing does."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return f"PyTorch's module for extensions cannot be imported: {error}"
    home = cpp_extension.CUDA_HOME
    if home is None or not Path(home, "bin", "nvcc").exists():
        return "there is no CUDA toolkit: nvcc is neither on the PATH nor under CUDA_HOME"
    if not cpp_extension.is_ninja_available():
        return "there is no ninja (pip install ninja)"
    compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler: {compiler!r} is not on the PATH"
    return None


def nowhere() -> str | None:
    """Why there is no folder for what is compiled on first use; None if there is one."""
    return "there is no home directory to keep it in: set TORCH_EXTENSIONS_DIR" if _root() is None else None


def load(capability: Capability) -> ModuleType:
    """The extension: the installation's, else the one compiled before, else compiled now, which takes a minute or two.

    Processes that ask at once wait for the first.

    Raises:
        ImportError: what was compiled does not fit this PyTorch.
        RuntimeError: the compiler failed; its output is in the message.
    """
    if has_prebuilt():
        return importlib.import_module(PREBUILT)
    if not _marker(capability).exists():
        with locked(_folder(capability)):
            if not _marker(capability).exists():
                return _compile(capability)
    name = _name(capability)
    spec = importlib.util.spec_from_file_location(name, _folder(capability) / f"{name}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(capability: Capability) -> ModuleType:
    from torch.utils import cpp_extension

    folder = _folder(capability)
    # PyTorch's own lock, left by a process that was killed, would be waited for without end.
    (folder / "lock").unlink(missing_ok=True)
    print(f"lora_kernels: compiling the CUDA backend in {folder}, once", file=sys.stderr, flush=True)
    module = cpp_extension.load(
        _name(capability),
        [str(path) for path in sources()],
        extra_cflags=["-O2"],
        extra_cuda_cflags=nvcc_flags((capability,)),
        build_directory=str(folder),
    )
    _marker(capability).touch()
    return module  # type: ignore[no-any-return]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. The system lifts the lock of a process that dies."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _name(capability: Capability) -> str:
    return f"lora_kernels_cuda_sm{capability[0]}{capability[1]}"


def _marker(capability: Capability) -> Path:
    """Exists when the extension beside it is whole."""
    return _folder(capability) / "complete"


@cache
def _folder(capability: Capability) -> Path:
    """Where the extension for a chip, from these sources and for this PyTorch, is kept."""
    root = _root()
    assert root is not None, "nowhere() says so first"
    return root / f"{_name(capability)}_{_digest(capability)}"


def _root() -> Path | None:
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else cache_folder()


def _digest(capability: Capability) -> str:
    """A name for all that the compiled extension depends on."""
    facts = [torch.__version__, str(torch.version.cuda), sys.version, *nvcc_flags((capability,))]
    digest = hashlib.sha256("\n".join(facts).encode())
    for path in sorted(source_folder().iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
