"""The cases of `python -m lora_kernels bench` for pytest-benchmark: forward, and forward with backward.

    python -m pytest bench                                     # a GPU: the suite "quick"; a CPU: "tiny"
    python -m pytest bench --suite shapes
    python -m pytest bench --benchmark-autosave, then --benchmark-compare

Wall-clock times of one call, from an idle GPU to an idle GPU, L2 flushed before each. They hold the launches, and
unlike those of the command the providers are not interleaved: compare them with care.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_kernels.cli.bench.cases import Case, Operands
from lora_kernels.cli.bench.clock import FLUSH_BYTES
from lora_kernels.cli.bench.layers import PARTS, checked, step_of
from lora_kernels.cli.bench.providers import PROVIDERS, Layer, Missing


@pytest.fixture(params=list(PROVIDERS))
def layer(request: pytest.FixtureRequest, operands: Operands) -> Layer:
    try:
        return checked(PROVIDERS[request.param], operands, {})
    except Missing as missing:
        pytest.skip(f"{request.param}: {missing}")


@pytest.fixture
def operands(case: Case, bench_device: torch.device) -> Operands:
    return Operands.make(case, bench_device)


@pytest.mark.parametrize("part", PARTS)
def test_layer(
    part: str, layer: Layer, operands: Operands, bench_device: torch.device, benchmark: Callable[..., Any]
) -> None:
    step = step_of(layer, operands, part)
    on_gpu = bench_device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.int8, device=bench_device)

    def prepare() -> None:
        flush.zero_()
        if on_gpu:
            torch.cuda.synchronize()

    def run() -> None:
        step()
        if on_gpu:
            torch.cuda.synchronize()

    # One table for each, with its providers side by side.
    benchmark.group = f"{operands.case}, {part}"  # type: ignore[attr-defined]
    benchmark.pedantic(run, setup=prepare, rounds=20, warmup_rounds=3)  # type: ignore[attr-defined]
