"""Which configuration the Triton launcher takes: what decides, and on which chip."""

from __future__ import annotations

from lora_kernels.backends.triton.launch import plan_masked
from lora_kernels.backends.triton.tiles import Chip

HOPPER = Chip((9, 0), 132, 232448, True)


def test_a_masked_branch_of_a_high_rank_takes_wide_tiles_that_share() -> None:
    for M, K, N, rank in ((8192, 4096, 4096, 64), (2048, 4096, 1024, 32), (300, 768, 2048, 256)):
        plan = plan_masked(HOPPER, 2, M, K, N, rank, "native", 132)
        assert plan.tiles.use_tma
        assert plan.tiles.block_n == 256
        assert plan.shares > 0


def test_a_masked_branch_that_shares_nothing_takes_pointers() -> None:
    for M, K, N in ((129, 64, 64), (300, 1000, 768)):
        assert not plan_masked(HOPPER, 2, M, K, N, 512, "native", 132).tiles.use_tma
