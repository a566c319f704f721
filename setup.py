"""What pyproject.toml cannot say: csrc/ is a part of the package, and is compiled where the environment asks for it.

    pip install .                                                        compiles nothing
    LORA_KERNELS_BUILD_NATIVE=1 pip install --no-build-isolation .       compiles csrc/host/, the launch path
    LORA_KERNELS_BUILD_CUDA=1 pip install --no-build-isolation .         compiles all of csrc/, the CUDA backend too

Both compile against the PyTorch at hand; the launch path needs no more than a C++ compiler.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class BuildWithSources(build_py):
    """An installed package compiles csrc/ on first use, so it holds a copy. An editable one finds the checkout's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copy = Path(self.build_lib, "lora_kernels", "csrc")
            # What an earlier build left there may have lost its original since.
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", copy)


def wanted(variable: str) -> bool:
    value = os.environ.get(variable, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{variable} was {value!r}, but must be 0 or 1")
    return value == "1"


def extensions(cuda: bool) -> dict[str, Any]:
    variable = "LORA_KERNELS_BUILD_CUDA" if cuda else "LORA_KERNELS_BUILD_NATIVE"
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"{variable} was set, but PyTorch cannot be imported here ({error}). The extension is "
            "compiled against the PyTorch that it will run with: install that, and pass --no-build-isolation to pip"
        ) from error
    sys.path.insert(0, str(ROOT))
    from lora_kernels.backends import cuda_build, native_build

    missing = cuda_build.missing() if cuda else cuda_build.missing_compiler()
    if missing is not None:
        raise SystemExit(f"{variable} was set, but nothing can be compiled here: {missing}")
    made = [CppExtension(native_build.PREBUILT, units(native_build.sources()), extra_compile_args=native_build.flags())]
    if cuda:
        nvcc = cuda_build.nvcc_flags(cuda_build.PREBUILT_CAPABILITIES, ptx=True)
        options = {"cxx": cuda_build.cxx_flags(), "nvcc": nvcc}
        made.append(CUDAExtension(cuda_build.PREBUILT, units(cuda_build.sources()), extra_compile_args=options))
    return {"ext_modules": made, "cmdclass": {"build_py": BuildWithSources, "build_ext": BuildExtension}}


def units(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


with_cuda, with_native = wanted("LORA_KERNELS_BUILD_CUDA"), wanted("LORA_KERNELS_BUILD_NATIVE")
if with_cuda or with_native:
    options = extensions(with_cuda)
    from lora_kernels.backends.cuda_build import programs_found

    with programs_found():
        setup(**options)
else:
    setup(cmdclass={"build_py": BuildWithSources})
