"""From the tensors of a group to launches of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lora_kernels.backends import Member, Precision, Problem, eager
from lora_kernels.backends.sync import zeros_for
from lora_kernels.backends.triton import ahead, wide_ranks
from lora_kernels.backends.triton.group_forward import group_forward_kernel
from lora_kernels.backends.triton.group_grads import group_grads_kernel
from lora_kernels.backends.triton.group_input import group_input_kernel
from lora_kernels.backends.triton.group_operands import (
    GroupPlan,
    Weights,
    adapters_of,
    biases_of,
    masks_of,
    narrow_of,
    plan_forward,
    plan_input,
    scales_of,
    up_block,
)
from lora_kernels.backends.triton.launch import looks
from lora_kernels.backends.triton.launches import (
    MOST_MEMBERS,
    TYPES,
    Launch,
    alignment,
    divisor,
    dot_precision,
    filled,
    fits_tma,
    remember,
)
from lora_kernels.backends.triton.tiles import (
    GradTiles,
    OnePassTiles,
    chip_of,
    group_grad_tiles,
    group_input_tiles,
    group_tiles,
    own_columns,
    rank_block,
    row_parts,
    share_stages,
)
from lora_kernels.dropout import Dropout

_launches: dict[tuple[object, ...], Launch] = {}


def forward(
    x: Tensor,
    members: Sequence[Member],
    precision: Precision,
    want_s: bool,
    *,
    tiles: OnePassTiles | None = None,
    spin_limit: int | None = None,
    programs: int | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Every y_i = x W_i^T + S_i B_i^T + b_i and S_i = scale_i * mask_i(x) A_i^T: in one launch, but for large ranks.

    Args:
        x: [M, K] with contiguous rows.
        members: two or three, dense, of one dtype; all with a dropout of one probability, or all without.
        tiles, spin_limit, programs: forced by tests.
    Returns:
        y_i [M, N_i] in x's dtype; S_i [M, r_i], in float32 if precision is "split".
    """
    M, K = x.shape
    lora_As, lora_Bs = adapters_of(members)
    ys = [torch.empty(M, lora_B.shape[0], dtype=x.dtype, device=x.device) for lora_B in lora_Bs]
    ss = narrow_of(x, lora_As, precision)
    if M == 0:
        return ys, list(ss)
    weights, biases = Weights.of(members), biases_of(members)
    if tiles is None:
        turned = [w.T if weights.by_rows else w for w in weights.stored]
        operands = zip(turned, lora_As, lora_Bs, biases, members, strict=True)
        layers = [wide_ranks.Layer(x, w, a.T, b.T, bias, m.scale) for w, a, b, bias, m in operands]
        if wide_ranks.are_wide(layers, members[0].dropout is not None, precision):
            ys, wide_ss = wide_ranks.each(layers)
            return ys, [*wide_ss] if want_s else [None] * len(ys)
    masks = masks_of([member.dropout for member in members], M, K)
    masked = masks[0] is not None
    scale_tensors, scales = scales_of(members)
    kind = (
        "group_forward", x.device, x.dtype, precision, K, x.stride(0), weights.by_rows,
        *[(w.shape, w.stride(0)) for w in weights.stored], *[a.shape[0] for a in lora_As], lora_As[0].dtype,
        None if biases[0] is None else biases[0].dtype, masked, tuple(t is None for t in scale_tensors),
        alignment(x, *weights.stored, *lora_As, *lora_Bs, *biases), dot_precision(x.dtype),
    )  # fmt: skip
    key = (M, tiles, spin_limit, programs, *kind)
    launch = _launches.get(key)
    if launch is None:
        Ns, ranks = [y.shape[1] for y in ys], [s.shape[1] for s in ss]
        use_tma = all(map(fits_tma, (x, *weights.stored))) and all(N * x.dtype.itemsize % 16 == 0 for N in Ns)
        chip = chip_of(x.device)
        chosen = tiles or group_tiles(chip, x.dtype.itemsize, use_tma, M, Ns)
        # As of a layer: masks on x, and products of halves, take the few programs too long.
        alone = precision != "split" and not masked
        plan = plan_forward(M, K, Ns, max(ranks), precision, chosen, programs or chip.multiprocessors, alone)
        numbers = (
            looks(spin_limit, triton.cdiv(K, chosen.block_k)) if plan.shared else 0, M, K, *filled(Ns, 0), *filled(ranks, 0),
            plan.k_parts[0], plan.shares, plan.sharers, int(plan.left_stays), x.stride(0),
            *filled([w.stride(0) for w in weights.stored], 0),
        )  # fmt: skip
        options = _options(plan, ranks, x.dtype, precision) | {
            "ALIGNED": alignment(*lora_As) == 0,
            "JOINT": plan.joint_block,
            "SHARE_STAGES": share_stages(chosen, plan.joint_block),
            "W_IS_NK": weights.by_rows,
            "MASK_X": masked,
            "HAS_BIAS": biases[0] is not None,
        }
        m, n, k = chosen.block_m, chosen.block_n, chosen.block_k
        pair = ((n, k) if weights.by_rows else (k, n), (m, n // 2))
        blocks = ((m, k), *pair * len(members)) if chosen.use_tma else None
        launch = Launch(
            group_forward_kernel, (*kind, chosen, plan.shared, plan.sharers > 0), (plan.programs, 1, 1), options, blocks, plan.workspace_size,
            plan.counters, numbers,
        )  # fmt: skip
        remember(_launches, key, launch)
    pairs = [t for pair in zip(weights.stored, ys, strict=True) for t in pair]
    launch(x.device, (x, *filled(pairs, None, 6), *filled(lora_As), *filled(lora_Bs), *filled(biases), *filled(ss),
                      *filled(masks), *filled(scale_tensors), *_memory(launch, x.device), *filled(scales)))  # fmt: skip
    return ys, list(ss) if want_s else [None] * len(ss)


def backward_input(
    dys: list[Tensor],
    members: Sequence[Member],
    precision: Precision,
    want_dx: bool,
    *,
    tiles: OnePassTiles | None = None,
    spin_limit: int | None = None,
    programs: int | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = sum of dy_i W_i + mask_i(T_i A_i) and every T_i = scale_i * dy_i B_i: in one launch, but for large ranks.

    Args:
        dys: [M, N_i] each, with contiguous rows.
        members, tiles, spin_limit, programs: as in forward.
    """
    if not want_dx:
        # No big product to share a pass with: what is left is a library's business.
        return eager.group_backward_input(dys, members, precision, want_dx=False)
    weights, (lora_As, lora_Bs) = Weights.of(members), adapters_of(members)
    first, M, K = dys[0], dys[0].shape[0], lora_As[0].shape[1]
    dx = torch.empty(M, K, dtype=first.dtype, device=first.device)
    ts = narrow_of(first, lora_As, precision)
    if M == 0:
        return dx, ts
    if tiles is None:
        turned = [w if weights.by_rows else w.T for w in weights.stored]
        operands = zip(dys, turned, lora_As, lora_Bs, members, strict=True)
        layers = [wide_ranks.Layer(dy, w, b, a, None, m.scale) for dy, w, a, b, m in operands]
        if wide_ranks.are_wide(layers, members[0].dropout is not None, precision):
            return wide_ranks.summed(layers)
    masks = masks_of([member.dropout for member in members], M, K)
    masked = masks[0] is not None
    scale_tensors, scales = scales_of(members)
    kind = (
        "group_input", first.device, first.dtype, precision, K, weights.by_rows, *[dy.stride(0) for dy in dys],
        *[(w.shape, w.stride(0)) for w in weights.stored], *[a.shape[0] for a in lora_As], lora_As[0].dtype, masked,
        tuple(t is None for t in scale_tensors), alignment(*dys, *weights.stored, *lora_As, *lora_Bs),
        dot_precision(first.dtype),
    )  # fmt: skip
    key = (M, tiles, spin_limit, programs, *kind)
    launch = _launches.get(key)
    if launch is None:
        Ns, ranks, itemsize = [dy.shape[1] for dy in dys], [t.shape[1] for t in ts], first.dtype.itemsize
        use_tma = all(map(fits_tma, (*dys, *weights.stored))) and K * itemsize % 16 == 0
        chip = chip_of(first.device)
        chosen = tiles or group_input_tiles(chip, itemsize, use_tma, M, K)
        alone = precision != "split"
        plan = plan_input(M, K, Ns, max(ranks), precision, chosen, programs or chip.multiprocessors, alone)
        numbers = (
            looks(spin_limit, sum(triton.cdiv(N, chosen.block_k) for N in Ns)) if plan.shared else 0, M, K, *filled(Ns, 0),
            *filled(ranks, 0), *filled(plan.k_parts, 0), plan.shares, plan.sharers, int(plan.left_stays),
            *filled([dy.stride(0) for dy in dys], 0), *filled([w.stride(0) for w in weights.stored], 0),
        )  # fmt: skip
        options = _options(plan, ranks, first.dtype, precision) | {
            "W_IS_NK": not weights.by_rows,
            "MASKED": masked,
            "ALIGNED": divisor(*ranks) == 8 and alignment(*lora_As) == 0,
            "SHARE_STAGES": share_stages(chosen, plan.rank_block),
            "BLOCK_U": up_block(plan.rank_block * plan.rank_chunks * len(members), precision),
            # With masks, what the flat loop holds beside the epilogue's loop over members does not fit into the registers.
            "FLATTEN": chosen.use_tma and not masked,
        }
        m, n, k = chosen.block_m, chosen.block_n, chosen.block_k
        pair = ((m, k), (k, n) if weights.by_rows else (n, k))
        blocks = ((m, n // 2), *pair * len(members)) if chosen.use_tma else None
        launch = Launch(
            group_input_kernel, (*kind, chosen, plan.shared, plan.sharers > 0), (plan.programs, 1, 1), options, blocks, plan.workspace_size,
            plan.counters, numbers,
        )  # fmt: skip
        remember(_launches, key, launch)
    pairs = [t for pair in zip(dys, weights.stored, strict=True) for t in pair]
    launch(first.device, (dx, *filled(pairs, None, 6), *filled(lora_Bs), *filled(lora_As), *filled(ts), *filled(masks),
                          *filled(scale_tensors), *_memory(launch, first.device), *filled(scales)))  # fmt: skip
    return dx, ts


def backward_adapters(
    x: Tensor | None,
    dys: list[Tensor],
    ss: list[Tensor | None],
    ts: list[Tensor | None],
    dropouts: list[Dropout | None],
    dtype: torch.dtype,
    *,
    tiles: GradTiles | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Every dA_i = T_i^T mask_i(x) [r_i, K] and dB_i = dy_i^T S_i [N_i, r_i], in `dtype`: in one launch, but for large ranks.

    None for what has no T or no S.
    """
    device, M = dys[0].device, dys[0].shape[0]
    if tiles is None and wide_ranks.take_gradients(dys[0], [*ss, *ts], dropouts):
        if ahead.rehearsing():
            return [None] * len(dys), [None] * len(dys)
        return eager.group_backward_adapters(x, dys, ss, ts, dropouts, dtype)
    K = 0 if x is None else x.shape[1]
    dAs = [
        None if t is None or x is None else torch.empty(t.shape[1], K, dtype=dtype, device=device) for t in ts
    ]
    dBs = [
        None if s is None else torch.empty(dy.shape[1], s.shape[1], dtype=dtype, device=device)
        for dy, s in zip(dys, ss, strict=True)
    ]
    # The kernel knows of those that are wanted only.
    given_ts = [t for t, dA in zip(ts, dAs, strict=True) if t is not None and dA is not None]
    given_dAs = [dA for dA in dAs if dA is not None]
    given_ss, given_dBs = [s for s in ss if s is not None], [dB for dB in dBs if dB is not None]
    given_dys = [dy for dy, s in zip(dys, ss, strict=True) if s is not None]
    if M == 0:
        for gradient in (*given_dAs, *given_dBs):
            gradient.zero_()
    if M == 0 or not (given_ts or given_ss):
        return dAs, dBs
    read_x = x if given_ts else None
    masks = masks_of([dropout for dropout, dA in zip(dropouts, dAs, strict=True) if dA is not None], M, K)
    masked = bool(masks) and masks[0] is not None
    narrow = [*given_ts, *given_ss]
    kind = (
        "group_grads", device, dys[0].dtype, narrow[0].dtype, dtype, K, read_x is not None and read_x.stride(0),
        len(given_ts), *[t.shape[1] for t in narrow], *[(dy.shape[1], dy.stride(0)) for dy in given_dys], masked,
        alignment(read_x, *given_dys, *narrow), dot_precision(dys[0].dtype),
    )  # fmt: skip
    key = (M, tiles, *kind)
    launch = _launches.get(key)
    if launch is None:
        chip, rank = chip_of(device), max(t.shape[1] for t in narrow)
        split = narrow[0].dtype != dys[0].dtype
        block_r = rank_block(rank, "split" if split else "native")
        sums = max(1, len(given_ts)) * block_r * (4 if split else 1)
        chosen = tiles or group_grad_tiles(chip, dys[0].dtype.itemsize, sums, masked)
        chunks = triton.cdiv(rank, block_r)
        blocks_x = triton.cdiv(K, chosen.block_c) if given_ts else 0
        blocks = blocks_x + sum(triton.cdiv(dy.shape[1], chosen.block_c) for dy in given_dys)
        parts, rows_per_part = row_parts(chip, chosen, M, blocks * chunks)
        stored_tiles = blocks + max(0, len(given_ts) - 1) * blocks_x
        numbers = (
            M, K, *filled([dy.shape[1] for dy in given_dys], 0),
            *filled([t.shape[1] for t in given_ts], 0), *filled([s.shape[1] for s in given_ss], 0),
            0 if read_x is None else read_x.stride(0), *filled([dy.stride(0) for dy in given_dys], 0), rows_per_part, parts,
        )  # fmt: skip
        options = {
            "A_COUNT": len(given_ts),
            "B_COUNT": len(given_dys),
            "BLOCK_M": chosen.block_m,
            "BLOCK_C": chosen.block_c,
            "BLOCK_R": block_r,
            "RANK_ALIGN": divisor(*[t.shape[1] for t in narrow]),
            "MASKED": masked,
            "PRECISION": dot_precision(dys[0].dtype),
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        }
        launch = Launch(
            group_grads_kernel, (*kind, chosen), (blocks, parts, chunks), options, None,
            parts * stored_tiles * chunks * chosen.block_c * block_r, blocks * chunks, numbers,
        )  # fmt: skip
        remember(_launches, key, launch)
    launch(device, (read_x, *filled(given_dys), *filled(given_ts), *filled(given_ss), *filled(given_dAs), *filled(given_dBs),
                    *filled(masks), *_memory(launch, device)))  # fmt: skip
    return dAs, dBs


def refuses(problems: Sequence[Problem]) -> str | None:
    """Why a group goes member by member."""
    if not 2 <= len(problems) <= MOST_MEMBERS:
        return f"its kernels take 2 or 3 members, and this group has {len(problems)}"
    return None


def _options(plan: GroupPlan, ranks: Sequence[int], dtype: torch.dtype, precision: Precision) -> dict[str, Any]:
    tiles = plan.tiles
    return {
        "MEMBERS": len(ranks),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_R": plan.rank_block,
        "OWN_R": own_columns(plan.rank_block, plan.shared),
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": plan.rank_chunks,
        "RANK_ALIGN": divisor(*ranks),
        "ALONE": plan.sharers > 0,
        "SPLIT": precision == "split",
        "PRECISION": dot_precision(dtype),
        "USE_TMA": tiles.use_tma,
        "DTYPE": TYPES[dtype],
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _memory(launch: Launch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A workspace, and zeros to count in."""
    workspace = torch.empty(launch.workspace_size, dtype=torch.float32, device=device)
    return workspace, zeros_for(device, launch.counters)
