"""Launches of a backward: dA and dB on their own, or with dx in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lora_kernels.backends import Precision, Scale, eager
from lora_kernels.backends.sync import zeros_for
from lora_kernels.backends.triton import ahead, wide_ranks
from lora_kernels.backends.triton.adapter_grads import adapter_grads_kernel
from lora_kernels.backends.triton.backward import backward_kernel
from lora_kernels.backends.triton.launch import (
    Settled,
    looks,
    one_pass,
    settle,
    stays,
    tiles_for_few_rows,
)
from lora_kernels.backends.triton.launches import Launch, alignment, divisor, dot_precision, remember
from lora_kernels.backends.triton.mask_launch import bits_of
from lora_kernels.backends.triton.tiles import (
    INTERPRETER,
    GradTiles,
    OnePassTiles,
    chip_of,
    rank_block,
    row_parts,
    tail_grad_tiles,
    tail_parts,
)
from lora_kernels.backends.triton.tuned import grad_tiles
from lora_kernels.dropout import Dropout

_launches: dict[tuple[object, ...], Launch] = {}
_whole: dict[tuple[object, ...], Launch | None] = {}


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
    if tiles is None and wide_ranks.take_gradients(dy, [s, t], [dropout]):
        # Nothing to compile, and nothing to compute with what a rehearsal has.
        return (None, None) if ahead.rehearsing() else eager.backward_adapters(x, dy, s, t, dropout, dtype)
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
    mask = bits_of(dropout, M, K) if want_a else None
    zeros = zeros_for(device, launch.counters)
    launch(device, (x if want_a else None, dy, t if want_a else None, s, dA, dB, workspace, zeros, mask))
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
        x is not None and (x.shape[1], x.stride(0)), t is None, s is None, dropout is None,
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
    numbers = (M, K, N, R, x_stride, dy.stride(0), rows_per_part, parts)
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": block_r,
        "RANK_ALIGN": divisor(R),
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


def backward(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    dtype: torch.dtype,
    *,
    tiles: OnePassTiles | None = None,
    spin_limit: int | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx = dy W + mask(T A), and of dA = T^T mask(x) and dB = dy^T S what has an operand: in one launch, or in two.

    Args:
        dy: [M, N] with contiguous rows.
        weight: [N, K]; one of its strides is 1.
        x: [M, K] with contiguous rows; None where there is no dA.
        s: [M, R], contiguous, in float32 if precision is "split"; None where there is no dB.
        dtype: that of dA and dB.
        tiles, spin_limit, programs: forced by tests.
    Returns:
        dx [M, K] in dy's dtype, dA [R, K] and dB [N, R].
    """
    launch = _backward_launch(
        dy, weight, lora_A, lora_B, x, s, scale, dropout, precision, dtype, (tiles, spin_limit, programs)
    )
    if launch is None:
        dx, t = one_pass(dy, weight, lora_B, lora_A, None, scale, dropout, False, precision)
        return dx, *adapter_grads(x, dy, s, None if x is None else t, dropout, dtype)
    (M, N), (R, K), device = dy.shape, lora_A.shape, dy.device
    dx = torch.empty(M, K, dtype=dy.dtype, device=device)
    t = torch.empty(M, R, dtype=torch.float32 if precision == "split" else dy.dtype, device=device)
    dA = None if x is None else torch.empty(R, K, dtype=dtype, device=device)
    dB = None if s is None else torch.empty(N, R, dtype=dtype, device=device)
    workspace = torch.empty(launch.workspace_size, dtype=torch.float32, device=device)
    mask = bits_of(dropout, M, K)
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    # As it is stored.
    stored = weight.T if launch.needs_views and weight.stride(0) == 1 else weight
    zeros = zeros_for(device, launch.counters)
    launch(device, (dy, stored, dx, lora_B, lora_A, t, workspace, zeros, mask, tensor, x, dy, s, dA, dB, number))
    return dx, dA, dB


def _backward_launch(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    dtype: torch.dtype,
    forced: tuple[OnePassTiles | None, int | None, int | None],
) -> Launch | None:
    """The one launch that backward makes for arguments like these, planned where there was none before."""
    if dy.shape[0] == 0 or not is_for_one_launch(dy.device, lora_A.shape[0]):
        return None
    if forced[0] is None and tiles_for_few_rows(dy, weight, lora_A.shape[0], precision) is not None:
        return None
    key = (
        dy.device, dy.dtype, precision, dtype, dy.shape, dy.stride(0), weight.shape, weight.stride(), lora_B.stride(),
        lora_A.shape, lora_A.stride(), lora_A.dtype, None if x is None else x.stride(0), s is None,
        isinstance(scale, Tensor) and scale.dtype, dropout is None,
        alignment(dy, weight, lora_B, lora_A, x, s), dot_precision(dy.dtype), forced,
    )  # fmt: skip
    try:
        return _whole[key]
    except KeyError:
        pass
    tiles, spin_limit, programs = forced
    # Programs that have fewer tiles have dA and dB to do; T as well only where L2 holds dy.
    alone = precision != "split" and stays(dy)
    chosen = settle(dy, weight, lora_B, lora_A, precision, alone, tiles, programs)
    launch = None
    # Without shares T is complete when all tiles are: dA would be the last program's alone.
    if chosen.plan.shared:
        launch = _plan_backward(chosen, dy, lora_A, lora_B, x, s, scale, dropout, dtype, spin_limit, programs)
    remember(_whole, key, launch)
    return launch


def is_for_one_launch(device: torch.device, rank: int) -> bool:
    """Where one launch is taken to be faster than two: on Hopper it was at ranks 8 and 16, and was not at 64."""
    chip = chip_of(device)
    return rank <= 32 and (chip.has_tma or chip == INTERPRETER)


def _plan_backward(
    chosen: Settled,
    dy: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    dtype: torch.dtype,
    spin_limit: int | None,
    programs: int | None,
) -> Launch:
    (M, N), (R, K), chip, plan = dy.shape, lora_A.shape, chip_of(dy.device), chosen.plan
    want_a, want_b = x is not None, s is not None
    grads = tail_grad_tiles(chip, dy.dtype.itemsize)
    blocks = (triton.cdiv(K, grads.block_c) if want_a else 0) + (triton.cdiv(N, grads.block_c) if want_b else 0)
    blocks *= plan.rank_chunks
    parts, rows_per_part = tail_parts(chip, grads, M, blocks)
    x_stride = 0 if x is None else x.stride(0)
    numbers = (
        looks(spin_limit, triton.cdiv(N, plan.tiles.block_k)),
        M,
        N,
        K,
        R,
        plan.k_parts,
        plan.shares,
        plan.sharers,
        int(plan.x_stays),
        rows_per_part,
        parts,
        dy.stride(0),
        chosen.weight_stride,
        x_stride,
        *lora_B.stride(),
        *lora_A.stride(),
    )
    options = {
        **chosen.options,
        "MASKED": dropout is not None,
        "WANT_A": want_a,
        "WANT_B": want_b,
        "GRAD_M": grads.block_m,
        "GRAD_C": grads.block_c,
        "GRAD_STAGES": grads.num_stages,
    }
    kind = (
        "backward", *chosen.kind, dtype, dropout is None, isinstance(scale, Tensor) and scale.dtype, want_a, want_b, x_stride,
        grads, alignment(x, s),
    )  # fmt: skip
    # A program that has no tile of dx begins with dB.
    grid = (programs or chip.multiprocessors, 1, 1)
    sums = parts * blocks * grads.block_c * plan.rank_block
    counters = plan.counters + 2 + blocks
    return Launch(
        backward_kernel, kind, grid, options, chosen.blocks, plan.workspace_size + sums, counters, numbers
    )
