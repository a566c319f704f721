"""From tensors to launches: which configuration, which workspaces, and the numbers that a kernel is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lora_kernels.backends import Precision, Scale
from lora_kernels.backends.sync import zeros_for
from lora_kernels.backends.triton import wide_ranks
from lora_kernels.backends.triton.few_rows_launch import plan_few_rows
from lora_kernels.backends.triton.launches import TYPES, Launch, alignment, divisor, dot_precision, fits_tma, remember
from lora_kernels.backends.triton.mask_launch import bits_of
from lora_kernels.backends.triton.one_pass import one_pass_kernel
from lora_kernels.backends.triton.tiles import (
    FewRowsTiles,
    OnePassTiles,
    chip_of,
    few_rows_tiles,
    own_columns,
    rank_block,
    share_out,
    share_stages,
    sharers,
)
from lora_kernels.backends.triton.tuned import one_pass_tiles
from lora_kernels.dropout import Dropout

# Looks at a flag take about a microsecond each, as does a step of a tile with a share: who shares has long published by
# then, if it runs at all.
_LEAST_LOOKS, _LOOKS_A_STEP = 300, 5
# Of x, for which L2 is a cache. An H100's is two halves of 25 MB, each of which has its own copies.
NUMBERS_THAT_STAY = 12 << 20


@dataclass(frozen=True)
class OnePassPlan:
    """Everything about a launch of the one-pass kernel that its shapes and dtypes decide."""

    tiles: OnePassTiles
    row_tiles: int
    column_tiles: int
    programs: int
    rank_block: int
    rank_chunks: int
    k_parts: int
    shares: int
    sharers: int
    x_stays: bool

    @property
    def flat(self) -> bool:
        """Whether there is a next tile to load while one is finished."""
        return self.tiles.use_tma and self.row_tiles * self.column_tiles > self.programs

    @property
    def shared(self) -> bool:
        """Whether S is computed in shares at all, and not by every tile."""
        return self.shares + self.sharers > 0

    @property
    def workspace_size(self) -> int:
        return self.k_parts * self.rank_chunks * self.row_tiles * self.tiles.block_m * self.rank_block

    @property
    def counters(self) -> int:
        return 2 + self.row_tiles * (1 + self.rank_chunks)


def plan_one_pass(
    M: int, K: int, N: int, R: int, precision: Precision, tiles: OnePassTiles, programs: int, alone: bool = True
) -> OnePassPlan:
    """The plan for a product [M, K] x [K, N]. alone: whether S may be computed by programs that have fewer tiles."""
    row_tiles, column_tiles = triton.cdiv(M, tiles.block_m), triton.cdiv(N, tiles.block_n)
    block_r = rank_block(R, precision)
    chunks = triton.cdiv(R, block_r)
    k_tiles = triton.cdiv(K, tiles.block_k)
    k_parts, shares = share_out(programs, row_tiles, column_tiles, k_tiles, chunks)
    k_parts_alone, own = sharers(programs, row_tiles, column_tiles, k_tiles, chunks) if alone else (1, 0)
    if own:
        k_parts, shares = k_parts_alone, 0
    else:
        programs = min(programs, row_tiles * column_tiles)
    x_stays = M * K <= NUMBERS_THAT_STAY
    return OnePassPlan(tiles, row_tiles, column_tiles, programs, block_r, chunks, k_parts, shares, own, x_stays)


_launches: dict[tuple[object, ...], Launch] = {}


def one_pass(
    left: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    mask_left: bool,
    precision: Precision,
    *,
    tiles: OnePassTiles | FewRowsTiles | None = None,
    spin_limit: int | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out = left weight + mask(S up) + bias and S = scale * mask(left) down: in one launch, but for large ranks.

    Args:
        left: [M, K] with contiguous rows.
        weight: [K, N]; one of its strides is 1.
        down: [K, R], up: [R, N]: views of the adapters.
        mask_left: whether the dropout mask sits on left (forward) or on S up (backward).
        tiles, spin_limit, programs: forced by tests and by tuning.
    Returns:
        out [M, N] in left's dtype; S [M, R], in float32 if precision is "split".
    """
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    layer = wide_ranks.Layer(left, weight, down, up, bias, scale)
    if tiles is None and wide_ranks.are_wide([layer], dropout is not None, precision):
        (out,), (s,) = wide_ranks.each([layer])
        return out, s
    M, N, R = left.shape[0], weight.shape[1], down.shape[1]
    device, dtype = left.device, left.dtype
    out = torch.empty(M, N, dtype=dtype, device=device)
    s = torch.empty(M, R, dtype=torch.float32 if precision == "split" else dtype, device=device)
    if M == 0:
        return out, s
    launch = one_pass_launch(
        left, weight, down, up, bias, scale, dropout, mask_left, precision, (tiles, spin_limit, programs)
    )
    workspace = torch.empty(launch.workspace_size, dtype=torch.float32, device=device)
    mask = bits_of(dropout, M, left.shape[1] if mask_left else N)
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    # As it is stored.
    stored = weight.T if launch.needs_views and weight.stride(0) == 1 else weight
    zeros = zeros_for(device, launch.counters)
    launch(device, (left, stored, out, down, up, bias, s, workspace, zeros, mask, tensor, number))
    return out, s


def one_pass_launch(
    left: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    mask_left: bool,
    precision: Precision,
    forced: tuple[OnePassTiles | FewRowsTiles | None, int | None, int | None] = (None, None, None),
) -> Launch:
    """The launch that one_pass makes for arguments like these, planned where there was none before."""
    key = (
        left.device, left.dtype, precision, left.shape, left.stride(0), weight.shape, weight.stride(), down.stride(),
        up.shape, up.stride(), down.dtype, bias is not None and bias.dtype, isinstance(scale, Tensor) and scale.dtype,
        dropout is None, mask_left, alignment(left, weight, down, up, bias),
        dot_precision(left.dtype), forced,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = _plan_launch(left, weight, down, up, bias, scale, dropout, mask_left, precision, *forced)
        remember(_launches, key, launch)
    return launch


def _plan_launch(
    left: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    mask_left: bool,
    precision: Precision,
    tiles: OnePassTiles | FewRowsTiles | None,
    spin_limit: int | None,
    programs: int | None,
) -> Launch:
    if tiles is None:
        tiles = tiles_for_few_rows(left, weight, down.shape[1], precision)
    if isinstance(tiles, FewRowsTiles):
        at_once = programs or chip_of(left.device).multiprocessors
        masked = dropout is not None
        return plan_few_rows(left, weight, down, up, bias, scale, masked, mask_left, precision, tiles, at_once)
    (M, K), N, R = left.shape, weight.shape[1], down.shape[1]
    mask_x, mask_out = dropout is not None and mask_left, dropout is not None and not mask_left
    # Masked operands, and products of halves, take the few programs too long.
    alone = precision != "split" and not mask_x
    chosen = settle(left, weight, down, up, precision, alone, tiles, programs)
    plan = chosen.plan
    numbers = (
        looks(spin_limit, triton.cdiv(K, plan.tiles.block_k)) if plan.shared else 0,
        M,
        N,
        K,
        R,
        plan.k_parts,
        plan.shares,
        plan.sharers,
        int(plan.x_stays),
        left.stride(0),
        chosen.weight_stride,
        N,
        *down.stride(),
        *up.stride(),
        R,
    )
    options = {
        **chosen.options,
        "MASK_X": mask_x,
        "MASK_OUT": mask_out,
        "HAS_BIAS": bias is not None,
    }
    kind = (
        "one_pass", *chosen.kind, mask_x, mask_out, isinstance(scale, Tensor) and scale.dtype,
        bias is not None and bias.dtype, alignment(bias),
    )  # fmt: skip
    grid = (plan.programs, 1, 1)
    return Launch(one_pass_kernel, kind, grid, options, chosen.blocks, plan.workspace_size, plan.counters, numbers)


def tiles_for_few_rows(left: Tensor, weight: Tensor, R: int, precision: Precision) -> FewRowsTiles | None:
    """The configuration for few rows, if there is one for the product left weight; else the one-pass kernel takes it."""
    if not _fits_tma_all(left, weight):
        return None
    (M, L), C = left.shape, weight.shape[1]
    return few_rows_tiles(chip_of(left.device), M, C, L, R, precision)


@dataclass(frozen=True)
class Settled:
    """What shapes, strides and dtypes decide about a product with an adapter, whichever kernel it is a part of.

    `kind` is what Triton's specialization of its arguments depends on.
    """

    plan: OnePassPlan
    weight_stride: int
    options: dict[str, Any]
    blocks: tuple[tuple[int, int], ...] | None
    kind: tuple[object, ...]


def settle(
    left: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    precision: Precision,
    alone: bool,
    tiles: OnePassTiles | None,
    programs: int | None,
) -> Settled:
    """The plan of out = left weight + S up and S = left down, and how a kernel is compiled for it."""
    (M, K), N, R, device, dtype = left.shape, weight.shape[1], down.shape[1], left.device, left.dtype
    w_is_nk = weight.stride(0) == 1
    stored_w = weight.T if w_is_nk else weight
    use_tma = _fits_tma_all(left, weight)
    chip = chip_of(device)
    tiles = tiles or one_pass_tiles(chip, dtype.itemsize, use_tma, M, N)
    plan = plan_one_pass(M, K, N, R, precision, tiles, programs or chip.multiprocessors, alone)
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_R": plan.rank_block,
        "OWN_R": own_columns(plan.rank_block, plan.shared),
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": plan.rank_chunks,
        "RANK_ALIGN": divisor(R),
        "DOWN_ALIGN": divisor(down.stride(0)),
        "UP_ALIGN": divisor(up.stride(1)),
        "ALONE": plan.sharers > 0,
        "SHARE_STAGES": share_stages(tiles, plan.rank_block),
        "W_IS_NK": w_is_nk,
        "SPLIT": precision == "split",
        "PRECISION": dot_precision(dtype),
        "USE_TMA": tiles.use_tma,
        "DTYPE": TYPES[dtype],
        "FLATTEN": plan.flat,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    blocks = None
    if tiles.use_tma:
        w_block = (tiles.block_n, tiles.block_k) if w_is_nk else (tiles.block_k, tiles.block_n)
        blocks = ((tiles.block_m, tiles.block_k), w_block, (tiles.block_m, tiles.block_n // 2))
    kind = (
        device, dtype, precision, K, N, R, tiles, plan.shared, plan.sharers > 0, plan.flat, w_is_nk, left.stride(0),
        stored_w.stride(0), down.stride(), up.stride(), down.dtype, alignment(left, stored_w, down, up),
    )  # fmt: skip
    return Settled(plan, stored_w.stride(0), options, blocks, kind)


def looks(spin_limit: int | None, steps: int) -> int:
    """How many times a tile looks for an S that is summed over so many steps, unless a test says how many."""
    return max(_LEAST_LOOKS, _LOOKS_A_STEP * steps) if spin_limit is None else spin_limit


def stays(left: Tensor) -> bool:
    """Whether L2 holds a matrix while its product is computed."""
    return left.numel() <= NUMBERS_THAT_STAY


def _fits_tma_all(left: Tensor, weight: Tensor) -> bool:
    """Whether TMA descriptors can describe both operands of left weight and the product."""
    stored = weight.T if weight.stride(0) == 1 else weight
    return fits_tma(left) and fits_tma(stored) and weight.shape[1] * left.element_size() % 16 == 0
