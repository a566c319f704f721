"""Both adapter gradients in one launch, each input read once.

    dA = T^T mask(x)    [R, K]        dB = dy^T S    [N, R]

Both are the same reduction over M, of a wide matrix against a narrow one. A program takes a block of columns of x
or of dy and a part of M; whoever finishes the last part of a block adds the parts in their fixed order, so the
sum has the same bits in every run, and nobody waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.mask import masked_operand
from lora_kernels.backends.triton.pieces import aligned, in_parts, sum_of_parts


@triton.jit
def reduce_rows(wide_ptr, stride_wide, narrow_ptr, column0, r0, columns, R, M, first_row, last_row, mask_ptr,
                BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr, STAGES: tl.constexpr = None):  # fmt: skip
    """sum over rows of mask(wide)[m, c] * narrow[m, r]: a float32 tile [BLOCK_C, BLOCK_R].

    wide is loaded as the tile [BLOCK_C, BLOCK_M] that is multiplied (masked_operand says why).
    """
    offs_c = column0 + tl.arange(0, BLOCK_C)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    split: tl.constexpr = wide_ptr.dtype.element_ty != narrow_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m0 in tl.range(first_row, last_row, BLOCK_M, num_stages=STAGES):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)
        in_rows = offs_m < last_row
        wide = tl.load(wide_ptr + rows[None, :] * stride_wide + offs_c[:, None],
                       in_rows[None, :] & (offs_c < columns)[:, None], other=0.0)  # fmt: skip
        narrow = tl.load(narrow_ptr + rows[:, None] * R + offs_r[None, :], in_rows[:, None] & (offs_r < R)[None, :], other=0.0)
        if MASKED:
            wide = masked_operand(wide, mask_ptr, m0, column0, last_row, columns, BLOCK_M, BLOCK_C, TURNED=True)
        if split:
            # Added here, not in the tensor cores, whose long sums are truncated at each step.
            acc += sum_of_parts(tl.dot(wide, in_parts(narrow, in_rows[:, None])), BLOCK_C, BLOCK_R)
        else:
            acc = tl.dot(wide, narrow, acc, input_precision=PRECISION)
    return acc


@triton.jit
def reduce_task(block, part, chunk, blocks, x_ptr, dy_ptr, t_ptr, s_ptr, dA_ptr, dB_ptr, workspace_ptr, sync_ptr, mask_ptr,
                M, K, N, R, stride_xm, stride_dym, rows_per_part, parts,
                BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, WANT_A: tl.constexpr,
                WANT_B: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
                STAGES: tl.constexpr = None):  # fmt: skip
    """One part of M of one block of columns, of which there are `blocks`: those of x, if WANT_A, and then those of dy.

    x [M, K], dy [M, N], t and s [M, R] contiguous; dA [R, K] and dB [N, R] contiguous. sync_ptr holds a zero for each
    block and chunk of the rank.
    """
    first_row = part * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, M)
    r0 = chunk * BLOCK_R
    blocks_a = tl.cdiv(K, BLOCK_C) if WANT_A else 0
    is_a = block < blocks_a
    column0 = tl.where(is_a, block, block - blocks_a) * BLOCK_C
    # Two calls rather than one with chosen pointers, whose alignment the compiler would no longer know.
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if WANT_A:
        if is_a:
            acc = reduce_rows(x_ptr, stride_xm, t_ptr, column0, r0, K, R, M, first_row, last_row, mask_ptr,
                              BLOCK_M, BLOCK_C, BLOCK_R, MASKED, PRECISION, STAGES)  # fmt: skip
    if WANT_B:
        if not is_a:
            acc = reduce_rows(dy_ptr, stride_dym, s_ptr, column0, r0, N, R, M, first_row, last_row, mask_ptr,
                              BLOCK_M, BLOCK_C, BLOCK_R, False, PRECISION, STAGES)  # fmt: skip

    last = True
    if parts > 1:
        TILE: tl.constexpr = BLOCK_C * BLOCK_R
        offsets = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        group = chunk * blocks + block
        tile_ptr = workspace_ptr + group.to(tl.int64) * parts * TILE + offsets
        tl.store(tile_ptr + part * TILE, acc)
        # Every thread's part of the tile must be written before one thread counts it.
        tl.debug_barrier()
        last = tl.atomic_add(sync_ptr + group, 1, sem="acq_rel") == parts - 1
        if last:
            acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
            for p in tl.range(0, parts):
                # Other multiprocessors wrote them: L1 may not be asked.
                acc += tl.load(tile_ptr + p * TILE, cache_modifier=".cg")
            # Zero again, for the next launch on the stream or the next replay of the graph.
            tl.store(sync_ptr + group, 0)
    if last:
        offs_c = column0 + tl.arange(0, BLOCK_C)
        offs_r = r0 + tl.arange(0, BLOCK_R)
        if WANT_A:
            if is_a:
                tl.store(dA_ptr + offs_r.to(tl.int64)[None, :] * K + offs_c[:, None], acc.to(dA_ptr.dtype.element_ty),
                         (offs_r < R)[None, :] & (offs_c < K)[:, None])  # fmt: skip
        if WANT_B:
            if not is_a:
                tl.store(dB_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :], acc.to(dB_ptr.dtype.element_ty),
                         (offs_r < R)[None, :] & (offs_c < N)[:, None])  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_part", "parts"])
def adapter_grads_kernel(
    x_ptr, dy_ptr, t_ptr, s_ptr, dA_ptr, dB_ptr, workspace_ptr, sync_ptr, mask_ptr,
    M, K, N, R, stride_xm, stride_dym, rows_per_part, parts,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, RANK_ALIGN: tl.constexpr,
    WANT_A: tl.constexpr, WANT_B: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The grid is (column blocks of x and then of dy, parts of M, chunks of the rank); RANK_ALIGN divides R."""
    reduce_task(tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), x_ptr, dy_ptr, t_ptr, s_ptr, dA_ptr,
                dB_ptr, workspace_ptr, sync_ptr, mask_ptr, M, K, N, aligned(R, RANK_ALIGN), stride_xm, stride_dym, rows_per_part, parts,
                BLOCK_M, BLOCK_C, BLOCK_R, WANT_A, WANT_B, MASKED, PRECISION)  # fmt: skip
