"""S, shared out among tiles, in whichever order they go through K, or computed by programs that have fewer tiles."""

from __future__ import annotations

import pytest
import torch
from cases import HAS_GPU, Case

from lora_kernels.backends.triton import launch
from lora_kernels.backends.triton.tiles import OnePassTiles, chip_of, share_stages, sharers
from lora_kernels.backends.triton.tuned import one_pass_tiles

DTYPE = torch.bfloat16 if HAS_GPU else torch.float16


@pytest.mark.parametrize("sizes", [(20, 130, 100, 16), (500, 2048, 520, 70)] if HAS_GPU else [(20, 130, 100, 16)])
def test_both_orders_of_the_sharing_tiles_give_the_same_s_and_a_right_sum(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, sizes: tuple[int, int, int, int]
) -> None:
    t = Case(*sizes, DTYPE).tensors(device)
    exact_s = 2.0 * t.x.double() @ t.lora_A.double().T
    exact = t.x.double() @ t.weight.double().T + exact_s @ t.lora_B.double().T
    M, K, N, rank = sizes
    tiles = one_pass_tiles(chip_of(device), DTYPE.itemsize, False, M, N)
    monkeypatch.setattr(launch, "sharers", lambda *sizes: (1, 0))
    plan = launch.plan_one_pass(M, K, N, rank, "native", tiles, chip_of(device).multiprocessors)
    assert plan.k_parts > 1, "nothing is shared out: the orders do not differ"
    found = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(launch, "NUMBERS_THAT_STAY", limit)
        monkeypatch.setattr(launch, "_launches", {})
        y, s = launch.one_pass(t.x, t.weight.T, t.lora_A.T, t.lora_B.T, None, 2.0, None, True, "native", tiles=tiles)
        assert float((y.double() - exact).norm() / exact.norm()) < 4e-3
        found.append(s)
    assert torch.equal(*found)
    assert float((found[0].double() - exact_s).norm() / exact_s.norm()) < 4e-3


@pytest.mark.parametrize("own", [1, 3, 4])
@pytest.mark.parametrize("k_parts", [1, 3])
@pytest.mark.parametrize("sizes", [(100, 130, 100, 16), (70, 200, 40, 70), (5, 40, 33, 8)])
def test_s_is_right_whichever_programs_compute_it(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, sizes: tuple[int, int, int, int], k_parts: int, own: int
) -> None:
    t = Case(*sizes, DTYPE).tensors(device)
    exact_s = 2.0 * t.x.double() @ t.lora_A.double().T
    exact = t.x.double() @ t.weight.double().T + exact_s @ t.lora_B.double().T
    monkeypatch.setattr(launch, "sharers", lambda *sizes: (k_parts, own))
    monkeypatch.setattr(launch, "_launches", {})
    found = [
        launch.one_pass(
            t.x, t.weight.T, t.lora_A.T, t.lora_B.T, None, 2.0, None, True, "native", programs=4, spin_limit=limit
        )
        for limit in (None, 0)
    ]
    for y, s in found:
        assert float((y.double() - exact).norm() / exact.norm()) < 4e-3
        assert float((s.double() - exact_s).norm() / exact_s.norm()) < 4e-3
        assert torch.equal(y, found[0][0])
        assert torch.equal(s, found[0][1])


def test_programs_compute_s_on_their_own_where_enough_of_them_have_fewer_tiles() -> None:
    # Tiles of 8192 x 4096, of 2048 x 4096, and of 512 x 1024 in 64 x 128, whose many idle programs split K as well.
    assert sharers(132, 64, 16, 64, 1) == (1, 32)
    assert sharers(132, 16, 16, 64, 1) == (1, 8)
    assert sharers(132, 8, 8, 16, 1) == (8, 68)
    # Too few; none; too many chunks of the rank.
    assert sharers(132, 64, 8, 64, 1) == (1, 0)
    assert sharers(128, 64, 16, 64, 1) == (1, 0)
    assert sharers(132, 64, 16, 64, 2) == (1, 0)


def test_the_loop_over_x_and_d_takes_no_more_memory_than_the_main_loop() -> None:
    for sizes in ((128, 256, 64, 3), (256, 128, 64, 3), (64, 64, 32, 3), (64, 128, 64, 4), (32, 32, 32, 2)):
        m, n, k, stages = sizes
        tiles = OnePassTiles(m, n, k, 4, stages, False, 1.0)
        for block_r in (16, 32, 64):
            taken = share_stages(tiles, block_r)
            assert taken == 6 or (taken + 1) * (m + block_r) > stages * (m + n)
            assert taken >= 1
            assert taken * (m + block_r) <= stages * (m + n)
