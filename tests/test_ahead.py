"""Kernels of a backward are compiled beside those of its forward, each once; in processes with caches of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    find_spec("triton.runtime._async_compile") is None, reason="this Triton is not meant to compile in threads"
)

# Writes down what is compiled, where, and whether Triton's cache on disk had it already.
LISTEN = """
import json, threading, triton

compiled = []

def listen(src, metadata, metadata_group, times, cache_hit):
    ahead = threading.current_thread().name.startswith("lora_kernels compiles")
    compiled.append((src.fn.__name__, ahead, cache_hit))

triton.knobs.compilation.listener = listen
"""

# An A100 that compiles and does nothing.
NO_GPU = (
    LISTEN
    + """
import contextlib
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from lora_kernels.backends import Member
from lora_kernels.backends.triton import ahead, backward_launch, group, group_launch, launch, launches, single
from lora_kernels.backends.triton.tiles import Chip
from lora_kernels.dropout import Dropout

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 80, 32)

triton.runtime.driver.set_active(Driver())
triton.JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **o: kernel.warmup(*a, grid=grid, **o)
launches.direct_kernel = launches.BoundLaunch = lambda *a: SimpleNamespace(parameters=[])
ahead.torch.cuda.device = lambda device: contextlib.nullcontext()
zeros = torch.zeros(1 << 16, dtype=torch.int32)
for module in (launch, backward_launch, group_launch):
    module.chip_of = lambda device: Chip((8, 0), 108, 166912, False)
    module.zeros_for = lambda device, count: zeros

M, K, N, r = 96, 64, 48, 8
dropout = Dropout(0.1, torch.zeros(1, dtype=torch.int64))
def matrix(rows, columns, dtype=torch.bfloat16): return torch.zeros(rows, columns, dtype=dtype)
x, dy = matrix(M, K), matrix(M, N)
def layer(): return matrix(N, K), matrix(r, K, torch.float32), matrix(N, r, torch.float32)
"""
)
LAYER = """
weight, lora_A, lora_B = layer()
_, s = single.forward(x, weight, lora_A, lora_B, None, 2.0, dropout, "rounded", want_s)
if want_s:
    single.backward(dy, weight, lora_A, lora_B, x, s, 2.0, dropout, "rounded", torch.float32)
"""
ONE_LAUNCH = "\nbackward_launch.is_for_one_launch = lambda device, rank: True"
GROUP = """
members = [Member(*layer(), None, 2.0, dropout) for _ in range(2)]
_, ss = group.forward(x, members, "rounded", want_s)
_, ts = group.backward_input([dy, dy], members, "rounded", True)
group_launch.backward_adapters(x, [dy, dy], ss, ts, [dropout] * 2, torch.float32)
"""
NO_ROOM = """
import lora_kernels.backends.triton.single as module
def no_room(*arguments): raise torch.OutOfMemoryError("no room")
module._rehearse_backward = no_room
"""
REPORT = "print(json.dumps(compiled))"

GPU = (
    LISTEN
    + """
import torch
from lora_kernels import lora_linear

def step(backend):
    torch.manual_seed(0)
    # More than few rows.
    shapes = [(600, 128), (96, 128), (16, 128), (96, 16)]
    x, weight, lora_A, lora_B = [torch.randn(s, device="cuda", dtype=torch.bfloat16) / 8 for s in shapes]
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = lora_linear(x, weight, lora_A, lora_B, scaling=0.5, dropout_p=0.3, backend=backend)
    y.backward(torch.randn_like(y))
    return [y.detach(), *[t.grad for t in leaves]]

expected, first, second = step("eager"), step("triton"), step("triton")
assert all(map(torch.equal, first, second))
for got, wanted in zip(first, expected):
    assert float((got - wanted).float().norm() / wanted.float().norm()) < 1e-2
"""
)


def _compiled(script: str, cache: Path) -> list[list[Any]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script + REPORT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout)
    return sorted(found)


def _ahead(*names: str) -> list[list[Any]]:
    """Those kernels on other threads, but for the first, the forward's, in this one; the mask's is for both."""
    return sorted([[name, True, False] for name in names[1:]] + [[names[0], False, False]])


@pytest.mark.parametrize(
    ("script", "names"),
    [
        (LAYER, ["one_pass_kernel", "mask_kernel", "one_pass_kernel", "adapter_grads_kernel"]),
        # And what a gated MLP has in its place.
        (
            ONE_LAUNCH + LAYER,
            ["one_pass_kernel", "mask_kernel", "backward_kernel", "one_pass_kernel", "adapter_grads_kernel"],
        ),
        (GROUP, ["group_forward_kernel", "mask_kernel", "group_input_kernel", "group_grads_kernel"]),
    ],
    ids=["layer", "layer in one launch", "group"],
)
def test_a_backward_is_compiled_beside_its_forward(script: str, names: list[str], tmp_path: Path) -> None:
    assert _compiled(NO_GPU + "want_s = True" + script, tmp_path) == _ahead(*names)


# Without a mask, and with what the adapters' gradients take of the libraries.
WIDE = (
    LAYER.replace("dropout", "None")
    + """
assert len(library) == 1
"""
)
TAKE_ALL = """
from lora_kernels.backends import eager
from lora_kernels.backends.triton import wide_ranks
wide_ranks.is_wide_rank = lambda rows, rank, members=1: True
library, adapters = [], eager.backward_adapters
def noting(*arguments):
    library.append(1)
    return adapters(*arguments)
eager.backward_adapters = noting
want_s = True
"""


def test_the_two_launches_of_a_large_rank(tmp_path: Path) -> None:
    """Those of the backward are compiled beside the forward's, and nothing is computed by a rehearsal."""
    found = _compiled(NO_GPU + TAKE_ALL + WIDE, tmp_path)
    assert found == sorted([["products_kernel", ahead, False] for ahead in (False, False, True, True)])


TUNE = """
from functools import partial
from lora_kernels.backends.triton.tiles import GradTiles, OnePassTiles
from lora_kernels.cli.bench.cases import Case, Operands
from lora_kernels.cli.tune import measure

operands = Operands.make(Case(M, K, N, rank=r), torch.device("cpu"))
grads = measure.Grads.of(operands)
torch.cuda.is_available = lambda: True
runs = [
    *(
        partial(problem.run, OnePassTiles(*sizes, False, 1.0))
        for problem in measure.OnePass.of(operands)
        for sizes in ((64, 64, 32, 4, 2), (32, 64, 32, 4, 2))
    ),
    partial(grads.run, GradTiles(32, 64, 4, 2)),
    # Configurations that cannot be compiled are the check's business.
    partial(grads.run, GradTiles(33, 64, 4, 2)),
]
measure.compile_ahead(runs)
for run in runs[:-1]: run()
"""


def test_tune_compiles_all_configurations_side_by_side(tmp_path: Path) -> None:
    found = _compiled(NO_GPU + TUNE, tmp_path)
    assert found == sorted([["one_pass_kernel", True, False]] * 4 + [["adapter_grads_kernel", True, False]])


def test_what_is_not_begun_can_be_given_up(tmp_path: Path) -> None:
    """Or a process that was interrupted would not end before all of it is compiled."""
    script = (
        NO_GPU
        + "ahead._MOST_THREADS = 1"
        + TUNE.replace("for run in runs[:-1]: run()", "")
        + """
assert len(ahead._compiling) == len(runs)
ahead.forget()
# The one that a thread has in hand, and what it may have had before.
assert len(ahead._compiling) <= 2
ahead._threads().shutdown()
begun = len(compiled)
assert begun <= 2
# It is compiled where it is needed.
runs[3]()
assert len(compiled) == begun + 1
"""
    )
    assert _compiled(script, tmp_path)


def test_a_forward_that_no_backward_follows_is_compiled_alone(tmp_path: Path) -> None:
    here = [[name, False, False] for name in ("mask_kernel", "one_pass_kernel")]
    assert _compiled(NO_GPU + "want_s = False" + LAYER, tmp_path) == here


def test_without_room_for_a_rehearsal_each_kernel_is_compiled_where_it_is_launched(tmp_path: Path) -> None:
    here = [[name, False, False] for name in ("adapter_grads_kernel", "mask_kernel", *["one_pass_kernel"] * 2)]
    assert _compiled(NO_GPU + NO_ROOM + "want_s = True" + LAYER, tmp_path) == here


@pytest.mark.gpu
def test_on_a_gpu_what_was_compiled_ahead_is_what_runs(tmp_path: Path) -> None:
    from lora_kernels.backends.triton.backward_launch import is_for_one_launch

    whole = is_for_one_launch(torch.device("cuda", 0), 16)
    names = ["one_pass_kernel", "mask_kernel", "one_pass_kernel", "adapter_grads_kernel"] + ["backward_kernel"] * whole
    assert _compiled(GPU, tmp_path) == _ahead(*names)
