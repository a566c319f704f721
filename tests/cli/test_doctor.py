"""python -m lora_kernels doctor, and the dispatcher around it."""

import subprocess
import sys

import pytest

from lora_kernels import selftest
from lora_kernels.cli.main import main
from lora_kernels.selftest import BackendStatus


def _report(monkeypatch: pytest.MonkeyPatch, *statuses: BackendStatus) -> None:
    monkeypatch.setattr(selftest, "backend_report", lambda: list(statuses))


def test_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "lora_kernels", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("python", "torch", "triton", "peft", "transformers", "bitsandbytes", "cuda", "GPU", "eager"):
        assert name in done.stdout
    assert done.stdout.count("automatic choice\n") == 1


def test_the_automatic_choice_is_marked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _report(
        monkeypatch,
        BackendStatus("broken", False, "there is no GPU"),
        BackendStatus("declined", True, None),
        BackendStatus("taken", True, None, automatic=True),
    )
    assert main(["doctor"]) == 0
    broken, declined, taken = capsys.readouterr().out.splitlines()[-3:]
    assert broken.split(None, 1) == ["broken", "refuses because there is no GPU"]
    assert declined.split(None, 1) == ["declined", "works"]
    assert taken.split(None, 1) == ["taken", "works   <- the automatic choice"]


def test_an_automatic_choice_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _report(
        monkeypatch,
        BackendStatus("taken", False, "its y is off by 1.0e+00", automatic=True),
        BackendStatus("other", True, None),
    )
    assert main(["doctor"]) == 1
    assert "The automatic choice of a backend does not work here." in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nosuch"], ["doctor", "--nosuch"]])
def test_a_wrong_command_line_is_one_line_and_exit_status_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "doctor" in out
    assert "finetune" in out
