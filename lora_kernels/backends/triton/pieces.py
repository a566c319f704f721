"""Device functions that more than one kernel uses: products of mixed precision, tiles in and out, and halves of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aligned(number, divisor: tl.constexpr):
    """`number`, of which the compiler now knows that `divisor` divides it."""
    return number // divisor * divisor


@triton.jit
def anchored(values, pointers, never):
    """`values`, as if they had been loaded from `pointers`. `never` is false.

    Triton moves the layout that the tensor cores want up through what is done to an operand to the loads that this starts
    from, but only if it does start from loads. Otherwise every tile would pass through shared memory. The pointers must
    differ where the values do: what is loaded from one address, Triton takes for one value.
    """
    return tl.load(pointers, mask=tl.full(pointers.shape, 1, tl.int1) & never, other=values)


@triton.jit
def beside(left, right):
    """[X, Y] and [X, Y] to [X, 2 Y], their columns interleaved."""
    return tl.reshape(tl.join(left, right), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def in_parts(wide, in_rows):
    """A float32 tile [X, Y] as bfloat16 [X, 4 Y]: each column as three whose sum has its 24 bits, and a zero.

    A product with it, folded by sum_of_parts, has float32 accuracy at the speed of the tensor cores. `in_rows` is
    the mask [X, 1] of the rows that count. The tile is zero outside of it already; but where a reshaped tile goes
    straight into a product, Triton 3.6 reshapes shared memory instead, and for unaligned operands it then fails to
    compile or computes addresses outside of it.
    """
    high = wide.to(tl.bfloat16)
    rest = wide - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.where(in_rows, beside(beside(high, low), beside(middle, tl.zeros_like(low))), 0.0)


@triton.jit
def sum_of_parts(parts, X: tl.constexpr, Y: tl.constexpr):
    """[X, 4 Y] to [X, Y]: adds what in_parts had set apart."""
    first, second = tl.split(tl.reshape(parts, (X, 2 * Y, 2)))
    high, low = tl.split(tl.reshape(first + second, (X, Y, 2)))
    return high + low


@triton.jit
def split_dot(left, right, in_columns, acc):
    """acc + left @ right of float32 tiles [M, K] and [K, N] as bfloat16 halves: 16 bits, where the sum keeps 8.

    One product over four times the columns, (high + low) of left times (high + low) of right: several products in
    a row on one accumulator would be kept from overlapping. `in_columns` is the mask [1, N] of the columns that
    count: as in in_parts, something must stand between a reshape and a product.
    """
    left_high = left.to(tl.bfloat16)
    left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
    right_high = right.to(tl.bfloat16)
    right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
    halves = tl.join(right_high, right_low)
    # [K, N, half of right, half of left] to [4 K, N].
    rows = tl.permute(tl.join(halves, halves), (0, 2, 3, 1))
    columns = beside(beside(left_high, left_high), beside(left_low, left_low))
    rows = tl.where(in_columns, tl.reshape(rows, (4 * right.shape[0], right.shape[1])), 0.0)
    return tl.dot(columns, rows, acc)


@triton.jit
def split_products(left, right, acc):
    """What split_dot computes, but for the product of both low halves: three products, one after the other.

    For products by mma.sync, which keep none of wgmma's waiting: with split_dot there, and sizes that are all odd, dx was
    wrong or its addresses illegal on an H100 (docs/kernels.md, under "Traps").
    """
    left_high = left.to(tl.bfloat16)
    left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
    right_high = right.to(tl.bfloat16)
    right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
    acc = tl.dot(left_low, right_high, acc)
    acc = tl.dot(left_high, right_low, acc)
    return tl.dot(left_high, right_high, acc)


@triton.jit
def load_tile(
    ref,
    stride,
    row0,
    column0,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """A tile of a row-major matrix [rows, columns], zero outside of it; `ref` is a descriptor or a pointer."""
    if USE_TMA:
        return ref.load([row0, column0])
    else:
        offs_row = row0 + tl.arange(0, BLOCK_ROWS)
        offs_column = column0 + tl.arange(0, BLOCK_COLUMNS)
        mask = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
        return tl.load(ref + offs_row.to(tl.int64)[:, None] * stride + offs_column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    ref,
    stride,
    row0,
    column0,
    rows,
    columns,
    tile,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """The counterpart of load_tile; what lies outside of the matrix is not written."""
    if USE_TMA:
        ref.store([row0, column0], tile)
    else:
        offs_row = row0 + tl.arange(0, BLOCK_ROWS)
        offs_column = column0 + tl.arange(0, BLOCK_COLUMNS)
        mask = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
        tl.store(ref + offs_row.to(tl.int64)[:, None] * stride + offs_column[None, :], tile, mask=mask)


@triton.jit
def s_addresses(s_ptr, stride_sm, row0, r0, M, R, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_r = r0 + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    return s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :], mask


@triton.jit
def load_s(stored, s_ptr, stride_sm, row0, r0, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    address, mask = s_addresses(s_ptr, stride_sm, row0, r0, tl.where(stored, M, 0), R, BLOCK_M, BLOCK_R)
    # Another multiprocessor may have written it: L1 may not be asked.
    return tl.load(address, mask, other=0.0, cache_modifier=".cg")


@triton.jit
def load_up(up_ptr, stride_ur, stride_un, r0, n0, R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile [BLOCK_R, BLOCK_N] of U."""
    offs_r = r0 + tl.arange(0, BLOCK_R)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = (offs_r < R)[:, None] & (offs_n < N)[None, :]
    return tl.load(up_ptr + offs_r[:, None] * stride_ur + offs_n[None, :].to(tl.int64) * stride_un, mask, other=0.0)


@triton.jit
def halves(tile, X: tl.constexpr, Y: tl.constexpr):
    """The left and the right half of a tile [X, Y]: a whole one's way out through shared memory would cost a stage."""
    return tl.split(tl.permute(tl.reshape(tile, (X, 2, Y // 2)), (0, 2, 1)))


@triton.jit
def rejoined(left, right, X: tl.constexpr, Y: tl.constexpr):
    """The tile [X, Y] of which these are the halves."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (X, Y))
