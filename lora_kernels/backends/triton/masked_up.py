"""mask(S U) in the epilogue of a product.

What is added must be multiplied before it is masked, in registers that the accumulators of the tile leave free: in
pieces. And it must not keep the products of the next tile from overlapping with each other (between_masked).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.mask import bit_places, kept, load_bits
from lora_kernels.backends.triton.pieces import halves, load_s, load_up, rejoined, split_products

# Columns of S U that are masked at once. More would not fit into the registers; with 32 and a product by wgmma, dx was
# wrong on an H100 at every rank above 16 (docs/kernels.md, under "Traps").
MASKED_COLUMNS = tl.constexpr(64)


@triton.jit
def between_masked(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """acc, out of a product with zeros: where masked ones are added to it next, the flat loop's still overlap.

    ptxas serializes the loop (C7515) where its accumulators are changed behind it and no product of the same size is there.
    """
    return tl.dot(tl.zeros((BLOCK_M, 16), DTYPE), tl.zeros((16, BLOCK_N), DTYPE), acc)


@triton.jit
def add_masked_up(acc, stored, row0, column0, up_ptr, s_ptr, mask_ptr, M, N, R, stride_ur, stride_un, stride_sm,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr,
                  SPLIT: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, BY_WARPS: tl.constexpr):  # fmt: skip
    """acc + mask(S U), for a tile whose first element is (row0, column0).

    BY_WARPS: 16 rows are multiplied on their own. That takes other instructions (mma.sync), beside which the main loop's
    products overlap (between_masked), and moves nothing: wgmma has the rows of its results in the warps in which mma.sync
    has those of a batch.
    """
    bits = load_bits(mask_ptr, row0, column0, M, N, BLOCK_M, BLOCK_N)
    for chunk in tl.range(0, RANK_CHUNKS, num_stages=1):
        r0 = chunk * BLOCK_R
        s = load_s(stored, s_ptr, stride_sm, row0, r0, M, R, BLOCK_M, BLOCK_R)
        if BLOCK_N > 2 * MASKED_COLUMNS:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            left_bits, right_bits = halves(bits, BLOCK_M, BLOCK_N // 32)
            left = _add_masked(left, s, left_bits, column0, up_ptr, stride_ur, stride_un, r0, R, N, BLOCK_M, HALF, BLOCK_R,
                               SPLIT, PRECISION, DTYPE, BY_WARPS)  # fmt: skip
            right = _add_masked(right, s, right_bits, column0 + HALF, up_ptr, stride_ur, stride_un, r0, R, N, BLOCK_M, HALF,
                                BLOCK_R, SPLIT, PRECISION, DTYPE, BY_WARPS)  # fmt: skip
            acc = rejoined(left, right, BLOCK_M, BLOCK_N)
        else:
            acc = _add_masked(acc, s, bits, column0, up_ptr, stride_ur, stride_un, r0, R, N, BLOCK_M, BLOCK_N, BLOCK_R, SPLIT,
                              PRECISION, DTYPE, BY_WARPS)  # fmt: skip
    return acc


@triton.jit
def _add_masked(acc, s, bits, column0, up_ptr, stride_ur, stride_un, r0, R, N, X: tl.constexpr, Y: tl.constexpr,
                BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
                BY_WARPS: tl.constexpr):  # fmt: skip
    """acc [X, Y] + mask(s U) in one piece or two, whose parts of U are under way together if the registers hold them."""
    if Y > MASKED_COLUMNS:
        HALF: tl.constexpr = Y // 2
        left_up = load_up(up_ptr, stride_ur, stride_un, r0, column0, R, N, BLOCK_R, HALF)
        if BLOCK_R <= 32:
            right_up = load_up(up_ptr, stride_ur, stride_un, r0, column0 + HALF, R, N, BLOCK_R, HALF)
        left, right = halves(acc, X, Y)
        left_bits, right_bits = halves(bits, X, Y // 32)
        left = _add_masked_piece(left, s, left_up, left_bits, X, HALF, BLOCK_R, SPLIT, PRECISION, DTYPE, BY_WARPS)
        if BLOCK_R > 32:
            right_up = load_up(up_ptr, stride_ur, stride_un, r0, column0 + HALF, R, N, BLOCK_R, HALF)
        right = _add_masked_piece(right, s, right_up, right_bits, X, HALF, BLOCK_R, SPLIT, PRECISION, DTYPE, BY_WARPS)
        return rejoined(left, right, X, Y)
    else:
        up = load_up(up_ptr, stride_ur, stride_un, r0, column0, R, N, BLOCK_R, Y)
        return _add_masked_piece(acc, s, up, bits, X, Y, BLOCK_R, SPLIT, PRECISION, DTYPE, BY_WARPS)


@triton.jit
def _add_masked_piece(acc, s, up, bits, X: tl.constexpr, Y: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
                      PRECISION: tl.constexpr, DTYPE: tl.constexpr, BY_WARPS: tl.constexpr):  # fmt: skip
    """acc [X, Y] + mask(s up) at once."""
    WARPS: tl.constexpr = X // 16
    product = tl.zeros((X, Y), tl.float32)
    if BY_WARPS:
        product = tl.zeros((WARPS, 16, Y), tl.float32)
        s = tl.reshape(s, (WARPS, 16, BLOCK_R))
        up = tl.broadcast_to(up[None, :, :], (WARPS, BLOCK_R, Y))
    if SPLIT:
        product = split_products(s, up, product)
    else:
        product = tl.dot(s.to(DTYPE), up.to(DTYPE), product, input_precision=PRECISION)
    return acc + tl.where(kept(bits, bit_places(), X, Y), tl.reshape(product, (X, Y)), 0.0)
