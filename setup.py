"""What pyproject.toml cannot say: csrc/ is a part of the package, and is compiled where the environment asks for it.

    pip install .                                                        compiles nothing
    LORA_KERNELS_BUILD_CUDA=1 pip install --no-build-isolation .         compiles csrc/ against the PyTorch at hand
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
            shutil.copytree(ROOT / "csrc", Path(self.build_lib, "lora_kernels", "csrc"), dirs_exist_ok=True)


def cuda_extension() -> dict[str, Any]:
    try:
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"LORA_KERNELS_BUILD_CUDA was set, but PyTorch cannot be imported here ({error}). The extension is "
            "compiled against the PyTorch that it will run with: install that, and pass --no-build-isolation to pip"
        ) from error
    sys.path.insert(0, str(ROOT))
    from lora_kernels.backends import cuda_build

    missing = cuda_build.missing()
    if missing is not None:
        raise SystemExit(f"LORA_KERNELS_BUILD_CUDA was set, but nothing can be compiled here: {missing}")
    extension = CUDAExtension(
        cuda_build.PREBUILT,
        [str(path.relative_to(ROOT)) for path in cuda_build.sources()],
        extra_compile_args={"cxx": ["-O2"], "nvcc": cuda_build.nvcc_flags(cuda_build.PREBUILT_CAPABILITIES, ptx=True)},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_py": BuildWithSources, "build_ext": BuildExtension}}


wanted = os.environ.get("LORA_KERNELS_BUILD_CUDA", "0")
if wanted not in ("0", "1"):
    raise SystemExit(f"LORA_KERNELS_BUILD_CUDA was {wanted!r}, but must be 0 or 1")
setup(**(cuda_extension() if wanted == "1" else {"cmdclass": {"build_py": BuildWithSources}}))
