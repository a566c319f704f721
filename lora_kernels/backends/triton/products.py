"""Outputs that are sums of products, in one launch.

    out_i = sum over p of L_ip R_ip + b_i      [M, N_i]
    out_i = scale_i * L_i R_i                  where there is one product for each

Layers of a large rank are computed by two of these (wide_ranks.py says which layers): S = scale * x A^T first, and then
y = x W^T + S B^T + b, the members of a group beside each other; backward T = scale * dy B, and then dx, the sum of all dy_i W_i
and T_i A_i of a group. S U is several steps of the main loop's length for them. Behind that loop, as the one-pass kernel adds it,
each step would wait for memory. Here the loop goes through K and then through the rank, and loads ahead from one into the other.

TMA puts zeros where a matrix ends within a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.group_pieces import member_number, member_of, member_ref
from lora_kernels.backends.triton.pieces import halves, load_tile, store_tile
from lora_kernels.backends.triton.sharing import load_w, plain_tile


@triton.jit
def _number_of(pair, n0, n1, n2, n3, n4, n5, COUNT: tl.constexpr):
    """The pair's own of what each of COUNT pairs has one."""
    chosen = member_number(pair, n0, n1, n2, COUNT)
    if COUNT > 3:
        chosen = tl.where(pair == 3, n3, chosen)
    if COUNT > 4:
        chosen = tl.where(pair == 4, n4, chosen)
    if COUNT > 5:
        chosen = tl.where(pair == 5, n5, chosen)
    return chosen


@triton.jit
def _ref_of(pair, ref0, ref1, ref2, ref3, ref4, ref5, COUNT: tl.constexpr):
    """The pair's own descriptor (or pointer), as member_ref chooses it."""
    if COUNT == 1:
        chosen = ref0
    else:
        chosen = member_ref(pair, ref0, ref1, ref2, COUNT)
    if COUNT > 3:
        if pair == 3:
            chosen = ref3
    if COUNT > 4:
        if pair == 4:
            chosen = ref4
    if COUNT > 5:
        if pair == 5:
            chosen = ref5
    return chosen


@triton.jit
def _pair_of(step, steps0, steps1, steps2, steps3, steps4, PAIRS: tl.constexpr):
    """(pair, its first step) of an output's steps, which go through one pair after the other."""
    pair, first = member_of(step, steps0, steps1, PAIRS)
    end = steps0 + steps1 + steps2
    if PAIRS > 3:
        pair, first = tl.where(step >= end, 3, pair), tl.where(step >= end, end, first)
    end += steps3
    if PAIRS > 4:
        pair, first = tl.where(step >= end, 4, pair), tl.where(step >= end, end, first)
    end += steps4
    if PAIRS > 5:
        pair, first = tl.where(step >= end, 5, pair), tl.where(step >= end, end, first)
    return pair, first


@triton.jit
def _multiply_step(
    acc, member, step, row0, column0, left0, right0, left1, right1, left2, right2, left3, right3, left4, right4, left5, right5,
    M, N, L0, L1, L2, L3, L4, L5, steps0, steps1, steps2, steps3, steps4, stride_l0, stride_l1, stride_l2, stride_l3, stride_l4,
    stride_l5, stride_r0, stride_r1, stride_r2, stride_r3, stride_r4, stride_r5, MEMBERS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RIGHT_IS_NK: tl.constexpr, PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    """acc + L R for one step of a member's tile."""
    COUNT: tl.constexpr = MEMBERS * PAIRS
    of_member, first = _pair_of(step, steps0, steps1, steps2, steps3, steps4, PAIRS)
    pair = member * PAIRS + of_member
    k0 = (step - first) * BLOCK_K
    length = _number_of(pair, L0, L1, L2, L3, L4, L5, COUNT)
    left = load_tile(_ref_of(pair, left0, left1, left2, left3, left4, left5, COUNT),
                     _number_of(pair, stride_l0, stride_l1, stride_l2, stride_l3, stride_l4, stride_l5, COUNT), row0, k0, M,
                     length, BLOCK_M, BLOCK_K, USE_TMA)  # fmt: skip
    right = load_w(_ref_of(pair, right0, right1, right2, right3, right4, right5, COUNT),
                   _number_of(pair, stride_r0, stride_r1, stride_r2, stride_r3, stride_r4, stride_r5, COUNT), k0, column0,
                   length, N, BLOCK_K, BLOCK_N, RIGHT_IS_NK, USE_TMA)  # fmt: skip
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _finish_tile(
    acc, member, row0, column0, out0, out1, out2, bias0, bias1, bias2, scale0, scale1, scale2, M, N, MEMBERS: tl.constexpr,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes a member's tile, scaled or with its bias."""
    HALF: tl.constexpr = BLOCK_N // 2
    if SCALED:
        acc *= member_number(member, scale0, scale1, scale2, MEMBERS)
    if HAS_BIAS:
        offs_n = column0 + tl.arange(0, BLOCK_N)
        bias_ptr = member_number(member, bias0, bias1, bias2, MEMBERS)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if MEMBERS == 1:
        out_ref = out0
    else:
        out_ref = member_ref(member, out0, out1, out2, MEMBERS)
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    store_tile(out_ref, N, row0, column0, M, N, left.to(DTYPE), BLOCK_M, HALF, USE_TMA)
    store_tile(out_ref, N, row0, column0 + HALF, M, N, right.to(DTYPE), BLOCK_M, HALF, USE_TMA)


@triton.jit
def _scale_of(scale_ptr, scale):
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32) * scale
    return scale


@triton.jit(do_not_specialize=["M", "steps0", "steps1", "steps2", "steps3", "steps4", "steps5"])
def products_kernel(
    out0, out1, out2, left0, right0, left1, right1, left2, right2, left3, right3, left4, right4, left5, right5,
    bias0, bias1, bias2, scale0_ptr, scale1_ptr, scale2_ptr, scale0, scale1, scale2,
    M, N0, N1, N2, L0, L1, L2, L3, L4, L5, steps0, steps1, steps2, steps3, steps4, steps5,
    stride_l0, stride_l1, stride_l2, stride_l3, stride_l4, stride_l5,
    stride_r0, stride_r1, stride_r2, stride_r3, stride_r4, stride_r5,
    MEMBERS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, RIGHT_IS_NK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
    DTYPE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """This program's tiles of every out_i [M, N_i]. PAIRS products for each, those of a member one after the other.

    A left is [M, L], a right [N, L] if RIGHT_IS_NK and else [L, N], each with contiguous rows; they and the outputs are TMA
    descriptors if USE_TMA, else pointers. What there is no member or pair for is None or 0. steps: of the members' pairs in
    this place the longest has these many; a single pair takes as many as it needs.
    """
    SCALED: tl.constexpr = PAIRS == 1
    if SCALED:
        scale0 = _scale_of(scale0_ptr, scale0)
        if MEMBERS > 1:
            scale1 = _scale_of(scale1_ptr, scale1)
        if MEMBERS > 2:
            scale2 = _scale_of(scale2_ptr, scale2)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    tiles0, tiles1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    column_tiles = tiles0 + tiles1 + tl.cdiv(N2, BLOCK_N)
    mine = tl.cdiv(tl.maximum(row_tiles * column_tiles - pid, 0), programs)
    if FLATTEN:
        # One loop over every step of every tile: the loads of a tile are under way while the one before it is finished.
        steps = steps0 + steps1 + steps2 + steps3 + steps4 + steps5
        member, row0, column0 = 0, 0, 0
        N = N0
        step = -1
        tile = pid - programs
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in tl.range(0, mine * steps):
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                tile += programs
                pid_m, pid_n = plain_tile(tile, row_tiles, column_tiles, 0, GROUP_M)
                member, first = member_of(pid_n, tiles0, tiles1, MEMBERS)
                N = member_number(member, N0, N1, N2, MEMBERS)
                row0, column0 = pid_m * BLOCK_M, (pid_n - first) * BLOCK_N
            acc = _multiply_step(acc, member, step, row0, column0, left0, right0, left1, right1, left2, right2, left3, right3,
                                 left4, right4, left5, right5, M, N, L0, L1, L2, L3, L4, L5, steps0, steps1, steps2, steps3, steps4,
                                 stride_l0, stride_l1, stride_l2, stride_l3, stride_l4, stride_l5, stride_r0, stride_r1,
                                 stride_r2, stride_r3, stride_r4, stride_r5, MEMBERS, PAIRS, BLOCK_M, BLOCK_N, BLOCK_K,
                                 RIGHT_IS_NK, PRECISION, USE_TMA)  # fmt: skip
            if step == steps - 1:
                _finish_tile(acc, member, row0, column0, out0, out1, out2, bias0, bias1, bias2, scale0, scale1, scale2, M, N,
                             MEMBERS, SCALED, HAS_BIAS, BLOCK_M, BLOCK_N, USE_TMA, DTYPE)  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        for index in tl.range(0, mine, num_stages=1):
            pid_m, pid_n = plain_tile(pid + index * programs, row_tiles, column_tiles, 0, GROUP_M)
            member, first = member_of(pid_n, tiles0, tiles1, MEMBERS)
            N = member_number(member, N0, N1, N2, MEMBERS)
            row0, column0 = pid_m * BLOCK_M, (pid_n - first) * BLOCK_N
            steps = steps0 + steps1 + steps2 + steps3 + steps4 + steps5
            if PAIRS == 1:
                steps = tl.cdiv(member_number(member, L0, L1, L2, MEMBERS), BLOCK_K)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in tl.range(0, steps):
                acc = _multiply_step(acc, member, step, row0, column0, left0, right0, left1, right1, left2, right2, left3,
                                     right3, left4, right4, left5, right5, M, N, L0, L1, L2, L3, L4, L5, steps0, steps1, steps2,
                                     steps3, steps4, stride_l0, stride_l1, stride_l2, stride_l3, stride_l4, stride_l5,
                                     stride_r0, stride_r1, stride_r2, stride_r3, stride_r4, stride_r5, MEMBERS, PAIRS, BLOCK_M,
                                     BLOCK_N, BLOCK_K, RIGHT_IS_NK, PRECISION, USE_TMA)  # fmt: skip
            _finish_tile(acc, member, row0, column0, out0, out1, out2, bias0, bias1, bias2, scale0, scale1, scale2, M, N,
                         MEMBERS, SCALED, HAS_BIAS, BLOCK_M, BLOCK_N, USE_TMA, DTYPE)  # fmt: skip
