"""Every .cu compiles for chips that need not be there, without PyTorch; and what there is to the build around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.backends import Problem, cuda, cuda_build

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CHIPS = [(8, 0), (9, 0), (10, 0)]
KERNELS = [path for path in cuda_build.sources() if path.suffix == ".cu"]
# Bytes of registers that lie in memory: what the Hopper kernel's masked epilogue needs. A main loop would take more.
MOST_SPILLED = 160
# As PyTorch compiles extensions: no implicit conversions, no operators of 16-bit types.
STRICT = [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]


@pytest.mark.skipif(NVCC is None, reason="NOTHING IN csrc/ IS COMPILED HERE: there is no nvcc on this machine")
@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_compiles(source: Path, chip: cuda_build.Capability, tmp_path: Path) -> None:
    flags = [*cuda_build.nvcc_flags((chip,)), *STRICT, "-std=c++17", "-Xptxas", "-v"]
    done = subprocess.run(
        [str(NVCC), *flags, "-c", str(source), "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    notes = done.stdout + done.stderr
    assert done.returncode == 0, notes[-5000:]
    assert "warning" not in notes, notes[-5000:]
    spilled = [int(line.split(" bytes spill stores")[0].split()[-1]) for line in notes.splitlines() if "spill" in line]
    assert max(spilled, default=0) <= MOST_SPILLED, notes[-5000:]


def test_the_kernels_know_nothing_of_pytorch() -> None:
    for path in filter(Path.is_file, cuda_build.source_folder().iterdir()):
        mentions = "#include <torch" in path.read_text() or "#include <ATen" in path.read_text()
        assert mentions == (path.name == "bindings.cpp"), path.name


def test_flags_name_hoppers_own_target() -> None:
    flags = cuda_build.nvcc_flags(((8, 0), (9, 0)), ptx=True)
    assert flags[1:] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_the_cache_depends_on_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(cuda_build.source_folder(), copy)
    before = cuda_build._digest((9, 0))
    monkeypatch.setattr(cuda_build, "source_folder", lambda: copy)
    assert cuda_build._digest((9, 0)) == before
    assert cuda_build._digest((8, 0)) != before
    with (copy / "philox.cuh").open("a") as file:
        file.write("\n")
    assert cuda_build._digest((9, 0)) != before


def test_refuses_for_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def problem(device: str) -> Problem:
        return Problem(torch.device(device), torch.bfloat16, "native", 64, 64, 8)

    assert cuda._refuses(problem("cpu")) == "x is on cpu, and its kernels run on CUDA GPUs"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._refuses(problem("cuda")) == "this PyTorch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda._refuses(problem("cuda")) == "compute capability is 7.5, and the kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(cuda_build, "_folder", lambda capability: tmp_path)
    monkeypatch.setattr(cuda_build, "missing", lambda: "there is no ninja")
    assert cuda._refuses(problem("cuda")) == "it is not compiled, and cannot be here: there is no ninja"
    # Naming it may compile; the automatic choice never does.
    monkeypatch.setattr(cuda_build, "missing", lambda: None)
    assert cuda._refuses(problem("cuda")) is None
    assert str(cuda._declines(problem("cuda"))).startswith("it is not compiled yet")
    (tmp_path / "complete").touch()
    assert cuda._declines(problem("cuda")) is None


def test_refuses_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The automatic choice asks whether it is built on every GPU: no home is a reason, and not an error."""
    problem = Problem(torch.device("cuda"), torch.bfloat16, "native", 64, 64, 8)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(cuda_build, "missing", lambda: None)
    monkeypatch.setattr(Path, "home", homeless)
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    cuda_build._folder.cache_clear()
    assert "no home directory to keep it in" in str(cuda._refuses(problem))
    assert str(cuda._declines(problem)).startswith("it is not compiled yet")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert cuda._refuses(problem) is None
    cuda_build._folder.cache_clear()


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_build.missing() == "this PyTorch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert "nvcc" in str(cuda_build.missing())
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert "nvcc" in str(cuda_build.missing())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert cuda_build.missing() == "there is no ninja (pip install ninja)"
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cuda_build.missing() == "there is no C++ compiler: 'no-such-compiler' is not on the PATH"


def test_processes_that_ask_at_once_compile_once(tmp_path: Path) -> None:
    """With a compiler that takes its time, and the lock of a process that was killed in the way."""
    script = """
import sys, time
from pathlib import Path
from torch.utils import cpp_extension
from lora_kernels.backends import cuda_build

def compiler(name, sources, build_directory, **options):
    assert not Path(build_directory, "lock").exists()
    time.sleep(1)
    module = Path(build_directory, f"{name}.so")
    with (Path(build_directory) / "count").open("a") as file:
        file.write("compiled ")
    # Any extension module serves as the compiled one.
    import _testcapi
    module.write_bytes(Path(_testcapi.__file__).read_bytes())
    return _testcapi

cpp_extension.load = compiler
cuda_build._name = lambda capability: "_testcapi"
print(cuda_build.load((8, 0)).__name__)
"""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    asked = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in asked] == ["_testcapi"] * 2
    (folder,) = tmp_path.iterdir()
    assert (folder / "count").read_text() == "compiled "
    (folder / "complete").unlink()
    (folder / "lock").touch()
    assert subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).strip() == "_testcapi"


def test_a_package_holds_the_sources(tmp_path: Path) -> None:
    """What `pip install .` copies, as far as setuptools decides it: csrc is inside, and the checkout stays clean."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "bench"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=copy, check=True, capture_output=True,
    )  # fmt: skip
    packed = tmp_path / "lib" / "lora_kernels" / "csrc"
    assert {p.name for p in packed.iterdir()} == {p.name for p in (ROOT / "csrc").iterdir()}
    assert not (copy / "lora_kernels" / "csrc").exists()


@pytest.mark.parametrize("variable", ["LORA_KERNELS_BUILD_CUDA", "LORA_KERNELS_BUILD_NATIVE"])
def test_the_switches_take_0_or_1(variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {variable: "yes"},
        check=False,
    )
    assert done.returncode != 0
    assert f"{variable} was 'yes', but must be 0 or 1" in done.stderr
