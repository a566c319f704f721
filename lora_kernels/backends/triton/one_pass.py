"""The one-pass kernel: a frozen product and its adapter from a single reading of the left operand.

    S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
    out = X W + mask(S U) + bias      [M, N]     U "up":   lora_B^T forward, lora_A backward

Forward, X is x, W is weight^T and the mask sits on X. Backward to the input, X is dy, W is weight, S is T and
the mask sits on S U.

How S gets from the tiles that have it to the tiles that need it
-----------------------------------------------------------------
S is computed in shares: one row block, one chunk of the rank, one part of K. A share is written to a workspace;
whoever writes the last part of a chunk adds the parts in their fixed order, stores S and raises the row block's
flag. Any tile that has finished its main loop looks at the flag and adds S U into its accumulator. Shares come first
in every program, so nobody waits long. Whose they are depends on how many tiles there are (tiles.sharers):

* Where the last wave of tiles leaves enough programs without one, these compute all of S before their first tile
  (ALONE; `sharers` of them), in the order of the tiles. They read X ahead of the others, for whom L2 then has it.
* Elsewhere the first few column tiles of each row block (`shares`) accumulate one share each in their main loops: the
  X tile that a program holds for X W serves the product with D as well.

Nobody waits for ever either: a tile that has looked `spin_limit` times in vain computes S itself and stores it,
by the same instructions in the same order, so whoever stores, the bits are the same. No program therefore
depends on another one ever running: the kernel needs no co-residency, no cooperative launch and no ticket, and
cannot deadlock while other kernels hold the multiprocessors.

Where the rank has more chunks than the row block has tiles (a rank beyond N / 2), nothing is shared: `shares`, `sharers`
and `spin_limit` are 0, and every tile computes S. One launch stays one launch.

The last program to finish puts every count and flag back to zero, for the next launch on the stream or the next
replay of the graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.pieces import aligned, load_tile
from lora_kernels.backends.triton.sharing import (
    add_down,
    compute_share,
    finish_tile,
    load_w,
    part_bounds,
    plain_tile,
    publish,
)


@triton.jit
def all_tiles(
    x_ref, w_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
    scale, spin_limit, M, N, K, R, k_parts, shares, sharers, x_stays,
    stride_xm, stride_w, stride_om, stride_dk, stride_dr, stride_ur, stride_un, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OWN_R: tl.constexpr,
    GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, RANK_ALIGN: tl.constexpr, DOWN_ALIGN: tl.constexpr, UP_ALIGN: tl.constexpr,
    ALONE: tl.constexpr, SHARE_STAGES: tl.constexpr, W_IS_NK: tl.constexpr, MASK_X: tl.constexpr, MASK_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """This program's tiles of out, and its shares of S. The module's docstring says what that is and why it ends.

    x_ref [M, K], w_ref ([N, K] if W_IS_NK, else [K, N]) and out_ref [M, N] are TMA descriptors if USE_TMA, else
    pointers. x_stays: whether L2 holds X. RANK_ALIGN divides R, DOWN_ALIGN stride_dk, UP_ALIGN stride_un: Triton itself asks
    only whether 16 does, and loads of D and U would be of one number each at rank 8. OWN_R: compute_s in sharing.py has it.
    sync_ptr holds, all zero: the count of finished programs, that of complete chunks of S, the same for each row block, and
    a count of parts for each row block and chunk.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    k_tiles = tl.cdiv(K, BLOCK_K)
    total_ptr = sync_ptr + 1
    ready_ptr = sync_ptr + 2
    arrived_ptr = ready_ptr + row_tiles
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32) * scale
    R = aligned(R, RANK_ALIGN)
    stride_sm = aligned(stride_sm, RANK_ALIGN)
    if DOWN_ALIGN > 1:
        stride_dk = aligned(stride_dk, DOWN_ALIGN)
    if UP_ALIGN > 1:
        stride_un = aligned(stride_un, UP_ALIGN)

    # Shares of S: of the programs with the fewest tiles, or with the first tiles.
    shared_tiles = row_tiles * shares
    of_a_row = RANK_CHUNKS * k_parts if ALONE else shares
    first_sharer = programs - sharers if ALONE else 0
    start = tl.where(pid >= first_sharer, pid - first_sharer, row_tiles * of_a_row)
    for item in tl.range(start, row_tiles * of_a_row, programs - first_sharer, num_stages=1):
        pid_m, pid_n = item // of_a_row, item % of_a_row
        row0, column0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        chunk, part = pid_n % RANK_CHUNKS, pid_n // RANK_CHUNKS
        first, last = part_bounds(part, k_parts, k_tiles)
        if ALONE:
            share = compute_share(x_ref, stride_xm, down_ptr, stride_dk, stride_dr, row0, chunk * BLOCK_R, first, last, M, K, R,
                                  mask_ptr, BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT, PRECISION, USE_TMA,
                                  SHARE_STAGES)  # fmt: skip
        else:
            # A tile starts with its share, so that S is known early. But where L2 does not hold X, all sharing tiles of a
            # row block go through K in step, or each of them would read X from memory on its own, all at once.
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
                share = add_down(x, down_ptr, stride_dk, stride_dr, ki * BLOCK_K, chunk * BLOCK_R, K, R, share, row0, M, mask_ptr,
                                 BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT, PRECISION)  # fmt: skip
        publish(share, workspace_ptr, arrived_ptr, ready_ptr, total_ptr, s_ptr, stride_sm, scale, pid_m, chunk, part, RANK_CHUNKS,
                k_parts, row_tiles, M, R, BLOCK_M, BLOCK_R)  # fmt: skip
        if not ALONE:
            # The rest of K, from where the share ended and, if it came first, around.
            for step in tl.range(last, k_tiles + first - lead):
                ki = tl.where(step < k_tiles, step, step - k_tiles)
                x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
                w = load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
            finish_tile(False, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr, total_ptr,
                        mask_ptr, scale, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk, stride_dr,
                        stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, RANK_CHUNKS, MASK_X, MASK_OUT,
                        HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip

    # All others.
    tile = pid + tl.cdiv(tl.maximum(shared_tiles - pid, 0), programs) * programs
    mine = tl.cdiv(tl.maximum(row_tiles * column_tiles - tile, 0), programs)
    all_stored = row_tiles < 0  # False, but for the compiler a value like those that follow
    if FLATTEN:
        # One loop over every step of every tile: the loads of a tile are under way while the one before it is finished.
        pid_m, pid_n = 0, 0
        ki = -1
        tile -= programs
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in tl.range(0, mine * k_tiles):
            ki = tl.where(ki == k_tiles - 1, 0, ki + 1)
            if ki == 0:
                tile += programs
                pid_m, pid_n = plain_tile(tile - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            x = load_tile(x_ref, stride_xm, pid_m * BLOCK_M, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = load_w(w_ref, stride_w, ki * BLOCK_K, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if ki == k_tiles - 1:
                all_stored = finish_tile(
                    all_stored, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr, total_ptr,
                    mask_ptr, scale, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk,
                    stride_dr, stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, RANK_CHUNKS, MASK_X,
                    MASK_OUT, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        for index in tl.range(0, mine, num_stages=1):
            pid_m, pid_n = plain_tile(tile + index * programs - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for ki in tl.range(0, k_tiles):
                x = load_tile(x_ref, stride_xm, pid_m * BLOCK_M, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
                w = load_w(w_ref, stride_w, ki * BLOCK_K, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
            all_stored = finish_tile(
                         all_stored, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr,
                         total_ptr, mask_ptr, scale, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk,
                         stride_dr, stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, RANK_CHUNKS,
                         MASK_X, MASK_OUT, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip


@triton.jit
def counters_of_tiles(M, BLOCK_M: tl.constexpr, RANK_CHUNKS: tl.constexpr):
    """How many numbers all_tiles counts in."""
    return 2 + tl.cdiv(M, BLOCK_M) * (1 + RANK_CHUNKS)


@triton.jit
def put_back(sync_ptr, used):
    """Zeroes what was counted in, for the next launch on the stream or the next replay of the graph."""
    for start in tl.range(0, used, 1024):
        offs = start + tl.arange(0, 1024)
        tl.store(sync_ptr + offs, 0, mask=offs < used)


@triton.jit(do_not_specialize=["M", "spin_limit", "k_parts", "shares", "sharers", "x_stays"])
def one_pass_kernel(
    x_ref, w_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
    scale, spin_limit, M, N, K, R, k_parts, shares, sharers, x_stays,
    stride_xm, stride_w, stride_om, stride_dk, stride_dr, stride_ur, stride_un, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OWN_R: tl.constexpr,
    GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, RANK_ALIGN: tl.constexpr, DOWN_ALIGN: tl.constexpr, UP_ALIGN: tl.constexpr,
    ALONE: tl.constexpr, SHARE_STAGES: tl.constexpr, W_IS_NK: tl.constexpr, MASK_X: tl.constexpr, MASK_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """The module's docstring says what it computes, all_tiles what the arguments are."""
    all_tiles(x_ref, w_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr, scale,
              spin_limit, M, N, K, R, k_parts, shares, sharers, x_stays, stride_xm, stride_w, stride_om, stride_dk,
              stride_dr, stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, GROUP_M, RANK_CHUNKS, RANK_ALIGN,
              DOWN_ALIGN, UP_ALIGN, ALONE, SHARE_STAGES, W_IS_NK, MASK_X, MASK_OUT, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE,
              FLATTEN)  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(sync_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        put_back(sync_ptr, counters_of_tiles(M, BLOCK_M, RANK_CHUNKS))
