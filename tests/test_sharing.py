"""S, shared out among tiles: in whichever order they go through K."""

from __future__ import annotations

import pytest
import torch
from cases import HAS_GPU, Case

from lora_kernels.backends.triton import launch
from lora_kernels.backends.triton.tiles import chip_of, one_pass_tiles

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
