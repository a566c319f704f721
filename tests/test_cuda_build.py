"""Every .cu compiles for chips that need not be there, without PyTorch; and what there is to the build around it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lora_kernels.backends import Problem, cuda, cuda_build

ROOT = Path(__file__).parents[1]
# At 1, it is an error that there is no nvcc: where a job is there for what nvcc says.
NEEDS_NVCC = "LORA_KERNELS_TEST_NVCC"
CHIPS = [(8, 0), (9, 0), (10, 0)]
KERNELS = [path for path in cuda_build.sources() if path.suffix == ".cu"]
# Bytes of registers that lie in memory: what the Hopper kernel's masked epilogue needs. A main loop would take more.
MOST_SPILLED = 160
# As PyTorch compiles extensions: no implicit conversions, no operators of 16-bit types.
STRICT = [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]


def find_nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        missing = "NOTHING IN csrc/ IS COMPILED HERE: there is no nvcc on this machine"
        if os.environ.get(NEEDS_NVCC) == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_compiles(source: Path, chip: cuda_build.Capability, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    flags = [*cuda_build.nvcc_flags((chip,)), *STRICT, "-std=c++17", "-Xptxas", "-v"]
    done = subprocess.run(
        [nvcc, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    notes = done.stdout + done.stderr
    assert done.returncode == 0, notes[-5000:]
    assert "warning" not in notes, notes[-5000:]
    # So it says where wgmma's products wait for each other.
    assert "Potential Performance Loss" not in notes, notes[-5000:]
    spilled = [int(line.split(" bytes spill stores")[0].split()[-1]) for line in notes.splitlines() if "spill" in line]
    assert max(spilled, default=0) <= MOST_SPILLED, notes[-5000:]


@pytest.mark.parametrize(("needed", "outcome"), [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_missing_nvcc_is_seen(needed: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NEEDS_NVCC, needed)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(outcome, match="NOTHING IN csrc/ IS COMPILED HERE"):
        find_nvcc()


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


def installed(**facts: str) -> ModuleType:
    """An extension as an installation holds it."""
    module = ModuleType(cuda_build.PREBUILT)
    vars(module).update({"sources": cuda_build._source_digest(), "torch_version": torch.__version__} | facts)
    return module


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (installed(), None),
        (installed(sources="1"), "from other sources than those that are here: install again"),
        (installed(torch_version="2.7.9"), f"against PyTorch 2.7.9, and this is {torch.__version__}: install again"),
        # As it was before extensions said what they were made of.
        (ModuleType(cuda_build.PREBUILT), "from other sources than those that are here: install again"),
        # Python's way to say that a module cannot be imported.
        (None, "import of lora_kernels._cuda halted"),
    ],
)
def test_a_stale_installation_is_refused(
    extension: ModuleType | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the automatic choice nor a call that names it runs what does not fit, or dies of it."""
    problem = Problem(torch.device("cuda"), torch.bfloat16, "native", 64, 64, 8)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_build, "has_prebuilt", lambda: True)
    monkeypatch.setitem(sys.modules, cuda_build.PREBUILT, extension)
    if reason is None:
        assert cuda._refuses(problem) is None
        assert cuda_build.load((9, 0)) is extension
        return
    refusal = str(cuda._refuses(problem))
    assert refusal.startswith("what was compiled at installation cannot be used: ")
    assert reason in refusal
    with pytest.raises(ImportError, match=re.escape(reason)):
        cuda_build.load((9, 0))


def test_other_sources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is told, and what is compared with it."""
    copy = tmp_path / "csrc"
    shutil.copytree(cuda_build.source_folder(), copy)
    monkeypatch.setattr(cuda_build, "source_folder", lambda: copy)
    before = cuda_build._source_digest()
    assert f"-DLORA_KERNELS_SOURCES={before}" in cuda_build.cxx_flags()
    with (copy / "bindings.cpp").open("a") as file:
        file.write("\n")
    assert f"-DLORA_KERNELS_SOURCES={before}" not in cuda_build.cxx_flags()


@pytest.mark.gpu
def test_the_extension_says_what_it_was_made_of() -> None:
    capability = torch.cuda.get_device_capability()
    if not cuda_build.is_built(capability) and cuda_build.missing() is not None:
        pytest.skip(f"nothing can be compiled: {cuda_build.missing()}")
    extension = cuda_build.load(capability)
    assert extension.sources == cuda_build._source_digest()
    assert torch.__version__.startswith(extension.torch_version)


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
    # A folder that cannot be made, as nobody can make one in a file.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(Path(__file__, "inside")))
    cuda_build._folder.cache_clear()
    assert f"{Path(__file__)}, where it would be kept, cannot be written" in str(cuda._refuses(problem))
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


def test_a_ninja_beside_python_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip puts it there, and nobody need have activated that environment."""
    on_path, scripts = tmp_path / "path", tmp_path / "scripts"
    for program in (on_path / "my-compiler", scripts / "ninja"):
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho 1.13\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{on_path}")
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "elsewhere"))
    assert cuda_build.missing_compiler() == "there is no ninja (pip install ninja)"
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(scripts))
    assert cuda_build.missing_compiler() is None
    assert os.environ["PATH"] == str(on_path)
    # As of two threads, of which the first to come is the first to leave.
    first, second = cuda_build.programs_found(), cuda_build.programs_found()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert shutil.which("ninja") == str(scripts / "ninja")
    second.__exit__(None, None, None)
    assert os.environ["PATH"] == str(on_path)


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
    packed = tmp_path / "lib" / "lora_kernels" / "csrc"
    packed.mkdir(parents=True)
    (packed / "gone.cu").write_text("// Of an earlier build.")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=copy, check=True, capture_output=True,
    )  # fmt: skip
    assert {p.name for p in packed.iterdir()} == {p.name for p in (ROOT / "csrc").iterdir()}
    assert cuda_build.digest_of(packed, []) == cuda_build._source_digest()
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


@pytest.mark.parametrize("why", [None, "there is no ninja (pip install ninja)"])
def test_a_run_says_that_it_leaves_the_backend_out(why: str | None, pytestconfig: pytest.Config) -> None:
    shared = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert shared is not None
    lines: list[str] = []
    reporter = SimpleNamespace(write_line=lines.append, stats={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "HAS_GPU", True)
        patch.setattr(shared, "_why_no_cuda", lambda: why)
        shared.pytest_terminal_summary(reporter)
        backends = shared._backends()
    assert backends == ["eager", "triton", *(["cuda"] if why is None else [])]
    assert lines == ([] if why is None else [f"NOT TESTED, the cuda backend: {why}"])


def test_a_run_says_that_nothing_was_compiled(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    shared = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert shared is not None
    monkeypatch.setattr(shared, "HAS_GPU", False)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv(NEEDS_NVCC, "0")
    with pytest.raises(pytest.skip.Exception) as skipped:
        find_nvcc()
    lines: list[str] = []
    reports = [SimpleNamespace(longrepr=("test_cuda_build.py", 30, f"Skipped: {skipped.value}"))]
    shared.pytest_terminal_summary(SimpleNamespace(write_line=lines.append, stats={"skipped": reports}))
    assert lines == ["NOT COMPILED, csrc/: there is no nvcc on this machine"]
