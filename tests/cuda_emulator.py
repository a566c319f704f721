"""The kernels of csrc/ as a module for the CPU, its arithmetic seen thread by thread: what tests have without a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from lora_kernels.backends import cuda_build

NAME = "lora_kernels_cuda_emulated"
# In place of files of the same name in csrc/, and of CUDA's own headers.
EMULATION = Path(__file__).with_name("cuda_emulation")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def load() -> ModuleType:
    """The module, compiled once for each state of the sources; processes that ask at once wait for the first."""
    csrc = cuda_build.source_folder()
    sources = [path for path in csrc.iterdir() if path.is_file() and not path.name.startswith("hopper")]
    sources += [csrc / "hopper_one_pass.h", *EMULATION.iterdir()]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = Path(tempfile.gettempdir(), f"{NAME}_{os.getuid()}_{digest.hexdigest()[:16]}")
    module = folder / f"{NAME}.so"
    with cuda_build.locked(folder):
        if not module.exists():
            _compile(sources, folder, module)
    spec = importlib.util.spec_from_file_location(NAME, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _compile(sources: list[Path], folder: Path, module: Path) -> None:
    from torch.utils import cpp_extension

    units = []
    for path in sources:
        # Those of the emulation come last, and take the place of their namesakes.
        copy = folder / path.name
        shutil.copyfile(path, copy)
        if path.suffix in (".cu", ".cpp"):
            units.append(copy)
    includes = [str(folder), *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    options = ["-std=c++20", *cuda_build.cxx_flags(), "-fPIC", "-w", "-fno-strict-aliasing"]
    options.append(f"-DTORCH_EXTENSION_NAME={NAME}")
    objects = [str(unit.with_suffix(".o")) for unit in units]
    compile_one = [str(COMPILER), *options, *(f"-I{path}" for path in includes), "-x", "c++", "-c"]
    compilations = [
        subprocess.Popen([*compile_one, str(unit), "-o", out])
        for unit, out in zip(units, objects, strict=True)
    ]
    assert [process.wait() for process in compilations] == [0] * len(units), "the emulation does not compile"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    part = module.with_suffix(".part")
    subprocess.run([str(COMPILER), "-shared", *objects, *libraries, "-o", str(part)], check=True)
    part.rename(module)
