"""What tiles do beside their product: they share S out, hand it over, and add S U before they are written.

Device functions of the one-pass kernel, whose docstring has the argument; the kernels of groups and of NF4 use them too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.mask import masked_operand
from lora_kernels.backends.triton.masked_up import add_masked_up, between_masked
from lora_kernels.backends.triton.pieces import (
    halves,
    in_parts,
    load_s,
    load_tile,
    load_up,
    s_addresses,
    split_dot,
    store_tile,
    sum_of_parts,
)
from lora_kernels.backends.triton.tiles import MAX_PARTS as _MAX_PARTS

# The most parts that a chunk of S is summed from.
MAX_PARTS = tl.constexpr(_MAX_PARTS)


@triton.jit
def add_down(x, down_ptr, stride_dk, stride_dr, k0, r0, K, R, s, row0, M, mask_ptr,
             BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
             MASK_X: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """s + mask(x) D for one step of K."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    mask = (offs_k < K)[:, None] & (offs_r < R)[None, :]
    down = tl.load(down_ptr + offs_k[:, None].to(tl.int64) * stride_dk + offs_r[None, :] * stride_dr, mask, other=0.0)
    if MASK_X:
        x = masked_operand(x, mask_ptr, row0, k0, M, K, BLOCK_M, BLOCK_K)
    if SPLIT:
        # Added here, not in the tensor cores, whose long sums are truncated at each step.
        return s + sum_of_parts(tl.dot(x, in_parts(down, (offs_k < K)[:, None])), BLOCK_M, BLOCK_R)
    else:
        return tl.dot(x, down.to(x.dtype), s, input_precision=PRECISION)


@triton.jit
def part_bounds(part, k_parts, k_tiles):
    """The steps of K that a part of S covers."""
    steps = tl.cdiv(k_tiles, k_parts)
    first = tl.minimum(part * steps, k_tiles)
    return first, tl.minimum(first + steps, k_tiles)


@triton.jit
def compute_share(x_ref, stride_xm, down_ptr, stride_dk, stride_dr, row0, r0, first, last, M, K, R, mask_ptr,
                  BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, MASK_X: tl.constexpr,
                  SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One share of S on its own, for whoever cannot have it from a main loop."""
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for ki in tl.range(first, last, num_stages=STAGES):
        x = load_tile(x_ref, stride_xm, row0, ki * BLOCK_K, M, K, BLOCK_M, BLOCK_K, USE_TMA)
        s = add_down(x, down_ptr, stride_dk, stride_dr, ki * BLOCK_K, r0, K, R, s, row0, M, mask_ptr,
                     BLOCK_M, BLOCK_K, BLOCK_R, MASK_X, SPLIT, PRECISION)  # fmt: skip
    return s


@triton.jit
def share_offsets(pid_m, item, row_tiles, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where the workspace keeps a share: shares are whole tiles, so that no access needs a mask."""
    tile = (item * row_tiles + pid_m).to(tl.int64) * (BLOCK_M * BLOCK_R)
    return tile + tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]


@triton.jit
def publish(share, workspace_ptr, arrived_ptr, ready_ptr, total_ptr, s_ptr, stride_sm, scale, pid_m, chunk, part, rank_chunks,
            k_parts, row_tiles, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Hands a share over; with the last part of a chunk, S of that chunk is complete and stored."""
    offsets = share_offsets(pid_m, part * rank_chunks + chunk, row_tiles, BLOCK_M, BLOCK_R)
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
            address, mask = s_addresses(s_ptr, stride_sm, pid_m * BLOCK_M, chunk * BLOCK_R + r0, M, R, BLOCK_M, PIECE)
            tl.store(address, (s * scale).to(s_ptr.dtype.element_ty), mask)
        tl.debug_barrier()
        tl.atomic_add(ready_ptr + pid_m, 1, sem="release")
        tl.atomic_add(total_ptr, 1, sem="release")


@triton.jit
def all_ready(ready_ptr, expected, spin_limit):
    """Looks at the flag until S is complete, at most `spin_limit` times more."""
    ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
    looks = 0
    while (ready < expected) & (looks < spin_limit):
        ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
        looks += 1
    return ready >= expected


@triton.jit
def plain_tile(index, row_tiles, column_tiles, first_column, GROUP_M: tl.constexpr):
    """The index-th tile right of `first_column`, in groups of GROUP_M row blocks that share columns of W in L2."""
    columns = column_tiles - first_column
    group = index // (GROUP_M * columns)
    first_row = group * GROUP_M
    group_rows = tl.minimum(row_tiles - first_row, GROUP_M)
    within = index % (GROUP_M * columns)
    return first_row + within % group_rows, first_column + within // group_rows


@triton.jit
def load_w(w_ref, stride_w, k0, n0, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
           W_IS_NK: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_K, BLOCK_N] of W, which is stored as [N, K] or as [K, N]."""
    if W_IS_NK:
        return tl.trans(load_tile(w_ref, stride_w, n0, k0, N, K, BLOCK_N, BLOCK_K, USE_TMA))
    else:
        return load_tile(w_ref, stride_w, k0, n0, K, N, BLOCK_K, BLOCK_N, USE_TMA)


@triton.jit
def add_up(acc, s, up_ptr, stride_ur, stride_un, r0, n0, R, N, dtype: tl.constexpr, BLOCK_R: tl.constexpr,
           BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + s U for one chunk of the rank."""
    up = load_up(up_ptr, stride_ur, stride_un, r0, n0, R, N, BLOCK_R, BLOCK_N)
    if SPLIT:
        return split_dot(s, up, (n0 + tl.arange(0, BLOCK_N) < N)[None, :], acc)
    else:
        return tl.dot(s.to(dtype), up.to(dtype), acc, input_precision=PRECISION)


@triton.jit
def compute_s(pid_m, x_ref, down_ptr, s_ptr, mask_ptr, scale, M, K, R, k_tiles, k_parts,
              stride_xm, stride_dk, stride_dr, stride_sm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
              OWN_R: tl.constexpr, MASK_X: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
              USE_TMA: tl.constexpr):  # fmt: skip
    """The row block's S, computed and stored here, for a tile that cannot have it from others: OWN_R columns at a time.

    Few give the bits of many, read X more often, and leave the main loop around this the registers (tiles.own_columns).
    """
    for r0 in tl.range(0, R, OWN_R, num_stages=1):
        s = tl.zeros((BLOCK_M, OWN_R), tl.float32)
        for part in tl.range(0, k_parts, num_stages=1):
            first, last = part_bounds(part, k_parts, k_tiles)
            s += compute_share(x_ref, stride_xm, down_ptr, stride_dk, stride_dr, pid_m * BLOCK_M, r0, first, last, M, K, R,
                               mask_ptr, BLOCK_M, BLOCK_K, OWN_R, MASK_X, SPLIT, PRECISION, USE_TMA, 1)  # fmt: skip
        address, mask = s_addresses(s_ptr, stride_sm, pid_m * BLOCK_M, r0, M, R, BLOCK_M, OWN_R)
        tl.store(address, (s * scale).to(s_ptr.dtype.element_ty), mask)


@triton.jit
def finish_tile(all_stored, acc, pid_m, pid_n, x_ref, out_ref, down_ptr, up_ptr, bias_ptr, s_ptr, ready_ptr,
                total_ptr, mask_ptr, scale, spin_limit, M, N, K, R, k_tiles, k_parts, stride_xm, stride_om, stride_dk, stride_dr,
                stride_ur, stride_un, stride_sm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_R: tl.constexpr, OWN_R: tl.constexpr, RANK_CHUNKS: tl.constexpr, MASK_X: tl.constexpr, MASK_OUT: tl.constexpr,
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
        stored = all_ready(ready_ptr + pid_m, RANK_CHUNKS, spin_limit)
        if not stored:
            compute_s(pid_m, x_ref, down_ptr, s_ptr, mask_ptr, scale, M, K, R, k_tiles, k_parts, stride_xm,
                      stride_dk, stride_dr, stride_sm, BLOCK_M, BLOCK_K, OWN_R, MASK_X, SPLIT, PRECISION,
                      USE_TMA)  # fmt: skip
            # The threads must meet between the stores and the loads of S. The result of an atomic reaches all of them
            # through such a meeting, and always is what is asked here; a bare barrier would keep the compiler from
            # pipelining the loop around it.
            stored = tl.atomic_add(ready_ptr + pid_m, 0, sem="acq_rel") >= 0
        all_stored = tl.atomic_add(total_ptr, 0, sem="acquire") == tl.cdiv(M, BLOCK_M) * RANK_CHUNKS
    if MASK_OUT:
        if USE_TMA:
            acc = between_masked(acc, BLOCK_M, BLOCK_N, DTYPE)
        acc = add_masked_up(acc, stored, row0, left0, up_ptr, s_ptr, mask_ptr, M, N, R, stride_ur, stride_un, stride_sm,
                            BLOCK_M, BLOCK_N, BLOCK_R, RANK_CHUNKS, SPLIT, PRECISION, DTYPE, USE_TMA)  # fmt: skip
    else:
        for chunk in tl.range(0, RANK_CHUNKS, num_stages=1):
            r0 = chunk * BLOCK_R
            s = load_s(stored, s_ptr, stride_sm, row0, r0, M, R, BLOCK_M, BLOCK_R)
            acc = add_up(acc, s, up_ptr, stride_ur, stride_un, r0, left0, R, N, DTYPE, BLOCK_R, BLOCK_N, SPLIT,
                         PRECISION)  # fmt: skip
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    store_tile(out_ref, stride_om, row0, left0, M, N, left.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    store_tile(out_ref, stride_om, row0, right0, M, N, right.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    return all_stored
