"""The one-pass kernel's product for few rows: what counts there is how fast the chip reads W.

    S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
    out = X W + mask(S U) + bias      [M, N]     U "up":   lora_B^T forward, lora_A backward

It takes the place of one_pass.py where tiles.few_rows_tiles says so, with the same arguments. There, a program walks
through tiles, and few columns give few programs work; here, by_parts.py cuts the reduction as well, and every program
has tens of kilobytes of W under way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.by_parts import hand_over, part_of_s, tile_of
from lora_kernels.backends.triton.pieces import aligned
from lora_kernels.backends.triton.sharing import part_bounds


@triton.jit
def _part_of_product(pid_m, pid_n, part, parts, x_ptr, stride_xm, w_ptr, stride_w, M, N, K, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_IS_NK: tl.constexpr,
                     EVEN_K: tl.constexpr):  # fmt: skip
    """(X W)^T over one part of the reduction: a float32 tile [BLOCK_N, BLOCK_M]."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    if W_IS_NK:
        w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]
    else:
        w_ptrs = w_ptr + offs_k.to(tl.int64)[:, None] * stride_w + offs_n[None, :]
    first, last = part_bounds(part, parts, tl.cdiv(K, BLOCK_K))
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for ki in tl.range(first, last):
        k0 = ki * BLOCK_K
        in_k = (k0 + offs_k < K) | EVEN_K
        x = tl.load(x_ptrs + k0, (offs_m < M)[:, None] & in_k[None, :], other=0.0)
        if W_IS_NK:
            w = tl.load(w_ptrs + k0, (offs_n < N)[:, None] & in_k[None, :], other=0.0)
        else:
            w = tl.trans(tl.load(w_ptrs + k0.to(tl.int64) * stride_w, in_k[:, None] & (offs_n < N)[None, :], other=0.0))
        acc = tl.dot(w, tl.trans(x), acc)
    return acc


@triton.jit(do_not_specialize=["M", "s_parts", "parts"])
def few_rows_kernel(
    x_ptr, w_ptr, out_ptr, down_ptr, up_ptr, bias_ptr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
    scale, M, N, K, R, s_parts, parts, stride_xm, stride_w, stride_dk, stride_dr, stride_ur, stride_un,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr,
    W_IS_NK: tl.constexpr, EVEN_K: tl.constexpr, K_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr, RANK_ALIGN: tl.constexpr, DOWN_ALIGN: tl.constexpr, UP_ALIGN: tl.constexpr, MASK_X: tl.constexpr,
    MASK_OUT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The module's docstring says what it computes, by_parts.py what the programs do and why it ends.

    x_ptr [M, K], w_ptr ([N, K] if W_IS_NK, else [K, N]), out_ptr [M, N] and s_ptr [M, R], the last two contiguous. Each
    ALIGN divides what it is named after: Triton itself asks only whether 16 does, and where 8 does not do for it, it loads number
    by number.
    """
    K, N, R = aligned(K, K_ALIGN), aligned(N, N_ALIGN), aligned(R, RANK_ALIGN)
    stride_xm, stride_w = aligned(stride_xm, X_ALIGN), aligned(stride_w, W_ALIGN)
    if DOWN_ALIGN > 1:
        stride_dk = aligned(stride_dk, DOWN_ALIGN)
    if UP_ALIGN > 1:
        stride_un = aligned(stride_un, UP_ALIGN)
    row_tiles = tl.cdiv(M, BLOCK_M)
    of_s = row_tiles * s_parts * RANK_CHUNKS
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if ticket < of_s:
        part_of_s(ticket, x_ptr, stride_xm, down_ptr, stride_dk, stride_dr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
                  scale, M, K, R, s_parts, BLOCK_M, BLOCK_K, BLOCK_R, RANK_CHUNKS, MASK_X, SPLIT)  # fmt: skip
    else:
        pid_m, pid_n, part = tile_of(ticket - of_s, row_tiles, parts)
        acc = _part_of_product(pid_m, pid_n, part, parts, x_ptr, stride_xm, w_ptr, stride_w, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K,
                               W_IS_NK, EVEN_K)  # fmt: skip
        hand_over(acc, pid_m, pid_n, part, parts, out_ptr, up_ptr, stride_ur, stride_un, bias_ptr, s_ptr, workspace_ptr, sync_ptr,
                  mask_ptr, M, N, R, s_parts, BLOCK_M, BLOCK_N, BLOCK_R, RANK_CHUNKS, MASK_OUT, SPLIT)  # fmt: skip
