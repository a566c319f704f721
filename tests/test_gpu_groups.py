"""What only a GPU can show of the group kernels: graphs, compilation, configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import captured
from test_group_kernels import GroupCase, by_autograd, computed, have_sharers
from tolerance import assert_as_exact_as_peft

from lora_kernels.backends import sync
from lora_kernels.backends.triton import group_launch
from lora_kernels.backends.triton.group_forward import group_forward_kernel
from lora_kernels.backends.triton.group_grads import group_grads_kernel
from lora_kernels.backends.triton.group_input import group_input_kernel
from lora_kernels.backends.triton.tiles import candidates, chip_of, group_tiles

pytestmark = pytest.mark.gpu

LARGE = GroupCase(4096, 1024, (1024, 256, 256), (16, 16, 16))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_captured_graph_replays(dropout: float) -> None:
    case = replace(LARGE, M=777, dropout=dropout)
    group = case.tensors(torch.device("cuda", 0))
    graph, results = captured(lambda: computed(case, group))
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for t in (group.x, *group.dys):
            t.copy_(torch.randn(t.shape, generator=generator, device="cuda"))
        graph.replay()
        expected = computed(case, group)
        for name, value in results.items():
            assert torch.equal(value, expected[name]), name


def test_the_counters_are_zero_after_every_launch() -> None:
    # The second has S and T computed by programs that have a tile less, where there are 132.
    for case in (
        LARGE,
        replace(LARGE, M=777),
        replace(LARGE, ranks=(256, 16, 64)),
        replace(LARGE, M=333, Ns=(64, 72), ranks=(512, 16)),
    ):
        computed(case, case.tensors(torch.device("cuda", 0)))
        torch.cuda.synchronize()
        assert all(int(piece.abs().sum()) == 0 for piece in sync._pieces.values())


def compiled_variants() -> int:
    device = torch.cuda.current_device()
    kernels = (group_forward_kernel, group_input_kernel, group_grads_kernel)
    return sum(len(kernel.device_caches[device][0]) for kernel in kernels)


def test_a_new_batch_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the other of the two ways to compute S and T, once."""
    chip = chip_of(torch.device("cuda", 0))
    tiles = group_tiles(chip, 2, True, LARGE.M, LARGE.Ns)
    for own in (0, 3):
        have_sharers(monkeypatch, 1, own)
        monkeypatch.setattr(group_launch, "_launches", {})
        computed(LARGE, LARGE.tensors(torch.device("cuda", 0)), tiles=tiles)
    monkeypatch.undo()
    before = compiled_variants()
    for rows in (1, 2, 15, 16, 17, 128, 333, 1000, 2048, 4095):
        case = replace(LARGE, M=rows)
        computed(case, case.tensors(torch.device("cuda", 0)), tiles=tiles)
    assert compiled_variants() == before


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("use_tma", [True, False])
def test_every_configuration_of_this_gpu_is_right(use_tma: bool, rank: int) -> None:
    case = GroupCase(700, 512, (768, 256, 264), (rank, 8, rank), dropout=0.1)
    for dropout in (0.0, 0.1):
        case = replace(case, dropout=dropout)
        group = case.tensors(torch.device("cuda", 0))
        exact, peft = by_autograd(case, group, True), by_autograd(case, group, False)
        for tiles in candidates(chip_of(torch.device("cuda", 0)), 2, use_tma):
            assert_as_exact_as_peft(computed(case, group, tiles=tiles), peft, exact)
