"""What every test shares: the device, the backends, and poisoned allocations.

Without a GPU, Triton's kernels run in its interpreter, which must be switched on before Triton is imported. The
interpreter computes tl.dot of bfloat16 as integers, so it gets float16 and float32.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import HAS_GPU

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
elif importlib.util.find_spec("triton") is not None:
    import compile_once

    compile_once.use()


# What compiles longest, and begins first: where several processes share the tests, nobody waits for it at the end. The
# Makefile has the tests handed out one by one; by default one process would be given all of these.
_FIRST = ("test_targets.py", "test_gpu_kernels.py", "test_gpu_groups.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _FIRST)
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


def _backends() -> list[str]:
    return ["eager", "triton", *(["cuda"] if HAS_GPU and _why_no_cuda() is None else [])]


def _why_no_cuda() -> str | None:
    """Why the CUDA backend's kernels cannot run on this machine's GPU; None if they can."""
    from lora_kernels.backends import cuda_build

    if torch.version.cuda is not None and cuda_build.is_built(torch.cuda.get_device_capability(0)):
        return None
    return cuda_build.missing()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Not the header of the report, which -q leaves out."""
    why = _why_no_cuda() if HAS_GPU else None
    if why is not None:
        terminalreporter.write_line(f"NOT TESTED, the cuda backend: {why}")
    skipped = {str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])}
    if any("NOTHING IN csrc/ IS COMPILED" in reason for reason in skipped):
        terminalreporter.write_line("NOT COMPILED, csrc/: there is no nvcc on this machine")


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def compiled_cuda() -> None:
    """For tests of the CUDA backend by name: they are skipped where it cannot be compiled, which the run's end says."""
    why = _why_no_cuda() if HAS_GPU else "there is no GPU"
    if why is not None:
        pytest.skip(why)


@pytest.fixture(autouse=True)
def named_backend(request: pytest.FixtureRequest) -> None:
    """Of tests that are parametrized with backends by name."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "cuda":
        request.getfixturevalue("compiled_cuda")


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no tile wrote is seen."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # PyTorch fills fresh memory with NaN only in deterministic mode; warn_only lets everything else run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA backend that refuses everything, whether or not it could run here."""
    from lora_kernels import dispatch
    from lora_kernels.backends import cuda

    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, refuses=lambda problem: "it is not in the mood"))
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    dispatch._load.cache_clear()
    dispatch.choose.cache_clear()
    yield
    dispatch._load.cache_clear()
    dispatch.choose.cache_clear()
