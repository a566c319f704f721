"""The gradient of x in a group of LoRA linears that read the same x, in one launch.

    T_i = scale_i * dy_i B_i         dx = sum over i of dy_i W_i + mask_i(T_i A_i)

The sum is one accumulation: a tile's main loop goes through the output features of one member after the other, and
dx is rounded and written once. Nothing is added up afterwards.

T is shared out and handed over as in the one-pass kernel, by its own functions, among programs that have a tile less
(ALONE) or among the first tiles: every chunk of every member's rank is cut into parts of that member's output features. A tile needs all of them, so a row block has one flag, and a tile
that has looked for it in vain computes T of every member itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.group_pieces import member_number, member_of, member_ref
from lora_kernels.backends.triton.masked_up import add_masked_up
from lora_kernels.backends.triton.pieces import aligned, halves, load_s, load_tile, store_tile
from lora_kernels.backends.triton.sharing import (
    add_down,
    add_up,
    all_ready,
    compute_s,
    compute_share,
    load_w,
    part_bounds,
    plain_tile,
    publish,
)


@triton.jit
def _multiply_step(acc, step, row0, column0, dy0_ref, dy1_ref, dy2_ref, w0_ref, w1_ref, w2_ref, M, K, N0, N1, N2, steps0,
                   steps1, stride_dy0, stride_dy1, stride_dy2, stride_w0, stride_w1, stride_w2, MEMBERS: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_IS_NK: tl.constexpr,
                   PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """acc + dy_i W_i for one step of the main loop."""
    member, first = member_of(step, steps0, steps1, MEMBERS)
    k0 = (step - first) * BLOCK_K
    N = member_number(member, N0, N1, N2, MEMBERS)
    dy = load_tile(member_ref(member, dy0_ref, dy1_ref, dy2_ref, MEMBERS),
                   member_number(member, stride_dy0, stride_dy1, stride_dy2, MEMBERS), row0, k0, M, N, BLOCK_M, BLOCK_K,
                   USE_TMA)  # fmt: skip
    w = load_w(member_ref(member, w0_ref, w1_ref, w2_ref, MEMBERS),
               member_number(member, stride_w0, stride_w1, stride_w2, MEMBERS), k0, column0, N, K, BLOCK_K, BLOCK_N,
               W_IS_NK, USE_TMA)  # fmt: skip
    return tl.dot(dy, w, acc, input_precision=PRECISION)


@triton.jit
def _compute_all_t(pid_m, dy0_ref, dy1_ref, dy2_ref, down0_ptr, down1_ptr, down2_ptr, t0_ptr, t1_ptr, t2_ptr, scale0, scale1,
                   scale2, M, N0, N1, N2, R0, R1, R2, k_parts0, k_parts1, k_parts2, stride_dy0, stride_dy1, stride_dy2,
                   MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OWN_R: tl.constexpr,
                   SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """Every member's T of a row block, computed and stored here."""
    for member in tl.range(0, MEMBERS, num_stages=1):
        N = member_number(member, N0, N1, N2, MEMBERS)
        R = member_number(member, R0, R1, R2, MEMBERS)
        compute_s(pid_m, member_ref(member, dy0_ref, dy1_ref, dy2_ref, MEMBERS),
                  member_number(member, down0_ptr, down1_ptr, down2_ptr, MEMBERS),
                  member_number(member, t0_ptr, t1_ptr, t2_ptr, MEMBERS), None,
                  member_number(member, scale0, scale1, scale2, MEMBERS), M, N, R, tl.cdiv(N, BLOCK_K),
                  member_number(member, k_parts0, k_parts1, k_parts2, MEMBERS),
                  member_number(member, stride_dy0, stride_dy1, stride_dy2, MEMBERS), R, 1, R, BLOCK_M, BLOCK_K, OWN_R,
                  False, SPLIT, PRECISION, USE_TMA)  # fmt: skip


@triton.jit
def _add_all_up(acc, stored, row0, column0, up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, M, K, R0, R1, R2,
                MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
                BLOCK_U: tl.constexpr, RANK_CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr,
                PRECISION: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """acc + the sum over members of T_i A_i, with the ranks of all members side by side.

    One product for as many of them as BLOCK_U columns hold: several in a row on one accumulator would keep the main
    loop's from overlapping (ptxas C7515). A loop of them does not, where its length is known only at run time, which
    keeps it a loop.
    """
    SLOT: tl.constexpr = RANK_CHUNKS * BLOCK_R
    times = 1
    if MEMBERS * SLOT > BLOCK_U:
        times = tl.maximum(tl.cdiv((MEMBERS - 1) * SLOT + (R2 if MEMBERS == 3 else R1), BLOCK_U), 1)
    for index in tl.range(0, times, num_stages=1):
        if BLOCK_U <= SLOT:
            # Of one member. Written so that a multiple of BLOCK_U can be seen in r0, or T would be loaded number by number.
            PIECES: tl.constexpr = SLOT // BLOCK_U
            member, r0 = index // PIECES, index % PIECES * BLOCK_U
            R = member_number(member, R0, R1, R2, MEMBERS)
            t = load_s(stored, member_number(member, t0_ptr, t1_ptr, t2_ptr, MEMBERS), R, row0, r0, M, R, BLOCK_M, BLOCK_U)
            acc = add_up(acc, t, member_number(member, up0_ptr, up1_ptr, up2_ptr, MEMBERS), K, 1, r0, column0, R, K, DTYPE,
                         BLOCK_U, BLOCK_N, SPLIT, PRECISION)  # fmt: skip
        else:
            t, up = _load_side_by_side(stored, index * BLOCK_U, row0, column0, up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr,
                                       t2_ptr, M, K, R0, R1, R2, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_U, SLOT, ALIGNED)  # fmt: skip
            acc = tl.dot(t.to(DTYPE), up.to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _load_side_by_side(stored, first, row0, column0, up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, M, K, R0, R1, R2,
                       MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
                       SLOT: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """BLOCK_U columns of the members' T side by side, each in a slot of its own, and the rows of their A.

    ALIGNED: 8 divides all ranks, and each A starts on 16 bytes, as T does. Triton 3.9 sees nothing of that in what is chosen per
    column, and would load number by number.
    """
    columns = first + tl.arange(0, BLOCK_U)
    member, offs_r = columns // SLOT, columns % SLOT
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_n = column0 + tl.arange(0, BLOCK_N)
    # Not offs_r < R, from which the compiler would not see that neighbours share an answer, and load them one by one.
    in_rank = member_number(member, offs_r < R0, offs_r < R1, offs_r < R2, MEMBERS) & (member < MEMBERS)
    R = member_number(member, R0, R1, R2, MEMBERS)
    t_ptrs = member_number(member, t0_ptr, t1_ptr, t2_ptr, MEMBERS)[None, :]
    t_ptrs += offs_m.to(tl.int64)[:, None] * R[None, :] + offs_r[None, :]
    in_t = (offs_m < tl.where(stored, M, 0))[:, None] & in_rank[None, :]
    up_ptrs = member_number(member, up0_ptr, up1_ptr, up2_ptr, MEMBERS)
    if ALIGNED:
        t_ptrs = tl.multiple_of(tl.max_contiguous(t_ptrs, (1, 8)), (1, 16))
        in_t = tl.max_constancy(in_t, (1, 8))
        up_ptrs = tl.multiple_of(up_ptrs, 16)
    # Another multiprocessor may have written T: L1 may not be asked.
    t = tl.load(t_ptrs, in_t, other=0.0, cache_modifier=".cg")
    up = tl.load(up_ptrs[:, None] + offs_r[:, None] * K + offs_n[None, :], in_rank[:, None] & (offs_n < K)[None, :], other=0.0)
    return t, up


@triton.jit
def _finish_dx_tile(
    all_stored, acc, pid_m, pid_n, out_ref, dy0_ref, dy1_ref, dy2_ref, down0_ptr, down1_ptr, down2_ptr, up0_ptr, up1_ptr,
    up2_ptr, t0_ptr, t1_ptr, t2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, ready_ptr, total_ptr, scale0, scale1, scale2,
    spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_parts0, k_parts1, k_parts2, stride_dy0, stride_dy1, stride_dy2,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    OWN_R: tl.constexpr, BLOCK_U: tl.constexpr, RANK_CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds what the adapters give to a finished sum of dy_i W_i and writes it; as finish_tile of the one-pass kernel."""
    CHUNKS: tl.constexpr = MEMBERS * RANK_CHUNKS
    HALF: tl.constexpr = BLOCK_N // 2
    row0 = pid_m * BLOCK_M
    left0 = pid_n * BLOCK_N
    stored = True
    if not all_stored:
        stored = all_ready(ready_ptr + pid_m, CHUNKS, spin_limit)
        if not stored:
            _compute_all_t(pid_m, dy0_ref, dy1_ref, dy2_ref, down0_ptr, down1_ptr, down2_ptr, t0_ptr, t1_ptr, t2_ptr, scale0,
                           scale1, scale2, M, N0, N1, N2, R0, R1, R2, k_parts0, k_parts1, k_parts2, stride_dy0, stride_dy1,
                           stride_dy2, MEMBERS, BLOCK_M, BLOCK_K, OWN_R, SPLIT, PRECISION, USE_TMA)  # fmt: skip
            # The threads must meet between the stores and the loads of T: finish_tile says why by an atomic.
            stored = tl.atomic_add(ready_ptr + pid_m, 0, sem="acq_rel") >= 0
        all_stored = tl.atomic_add(total_ptr, 0, sem="acquire") == tl.cdiv(M, BLOCK_M) * CHUNKS
    if MASKED:
        for member in tl.range(0, MEMBERS, num_stages=1):
            R = member_number(member, R0, R1, R2, MEMBERS)
            acc = add_masked_up(acc, stored, row0, left0, member_number(member, up0_ptr, up1_ptr, up2_ptr, MEMBERS),
                                member_number(member, t0_ptr, t1_ptr, t2_ptr, MEMBERS),
                                member_number(member, mask0_ptr, mask1_ptr, mask2_ptr, MEMBERS), M, K, R, K, 1, R, BLOCK_M,
                                BLOCK_N, BLOCK_R, RANK_CHUNKS, SPLIT, PRECISION, DTYPE, False)  # fmt: skip
    else:
        acc = _add_all_up(acc, stored, row0, left0, up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, M, K, R0, R1, R2,
                          MEMBERS, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_U, RANK_CHUNKS, ALIGNED, SPLIT, PRECISION, DTYPE)  # fmt: skip
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    store_tile(out_ref, K, row0, left0, M, K, left.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    store_tile(out_ref, K, row0, left0 + HALF, M, K, right.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    return all_stored


@triton.jit(do_not_specialize=["M", "spin_limit", "k_parts0", "k_parts1", "k_parts2", "shares", "sharers", "dy_stays"])
def group_input_kernel(
    out_ref, dy0_ref, w0_ref, dy1_ref, w1_ref, dy2_ref, w2_ref,
    down0_ptr, down1_ptr, down2_ptr, up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, mask0_ptr, mask1_ptr, mask2_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, workspace_ptr, sync_ptr, scale0, scale1, scale2, spin_limit,
    M, K, N0, N1, N2, R0, R1, R2, k_parts0, k_parts1, k_parts2, shares, sharers, dy_stays,
    stride_dy0, stride_dy1, stride_dy2, stride_w0, stride_w1, stride_w2,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    OWN_R: tl.constexpr, BLOCK_U: tl.constexpr, GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, RANK_ALIGN: tl.constexpr,
    ALIGNED: tl.constexpr, ALONE: tl.constexpr, SHARE_STAGES: tl.constexpr, W_IS_NK: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out_ref [M, K], each dy_ref [M, N_i] and w_ref ([K, N_i] if W_IS_NK, else [N_i, K]) are TMA descriptors if USE_TMA,
    else pointers; down is lora_B, up is lora_A, and these, t [M, R_i] and out are contiguous. With two members, what is
    the third's is None or 0. K counts the columns of dx: a step of the main loop is one of some N_i. dy_stays: whether
    L2 holds all dy_i. RANK_ALIGN divides each R_i; _load_side_by_side says what ALIGNED is.

    sync_ptr holds, all zero: the count of finished programs, that of complete chunks of T, the same for each row
    block, and a count of parts for each row block and chunk.
    """
    R0, R1, R2 = aligned(R0, RANK_ALIGN), aligned(R1, RANK_ALIGN), aligned(R2, RANK_ALIGN)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(K, BLOCK_N)
    steps0, steps1 = tl.cdiv(N0, BLOCK_K), tl.cdiv(N1, BLOCK_K)
    steps = steps0 + steps1
    if MEMBERS == 3:
        steps += tl.cdiv(N2, BLOCK_K)
    CHUNKS: tl.constexpr = MEMBERS * RANK_CHUNKS
    total_ptr = sync_ptr + 1
    ready_ptr = sync_ptr + 2
    arrived_ptr = ready_ptr + row_tiles
    if scale0_ptr is not None:
        scale0 = tl.load(scale0_ptr).to(tl.float32) * scale0
    if scale1_ptr is not None:
        scale1 = tl.load(scale1_ptr).to(tl.float32) * scale1
    if scale2_ptr is not None:
        scale2 = tl.load(scale2_ptr).to(tl.float32) * scale2

    # Shares of T: of the programs with the fewest tiles, or with the first tiles. Those of a row block are the parts of the
    # first member's chunks, then of the next one's.
    shared_tiles = row_tiles * shares
    of_a_row = shares
    if ALONE:
        of_a_row = (k_parts0 + k_parts1 + (k_parts2 if MEMBERS == 3 else 0)) * RANK_CHUNKS
    first_sharer = programs - sharers if ALONE else 0
    start = tl.where(pid >= first_sharer, pid - first_sharer, row_tiles * of_a_row)
    for item in tl.range(start, row_tiles * of_a_row, programs - first_sharer, num_stages=1):
        pid_m, pid_n = item // of_a_row, item % of_a_row
        row0, column0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        giver, first_item = member_of(pid_n, k_parts0 * RANK_CHUNKS, k_parts1 * RANK_CHUNKS, MEMBERS)
        k_parts = member_number(giver, k_parts0, k_parts1, k_parts2, MEMBERS)
        chunk, part = (pid_n - first_item) % RANK_CHUNKS, (pid_n - first_item) // RANK_CHUNKS
        N = member_number(giver, N0, N1, N2, MEMBERS)
        R = member_number(giver, R0, R1, R2, MEMBERS)
        first, last = part_bounds(part, k_parts, tl.cdiv(N, BLOCK_K))
        dy_ref = member_ref(giver, dy0_ref, dy1_ref, dy2_ref, MEMBERS)
        stride_dy = member_number(giver, stride_dy0, stride_dy1, stride_dy2, MEMBERS)
        down_ptr = member_number(giver, down0_ptr, down1_ptr, down2_ptr, MEMBERS)
        if ALONE:
            share = compute_share(dy_ref, stride_dy, down_ptr, R, 1, row0, chunk * BLOCK_R, first, last, M, N, R, None, BLOCK_M,
                                  BLOCK_K, BLOCK_R, False, SPLIT, PRECISION, USE_TMA, SHARE_STAGES)  # fmt: skip
        else:
            before = member_number(giver, 0, steps0, steps0 + steps1, MEMBERS)
            w_ref = member_ref(giver, w0_ref, w1_ref, w2_ref, MEMBERS)
            stride_w = member_number(giver, stride_w0, stride_w1, stride_w2, MEMBERS)
            # As in the one-pass kernel: in step through all members where L2 does not hold what they read.
            lead = tl.where(dy_stays != 0, 0, before + first)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in tl.range(0, lead):
                acc = _multiply_step(acc, step, row0, column0, dy0_ref, dy1_ref, dy2_ref, w0_ref, w1_ref, w2_ref, M, K, N0, N1,
                                     N2, steps0, steps1, stride_dy0, stride_dy1, stride_dy2, stride_w0, stride_w1, stride_w2,
                                     MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K, W_IS_NK, PRECISION, USE_TMA)  # fmt: skip
            share = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for ki in tl.range(first, last):
                dy = load_tile(dy_ref, stride_dy, row0, ki * BLOCK_K, M, N, BLOCK_M, BLOCK_K, USE_TMA)
                w = load_w(w_ref, stride_w, ki * BLOCK_K, column0, N, K, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
                acc = tl.dot(dy, w, acc, input_precision=PRECISION)
                share = add_down(dy, down_ptr, R, 1, ki * BLOCK_K, chunk * BLOCK_R, N, R, share, row0, M, None, BLOCK_M,
                                 BLOCK_K, BLOCK_R, False, SPLIT, PRECISION)  # fmt: skip
        # Counted, and kept in the workspace, as chunks of the whole group.
        chunks_before = giver * RANK_CHUNKS * BLOCK_R
        publish(share, workspace_ptr, arrived_ptr, ready_ptr, total_ptr,
                member_number(giver, t0_ptr, t1_ptr, t2_ptr, MEMBERS) - chunks_before, R,
                member_number(giver, scale0, scale1, scale2, MEMBERS), pid_m, giver * RANK_CHUNKS + chunk, part, CHUNKS,
                k_parts, row_tiles, M, R + chunks_before, BLOCK_M, BLOCK_R)  # fmt: skip
        if not ALONE:
            # The rest, from where the share ended and, if it came first, around.
            for index in tl.range(before + last, steps + before + first - lead):
                step = tl.where(index < steps, index, index - steps)
                acc = _multiply_step(acc, step, row0, column0, dy0_ref, dy1_ref, dy2_ref, w0_ref, w1_ref, w2_ref, M, K, N0, N1,
                                     N2, steps0, steps1, stride_dy0, stride_dy1, stride_dy2, stride_w0, stride_w1, stride_w2,
                                     MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K, W_IS_NK, PRECISION, USE_TMA)  # fmt: skip
            _finish_dx_tile(False, acc, pid_m, pid_n, out_ref, dy0_ref, dy1_ref, dy2_ref, down0_ptr, down1_ptr, down2_ptr,
                            up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, ready_ptr,
                            total_ptr, scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_parts0,
                            k_parts1, k_parts2, stride_dy0, stride_dy1, stride_dy2, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K,
                            BLOCK_R, OWN_R, BLOCK_U, RANK_CHUNKS, ALIGNED, MASKED, SPLIT, PRECISION, USE_TMA,
                            DTYPE)  # fmt: skip

    # All others.
    tile = pid + tl.cdiv(tl.maximum(shared_tiles - pid, 0), programs) * programs
    mine = tl.cdiv(tl.maximum(row_tiles * column_tiles - tile, 0), programs)
    all_stored = shared_tiles < 0  # False, but for the compiler a value like those that follow
    if FLATTEN:
        # One loop over every step of every tile: the loads of a tile are under way while the one before it is finished.
        pid_m, pid_n = 0, 0
        step = -1
        tile -= programs
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in tl.range(0, mine * steps):
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                tile += programs
                pid_m, pid_n = plain_tile(tile - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            acc = _multiply_step(acc, step, pid_m * BLOCK_M, pid_n * BLOCK_N, dy0_ref, dy1_ref, dy2_ref, w0_ref, w1_ref,
                                 w2_ref, M, K, N0, N1, N2, steps0, steps1, stride_dy0, stride_dy1, stride_dy2, stride_w0,
                                 stride_w1, stride_w2, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K, W_IS_NK, PRECISION,
                                 USE_TMA)  # fmt: skip
            if step == steps - 1:
                all_stored = _finish_dx_tile(
                    all_stored, acc, pid_m, pid_n, out_ref, dy0_ref, dy1_ref, dy2_ref, down0_ptr, down1_ptr, down2_ptr,
                    up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, ready_ptr,
                    total_ptr, scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_parts0,
                    k_parts1, k_parts2, stride_dy0, stride_dy1, stride_dy2, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K,
                    BLOCK_R, OWN_R, BLOCK_U, RANK_CHUNKS, ALIGNED, MASKED, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        for index in tl.range(0, mine, num_stages=1):
            pid_m, pid_n = plain_tile(tile + index * programs - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in tl.range(0, steps):
                acc = _multiply_step(acc, step, pid_m * BLOCK_M, pid_n * BLOCK_N, dy0_ref, dy1_ref, dy2_ref, w0_ref,
                                     w1_ref, w2_ref, M, K, N0, N1, N2, steps0, steps1, stride_dy0, stride_dy1, stride_dy2,
                                     stride_w0, stride_w1, stride_w2, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K, W_IS_NK,
                                     PRECISION, USE_TMA)  # fmt: skip
            all_stored = _finish_dx_tile(
                all_stored, acc, pid_m, pid_n, out_ref, dy0_ref, dy1_ref, dy2_ref, down0_ptr, down1_ptr, down2_ptr,
                up0_ptr, up1_ptr, up2_ptr, t0_ptr, t1_ptr, t2_ptr, mask0_ptr, mask1_ptr, mask2_ptr, ready_ptr,
                total_ptr, scale0, scale1, scale2, spin_limit, M, K, N0, N1, N2, R0, R1, R2, k_parts0,
                k_parts1, k_parts2, stride_dy0, stride_dy1, stride_dy2, MEMBERS, BLOCK_M, BLOCK_N, BLOCK_K,
                BLOCK_R, OWN_R, BLOCK_U, RANK_CHUNKS, ALIGNED, MASKED, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip

    tl.debug_barrier()
    if tl.atomic_add(sync_ptr, 1, sem="acq_rel") == programs - 1:
        used = 2 + row_tiles * (1 + CHUNKS)
        for start in tl.range(0, used, 1024):
            offs = start + tl.arange(0, 1024)
            tl.store(sync_ptr + offs, 0, mask=offs < used)
