"""The pytest-benchmark suites of bench/ run, on a CPU as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]


def test_the_suites_run() -> None:
    only = "(frozen or eager or bitsandbytes) and 1x256x320"
    # A worker of pytest-xdist tells its children so, and pytest-benchmark measures nothing in those.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--suite", "tiny", "-k", only],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed, 2 skipped" in done.stdout
    assert "bitsandbytes: it is for 4-bit weights" in done.stdout
    assert "1x256x320 r16 float32, step" in done.stdout
