"""From tensors to launches: descriptors, workspaces and the numbers that a kernel is called with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends import Precision, Scale
from lora_kernels.backends.triton.adapter_grads import adapter_grads_kernel
from lora_kernels.backends.triton.one_pass import one_pass_kernel
from lora_kernels.backends.triton.sync import zeros_for
from lora_kernels.backends.triton.tiles import (
    OnePassTiles,
    chip_of,
    grad_tiles,
    one_pass_tiles,
    rank_block,
    share_out,
)
from lora_kernels.dropout import Dropout

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Looks at a flag take about a microsecond each: a sharing tile has long published by then, if it runs at all.
SPIN_LIMIT = 300


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
    (M, K), N, R = left.shape, weight.shape[1], down.shape[1]
    device, dtype = left.device, left.dtype
    out = torch.empty(M, N, dtype=dtype, device=device)
    s = torch.empty(M, R, dtype=torch.float32 if precision == "split" else dtype, device=device)
    if out.numel() == 0:
        return out, s
    chip = chip_of(device)
    w_is_nk = weight.stride(0) == 1
    stored_w = weight.T if w_is_nk else weight
    if tiles is None:
        use_tma = chip.has_tma and all(map(fits_tma, (left, stored_w, out)))
        tiles = one_pass_tiles(chip, dtype.itemsize, use_tma, M, N)
    row_tiles, column_tiles = triton.cdiv(M, tiles.block_m), triton.cdiv(N, tiles.block_n)
    block_r = rank_block(R, precision)
    rank_chunks = triton.cdiv(R, block_r)
    programs = programs or min(chip.multiprocessors, row_tiles * column_tiles)
    k_parts, shares = share_out(programs, row_tiles, column_tiles, triton.cdiv(K, tiles.block_k), rank_chunks)
    workspace = torch.empty(
        k_parts * rank_chunks * row_tiles * tiles.block_m * block_r, dtype=torch.float32, device=device
    )
    sync = zeros_for(device, 1 + row_tiles * (1 + rank_chunks))
    refs: tuple[object, ...] = (left, stored_w, out)
    if tiles.use_tma:
        w_block = (tiles.block_n, tiles.block_k) if w_is_nk else (tiles.block_k, tiles.block_n)
        blocks = ((tiles.block_m, tiles.block_k), w_block, (tiles.block_m, tiles.block_n // 2))
        refs = tuple(_descriptor(t, block) for t, block in zip((left, stored_w, out), blocks, strict=True))
    scale_is_tensor = isinstance(scale, Tensor)
    mask_out = dropout is not None and not mask_left
    one_pass_kernel[(programs,)](
        *refs,
        down,
        up,
        bias,
        s,
        workspace,
        sync,
        None if dropout is None else dropout.seed,
        scale if scale_is_tensor else None,
        1.0 if scale_is_tensor else float(scale),
        0 if dropout is None else dropout.threshold,
        spin_limit if shares else 0,
        M,
        N,
        K,
        R,
        k_parts,
        shares,
        left.stride(0),
        stored_w.stride(0),
        out.stride(0),
        down.stride(0),
        down.stride(1),
        up.stride(0),
        up.stride(1),
        s.stride(0),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        BLOCK_R=block_r,
        GROUP_M=tiles.group_m,
        RANK_CHUNKS=rank_chunks,
        W_IS_NK=w_is_nk,
        MASK_X=dropout is not None and mask_left,
        MASK_OUT=mask_out,
        HAS_BIAS=bias is not None,
        SPLIT=precision == "split",
        PRECISION=dot_precision(dtype),
        USE_TMA=tiles.use_tma,
        DTYPE=_TYPES[dtype],
        # With the mask in its epilogue, the flat loop's products would no longer overlap (ptxas C7515).
        FLATTEN=tiles.use_tma and not mask_out,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, s


def adapter_grads(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """dA = T^T mask(x) [R, K] and dB = dy^T S [N, R], in `dtype`; None for what has no operands."""
    want_a, want_b = t is not None and x is not None, s is not None
    narrow = t if t is not None else s
    assert narrow is not None
    (M, N), R, device = dy.shape, narrow.shape[1], dy.device
    K = x.shape[1] if x is not None else 0
    dA = torch.empty(R, K, dtype=dtype, device=device) if want_a else None
    dB = torch.empty(N, R, dtype=dtype, device=device) if want_b else None
    if M == 0:
        return None if dA is None else dA.zero_(), None if dB is None else dB.zero_()
    chip = chip_of(device)
    tiles = grad_tiles(chip, dy.dtype.itemsize)
    block_r = rank_block(R, "native")
    chunks = triton.cdiv(R, block_r)
    blocks = (triton.cdiv(K, tiles.block_c) if want_a else 0) + (triton.cdiv(N, tiles.block_c) if want_b else 0)
    if blocks == 0:
        return dA, dB
    # One wave of programs, of which two or three share a multiprocessor; at least two steps of rows for each.
    row_steps = triton.cdiv(M, tiles.block_m)
    parts = max(1, min(2 * chip.multiprocessors // (blocks * chunks), triton.cdiv(row_steps, 2), 32))
    rows_per_part = triton.cdiv(row_steps, parts) * tiles.block_m
    parts = triton.cdiv(M, rows_per_part)
    workspace = torch.empty(
        parts * blocks * chunks * tiles.block_c * block_r if parts > 1 else 1, dtype=torch.float32, device=device
    )
    adapter_grads_kernel[(blocks, parts, chunks)](
        x if want_a else None,
        dy,
        t if want_a else None,
        s,
        dA,
        dB,
        workspace,
        zeros_for(device, blocks * chunks),
        None if dropout is None else dropout.seed,
        0 if dropout is None else dropout.threshold,
        M,
        K,
        N,
        R,
        0 if x is None else x.stride(0),
        dy.stride(0),
        rows_per_part,
        parts,
        BLOCK_M=tiles.block_m,
        BLOCK_C=tiles.block_c,
        BLOCK_R=block_r,
        WANT_A=want_a,
        WANT_B=want_b,
        MASKED=dropout is not None,
        PRECISION=dot_precision(dy.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return dA, dB


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products take the tensor cores' short mantissa only where the user allowed it to PyTorch as well."""
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "ieee"
    return "tf32"


def fits_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe a two-dimensional tensor: rows that start on 16 bytes."""
    return t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0


def _descriptor(t: Tensor, block: tuple[int, int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))
