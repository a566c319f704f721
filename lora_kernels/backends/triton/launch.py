"""From tensors to launches: which configuration, which workspaces, and the numbers that a kernel is called with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends import Precision, Scale, tf32_allowed
from lora_kernels.backends.sync import zeros_for
from lora_kernels.backends.triton.adapter_grads import adapter_grads_kernel
from lora_kernels.backends.triton.launches import Launch, alignment, remember
from lora_kernels.backends.triton.one_pass import one_pass_kernel
from lora_kernels.backends.triton.tiles import (
    GradTiles,
    OnePassTiles,
    chip_of,
    grad_tiles,
    one_pass_tiles,
    rank_block,
    row_parts,
    share_out,
)
from lora_kernels.dropout import Dropout

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Looks at a flag take about a microsecond each: a sharing tile has long published by then, if it runs at all.
SPIN_LIMIT = 300
# Of x, for which L2 is a cache. An H100's is two halves of 25 MB, each of which has its own copies.
NUMBERS_THAT_STAY = 12 << 20


@dataclass(frozen=True)
class OnePassPlan:
    """Everything about a launch of the one-pass kernel that its shapes and dtypes decide."""

    tiles: OnePassTiles
    row_tiles: int
    programs: int
    rank_block: int
    rank_chunks: int
    k_parts: int
    shares: int
    x_stays: bool

    @property
    def workspace_size(self) -> int:
        return self.k_parts * self.rank_chunks * self.row_tiles * self.tiles.block_m * self.rank_block

    @property
    def counters(self) -> int:
        return 2 + self.row_tiles * (1 + self.rank_chunks)


def plan_one_pass(
    M: int, K: int, N: int, R: int, precision: Precision, tiles: OnePassTiles, programs: int
) -> OnePassPlan:
    row_tiles, column_tiles = triton.cdiv(M, tiles.block_m), triton.cdiv(N, tiles.block_n)
    block_r = rank_block(R, precision)
    chunks = triton.cdiv(R, block_r)
    programs = min(programs, row_tiles * column_tiles)
    k_parts, shares = share_out(programs, row_tiles, column_tiles, triton.cdiv(K, tiles.block_k), chunks)
    return OnePassPlan(tiles, row_tiles, programs, block_r, chunks, k_parts, shares, M * K <= NUMBERS_THAT_STAY)


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
    tiles: OnePassTiles | None = None,
    spin_limit: int = SPIN_LIMIT,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out = left weight + mask(S up) + bias and S = scale * mask(left) down, in one launch.

    Args:
        left: [M, K] with contiguous rows.
        weight: [K, N]; one of its strides is 1.
        down: [K, R], up: [R, N]: views of the adapters.
        mask_left: whether the dropout mask sits on left (forward) or on S up (backward).
        tiles, spin_limit, programs: forced by tests and by tuning.
    Returns:
        out [M, N] in left's dtype; S [M, R], in float32 if precision is "split".
    """
    M, N, R = left.shape[0], weight.shape[1], down.shape[1]
    device, dtype = left.device, left.dtype
    out = torch.empty(M, N, dtype=dtype, device=device)
    s = torch.empty(M, R, dtype=torch.float32 if precision == "split" else dtype, device=device)
    if M == 0:
        return out, s
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    launch = one_pass_launch(
        left, weight, down, up, bias, scale, dropout, mask_left, precision, (tiles, spin_limit, programs)
    )
    workspace = torch.empty(launch.workspace_size, dtype=torch.float32, device=device)
    seed = None if dropout is None else dropout.seed
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    # As it is stored.
    stored = weight.T if launch.needs_views and weight.stride(0) == 1 else weight
    zeros = zeros_for(device, launch.counters)
    launch(device, (left, stored, out, down, up, bias, s, workspace, zeros, seed, tensor, number))
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
    forced: tuple[OnePassTiles | None, int, int | None] = (None, SPIN_LIMIT, None),
) -> Launch:
    """The launch that one_pass makes for arguments like these, planned where there was none before."""
    key = (
        left.device, left.dtype, precision, left.shape, left.stride(0), weight.shape, weight.stride(), down.stride(),
        up.shape, up.stride(), down.dtype, bias is not None and bias.dtype, isinstance(scale, Tensor) and scale.dtype,
        dropout is not None and dropout.threshold, mask_left, alignment(left, weight, down, up, bias),
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
    tiles: OnePassTiles | None,
    spin_limit: int,
    programs: int | None,
) -> Launch:
    (M, K), N, R, device, dtype = left.shape, weight.shape[1], down.shape[1], left.device, left.dtype
    w_is_nk = weight.stride(0) == 1
    stored_w = weight.T if w_is_nk else weight
    out_rows_align = N * dtype.itemsize % 16 == 0
    use_tma = fits_tma(left) and fits_tma(stored_w) and out_rows_align
    mask_out = dropout is not None and not mask_left
    chip = chip_of(device)
    tiles = tiles or one_pass_tiles(chip, dtype.itemsize, use_tma, M, N)
    plan = plan_one_pass(M, K, N, R, precision, tiles, programs or chip.multiprocessors)
    numbers = (
        0 if dropout is None else dropout.threshold,
        spin_limit if plan.shares else 0,
        M,
        N,
        K,
        R,
        plan.k_parts,
        plan.shares,
        int(plan.x_stays),
        left.stride(0),
        stored_w.stride(0),
        N,
        *down.stride(),
        *up.stride(),
        R,
    )
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_R": plan.rank_block,
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": plan.rank_chunks,
        "W_IS_NK": w_is_nk,
        "MASK_X": dropout is not None and mask_left,
        "MASK_OUT": mask_out,
        "HAS_BIAS": bias is not None,
        "SPLIT": precision == "split",
        "PRECISION": dot_precision(dtype),
        "USE_TMA": tiles.use_tma,
        "DTYPE": TYPES[dtype],
        # With the mask in its epilogue, the flat loop's products would no longer overlap (ptxas C7515).
        "FLATTEN": tiles.use_tma and not mask_out,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    blocks = None
    if tiles.use_tma:
        w_block = (tiles.block_n, tiles.block_k) if w_is_nk else (tiles.block_k, tiles.block_n)
        blocks = ((tiles.block_m, tiles.block_k), w_block, (tiles.block_m, tiles.block_n // 2))
    kind = (
        "one_pass", device, dtype, precision, K, N, R, tiles, w_is_nk, mask_out, left.stride(0), stored_w.stride(0),
        down.stride(), up.stride(), down.dtype, dropout is None, isinstance(scale, Tensor) and scale.dtype,
        bias is not None and bias.dtype, alignment(left, stored_w, down, up, bias),
    )  # fmt: skip
    grid = (plan.programs, 1, 1)
    return Launch(one_pass_kernel, kind, grid, options, blocks, plan.workspace_size, plan.counters, numbers)


def adapter_grads(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    *,
    tiles: GradTiles | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dA = T^T mask(x) [R, K] and dB = dy^T S [N, R], in `dtype`; None for what has no operands."""
    want_a, want_b = t is not None and x is not None, s is not None
    narrow = t if t is not None else s
    assert narrow is not None
    (M, N), R, device = dy.shape, narrow.shape[1], dy.device
    K = 0 if x is None else x.shape[1]
    dA = torch.empty(R, K, dtype=dtype, device=device) if want_a else None
    dB = torch.empty(N, R, dtype=dtype, device=device) if want_b else None
    if M == 0:
        return None if dA is None else dA.zero_(), None if dB is None else dB.zero_()
    launch = adapter_grads_launch(x, dy, s, t, dropout, dtype, tiles)
    workspace = torch.empty(launch.workspace_size, dtype=torch.float32, device=device)
    seed = dropout.seed if want_a and dropout is not None else None
    zeros = zeros_for(device, launch.counters)
    launch(device, (x if want_a else None, dy, t if want_a else None, s, dA, dB, workspace, zeros, seed))
    return dA, dB


def adapter_grads_launch(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    tiles: GradTiles | None = None,
) -> Launch:
    """The launch that adapter_grads makes for arguments like these, planned where there was none before."""
    narrow = t if t is not None else s
    assert narrow is not None
    key = (
        dy.device, dy.dtype, narrow.dtype, dtype, dy.shape, dy.stride(0), narrow.shape[1],
        x is not None and (x.shape[1], x.stride(0)), t is None, s is None, dropout is not None and dropout.threshold,
        alignment(x, dy, t, s), dot_precision(dy.dtype), tiles,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = _plan_adapter_grads(x, dy, s, t, dropout, dtype, tiles)
        remember(_launches, key, launch)
    return launch


def _plan_adapter_grads(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    tiles: GradTiles | None,
) -> Launch:
    want_a, want_b = t is not None and x is not None, s is not None
    narrow = t if t is not None else s
    assert narrow is not None
    (M, N), R, device = dy.shape, narrow.shape[1], dy.device
    K, x_stride = (0, 0) if x is None else (x.shape[1], x.stride(0))
    chip = chip_of(device)
    tiles = tiles or grad_tiles(chip, dy.dtype.itemsize)
    block_r = rank_block(R, "native" if narrow.dtype == dy.dtype else "split")
    chunks = triton.cdiv(R, block_r)
    blocks = (triton.cdiv(K, tiles.block_c) if want_a else 0) + (triton.cdiv(N, tiles.block_c) if want_b else 0)
    parts, rows_per_part = row_parts(chip, tiles, M, blocks * chunks)
    masked = want_a and dropout is not None
    threshold = dropout.threshold if masked and dropout is not None else 0
    numbers = (threshold, M, K, N, R, x_stride, dy.stride(0), rows_per_part, parts)
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": block_r,
        "WANT_A": want_a,
        "WANT_B": want_b,
        "MASKED": masked,
        "PRECISION": dot_precision(dy.dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    kind = (
        "adapter_grads", device, dy.dtype, narrow.dtype, dtype, K, N, R, x_stride, dy.stride(0), want_a, want_b,
        masked, tiles, alignment(x, dy, t, s),
    )  # fmt: skip
    workspace_size = parts * blocks * chunks * tiles.block_c * block_r
    grid = (blocks, parts, chunks)
    return Launch(adapter_grads_kernel, kind, grid, options, None, workspace_size, blocks * chunks, numbers)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products take the tensor cores' short mantissa only where the user allowed it to PyTorch as well."""
    if dtype == torch.float32 and not tf32_allowed():
        return "ieee"
    return "tf32"


def fits_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe a two-dimensional tensor: rows that start on 16 bytes."""
    stride = t.stride(0)
    return (
        t.dtype != torch.float32
        and t.data_ptr() % 16 == 0
        and stride * t.element_size() % 16 == 0
        and stride >= t.shape[1]
        and t.stride(1) == 1
    )
