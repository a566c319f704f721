"""Who computes a call: the choice, its reasons, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import dispatch, explain, lora_linear, selftest, use_backend
from lora_kernels.backends import Problem, cuda_build, eager, tf32_allowed
from lora_kernels.cli.main import main
from lora_kernels.dispatch import BackendRefused, choose, requested
from lora_kernels.selftest import BackendStatus, backend_report


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (9, 24), "weight": (40, 24), "lora_A": (3, 24), "lora_B": (40, 3)}
    return {name: torch.ones(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def test_use_backend_nests_and_is_undone() -> None:
    assert requested(None) == "auto"
    with use_backend("eager"):
        assert requested(None) == "eager"
        with use_backend("triton"):
            assert requested(None) == "triton"
            assert requested("auto") == "auto"
        assert requested(None) == "eager"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert requested(None) == "eager"
    assert requested(None) == "auto"


def test_use_backend_takes_known_names_only() -> None:
    with pytest.raises(ValueError, match="backend was 'tpu', but must be one of auto, triton, cuda, eager"):
        use_backend("tpu").__enter__()  # type: ignore[arg-type]
    assert requested(None) == "auto"


def test_use_backend_holds_for_its_thread() -> None:
    seen: list[str] = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(requested(None)))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.usefixtures("cuda_refuses")
def test_an_argument_wins_over_the_block(device: torch.device) -> None:
    tensors = make(device)
    with use_backend("cuda"):
        assert explain(**tensors, backend="eager").backend.name == "eager"
        lora_linear(**tensors, backend="eager")
        with pytest.raises(BackendRefused):
            explain(**tensors)
        with pytest.raises(BackendRefused):
            lora_linear(**tensors)
    with use_backend("eager"):
        assert explain(**tensors).backend.name == "eager"
        assert explain(**tensors, backend="triton").backend.name == "triton"


@pytest.mark.usefixtures("cuda_refuses")
def test_a_named_backend_does_not_fall_back(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this call: it is not in the mood") as caught:
        lora_linear(**make(device), backend="cuda")
    assert isinstance(caught.value, BackendRefused)
    assert caught.value.reason == "it is not in the mood"


def test_the_backward_takes_the_backend_of_the_forward(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make(device)
    tensors["lora_A"].requires_grad_()
    with use_backend(backend):  # type: ignore[arg-type]
        y = lora_linear(**tensors)
    assert y.grad_fn.backend.name == backend  # type: ignore[union-attr]
    # Neither the block nor a choice has a say any more.
    monkeypatch.setattr(dispatch, "choose", None)
    with use_backend("cuda"):
        y.sum().backward()
    assert torch.equal(tensors["lora_A"].grad, torch.full((3, 24), 9.0 * 40, device=device))  # type: ignore[arg-type]


def test_explain(device: torch.device) -> None:
    choice = explain(**make(device), backend="eager")
    assert str(choice).splitlines() == [
        "eager: library matrix products: 3 forward, 5 backward",
        "not triton: eager was asked for",
        "not cuda: eager was asked for",
    ]
    on_cpu = explain(**make(torch.device("cpu")), backend="auto")
    assert on_cpu.backend is eager.BACKEND
    assert list(on_cpu.refusals) == ["triton", "cuda"]
    assert on_cpu.refusals["cuda"] == "x is on cpu, and its kernels run on CUDA GPUs"
    assert "riton" in on_cpu.refusals["triton"]


@pytest.mark.usefixtures("cuda_refuses")
def test_a_cached_choice_is_for_what_it_was_made(device: torch.device) -> None:
    """The cache may not hand a choice to a call that asks for another backend, or differs in what decides."""
    tensors = make(device)
    lora_linear(**tensors, backend="eager")
    with pytest.raises(BackendRefused):
        lora_linear(**tensors, backend="cuda")
    with pytest.raises(TypeError, match=r"lora_B was torch\.float16"):
        lora_linear(**(tensors | {"lora_B": tensors["lora_B"].half()}), backend="eager")


TF32 = """
import torch
from lora_kernels.backends import Problem, tf32_allowed
matmul = torch.backends.cuda.matmul
{setting}
problem = Problem.of(torch.device("cpu"), torch.{dtype}, "native", 8, 8, 1)
print(tf32_allowed(), problem.tf32)
"""
NEW = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older than PyTorch 2.9")


@pytest.mark.parametrize(
    ("setting", "dtype", "expected"),
    [
        ("", "float32", "False False"),
        ("matmul.allow_tf32 = True", "float32", "True True"),
        ("matmul.allow_tf32 = True", "bfloat16", "True False"),
        ("torch.set_float32_matmul_precision('high')", "float32", "True True"),
        pytest.param("matmul.fp32_precision = 'tf32'", "float32", "True True", marks=NEW),
        pytest.param("torch.backends.fp32_precision = 'tf32'", "float32", "True True", marks=NEW),
        pytest.param("matmul.allow_tf32 = True; matmul.fp32_precision = 'ieee'", "float32", "False False", marks=NEW),
    ],
)
def test_tf32_is_what_the_user_said_in_whichever_way(setting: str, dtype: str, expected: str) -> None:
    # In a process of its own: once the newer setting was touched, the older ones raise.
    done = subprocess.run(
        [sys.executable, "-c", TF32.format(setting=setting, dtype=dtype)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr


def test_tf32_is_part_of_the_cached_choice(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Problem] = []

    def recording(problem: Problem, name: Any) -> Any:
        problems.append(problem)
        return choose(problem, name)

    from lora_kernels import functional

    monkeypatch.setattr(functional, "choose", recording)
    monkeypatch.setattr(functional, "_choices", {})
    for allowed in (False, True, False):
        for module in (functional, sys.modules[Problem.__module__]):
            monkeypatch.setattr(module, "tf32_allowed", lambda allowed=allowed: allowed)
        lora_linear(**make(device), backend="eager")
        lora_linear(**make(device, torch.float16), backend="eager")
    assert [(p.dtype, p.tf32) for p in problems] == [
        (torch.float32, False),
        (torch.float16, False),
        (torch.float32, True),
    ]
    assert isinstance(tf32_allowed(), bool)


def test_the_report_of_this_machine(device: torch.device) -> None:
    report = {status.name: status for status in backend_report(device)}
    assert list(report) == ["triton", "cuda", "eager"]
    assert report["eager"] == BackendStatus("eager", True, None, automatic=device.type == "cpu")
    # Without a GPU it works, through the interpreter that the tests switch on, and is chosen by nobody.
    assert report["triton"] == BackendStatus("triton", True, None, automatic=device.type == "cuda")
    if device.type == "cpu":
        assert report["cuda"].reason == "x is on cpu, and its kernels run on CUDA GPUs"
    else:
        assert report["cuda"].works == (cuda_build.missing() is None)


def triton_error() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 232448, "shared memory")


@pytest.mark.parametrize(
    ("make_error", "reason"),
    [
        (triton_error, "OutOfResources: out of resource: shared memory"),
        (lambda: RuntimeError(), "RuntimeError:"),
        (lambda: RuntimeError("\n"), "RuntimeError:"),
        (lambda: AssertionError("first\nsecond"), "AssertionError: first"),
        (lambda: KeyError("name"), "KeyError: 'name'"),
    ],
    ids=["triton", "empty", "blank", "two lines", "lookup"],
)
def test_a_backend_that_breaks_is_reported(
    make_error: Any, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> Any:
        raise make_error()

    monkeypatch.setattr(dispatch.eager, "BACKEND", replace(eager.BACKEND, forward=breaks))
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    dispatch._load.cache_clear()
    dispatch.choose.cache_clear()
    try:
        status = backend_report(torch.device("cpu"))[-1]
        monkeypatch.setattr(selftest, "backend_report", lambda: [status])
        assert main(["doctor"]) == 1
    finally:
        dispatch._load.cache_clear()
        dispatch.choose.cache_clear()
    assert (status.name, status.works, status.automatic) == ("eager", False, True)
    assert status.reason is not None
    assert status.reason.startswith(reason)
    assert "\n" not in status.reason
    assert "The automatic choice of a backend does not work here." in capsys.readouterr().out


def test_a_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        dA, dB = eager.backward_adapters(*arguments)
        return (None if dA is None else dA * 1.1), dB

    monkeypatch.setattr(dispatch.eager, "BACKEND", replace(eager.BACKEND, backward_adapters=wrong))
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    dispatch._load.cache_clear()
    dispatch.choose.cache_clear()
    try:
        status = backend_report(torch.device("cpu"))[-1]
    finally:
        dispatch._load.cache_clear()
        dispatch.choose.cache_clear()
    assert status.reason == "its gradient of lora_A is off by 1.0e-01"


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_doctor_names_what_the_automatic_choice_takes(interpreted: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpreted, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (automatic,) = [line for line in done.stdout.splitlines() if line.endswith("<- the automatic choice")]
    assert automatic.split()[0] == "eager"
    (triton,) = [line for line in done.stdout.splitlines() if line.startswith("  triton")]
    assert ("refuses because x is on" in triton) == (interpreted == "0")
    assert "backend=" not in triton
