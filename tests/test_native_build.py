"""How the launch path in C++ is compiled, found again and left alone; and what the commands say of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_path import FOLDER, kept_in

from lora_kernels import native
from lora_kernels.backends import cuda_build, native_build
from lora_kernels.cli import doctor
from lora_kernels.cli.main import main

pytest_plugins = ("launch_path",)


def test_a_stale_build_is_not_loaded(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = cuda_build.versions()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_functions", list)
    for present, reason in ((versions, None), (["2.99.0", *versions[1:]], native.NOT_COMPILED)):
        monkeypatch.setattr(cuda_build, "versions", lambda present=present: present)
        with kept_in(FOLDER):
            assert native.why_not() == reason
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(native_build, "has_prebuilt", lambda: True)
    monkeypatch.setitem(sys.modules, native_build.PREBUILT, extension)
    assert "compiled against PyTorch" in str(native.why_not())
    monkeypatch.setattr(torch, "__version__", extension.torch_version)
    assert native.why_not() is None
    monkeypatch.setattr(native_build, "_source_digest", lambda: "another")
    assert "from other sources" in str(native.why_not())
    monkeypatch.setenv(native.VARIABLE, "0")
    assert native.why_not() == "LORA_KERNELS_NATIVE is 0"


def test_other_sources_have_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "csrc" / "host"
    shutil.copytree(native_build._source_folder(), copy)
    shutil.copy(cuda_build.source_folder() / "problem.h", copy.parent)

    def folder() -> Path:
        native_build.folder.cache_clear()
        return native_build.folder()

    with kept_in(tmp_path):
        before = folder()
        monkeypatch.setattr(cuda_build, "source_folder", lambda: copy.parent)
        assert folder() == before
        # The other is shared with the CUDA backend, whose functions are called by what it says.
        for path in (copy / "plans.h", copy.parent / "problem.h"):
            with path.open("a") as file:
                file.write("\n")
            assert folder() != before
            before = folder()


def test_the_build_command(
    extension: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept_in(FOLDER):
        assert main(["build"]) == 0
    # A process loads one extension of a name, and another test may have loaded it from elsewhere.
    assert extension.__file__ in capsys.readouterr().out
    with kept_in(tmp_path):
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert main(["build"]) == 2
        assert "there is no C++ compiler: 'no-such-compiler'" in capsys.readouterr().err
        monkeypatch.delenv("CXX")
        monkeypatch.setattr(native_build, "flags", lambda: ["-no-such-option"])
        assert main(["build"]) == 2
        assert "no-such-option" in capsys.readouterr().err
        assert not native_build.is_built()


@pytest.mark.parametrize("reason", [None, native.NOT_COMPILED, "LORA_KERNELS_NATIVE is 0"])
def test_the_doctor_says_who_launches(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: reason)
    said = doctor._launches()
    assert (said == "native") == (reason is None)
    assert reason is None or said.startswith(f"Python: {reason}")
    assert ("python -m lora_kernels build" in said) == (reason == native.NOT_COMPILED)


def test_the_switch_takes_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "off")
    with pytest.raises(ValueError, match="LORA_KERNELS_NATIVE in the environment was 'off', but must be 0 or 1"):
        native.why_not()
