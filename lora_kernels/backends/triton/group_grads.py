"""The adapter gradients of a group of LoRA linears that read the same x, in one launch, each input read once.

    dA_i = T_i^T mask_i(x)    [R_i, K]        dB_i = dy_i^T S_i    [N_i, R_i]

As in adapter_grads.py, a program takes a block of columns of x or of a dy and a part of M, and whoever finishes the
last part of a block adds the parts in their fixed order. A block of x has a sum for every member.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.adapter_grads import reduce_rows
from lora_kernels.backends.triton.group_pieces import member_number, member_of
from lora_kernels.backends.triton.mask import masked_operand
from lora_kernels.backends.triton.pieces import aligned, in_parts, sum_of_parts


@triton.jit
def _add_rows(acc, x, t_ptr, mask_ptr, m0, column0, r0, K, R, last_row, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
              BLOCK_R: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + mask_i(x)^T T_i for one step of M; x is [BLOCK_C, BLOCK_M]."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    in_rows = (offs_m < last_row)[:, None]
    t = tl.load(t_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :], in_rows & (offs_r < R)[None, :], other=0.0)
    if MASKED:
        x = masked_operand(x, mask_ptr, m0, column0, last_row, K, BLOCK_M, BLOCK_C, TURNED=True)
    if x.dtype != t.dtype:
        # Added here, not in the tensor cores, whose long sums are truncated at each step.
        return acc + sum_of_parts(tl.dot(x, in_parts(t, in_rows)), BLOCK_C, BLOCK_R)
    else:
        return tl.dot(x, t, acc, input_precision=PRECISION)


@triton.jit
def _sum_of_stored(tile_ptr, parts, stride_part, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for p in tl.range(0, parts):
        # Other multiprocessors wrote them: L1 may not be asked.
        acc += tl.load(tile_ptr + p * stride_part, cache_modifier=".cg")
    return acc


@triton.jit
def _store_dA(dA_ptr, acc, column0, r0, K, R, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_c = column0 + tl.arange(0, BLOCK_C)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    tl.store(dA_ptr + offs_r.to(tl.int64)[None, :] * K + offs_c[:, None], acc.to(dA_ptr.dtype.element_ty),
             (offs_r < R)[None, :] & (offs_c < K)[:, None])  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_part", "parts"])
def group_grads_kernel(
    x_ptr, dy0_ptr, dy1_ptr, dy2_ptr, t0_ptr, t1_ptr, t2_ptr, s0_ptr, s1_ptr, s2_ptr, dA0_ptr, dA1_ptr, dA2_ptr,
    dB0_ptr, dB1_ptr, dB2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, workspace_ptr, sync_ptr, M, K, N0, N1, N2,
    RA0, RA1, RA2, RB0, RB1, RB2, stride_xm, stride_dy0, stride_dy1, stride_dy2, rows_per_part, parts,
    A_COUNT: tl.constexpr, B_COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_ALIGN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [M, K]; t_i [M, RA_i] of the A_COUNT members whose dA is wanted, dy_i [M, N_i] and s_i [M, RB_i] of the B_COUNT
    whose dB is, all contiguous but x and the dys, whose rows are; dA_i [RA_i, K] and dB_i [N_i, RB_i] contiguous.

    The grid is (column blocks of x and then of each dy, parts of M, chunks of the largest rank); sync_ptr holds a zero
    for each column block and chunk.
    """
    RA0, RA1, RA2 = aligned(RA0, RANK_ALIGN), aligned(RA1, RANK_ALIGN), aligned(RA2, RANK_ALIGN)
    RB0, RB1, RB2 = aligned(RB0, RANK_ALIGN), aligned(RB1, RANK_ALIGN), aligned(RB2, RANK_ALIGN)
    block, part, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = part * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, M)
    r0 = chunk * BLOCK_R
    blocks_x = tl.cdiv(K, BLOCK_C) if A_COUNT > 0 else 0
    is_x = block < blocks_x
    member, column0 = 0, block * BLOCK_C
    # Of a block of x, its sum for each member; of a block of a dy, the first is all there is.
    acc0 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if A_COUNT > 0:
        if is_x:
            offs_c = column0 + tl.arange(0, BLOCK_C)
            for m0 in tl.range(first_row, last_row, BLOCK_M):
                offs_m = m0 + tl.arange(0, BLOCK_M)
                x = tl.load(x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_c[:, None],
                            (offs_m < last_row)[None, :] & (offs_c < K)[:, None], other=0.0)  # fmt: skip
                acc0 = _add_rows(acc0, x, t0_ptr, mask0_ptr, m0, column0, r0, K, RA0, last_row, BLOCK_M, BLOCK_C,
                                 BLOCK_R, MASKED, PRECISION)  # fmt: skip
                if A_COUNT > 1:
                    acc1 = _add_rows(acc1, x, t1_ptr, mask1_ptr, m0, column0, r0, K, RA1, last_row, BLOCK_M,
                                     BLOCK_C, BLOCK_R, MASKED, PRECISION)  # fmt: skip
                if A_COUNT > 2:
                    acc2 = _add_rows(acc2, x, t2_ptr, mask2_ptr, m0, column0, r0, K, RA2, last_row, BLOCK_M,
                                     BLOCK_C, BLOCK_R, MASKED, PRECISION)  # fmt: skip
    if B_COUNT > 0:
        if not is_x:
            member, first = member_of(block - blocks_x, tl.cdiv(N0, BLOCK_C),
                                      tl.cdiv(N1, BLOCK_C) if B_COUNT > 1 else 0, B_COUNT)  # fmt: skip
            column0 = (block - blocks_x - first) * BLOCK_C
            acc0 = reduce_rows(member_number(member, dy0_ptr, dy1_ptr, dy2_ptr, B_COUNT),
                               member_number(member, stride_dy0, stride_dy1, stride_dy2, B_COUNT),
                               member_number(member, s0_ptr, s1_ptr, s2_ptr, B_COUNT), column0, r0,
                               member_number(member, N0, N1, N2, B_COUNT), member_number(member, RB0, RB1, RB2, B_COUNT),
                               M, first_row, last_row, None, BLOCK_M, BLOCK_C, BLOCK_R, False, PRECISION)  # fmt: skip

    last = True
    if parts > 1:
        TILE: tl.constexpr = BLOCK_C * BLOCK_R
        offsets = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        # A part of all blocks and chunks after the other; in it, the blocks of x have A_COUNT tiles each.
        tiles = tl.num_programs(0)
        slot = block
        if A_COUNT > 1:
            tiles += (A_COUNT - 1) * blocks_x
            slot += (A_COUNT - 1) * tl.minimum(block, blocks_x)
        stride_part = tl.num_programs(2).to(tl.int64) * tiles * TILE
        tile_ptr = workspace_ptr + (chunk * tiles + slot).to(tl.int64) * TILE + offsets
        mine_ptr = tile_ptr + part * stride_part
        tl.store(mine_ptr, acc0)
        if A_COUNT > 1:
            if is_x:
                tl.store(mine_ptr + TILE, acc1)
                if A_COUNT > 2:
                    tl.store(mine_ptr + 2 * TILE, acc2)
        # Every thread's part of the tiles must be written before one thread counts them.
        tl.debug_barrier()
        count_ptr = sync_ptr + chunk * tl.num_programs(0) + block
        last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == parts - 1
        if last:
            acc0 = _sum_of_stored(tile_ptr, parts, stride_part, BLOCK_C, BLOCK_R)
            if A_COUNT > 1:
                if is_x:
                    acc1 = _sum_of_stored(tile_ptr + TILE, parts, stride_part, BLOCK_C, BLOCK_R)
                    if A_COUNT > 2:
                        acc2 = _sum_of_stored(tile_ptr + 2 * TILE, parts, stride_part, BLOCK_C, BLOCK_R)
            # Zero again, for the next launch on the stream or the next replay of the graph.
            tl.store(count_ptr, 0)
    if last:
        if A_COUNT > 0:
            if is_x:
                _store_dA(dA0_ptr, acc0, column0, r0, K, RA0, BLOCK_C, BLOCK_R)
                if A_COUNT > 1:
                    _store_dA(dA1_ptr, acc1, column0, r0, K, RA1, BLOCK_C, BLOCK_R)
                if A_COUNT > 2:
                    _store_dA(dA2_ptr, acc2, column0, r0, K, RA2, BLOCK_C, BLOCK_R)
        if B_COUNT > 0:
            if not is_x:
                R = member_number(member, RB0, RB1, RB2, B_COUNT)
                dB_ptr = member_number(member, dB0_ptr, dB1_ptr, dB2_ptr, B_COUNT)
                offs_c = column0 + tl.arange(0, BLOCK_C)
                offs_r = r0 + tl.arange(0, BLOCK_R)
                tl.store(dB_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :], acc0.to(dB_ptr.dtype.element_ty),
                         (offs_r < R)[None, :] & (offs_c < member_number(member, N0, N1, N2, B_COUNT))[:, None])  # fmt: skip
