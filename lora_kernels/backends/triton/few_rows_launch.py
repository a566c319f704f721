"""The launch of a product for few rows (few_rows.py), in the place of the one-pass kernel's."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.backends import Precision, Scale
from lora_kernels.backends.triton.few_rows import few_rows_kernel
from lora_kernels.backends.triton.launches import Launch, alignment, divisor
from lora_kernels.backends.triton.parts_plan import plan_by_parts
from lora_kernels.backends.triton.tiles import FewRowsTiles, few_rows_parts


def plan_few_rows(
    left: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    masked: bool,
    mask_left: bool,
    precision: Precision,
    tiles: FewRowsTiles,
    programs: int,
) -> Launch:
    """The launch of launch.one_pass for arguments like these, which takes the same tensors in the same order.

    Args:
        programs: as many as may run at once.
    """
    (M, K), N, R = left.shape, weight.shape[1], down.shape[1]
    w_is_nk = weight.stride(0) == 1
    stride_w = weight.stride(1 if w_is_nk else 0)
    parts, s_parts = few_rows_parts(programs, tiles, M, N, K)
    plan = plan_by_parts(M, N, tiles.block_m, tiles.block_n, parts, s_parts, R, precision)
    numbers = (M, N, K, R, plan.s_parts, plan.parts, left.stride(0), stride_w, *down.stride(), *up.stride())
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_R": plan.rank_block,
        "RANK_CHUNKS": plan.rank_chunks,
        "W_IS_NK": w_is_nk,
        "EVEN_K": K % tiles.block_k == 0,
        "K_ALIGN": divisor(K),
        "N_ALIGN": divisor(N),
        "X_ALIGN": divisor(left.stride(0)),
        "W_ALIGN": divisor(stride_w),
        "RANK_ALIGN": divisor(R),
        "DOWN_ALIGN": divisor(down.stride(0)),
        "UP_ALIGN": divisor(up.stride(1)),
        "MASK_X": masked and mask_left,
        "MASK_OUT": masked and not mask_left,
        "SPLIT": precision == "split",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    # Named as the one-pass kernel's, for whose it can stand wherever launches are handed on (native.py).
    kind = (
        "one_pass", left.device, left.dtype, precision, K, N, R, tiles, w_is_nk, left.stride(0), stride_w, down.stride(),
        up.stride(), down.dtype, masked, mask_left, isinstance(scale, Tensor) and scale.dtype,
        bias is not None and bias.dtype, alignment(left, weight, down, up, bias),
    )  # fmt: skip
    grid = (plan.programs, 1, 1)
    return Launch(few_rows_kernel, kind, grid, options, None, plan.workspace_size, plan.counters, numbers)
