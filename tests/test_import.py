"""Importing the package is free: no GPU, no Triton, no PEFT, no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str, directory: Path, *options: str) -> str:
    """What a fresh Python prints. It may not write next to the sources, where a compiled module may be."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(directory)}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_brings_in_nothing_else(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import lora_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "peft", "transformers", "bitsandbytes", "accelerate", "matplotlib"}))
print(torch.cuda.is_initialized())
print("lora_kernels.compiled" in sys.modules, "lora_kernels.integrations" in sys.modules)
"""
    assert run(code, tmp_path).splitlines() == ["[]", "False", "False False"]


def test_importing_writes_nothing(tmp_path: Path) -> None:
    code = """
import sys, torch
def refuse(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise SystemExit(f"opened {arguments[0]} for writing")
    if event in {"os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"}:
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
import lora_kernels
lora_kernels.LoRALinear(4, 4)(torch.ones(2, 4)).sum().backward()
print("done")
"""
    assert run(code, tmp_path, "-B") == "done"
    # Where there is a GPU, its driver makes a cache of its own when PyTorch asks for the device.
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != ".nv"] == []


def test_everything_but_triton_works_without_triton(tmp_path: Path) -> None:
    code = """
import sys, torch
sys.modules["triton"] = None
import lora_kernels
from lora_kernels.dispatch import BackendRefused
from lora_kernels.selftest import backend_report
arguments = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
print(lora_kernels.lora_linear(*arguments).tolist())
print(lora_kernels.explain(*arguments, backend="auto").backend.name)
print([(status.name, status.works, status.automatic) for status in backend_report(torch.device("cpu"))])
try:
    lora_kernels.lora_linear(*arguments, backend="triton")
except BackendRefused as refusal:
    print(refusal.reason)
"""
    y, name, report, reason = run(code, tmp_path).splitlines()
    assert y == str([[8.0] * 3] * 2)
    assert name == "eager"
    assert report == str([("triton", False, False), ("cuda", False, False), ("eager", True, True)])
    assert reason.startswith("Triton cannot be imported: ")


def test_public_names(tmp_path: Path) -> None:
    code = """
import lora_kernels
names = set(lora_kernels.__all__)
print(sorted(names - lora_kernels._PEFT_NAMES - set(vars(lora_kernels))), lora_kernels._PEFT_NAMES <= names)
try:
    lora_kernels.nothing
except AttributeError as error:
    print(error)
"""
    assert run(code, tmp_path).splitlines() == ["[] True", "module 'lora_kernels' has no attribute 'nothing'"]
