"""The product with an NF4 weight that is decoded where it is used: no 16-bit copy of it exists anywhere.

    S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
    out = X op(W) + mask(S U) + bias  [M, C]     U "up":   lora_B^T forward, lora_A backward

Forward, X is x, op(W) is W^T and the mask sits on X. Backward to the input, X is dy, op(W) is W, S is T and the mask
sits on S U. W is [N, K] in NF4, and K a multiple of its block size: then no block straddles rows, and a tile of
W has a row of scales each.

How it is fast for few rows
---------------------------
The tile of out is computed transposed (by_parts.py), with W as the left operand, which the tensor cores take from
registers. Each thread decodes exactly the weights that it feeds to the tensor cores. For that it reads whole words of
eight codes, which it shares with its neighbours, and shifts each by what its place in the operand asks for, so that
nothing is moved between decoding and multiplying.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.by_parts import hand_over, part_of_s, tile_of
from lora_kernels.backends.triton.nf4 import code_shifts, decode_codes, lane_table, load_scales
from lora_kernels.backends.triton.pieces import aligned, anchored
from lora_kernels.backends.triton.sharing import part_bounds


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _part_of_product(pid_m, pid_c, part, parts, x_ptr, stride_xm, words_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr,
                     offset_ptr, float_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
                     BLOCK_SIZE: tl.constexpr, FORWARD: tl.constexpr, EVEN_L: tl.constexpr, EVEN_K: tl.constexpr,
                     SHUFFLE: tl.constexpr):  # fmt: skip
    """(X op(W))^T over one part of the reduction: a float32 tile [BLOCK_C, BLOCK_M].

    Rows that lie outside of W repeat the last one: they are not stored, or meet zeros of X. Those outside of X repeat all
    of its rows: if they repeated one, every program would wait for its place in L2.
    """
    ROWS: tl.constexpr = BLOCK_C if FORWARD else BLOCK_L
    COLUMNS: tl.constexpr = BLOCK_L if FORWARD else BLOCK_C
    SCALES: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    never = M < 0
    table = anchored(lane_table(pid_m, SHUFFLE), float_ptr + tl.zeros((1, 1), tl.int32), never)
    shifts = anchored(code_shifts(), words_ptr + code_shifts(), never)[None, None, :]
    offset = 0.0
    if offset_ptr is not None:
        offset = tl.load(offset_ptr)

    L = K if FORWARD else N
    row_blocks = K // BLOCK_SIZE
    # Written so that a multiple of 16 bytes can be seen in it.
    row_words = K // 32 * 4
    x_rows = ((pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M).to(tl.int64)[:, None]
    x_ptrs = x_ptr + x_rows * stride_xm + tl.arange(0, BLOCK_L)[None, :]
    first, last = part_bounds(part, parts, tl.cdiv(L, BLOCK_L))
    acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for li in tl.range(first, last):
        row0, column0 = (pid_c * BLOCK_C, li * BLOCK_L) if FORWARD else (li * BLOCK_L, pid_c * BLOCK_C)
        rows = tl.minimum(row0 + tl.arange(0, ROWS), N - 1)[:, None]
        offs_word = (column0 // 8 + tl.arange(0, COLUMNS // 8))[None, :]
        offs_block = (column0 // BLOCK_SIZE + tl.arange(0, SCALES))[None, :]
        words = _load(words_ptr + rows.to(tl.int64) * row_words + offs_word, offs_word < row_words, not EVEN_K)
        scales = load_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset, rows * row_blocks + offs_block,
                             offs_block < row_blocks)  # fmt: skip
        x = _load(x_ptrs + li * BLOCK_L, (li * BLOCK_L + tl.arange(0, BLOCK_L) < L)[None, :], not EVEN_L)
        codes = tl.reshape(words[:, :, None] >> shifts, (ROWS, COLUMNS))
        scales = tl.broadcast_to(scales[:, :, None], (ROWS, SCALES, COLUMNS // SCALES))
        w = (decode_codes(codes, table, SHUFFLE) * tl.reshape(scales, (ROWS, COLUMNS))).to(x.dtype)
        operand = w if FORWARD else tl.trans(w)
        acc = tl.dot(operand, tl.trans(x), acc)
    return acc


@triton.jit(do_not_specialize=["M", "s_parts", "parts"])
def nf4_product_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, out_ptr, down_ptr, up_ptr, bias_ptr, s_ptr,
    workspace_ptr, sync_ptr, mask_ptr, scale_ptr, scale, M, N, K, R, s_parts, parts,
    stride_xm, stride_dl, stride_dr, stride_ur, stride_uc,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr,
    RANK_ALIGN: tl.constexpr, DOWN_ALIGN: tl.constexpr, UP_ALIGN: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORWARD: tl.constexpr,
    EVEN_L: tl.constexpr, EVEN_K: tl.constexpr, MASKED: tl.constexpr, SPLIT: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """The module's docstring says what it computes, by_parts.py what the programs do and why it ends.

    x_ptr [M, L], words_ptr int32 [N K / 8], out_ptr [M, C], s_ptr [M, R]. RANK_ALIGN divides R, DOWN_ALIGN stride_dl,
    UP_ALIGN stride_uc: few_rows.py says why.
    """
    R = aligned(R, RANK_ALIGN)
    if DOWN_ALIGN > 1:
        stride_dl = aligned(stride_dl, DOWN_ALIGN)
    if UP_ALIGN > 1:
        stride_uc = aligned(stride_uc, UP_ALIGN)
    C = N if FORWARD else K
    L = K if FORWARD else N
    row_tiles = tl.cdiv(M, BLOCK_M)
    of_s = row_tiles * s_parts * RANK_CHUNKS
    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if ticket < of_s:
        part_of_s(ticket, x_ptr, stride_xm, down_ptr, stride_dl, stride_dr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
                  scale, M, L, R, s_parts, BLOCK_M, BLOCK_L, BLOCK_R, RANK_CHUNKS, MASKED and FORWARD, SPLIT)  # fmt: skip
    else:
        pid_m, pid_c, part = tile_of(ticket - of_s, row_tiles, parts)
        acc = _part_of_product(pid_m, pid_c, part, parts, x_ptr, stride_xm, words_ptr, absmax_ptr, nested_absmax_ptr,
                               nested_map_ptr, offset_ptr, workspace_ptr, M, N, K, BLOCK_M, BLOCK_C, BLOCK_L, BLOCK_SIZE,
                               FORWARD, EVEN_L, EVEN_K, SHUFFLE)  # fmt: skip
        hand_over(acc, pid_m, pid_c, part, parts, out_ptr, up_ptr, stride_ur, stride_uc, bias_ptr, s_ptr, workspace_ptr, sync_ptr,
                  mask_ptr, M, C, R, s_parts, BLOCK_M, BLOCK_C, BLOCK_R, RANK_CHUNKS, MASKED and not FORWARD, SPLIT)  # fmt: skip
