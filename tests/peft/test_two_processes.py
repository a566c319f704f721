"""DDP and FSDP2 over two processes, with groups and gated MLPs: what one with stock PEFT learns from both halves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from peft_models import assert_same

SCRIPT = Path(two_processes.__file__)
GPUS = torch.cuda.device_count()
TWO_GPUS = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(GPUS < two_processes.WORLD, reason="needs two GPUs")]
)


@pytest.fixture(scope="module", params=["cpu", TWO_GPUS])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The device, and by kind what two processes made of a model."""
    device, folder = request.param, tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # Triton's interpreter would be chosen for tensors on the CPU.
    environment.pop("TRITON_INTERPRET", None)
    commands = [[sys.executable, str(SCRIPT), device, str(rank), str(folder)] for rank in range(two_processes.WORLD)]
    processes = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    return device, torch.load(folder / "results.pt")


@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_two_learn_what_one_learns(kind: str, learned: tuple[str, dict[str, Any]]) -> None:
    device, results = learned
    stock = two_processes.model_of(device, kind)
    losses = two_processes.train(stock, two_processes.tokens().to(device))
    assert losses[-1] < losses[0]
    assert results[kind]["losses"] == pytest.approx(losses, rel=1e-4)
    assert_same(two_processes.adapters(stock), results[kind]["adapters"], 1e-3)
