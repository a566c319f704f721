"""Every kernel in every shipped configuration compiles for every chip, and fits it, without that chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("triton", reason="Triton is not installed")

# Bytes of a thread's stack: of each kernel what the build that needs most of it takes with Triton 3.9, for an epilogue
# with much in it. That is far from where a main loop would spill; but a change that takes more should be measured
# before it raises a number here.
MOST_STACK = {
    "mask": 0,
    "one_pass": 608,
    "few_rows": 48,
    "products": 0,
    "backward": 608,
    "group_forward": 448,
    "group_input": 552,
    "nf4_product": 344,
    "adapter_grads": 0,
    "group_grads": 0,
    "dequantize": 0,
    "gated_forward": 0,
    "gated_backward": 0,
}
# Triton 3.4, which comes with PyTorch 2.8, takes up to 744 for a group's forward.
RECENT, OLDER = Version(version("triton")) >= Version("3.5"), 800


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 942])
def test_every_configuration_fits(capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("compile_targets.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment, check=False
    )
    if "ROCm linker" in done.stderr:
        pytest.skip("this release of Triton brings no linker for AMD's chips")
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) >= 6
    for result in results:
        name = result["build"]
        assert result["shared"] <= result["limit"], f"{name} takes {result['shared']} bytes of shared memory"
        most = MOST_STACK[result["kernel"]] if RECENT else OLDER
        assert result["stack"] <= most, f"{name} spills: a stack of {result['stack']} bytes"
        assert not result["serialized"], f"{name}: {result['serialized']}"
        # Seen on an H100: products of reshaped shared memory that reach outside of it.
        assert not result["reshaped"], f"{name} multiplies shared memory that the compiler reshaped"
        assert not result["moved"], f"{name} moves decoded weights through shared memory"
        assert result["by_number"] == 0, f"{name} has {result['by_number']} loads of a number each"
        # What mask.py asks of Triton's inside, it may stop telling: the mask would be right, and slow.
        assert result["in_pairs"], f"{name} masks X number by number"
        assert result["pipelined"], f"{name}: its main loop is not pipelined, shared memory is {result['shared']}"
