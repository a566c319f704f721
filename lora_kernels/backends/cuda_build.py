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
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lora_kernels.backends.cache import cache_folder, is_there

Capability = tuple[int, int]

PREBUILT = "lora_kernels._cuda"
# What an extension made ahead of time holds. Other chips from 8.0 on take the first one's code, or its PTX.
PREBUILT_CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0))
# A file that exists when the extension beside it is whole.
COMPLETE = "complete"
_PACKAGE = Path(__file__).parents[1]
# An extension can be initialized once in a process.
_loaded: dict[Path, ModuleType] = {}
_loading = threading.Lock()
_path = threading.Lock()


def source_folder() -> Path:
    """csrc: a part of the package where it was installed, beside it in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def sources() -> list[Path]:
    """What is compiled, each file on its own."""
    return sorted(path for path in source_folder().iterdir() if path.suffix in (".cu", ".cpp"))


def cxx_flags() -> list[str]:
    """The options of the C++ compiler; the extension says by them what it was made of."""
    return ["-O2", f"-DLORA_KERNELS_SOURCES={_source_digest()}"]


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


def why_stale() -> str | None:
    """Why the extension of the installation cannot be used; None if it can, or if there is none."""
    try:
        if has_prebuilt():
            load_prebuilt(PREBUILT, _source_digest())
    except ImportError as error:
        return str(error)
    return None


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
    return missing_compiler()


def missing_compiler() -> str | None:
    """What stands in the way of compiling C++ on this machine; None if nothing does."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return f"PyTorch's module for extensions cannot be imported: {error}"
    with programs_found():
        if not cpp_extension.is_ninja_available():
            return "there is no ninja (pip install ninja)"
    compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler: {compiler!r} is not on the PATH"
    return None


def nowhere() -> str | None:
    """Why there is no folder for what is compiled on first use; None if there is one."""
    return "there is no home directory to keep it in: set TORCH_EXTENSIONS_DIR" if root_folder() is None else None


def cannot_keep() -> str | None:
    """Why nothing can be compiled on first use: there is no folder for it, or none that can be written."""
    root = root_folder()
    if root is None:
        return nowhere()
    there = next(path for path in (root, *root.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return None
    return f"{there}, where it would be kept, cannot be written: set TORCH_EXTENSIONS_DIR"


def load(capability: Capability) -> ModuleType:
    """The extension: the installation's, else the one compiled before, else compiled now, which takes a minute or two.

    Processes that ask at once wait for the first.

    Raises:
        ImportError: the installation's cannot be loaded here, or was compiled against another PyTorch, or from other
            sources.
        RuntimeError: the compiler failed; its output is in the message.
    """
    if has_prebuilt():
        return load_prebuilt(PREBUILT, _source_digest())
    return load_compiled(_name(capability), _folder(capability)) or compile_once(
        _name(capability),
        _folder(capability),
        "the CUDA backend",
        sources(),
        extra_cflags=cxx_flags(),
        extra_cuda_cflags=nvcc_flags((capability,)),
    )


def load_prebuilt(name: str, digest: str) -> ModuleType:
    """An extension of the installation, if it is of the sources with this digest.

    Raises:
        ImportError: it cannot be loaded here, or was compiled against another PyTorch, or from other sources.
    """
    module = importlib.import_module(name)
    # One that does not say what it was made of is older than the sources that have it say so.
    if getattr(module, "sources", None) != digest:
        raise ImportError("it was compiled from other sources than those that are here: install again")
    if not torch.__version__.startswith(module.torch_version):
        raise ImportError(
            f"it was compiled against PyTorch {module.torch_version}, and this is {torch.__version__}: install again"
        )
    return module


def load_compiled(name: str, folder: Path) -> ModuleType | None:
    """The extension that `compile_once` left in a folder; None if there is none that is whole."""
    with _loading:
        if folder in _loaded or not (folder / COMPLETE).exists():
            return _loaded.get(folder)
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _loaded[folder] = module
        return module


def compile_once(name: str, folder: Path, what: str, units: list[Path], **options: Any) -> ModuleType:
    """The extension, compiled in a folder by this process or by one that was asked at the same time.

    Args:
        options: of torch.utils.cpp_extension.load.
    Raises:
        RuntimeError: the compiler failed; its output is in the message.
    """
    with locked(folder):
        made = load_compiled(name, folder)
        if made is not None:
            return made
        from torch.utils import cpp_extension

        # PyTorch's own lock, left by a process that was killed, would be waited for without end.
        (folder / "lock").unlink(missing_ok=True)
        print(f"lora_kernels: compiling {what} in {folder}, once", file=sys.stderr, flush=True)
        with programs_found():
            module = cpp_extension.load(name, [str(path) for path in units], build_directory=str(folder), **options)
        (folder / COMPLETE).touch()
        _loaded[folder] = module
        return module  # type: ignore[no-any-return]


@contextmanager
def programs_found() -> Iterator[None]:
    """The programs that pip installed beside this Python are on the PATH, last: nobody need activate the environment.

    PyTorch looks for ninja there alone.
    """
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    added = os.pathsep.join(["", *(sysconfig.get_path("scripts", scheme) for scheme in schemes)])
    # Threads may overlap here: each takes away what it has added, and what another has added stays.
    with _path:
        os.environ["PATH"] = os.environ.get("PATH", os.defpath) + added
    try:
        yield
    finally:
        with _path:
            os.environ["PATH"] = os.environ["PATH"].removesuffix(added)


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
    return _folder(capability) / COMPLETE


@cache
def _folder(capability: Capability) -> Path:
    """Where the extension for a chip, from these sources and for this PyTorch, is kept."""
    root = root_folder()
    assert root is not None, "nowhere() says so first"
    return root / f"{_name(capability)}_{_digest(capability)}"


def root_folder() -> Path | None:
    """Where the folders of compiled extensions are; None where there is no home directory."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else cache_folder()


def _digest(capability: Capability) -> str:
    """A name for all that the compiled extension depends on."""
    return digest_of(source_folder(), [*versions(), *nvcc_flags((capability,))])


def _source_digest() -> str:
    return digest_of(source_folder(), [])


def versions() -> list[str]:
    """The PyTorch, CUDA and Python that an extension is compiled against."""
    return [torch.__version__, str(torch.version.cuda), sys.version]


def digest_of(folder: Path, facts: list[str]) -> str:
    """A short name for facts and for what the files of a folder hold."""
    digest = hashlib.sha256("\n".join(facts).encode())
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
