"""The forward of a group of LoRA linears that read the same x, in one launch.

    S_i = scale_i * mask_i(x) A_i^T         y_i = x W_i^T + S_i B_i^T + b_i

The column tiles of all members stand side by side, each member's rounded up to whole tiles, and one persistent loop
goes over them: what the members leave of a wave of tiles is filled by each other's. The weights stay where they are;
a tile takes the descriptors and pointers of the member that it belongs to.

S is shared out and handed over as in the one-pass kernel, by its own functions: every chunk of every member's rank is
a share of its own, computed next to any column tile of the row block, whichever member that tile belongs to. Flags and
counts are a member's own, and so is the argument why the kernel ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.group_pieces import member_number, member_of, member_ref
from lora_kernels.backends.triton.pieces import aligned, load_tile
from lora_kernels.backends.triton.sharing import (
    add_down,
    finish_tile,
    load_w,
    part_bounds,
    plain_tile,
    publish,
)


@triton.jit(do_not_specialize=["M", "spin_limit", "k_parts", "shares", "x_stays"])
def group_forward_kernel(
    x_ref, w0_ref, out0_ref, w1_ref, out1_ref, w2_ref, out2_ref,
    down0_ptr, down1_ptr, down2_ptr, up0_ptr, up1_ptr, up2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, s0_ptr, s1_ptr, s2_ptr,
    mask0_ptr, mask1_ptr, mask2_ptr, scale0_ptr, scale1_ptr, scale2_ptr, workspace_ptr, sync_ptr,
    scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_parts, shares, x_stays,
    stride_xm, stride_w0, stride_w1, stride_w2,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    OWN_R: tl.constexpr, GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, RANK_ALIGN: tl.constexpr, W_IS_NK: tl.constexpr,
    MASK_X: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """x_ref [M, K], each w_ref ([N_i, K] if W_IS_NK, else [K, N_i]) and out_ref [M, N_i] are TMA descriptors if USE_TMA,
    else pointers; down is lora_A, up is lora_B, and these, s [M, R_i] and out are contiguous. With two members, what is
    the third's is None or 0. x_stays: whether L2 holds x. RANK_ALIGN divides each R_i, as in all_tiles of one_pass.py.

    sync_ptr holds, all zero: the count of finished programs, and for each member a count of complete chunks of its S,
    the same for each row block, and a count of parts for each row block and chunk.
    """
    R0, R1, R2 = aligned(R0, RANK_ALIGN), aligned(R1, RANK_ALIGN), aligned(R2, RANK_ALIGN)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    tiles0, tiles1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    column_tiles = tiles0 + tiles1
    if MEMBERS == 3:
        column_tiles += tl.cdiv(N2, BLOCK_N)
    k_tiles = tl.cdiv(K, BLOCK_K)
    # A member's counters: complete chunks, the same for each row block, and parts for each row block and chunk.
    counters = 1 + row_tiles * (1 + RANK_CHUNKS)
    share_size = k_parts.to(tl.int64) * RANK_CHUNKS * row_tiles * BLOCK_M * BLOCK_R
    if scale0_ptr is not None:
        scale0 = tl.load(scale0_ptr).to(tl.float32) * scale0
    if scale1_ptr is not None:
        scale1 = tl.load(scale1_ptr).to(tl.float32) * scale1
    if scale2_ptr is not None:
        scale2 = tl.load(scale2_ptr).to(tl.float32) * scale2

    # The sharing tiles.
    shared_tiles = row_tiles * shares
    for tile in tl.range(pid, shared_tiles, programs, num_stages=1):
        pid_m, column = tile // shares, tile % shares
        member, first_column = member_of(column, tiles0, tiles1, MEMBERS)
        pid_n = column - first_column
        giver = column // RANK_CHUNKS % MEMBERS
        chunk, part = column % RANK_CHUNKS, column // (RANK_CHUNKS * MEMBERS)
        row0, column0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        first, last = part_bounds(part, k_parts, k_tiles)
        N = member_number(member, N0, N1, N2, MEMBERS)
        R = member_number(giver, R0, R1, R2, MEMBERS)
        stride_w = member_number(member, stride_w0, stride_w1, stride_w2, MEMBERS)
        down_ptr = member_number(giver, down0_ptr, down1_ptr, down2_ptr, MEMBERS)
        mask_ptr = mask0_ptr
        if MASK_X:
            mask_ptr = member_number(giver, mask0_ptr, mask1_ptr, mask2_ptr, MEMBERS)
        w_ref = member_ref(member, w0_ref, w1_ref, w2_ref, MEMBERS)
        # As in the one-pass kernel: in step through K where L2 does not hold x.
        lead = tl.where(x_stays != 0, 0, first)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for ki in tl.range(0, lead):
            x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        share = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for ki in tl.range(first, last):
            x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            share = add_down(x, down_ptr, 1, K, ki * BLOCK_K, chunk * BLOCK_R, K, R, share, row0, M, mask_ptr,
                             BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT, PRECISION)  # fmt: skip
        total_ptr = sync_ptr + 1 + giver * counters
        ready_ptr = total_ptr + 1
        publish(share, workspace_ptr + giver * share_size, ready_ptr + row_tiles, ready_ptr, total_ptr,
                member_number(giver, s0_ptr, s1_ptr, s2_ptr, MEMBERS), R,
                member_number(giver, scale0, scale1, scale2, MEMBERS), pid_m, chunk, part, RANK_CHUNKS, k_parts,
                row_tiles, M, R, BLOCK_M, BLOCK_R)  # fmt: skip
        # The rest of K, from where the share ended and, if it came first, around.
        for step in tl.range(last, k_tiles + first - lead):
            ki = tl.where(step < k_tiles, step, step - k_tiles)
            x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        _finish_member_tile(
            0, acc, member, pid_m, pid_n, x_ref, out0_ref, out1_ref, out2_ref, down0_ptr, down1_ptr, down2_ptr, up0_ptr,
            up1_ptr, up2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, s0_ptr, s1_ptr, s2_ptr, mask0_ptr, mask1_ptr, mask2_ptr,
            sync_ptr, counters, scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_tiles,
            k_parts, stride_xm, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, RANK_CHUNKS, MASK_X, HAS_BIAS, SPLIT,
            PRECISION, USE_TMA, DTYPE)  # fmt: skip

    # All others.
    tile = pid + tl.cdiv(tl.maximum(shared_tiles - pid, 0), programs) * programs
    mine = tl.cdiv(tl.maximum(row_tiles * column_tiles - tile, 0), programs)
    # A bit for each member whose S is known to be complete in all row blocks.
    stored = tl.minimum(shared_tiles, 0)
    if USE_TMA:
        # One loop over every step of every tile: the loads of a tile are under way while the one before it is finished.
        pid_m, pid_n, member = 0, 0, 0
        ki = -1
        tile -= programs
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in tl.range(0, mine * k_tiles):
            ki = tl.where(ki == k_tiles - 1, 0, ki + 1)
            if ki == 0:
                tile += programs
                pid_m, column = plain_tile(tile - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
                member, first_column = member_of(column, tiles0, tiles1, MEMBERS)
                pid_n = column - first_column
            w_ref = member_ref(member, w0_ref, w1_ref, w2_ref, MEMBERS)
            x = load_tile(x_ref, stride_xm, pid_m * BLOCK_M, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            # A descriptor knows W's stride and N.
            w = load_w(w_ref, 0, ki * BLOCK_K, pid_n * BLOCK_N, K, 0, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if ki == k_tiles - 1:
                stored = _finish_member_tile(
                    stored, acc, member, pid_m, pid_n, x_ref, out0_ref, out1_ref, out2_ref, down0_ptr, down1_ptr,
                    down2_ptr, up0_ptr, up1_ptr, up2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, s0_ptr, s1_ptr, s2_ptr,
                    mask0_ptr, mask1_ptr, mask2_ptr, sync_ptr, counters, scale0, scale1, scale2, spin_limit,
                    M, K, N0, N1, N2, R0, R1, R2, k_tiles, k_parts, stride_xm, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K,
                    BLOCK_R, OWN_R, RANK_CHUNKS, MASK_X, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        for index in tl.range(0, mine, num_stages=1):
            pid_m, column = plain_tile(tile + index * programs - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            member, first_column = member_of(column, tiles0, tiles1, MEMBERS)
            pid_n = column - first_column
            N = member_number(member, N0, N1, N2, MEMBERS)
            stride_w = member_number(member, stride_w0, stride_w1, stride_w2, MEMBERS)
            w_ref = member_ref(member, w0_ref, w1_ref, w2_ref, MEMBERS)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for ki in tl.range(0, k_tiles):
                x = load_tile(x_ref, stride_xm, pid_m * BLOCK_M, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
                w = load_w(w_ref, stride_w, ki * BLOCK_K, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
            stored = _finish_member_tile(
                stored, acc, member, pid_m, pid_n, x_ref, out0_ref, out1_ref, out2_ref, down0_ptr, down1_ptr,
                down2_ptr, up0_ptr, up1_ptr, up2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, s0_ptr, s1_ptr, s2_ptr,
                mask0_ptr, mask1_ptr, mask2_ptr, sync_ptr, counters, scale0, scale1, scale2, spin_limit,
                M, K, N0, N1, N2, R0, R1, R2, k_tiles, k_parts, stride_xm, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K,
                BLOCK_R, OWN_R, RANK_CHUNKS, MASK_X, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip

    tl.debug_barrier()
    if tl.atomic_add(sync_ptr, 1, sem="acq_rel") == programs - 1:
        used = 1 + MEMBERS * counters
        for start in tl.range(0, used, 1024):
            offs = start + tl.arange(0, 1024)
            tl.store(sync_ptr + offs, 0, mask=offs < used)


@triton.jit
def _finish_member_tile(
    stored, acc, member, pid_m, pid_n, x_ref, out0_ref, out1_ref, out2_ref, down0_ptr, down1_ptr, down2_ptr, up0_ptr,
    up1_ptr, up2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, s0_ptr, s1_ptr, s2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, sync_ptr,
    counters, scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_tiles, k_parts, stride_xm,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    OWN_R: tl.constexpr, RANK_CHUNKS: tl.constexpr, MASK_X: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """finish_tile with what belongs to the tile's member. Returns `stored` with that member's bit."""
    total_ptr = sync_ptr + 1 + member * counters
    N = member_number(member, N0, N1, N2, MEMBERS)
    R = member_number(member, R0, R1, R2, MEMBERS)
    bias_ptr = bias0_ptr
    if HAS_BIAS:
        bias_ptr = member_number(member, bias0_ptr, bias1_ptr, bias2_ptr, MEMBERS)
    mask_ptr = mask0_ptr
    if MASK_X:
        mask_ptr = member_number(member, mask0_ptr, mask1_ptr, mask2_ptr, MEMBERS)
    all_stored = finish_tile(
        (stored >> member) % 2 == 1, acc, pid_m, pid_n, x_ref, member_ref(member, out0_ref, out1_ref, out2_ref, MEMBERS),
        member_number(member, down0_ptr, down1_ptr, down2_ptr, MEMBERS),
        member_number(member, up0_ptr, up1_ptr, up2_ptr, MEMBERS), bias_ptr,
        member_number(member, s0_ptr, s1_ptr, s2_ptr, MEMBERS), total_ptr + 1, total_ptr, mask_ptr,
        member_number(member, scale0, scale1, scale2, MEMBERS), spin_limit, M, N, K, R, k_tiles, k_parts,
        stride_xm, N, 1, K, 1, R, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, RANK_CHUNKS, MASK_X, False, HAS_BIAS, SPLIT,
        PRECISION, USE_TMA, DTYPE)  # fmt: skip
    return stored | (all_stored.to(tl.int32) << member)
