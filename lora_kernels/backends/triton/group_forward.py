"""The forward of a group of LoRA linears that read the same x, in one launch.

    S_i = scale_i * mask_i(x) A_i^T         y_i = x W_i^T + S_i B_i^T + b_i

The column tiles of all members stand side by side, each member's rounded up to whole tiles, and one persistent loop
goes over them: what the members leave of a wave of tiles is filled by each other's. The weights stay where they are;
a tile takes the descriptors and pointers of the member that it belongs to.

S is shared out and handed over as in the one-pass kernel: by programs that have a tile less (ALONE), which multiply x by
all members' A side by side; or among the first tiles, where every chunk of every member's rank is a share of its own,
computed next to any column tile of the row block, whichever member that tile belongs to. Flags are a member's own, and so
is the argument why the kernel ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.group_pieces import member_number, member_of, member_ref
from lora_kernels.backends.triton.pieces import aligned, load_tile, s_addresses
from lora_kernels.backends.triton.sharing import (
    MAX_PARTS,
    add_down,
    finish_tile,
    load_w,
    part_bounds,
    plain_tile,
    publish,
    share_offsets,
)


@triton.jit(do_not_specialize=["M", "spin_limit", "k_parts", "shares", "sharers", "x_stays"])
def group_forward_kernel(
    x_ref, w0_ref, out0_ref, w1_ref, out1_ref, w2_ref, out2_ref,
    down0_ptr, down1_ptr, down2_ptr, up0_ptr, up1_ptr, up2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, s0_ptr, s1_ptr, s2_ptr,
    mask0_ptr, mask1_ptr, mask2_ptr, scale0_ptr, scale1_ptr, scale2_ptr, workspace_ptr, sync_ptr,
    scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_parts, shares, sharers, x_stays,
    stride_xm, stride_w0, stride_w1, stride_w2,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    OWN_R: tl.constexpr, GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, RANK_ALIGN: tl.constexpr, ALIGNED: tl.constexpr,
    ALONE: tl.constexpr, JOINT: tl.constexpr, SHARE_STAGES: tl.constexpr, W_IS_NK: tl.constexpr, MASK_X: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x_ref [M, K], each w_ref ([N_i, K] if W_IS_NK, else [K, N_i]) and out_ref [M, N_i] are TMA descriptors if USE_TMA,
    else pointers; down is lora_A, up is lora_B, and these, s [M, R_i] and out are contiguous. With two members, what is
    the third's is None or 0. x_stays: whether L2 holds x. RANK_ALIGN divides each R_i, as in all_tiles of one_pass.py.
    JOINT: the columns of all members' ranks side by side, of BLOCK_R each; ALIGNED: each A starts on 16 bytes.

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

    # Shares of S: of the programs with the fewest tiles, or with the first tiles.
    shared_tiles = row_tiles * shares
    if ALONE:
        first_sharer = programs - sharers
        start = tl.where(pid >= first_sharer, pid - first_sharer, row_tiles * k_parts)
        for item in tl.range(start, row_tiles * k_parts, sharers, num_stages=1):
            pid_m, part = item // k_parts, item % k_parts
            first, last = part_bounds(part, k_parts, k_tiles)
            share = _joint_share(x_ref, stride_xm, pid_m * BLOCK_M, first, last, M, K, down0_ptr, down1_ptr, down2_ptr, R0, R1, R2,
                                 MEMBERS, BLOCK_M, BLOCK_K, BLOCK_R, JOINT, ALIGNED, PRECISION, USE_TMA,
                                 SHARE_STAGES)  # fmt: skip
            _publish_jointly(share, workspace_ptr, sync_ptr, counters, s0_ptr, s1_ptr, s2_ptr, scale0, scale1, scale2, pid_m, part,
                             k_parts, row_tiles, M, R0, R1, R2, MEMBERS, BLOCK_M, BLOCK_R, JOINT)  # fmt: skip
    else:
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
def _joint_share(x_ref, stride_xm, row0, first, last, M, K, down0_ptr, down1_ptr, down2_ptr, R0, R1, R2, MEMBERS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, JOINT: tl.constexpr, ALIGNED: tl.constexpr,
                 PRECISION: tl.constexpr, USE_TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """x [A_0^T A_1^T ...] of some steps of K, each member's in a slot of BLOCK_R columns."""
    columns = tl.arange(0, JOINT)
    member, offs_r = columns // BLOCK_R, columns % BLOCK_R
    in_rank = member_number(member, offs_r < R0, offs_r < R1, offs_r < R2, MEMBERS) & (member < MEMBERS)
    down_ptrs = member_number(member, down0_ptr, down1_ptr, down2_ptr, MEMBERS)
    if ALIGNED:
        # Triton 3.9 sees nothing of that in what is chosen per column, and would load number by number.
        down_ptrs = tl.multiple_of(down_ptrs, 16)
    s = tl.zeros((BLOCK_M, JOINT), tl.float32)
    for ki in tl.range(first, last, num_stages=STAGES):
        x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
        offs_k = ki * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (offs_k < K)[:, None] & in_rank[None, :]
        down = tl.load(down_ptrs[None, :] + offs_r[None, :].to(tl.int64) * K + offs_k[:, None], mask, other=0.0)
        s = tl.dot(x, down.to(x.dtype), s, input_precision=PRECISION)
    return s


@triton.jit
def _publish_jointly(share, workspace_ptr, sync_ptr, counters, s0_ptr, s1_ptr, s2_ptr, scale0, scale1, scale2, pid_m, part, k_parts,
                     row_tiles, M, R0, R1, R2, MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
                     JOINT: tl.constexpr):  # fmt: skip
    """As publish in sharing.py: with the last part, every member's S of the row block is complete and stored."""
    tl.store(workspace_ptr + share_offsets(pid_m, part, row_tiles, BLOCK_M, JOINT), share)
    # Every thread's part of the share must be written before one thread counts it, with the counts of the first member.
    tl.debug_barrier()
    if tl.atomic_add(sync_ptr + 2 + row_tiles + pid_m, 1, sem="acq_rel") == k_parts - 1:
        PIECE: tl.constexpr = 16
        for column in tl.range(0, MEMBERS * BLOCK_R, PIECE, num_stages=1):
            member = column // BLOCK_R
            R = member_number(member, R0, R1, R2, MEMBERS)
            s = tl.zeros((BLOCK_M, PIECE), tl.float32)
            for p in tl.static_range(MAX_PARTS):
                rows = tl.arange(0, BLOCK_M)[:, None]
                tile = (p * row_tiles + pid_m).to(tl.int64) * (BLOCK_M * JOINT)
                piece = workspace_ptr + tile + rows * JOINT + (column + tl.arange(0, PIECE))[None, :]
                # Other multiprocessors wrote them: L1 may not be asked.
                s += tl.load(piece, mask=rows < tl.where(p < k_parts, BLOCK_M, 0), other=0.0, cache_modifier=".cg")
            scale = member_number(member, scale0, scale1, scale2, MEMBERS)
            s_ptr = member_number(member, s0_ptr, s1_ptr, s2_ptr, MEMBERS)
            address, mask = s_addresses(s_ptr, R, pid_m * BLOCK_M, column % BLOCK_R, M, R, BLOCK_M, PIECE)
            tl.store(address, (s * scale).to(s_ptr.dtype.element_ty), mask)
        tl.debug_barrier()
        for member in tl.static_range(MEMBERS):
            total_ptr = sync_ptr + 1 + member * counters
            tl.atomic_add(total_ptr + 1 + pid_m, 1, sem="release")
            tl.atomic_add(total_ptr, 1, sem="release")


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
