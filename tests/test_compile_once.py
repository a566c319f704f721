"""Two processes that need the same kernel at the same time: one of them compiles it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = """
import compile_once, triton
from target_builds import MASK, Build
from target_sources import source
from triton.backends.compiler import GPUTarget

compile_once.use()
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
src, options = source(Build(80, "mask", MASK))
print("ready", flush=True)
input()
for _ in range(2):
    triton.compile(src, target=GPUTarget("cuda", 80, 32), options=options)
print(*hits)
"""


def test_one_process_compiles(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_INTERPRET": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate()[0].split() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == [["False", "True"], ["True", "True"]]
