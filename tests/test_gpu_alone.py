"""What a GPU shows only to whoever has it alone: progress under contention, and how much memory a step takes.

`make test-gpu` runs this file after all others: processes take turns on a GPU, and a kernel that holds multiprocessors
would hold them against nobody while another process has its turn.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import HAS_GPU, Case
from test_gpu_groups import LARGE
from test_gpu_kernels import CASE, forward
from test_group_kernels import computed, plans_of

from lora_kernels import LoRALinear, NF4Weight, lora_linear
from lora_kernels.backends.triton.tiles import chip_of

if HAS_GPU:
    from contention import while_held

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [CASE.M, 8], ids=["many rows", "few rows"])
@pytest.mark.parametrize("held", [32, 110, 128])
def test_a_layer_finishes_while_another_kernel_holds_multiprocessors(held: int, rows: int) -> None:
    case = replace(CASE, M=rows)
    expected = forward(case)
    for value, want in zip(while_held(held, lambda: forward(case)), expected, strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("held", [32, 110, 128])
def test_so_does_a_product_that_decodes_its_weight(held: int) -> None:
    t = replace(CASE, M=8).tensors(torch.device("cuda", 0))
    weight = NF4Weight.quantize(t.weight)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return lora_linear(t.x, weight, t.lora_A, t.lora_B, scaling=2.0, backend="triton")

    expected = call()
    assert torch.equal(while_held(held, call), expected)


# Dense, on 132 multiprocessors: S by tiles, by clusters that have a tile less, and by single blocks (docs/kernels.md).
CUDA_CASES = [
    (CASE, False),
    (replace(CASE, M=5000, N=3000), False),
    (replace(CASE, M=100, K=1000, N=25600, rank=40), False),
    (replace(CASE, M=8), True),
]


@pytest.mark.parametrize(("case", "nf4"), CUDA_CASES, ids=str)
@pytest.mark.parametrize("held", [32, 110, 128])
def test_the_cuda_backend_finishes_beside_it_as_well(held: int, case: Case, nf4: bool, compiled_cuda: None) -> None:
    """Its kernel for Hopper waits for S inside of a launch, as does the one that streams NF4 weights."""
    t = case.tensors(torch.device("cuda", 0))
    weight = NF4Weight.quantize(t.weight) if nf4 else t.weight

    def call() -> torch.Tensor:
        with torch.no_grad():
            return lora_linear(t.x, weight, t.lora_A, t.lora_B, scaling=2.0, backend="cuda")

    expected = call()
    assert torch.equal(while_held(held, call), expected)


# On 132 multiprocessors: S and T in tiles; S, and both, by programs that have a tile less. With dropout S is in tiles.
@pytest.mark.parametrize(("M", "K", "alone"), [(4096, 1024, [0, 0]), (2048, 1024, [36, 0]), (2048, 2560, [36, 76])])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("held", [32, 110, 128])
def test_a_group_finishes_while_another_kernel_holds_multiprocessors(
    held: int, dropout: float, M: int, K: int, alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(monkeypatch)
    case = replace(LARGE, M=M, K=K, dropout=dropout)
    group = case.tensors(torch.device("cuda", 0))
    expected = computed(case, group)
    for name, value in while_held(held, lambda: computed(case, group)).items():
        assert torch.equal(value, expected[name]), name
    if chip_of(group.x.device).multiprocessors == 132:
        assert [plan.sharers for plan in plans] == [0 if dropout else alone[0], alone[1]]


def test_a_step_keeps_what_it_must_and_no_more() -> None:
    M, K, N, rank = 4096, 2048, 2048, 16
    module = LoRALinear(K, N, rank, device="cuda", dtype=torch.bfloat16, bias=False)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    torch.autograd.grad(module(x), [x, module.lora_A, module.lora_B], dy)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(module(x), [x, module.lora_A, module.lora_B], dy)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    outputs = 2 * M * N + 2 * M * K
    small = 2 * 2 * M * rank + 2 * rank * (K + N)
    partial_sums = 16 << 20
    assert used <= outputs + small + partial_sums, f"{used / 2**20:.1f} MiB"
