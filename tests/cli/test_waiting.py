"""What is shown while something takes long: on a terminal a count, elsewhere nothing."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from terminal import on_a_terminal

from lora_kernels import selftest
from lora_kernels.backends import cuda_build, native_build
from lora_kernels.cli import build, doctor, waiting
from lora_kernels.cli.main import main
from lora_kernels.selftest import BackendStatus


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands count every 5 ms."""
    elapsed = waiting.elapsed
    for module in (build, doctor):
        monkeypatch.setattr(module, "elapsed", lambda what: elapsed(what, interval=0.005))


def _slow(result: Any) -> Any:
    time.sleep(0.1)
    return result


def test_the_line_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with pytest.raises(KeyError), waiting.elapsed("brewing", interval=0.005):
        _slow({})["cup"]
    assert "brewing: 0 s\033[K\r" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")


def test_a_file_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    with waiting.elapsed("brewing", interval=0.005):
        time.sleep(0.05)
    assert list(waiting.bar(range(3), "cup")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_bar_is_as_long_as_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = on_a_terminal(monkeypatch)
    assert list(waiting.bar(range(3), "cup", "brewing")) == [0, 1, 2]
    assert list(waiting.bar(iter("ab"), "cup", "drinking", 2)) == ["a", "b"]
    assert "brewing: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "drinking: 100%" in terminal.getvalue()


def test_build_counts(
    hurried: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = on_a_terminal(monkeypatch)
    made = SimpleNamespace(__file__="made.so")
    monkeypatch.setattr(native_build, "build", lambda: _slow(made))
    monkeypatch.setattr(cuda_build, "missing", lambda: None)
    monkeypatch.setattr(cuda_build, "nowhere", lambda: None)
    monkeypatch.setattr(cuda_build, "load", lambda capability: _slow(made))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert main(["build", "--cuda"]) == 0
    assert capsys.readouterr().out == "launch path   made.so\nCUDA backend  made.so\n"
    assert "compiling the launch path: 0 s" in terminal.getvalue()
    assert "compiling the CUDA backend: 0 s" in terminal.getvalue()


def test_doctor_counts(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    statuses = [BackendStatus("taken", True, None, automatic=True)]
    monkeypatch.setattr(selftest, "backend_report", lambda: _slow(statuses))
    assert main(["doctor"]) == 0
    assert "testing the backends: 0 s" in terminal.getvalue()
