"""A whole backward in one launch: dx and T as one_pass.py has them, and behind them both adapter gradients.

    T  = scale * dy B        dx = dy W + mask(T A)        dA = T^T mask(x)        dB = dy^T S

dA and dB wait for memory, dx for the tensor cores, and the last wave of dx's tiles seldom fills the chip. So a program
that has no tile left takes parts of dA and dB, one after the other, while others still multiply: first those of dB,
for which all is there from the start, then those of dA, once T is complete.

Nobody waits for T for ever, which a program that does not even run yet may have to compute: whoever has looked for it
`spin_limit` times in vain is done. The last program of all does what is left. Which program does a part changes no
bit: parts are added up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.adapter_grads import reduce_task
from lora_kernels.backends.triton.one_pass import all_tiles, counters_of_tiles, put_back
from lora_kernels.backends.triton.pieces import aligned
from lora_kernels.backends.triton.sharing import all_ready

# What a program does when it has no tile left.
_OF_B = tl.constexpr(0)
_LOOK_AT_T = tl.constexpr(1)
_OF_A = tl.constexpr(2)
_LEAVE = tl.constexpr(3)


@triton.jit(
    do_not_specialize=[
        "M", "spin_limit", "n_parts", "shares", "sharers", "dy_stays", "rows_per_part", "parts",
    ]
)  # fmt: skip
def backward_kernel(
    dy_ref, w_ref, dx_ref, lora_b_ptr, lora_a_ptr, t_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
    x_ptr, dy_ptr, s_ptr, dA_ptr, dB_ptr,
    scale, spin_limit, M, N, K, R, n_parts, shares, sharers, dy_stays, rows_per_part, parts,
    stride_dym, stride_w, stride_xm, stride_bn, stride_br, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OWN_R: tl.constexpr,
    GROUP_M: tl.constexpr, RANK_CHUNKS: tl.constexpr, RANK_ALIGN: tl.constexpr, DOWN_ALIGN: tl.constexpr,
    UP_ALIGN: tl.constexpr, ALONE: tl.constexpr, SHARE_STAGES: tl.constexpr, W_IS_NK: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr, FLATTEN: tl.constexpr,
    WANT_A: tl.constexpr, WANT_B: tl.constexpr, GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_STAGES: tl.constexpr,
):  # fmt: skip
    """x [M, K], dy [M, N], the weight as [N, K] or, if W_IS_NK, as [K, N]; T and S [M, R] contiguous.

    The blocks are those of dx's product, whose columns are K and whose sum is over N; GRAD_M and GRAD_C are of dA and dB.
    sync_ptr holds zeros: those of all_tiles, the parts of dB and of dA that were taken, and those of reduce_task.
    """
    all_tiles(dy_ref, w_ref, dx_ref, lora_b_ptr, lora_a_ptr, None, t_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr, scale,
              spin_limit, M, K, N, R, n_parts, shares, sharers, dy_stays, stride_dym, stride_w, K, stride_bn,
              stride_br, stride_ar, stride_ak, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, OWN_R, GROUP_M, RANK_CHUNKS, RANK_ALIGN,
              DOWN_ALIGN, UP_ALIGN, ALONE, SHARE_STAGES, W_IS_NK, False, MASKED, False, SPLIT, PRECISION, USE_TMA, DTYPE,
              FLATTEN)  # fmt: skip

    row_tiles = tl.cdiv(M, BLOCK_M)
    sums_ptr = workspace_ptr + row_tiles.to(tl.int64) * (n_parts * RANK_CHUNKS) * (BLOCK_M * BLOCK_R)
    taken_ptr = sync_ptr + counters_of_tiles(M, BLOCK_M, RANK_CHUNKS)
    chunks_of_t = row_tiles * RANK_CHUNKS
    blocks_a = tl.cdiv(K, GRAD_C) if WANT_A else 0
    blocks = blocks_a + (tl.cdiv(N, GRAD_C) if WANT_B else 0)
    tasks_b = (blocks - blocks_a) * RANK_CHUNKS * parts
    tasks = blocks * RANK_CHUNKS * parts
    state = _OF_B
    counted = False
    last = False
    while state != _LEAVE:
        task = tasks
        if state == _OF_B:
            task = tl.atomic_add(taken_ptr, 1, sem="relaxed")
            if task >= tasks_b:
                task = tasks
                state = _LOOK_AT_T
        if state == _LOOK_AT_T:
            state = tl.where(all_ready(sync_ptr + 1, chunks_of_t, spin_limit), _OF_A, _LEAVE)
        if state == _OF_A:
            task = tasks_b + tl.atomic_add(taken_ptr + 1, 1, sem="relaxed")
            if task >= tasks:
                state = _LEAVE
        if task < tasks:
            # Neighbours in memory are read at about the same time, and first the rows that dx has read last.
            is_b = task < tasks_b
            within = tl.where(is_b, task, task - tasks_b)
            chunk = within % RANK_CHUNKS
            within = within // RANK_CHUNKS
            own = tl.where(is_b, blocks - blocks_a, blocks_a)
            block = within % own + tl.where(is_b, blocks_a, 0)
            reduce_task(block, parts - 1 - within // own, chunk, blocks, x_ptr, dy_ptr, t_ptr, s_ptr, dA_ptr, dB_ptr,
                        sums_ptr, taken_ptr + 2, mask_ptr, M, K, N, aligned(R, RANK_ALIGN), stride_xm, stride_dym,
                        rows_per_part, parts, GRAD_M, GRAD_C, BLOCK_R, WANT_A, WANT_B, MASKED, PRECISION, GRAD_STAGES)  # fmt: skip
        if state == _LEAVE:
            if not counted:
                counted = True
                # Every thread has done what it had to before one thread says so.
                tl.debug_barrier()
                last = tl.atomic_add(sync_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
                if last:
                    state = _OF_A
    if last:
        put_back(sync_ptr, counters_of_tiles(M, BLOCK_M, RANK_CHUNKS) + 2)
