"""The one-pass kernel: a frozen product and its adapter from a single reading of the left operand.

    S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
    out = X W + mask(S U) + bias      [M, N]     U "up":   lora_B^T forward, lora_A backward

Forward, X is x, W is weight^T and the mask sits on X. Backward to the input, X is dy, W is weight, S is T and
the mask sits on S U.

How S gets from the tiles that have it to the tiles that need it
-----------------------------------------------------------------
The X tile that a program holds for X W serves the product with D as well. That work is shared out: of the
column tiles of one row block the first few each accumulate S over one part of K (and one chunk of the rank),
right at the start of their own main loop, and write that partial sum to a workspace. Whoever writes the last
part of a chunk adds the parts in their fixed order, stores S and raises the row block's flag. Any tile that has
finished its main loop looks at the flag and adds S U into its accumulator. A program's first tiles are the
sharing ones and parts are written early, so nobody waits long.

Nobody waits for ever either: a tile that has looked `spin_limit` times in vain computes S itself and stores it, by
the same instructions in the same order, so whoever stores, the bits are the same. No program therefore depends on another one ever
running: the kernel needs no co-residency, no cooperative launch and no ticket, and cannot deadlock while other
kernels hold the multiprocessors.

Where the rank has more chunks than the row block has tiles (a rank beyond N / 2), nothing is shared: `shares` and
`spin_limit` are 0, and every tile computes S. One launch stays one launch.

The last program to finish puts every count and flag back to zero, for the next launch on the stream or the next
replay of the graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.pieces import (
    in_parts,
    keep_tile,
    load_tile,
    split_dot,
    split_products,
    store_tile,
    sum_of_parts,
)
from lora_kernels.backends.triton.tiles import MAX_PARTS as _MAX_PARTS

# The most parts that a chunk of S is summed from.
MAX_PARTS = tl.constexpr(_MAX_PARTS)
# Columns of S U that are masked at once. More would not fit into the registers; with 32, dx was wrong on an H100 at every
# rank above 16 (docs/kernels.md, under "Traps").
MASKED_COLUMNS = tl.constexpr(64)


@triton.jit
def _add_down(x, down_ptr, stride_dk, stride_dr, k0, r0, K, R, s, row0, seed_ptr, threshold,
              BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
              MASK_X: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """s + mask(x) D for one step of K."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    mask = (offs_k < K)[:, None] & (offs_r < R)[None, :]
    down = tl.load(down_ptr + offs_k[:, None].to(tl.int64) * stride_dk + offs_r[None, :] * stride_dr, mask, other=0.0)
    if MASK_X:
        x = tl.where(keep_tile(seed_ptr, row0, k0, threshold, BLOCK_M, BLOCK_K), x, 0.0)
    if SPLIT:
        # Added here, not in the tensor cores, whose long sums are truncated at each step.
        return s + sum_of_parts(tl.dot(x, in_parts(down, (offs_k < K)[:, None])), BLOCK_M, BLOCK_R)
    else:
        return tl.dot(x, down.to(x.dtype), s, input_precision=PRECISION)


@triton.jit
def _part_bounds(part, k_parts, k_tiles):
    """The steps of K that a part of S covers."""
    steps = tl.cdiv(k_tiles, k_parts)
    first = tl.minimum(part * steps, k_tiles)
    return first, tl.minimum(first + steps, k_tiles)


@triton.jit
def _compute_share(x_ref, stride_xm, down_ptr, stride_dk, stride_dr, row0, r0, first, last, M, K, R, seed_ptr, threshold,
                   BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, MASK_X: tl.constexpr,
                   SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """One share of S on its own, for whoever cannot have it from a main loop."""
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for ki in tl.range(first, last, num_stages=1):
        x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
        s = _add_down(x, down_ptr, stride_dk, stride_dr, ki * BLOCK_K, r0, K, R, s, row0, seed_ptr, threshold,
                      BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT, PRECISION)  # fmt: skip
    return s


@triton.jit
def _share_offsets(pid_m, item, row_tiles, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where the workspace keeps a share: shares are whole tiles, so that no access needs a mask."""
    tile = (item * row_tiles + pid_m).to(tl.int64) * (BLOCK_M * BLOCK_R)
    return tile + tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]


@triton.jit
def _s_addresses(s_ptr, stride_sm, row0, r0, M, R, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_r = r0 + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    return s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :], mask


@triton.jit
def _publish(share, workspace_ptr, arrived_ptr, ready_ptr, total_ptr, s_ptr, stride_sm, scale, pid_m, chunk, part, rank_chunks,
             k_parts, row_tiles, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Hands a share over; with the last part of a chunk, S of that chunk is complete and stored."""
    offsets = _share_offsets(pid_m, part * rank_chunks + chunk, row_tiles, BLOCK_M, BLOCK_R)
    tl.store(workspace_ptr + offsets, share)
    # Every thread's part of the share must be written before one thread counts it.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + pid_m * rank_chunks + chunk, 1, sem="acq_rel") == k_parts - 1:
        PIECE: tl.constexpr = 16  # all parts of a piece are in flight at once, and fit into the registers
        for r0 in tl.range(0, BLOCK_R, PIECE, num_stages=1):
            s = tl.zeros((BLOCK_M, PIECE), tl.float32)
            for p in tl.static_range(MAX_PARTS):
                tile = ((p * rank_chunks + chunk) * row_tiles + pid_m).to(tl.int64) * (BLOCK_M * BLOCK_R)
                rows = tl.arange(0, BLOCK_M)[:, None]
                piece = workspace_ptr + tile + rows * BLOCK_R + (r0 + tl.arange(0, PIECE))[None, :]
                # Other multiprocessors wrote them: L1 may not be asked.
                s += tl.load(piece, mask=rows < tl.where(p < k_parts, BLOCK_M, 0), other=0.0, cache_modifier=".cg")
            address, mask = _s_addresses(s_ptr, stride_sm, pid_m * BLOCK_M, chunk * BLOCK_R + r0, M, R, BLOCK_M, PIECE)
            tl.store(address, (s * scale).to(s_ptr.dtype.element_ty), mask)
        tl.debug_barrier()
        tl.atomic_add(ready_ptr + pid_m, 1, sem="release")
        tl.atomic_add(total_ptr, 1, sem="release")


@triton.jit
def _all_ready(ready_ptr, expected, spin_limit):
    """Looks at the flag until S is complete, at most `spin_limit` times more."""
    ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
    looks = 0
    while (ready < expected) & (looks < spin_limit):
        ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
        looks += 1
    return ready >= expected


@triton.jit
def _plain_tile(index, row_tiles, column_tiles, first_column, GROUP_M: tl.constexpr):
    """The index-th tile right of `first_column`, in groups of GROUP_M row blocks that share columns of W in L2."""
    columns = column_tiles - first_column
    group = index // (GROUP_M * columns)
    first_row = group * GROUP_M
    group_rows = tl.minimum(row_tiles - first_row, GROUP_M)
    within = index % (GROUP_M * columns)
    return first_row + within % group_rows, first_column + within // group_rows


@triton.jit
def _load_w(w_ref, stride_w, k0, n0, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
            W_IS_NK: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_K, BLOCK_N] of W, which is stored as [N, K] or as [K, N]."""
    if W_IS_NK:
        return tl.trans(load_tile(w_ref, stride_w, n0, k0, N, K, BLOCK_N, BLOCK_K, USE_TMA))
    else:
        return load_tile(w_ref, stride_w, k0, n0, K, N, BLOCK_K, BLOCK_N, USE_TMA)


@triton.jit
def _add_up(acc, s, up_ptr, stride_ur, stride_un, r0, n0, R, N, dtype: tl.constexpr, BLOCK_R: tl.constexpr,
            BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    """acc + s U for one chunk of the rank. OVERLAPS: the main loop's products go on behind it."""
    offs_r = r0 + tl.arange(0, BLOCK_R)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask = (offs_r < R)[:, None] & (offs_n < N)[None, :]
    up = tl.load(up_ptr + offs_r[:, None] * stride_ur + offs_n[None, :].to(tl.int64) * stride_un, mask, other=0.0)
    if SPLIT:
        if OVERLAPS:
            return split_dot(s, up, (offs_n < N)[None, :], acc)
        else:
            return split_products(s, up, acc)
    else:
        return tl.dot(s.to(dtype), up.to(dtype), acc, input_precision=PRECISION)


@triton.jit
def _compute_s(pid_m, x_ref, down_ptr, s_ptr, seed_ptr, scale, threshold, M, K, R, k_tiles, k_parts,
               stride_xm, stride_dk, stride_dr, stride_sm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
               BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr, MASK_X: tl.constexpr, SPLIT: tl.constexpr,
               PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """The row block's S, computed and stored here, for a tile that cannot have it from others."""
    for chunk in tl.range(0, RANK_CHUNKS, num_stages=1):
        s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for part in tl.range(0, k_parts, num_stages=1):
            first, last = _part_bounds(part, k_parts, k_tiles)
            s += _compute_share(x_ref, stride_xm, down_ptr, stride_dk, stride_dr, pid_m * BLOCK_M, chunk * BLOCK_R,
                                first, last, M, K, R, seed_ptr, threshold, BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT,
                                PRECISION, USE_TMA)  # fmt: skip
        address, mask = _s_addresses(s_ptr, stride_sm, pid_m * BLOCK_M, chunk * BLOCK_R, M, R, BLOCK_M, BLOCK_R)
        tl.store(address, (s * scale).to(s_ptr.dtype.element_ty), mask)


@triton.jit
def _load_s(stored, s_ptr, stride_sm, row0, r0, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    address, mask = _s_addresses(s_ptr, stride_sm, row0, r0, tl.where(stored, M, 0), R, BLOCK_M, BLOCK_R)
    # Another multiprocessor may have written it: L1 may not be asked.
    return tl.load(address, mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile: a whole one's way out through shared memory would cost a stage."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _add_masked_up(acc, stored, pid_m, column0, up_ptr, s_ptr, seed_ptr, threshold, M, N, R, stride_ur, stride_un,
                   stride_sm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
                   RANK_CHUNKS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
                   DTYPE: tl.constexpr):  # fmt: skip
    """acc + mask(S U) for BLOCK_N columns from `column0`."""
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in tl.range(0, RANK_CHUNKS, num_stages=1):
        s = _load_s(stored, s_ptr, stride_sm, pid_m * BLOCK_M, chunk * BLOCK_R, M, R, BLOCK_M, BLOCK_R)
        up = _add_up(up, s, up_ptr, stride_ur, stride_un, chunk * BLOCK_R, column0, R, N, DTYPE, BLOCK_R, BLOCK_N, SPLIT,
                     PRECISION, False)  # fmt: skip
    keep = keep_tile(seed_ptr, pid_m * BLOCK_M, column0, threshold, BLOCK_M, BLOCK_N)
    return acc + tl.where(keep, up, 0.0)


@triton.jit
def _finish_tile(all_stored, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr,
                 total_ptr, seed_ptr, scale, threshold, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk, stride_dr,
                 stride_ur, stride_un, stride_sm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr, MASK_X: tl.constexpr, MASK_OUT: tl.constexpr,
                 HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
                 DTYPE: tl.constexpr):  # fmt: skip
    """Adds mask(S U) and the bias to a finished X W tile and writes it.

    Returns whether S is known to be complete in all row blocks, after which nobody has to look at a flag again.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    row0 = pid_m * BLOCK_M
    left0 = pid_n * BLOCK_N
    right0 = left0 + HALF
    if HAS_BIAS:
        offs_n = left0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    stored = True
    if not all_stored:
        stored = _all_ready(ready_ptr + pid_m, RANK_CHUNKS, spin_limit)
        if not stored:
            _compute_s(pid_m, x_ref, down_ptr, s_ptr, seed_ptr, scale, threshold, M, K, R, k_tiles, k_parts, stride_xm,
                       stride_dk, stride_dr, stride_sm, BLOCK_M, BLOCK_K, BLOCK_R, RANK_CHUNKS, MASK_X, SPLIT, PRECISION,
                       USE_TMA)  # fmt: skip
            # The threads must meet between the stores and the loads of S. The result of an atomic reaches all of them
            # through such a meeting, and always is what is asked here; a bare barrier would keep the compiler from
            # pipelining the loop around it.
            stored = tl.atomic_add(ready_ptr + pid_m, 0, sem="acq_rel") >= 0
        all_stored = tl.atomic_add(total_ptr, 0, sem="acquire") == tl.cdiv(M, BLOCK_M) * RANK_CHUNKS
    if MASK_OUT:
        if HALF < MASKED_COLUMNS:
            acc = _add_masked_up(acc, stored, pid_m, left0, up_ptr, s_ptr, seed_ptr, threshold, M, N, R, stride_ur, stride_un,
                                 stride_sm, BLOCK_M, BLOCK_N, BLOCK_R, RANK_CHUNKS, SPLIT, PRECISION, DTYPE)  # fmt: skip
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        for side in tl.static_range(2):
            half = left if side == 0 else right
            half0 = left0 + side * HALF
            if HALF > MASKED_COLUMNS:
                first, second = _halves(half, BLOCK_M, HALF)
                first = _add_masked_up(first, stored, pid_m, half0, up_ptr, s_ptr, seed_ptr, threshold, M, N, R, stride_ur,
                                       stride_un, stride_sm, BLOCK_M, HALF // 2, BLOCK_R, RANK_CHUNKS, SPLIT, PRECISION,
                                       DTYPE)  # fmt: skip
                second = _add_masked_up(second, stored, pid_m, half0 + HALF // 2, up_ptr, s_ptr, seed_ptr, threshold, M, N,
                                        R, stride_ur, stride_un, stride_sm, BLOCK_M, HALF // 2, BLOCK_R, RANK_CHUNKS,
                                        SPLIT, PRECISION, DTYPE)  # fmt: skip
                half = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (BLOCK_M, HALF))
            elif HALF == MASKED_COLUMNS:
                half = _add_masked_up(half, stored, pid_m, half0, up_ptr, s_ptr, seed_ptr, threshold, M, N, R, stride_ur,
                                      stride_un, stride_sm, BLOCK_M, HALF, BLOCK_R, RANK_CHUNKS, SPLIT, PRECISION,
                                      DTYPE)  # fmt: skip
            store_tile(out_ref, stride_om, row0, half0, M, N, half.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    else:
        for chunk in tl.range(0, RANK_CHUNKS, num_stages=1):
            r0 = chunk * BLOCK_R
            s = _load_s(stored, s_ptr, stride_sm, row0, r0, M, R, BLOCK_M, BLOCK_R)
            acc = _add_up(acc, s, up_ptr, stride_ur, stride_un, r0, left0, R, N, DTYPE, BLOCK_R, BLOCK_N, SPLIT,
                          PRECISION, True)  # fmt: skip
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        store_tile(out_ref, stride_om, row0, left0, M, N, left.to(DTYPE), BLOCK_M, HALF, USE_TMA)
        store_tile(out_ref, stride_om, row0, right0, M, N, right.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    return all_stored


@triton.jit(do_not_specialize=["M", "threshold", "spin_limit", "k_parts", "shares", "x_stays"])
def one_pass_kernel(
    x_ref, w_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, workspace_ptr, sync_ptr, seed_ptr, scale_ptr,
    scale, threshold, spin_limit, M, N, K, R, k_parts, shares, x_stays,
    stride_xm, stride_w, stride_om, stride_dk, stride_dr, stride_ur, stride_un, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, W_IS_NK: tl.constexpr, MASK_X: tl.constexpr,
    MASK_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr, DTYPE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The module's docstring says what it computes and why it ends.

    x_ref [M, K], w_ref ([N, K] if W_IS_NK, else [K, N]) and out_ref [M, N] are TMA descriptors if USE_TMA, else
    pointers. x_stays: whether L2 holds X. sync_ptr holds, all zero: the count of finished programs, that of complete chunks of S, the
    same for each row block, and a count of parts for each row block and chunk.
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

    # The sharing tiles.
    shared_tiles = row_tiles * shares
    for tile in tl.range(pid, shared_tiles, programs, num_stages=1):
        pid_m, pid_n = tile // shares, tile % shares
        row0, column0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        chunk, part = pid_n % RANK_CHUNKS, pid_n // RANK_CHUNKS
        first, last = _part_bounds(part, k_parts, k_tiles)
        # A tile starts with its share, so that S is known early. But where L2 does not hold X, all sharing tiles of a row
        # block go through K in step, or each of them would read X from memory on its own, all at once.
        lead = tl.where(x_stays != 0, 0, first)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for ki in tl.range(0, lead):
            x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = _load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        share = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for ki in tl.range(first, last):
            x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = _load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            share = _add_down(x, down_ptr, stride_dk, stride_dr, ki * BLOCK_K, chunk * BLOCK_R, K, R, share, row0, seed_ptr,
                              threshold, BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT, PRECISION)  # fmt: skip
        _publish(share, workspace_ptr, arrived_ptr, ready_ptr, total_ptr, s_ptr, stride_sm, scale, pid_m, chunk, part, RANK_CHUNKS,
                 k_parts, row_tiles, M, R, BLOCK_M, BLOCK_R)  # fmt: skip
        # The rest of K, from where the share ended and, if it came first, around.
        for step in tl.range(last, k_tiles + first - lead):
            ki = tl.where(step < k_tiles, step, step - k_tiles)
            x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = _load_w(w_ref, stride_w, ki * BLOCK_K, column0, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        _finish_tile(False, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr, total_ptr,
                     seed_ptr, scale, threshold, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk, stride_dr,
                     stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_CHUNKS, MASK_X, MASK_OUT,
                     HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip

    # All others.
    tile = pid + tl.cdiv(tl.maximum(shared_tiles - pid, 0), programs) * programs
    mine = tl.cdiv(tl.maximum(row_tiles * column_tiles - tile, 0), programs)
    all_stored = shared_tiles < 0  # False, but for the compiler a value like those that follow
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
                pid_m, pid_n = _plain_tile(tile - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            x = load_tile(x_ref, stride_xm, pid_m * BLOCK_M, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            w = _load_w(w_ref, stride_w, ki * BLOCK_K, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if ki == k_tiles - 1:
                all_stored = _finish_tile(
                    all_stored, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr, total_ptr,
                    seed_ptr, scale, threshold, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk,
                    stride_dr, stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_CHUNKS, MASK_X,
                    MASK_OUT, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        for index in tl.range(0, mine, num_stages=1):
            pid_m, pid_n = _plain_tile(tile + index * programs - shared_tiles, row_tiles, column_tiles, shares, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for ki in tl.range(0, k_tiles):
                x = load_tile(x_ref, stride_xm, pid_m * BLOCK_M, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
                w = _load_w(w_ref, stride_w, ki * BLOCK_K, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, W_IS_NK, USE_TMA)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
            all_stored = _finish_tile(
                         all_stored, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr,
                         total_ptr, seed_ptr, scale, threshold, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk,
                         stride_dr, stride_ur, stride_un, stride_sm, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_CHUNKS,
                         MASK_X, MASK_OUT, HAS_BIAS, SPLIT, PRECISION, USE_TMA, DTYPE)  # fmt: skip

    tl.debug_barrier()
    if tl.atomic_add(sync_ptr, 1, sem="acq_rel") == programs - 1:
        used = 2 + row_tiles * (1 + RANK_CHUNKS)
        for start in tl.range(0, used, 1024):
            offs = start + tl.arange(0, 1024)
            tl.store(sync_ptr + offs, 0, mask=offs < used)
