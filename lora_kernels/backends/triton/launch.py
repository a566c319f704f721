"""From tensors to launches: which configuration, which workspaces, and the numbers that a kernel is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends import Precision, Scale, tf32_allowed
from lora_kernels.backends.sync import zeros_for
from lora_kernels.backends.triton.adapter_grads import adapter_grads_kernel
from lora_kernels.backends.triton.direct import DirectKernel, direct_kernel
from lora_kernels.backends.triton.one_pass import one_pass_kernel
from lora_kernels.backends.triton.tiles import (
    Chip,
    GradTiles,
    OnePassTiles,
    chip_of,
    grad_tiles,
    one_pass_tiles,
    rank_block,
    row_parts,
    share_out,
    shipped_tiles,
)
from lora_kernels.dropout import Dropout

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Looks at a flag take about a microsecond each: a sharing tile has long published by then, if it runs at all.
SPIN_LIMIT = 300
_MOST_PLANS = 4096


@dataclass(frozen=True)
class OnePassPlan:
    """Everything about a launch of the one-pass kernel that its shapes and dtypes decide."""

    tiles: OnePassTiles
    row_tiles: int
    programs: int
    rank_block: int
    rank_chunks: int
    k_parts: int
    shares: int

    @property
    def workspace_size(self) -> int:
        return self.k_parts * self.rank_chunks * self.row_tiles * self.tiles.block_m * self.rank_block

    @property
    def counters(self) -> int:
        return 2 + self.row_tiles * (1 + self.rank_chunks)


def plan_one_pass(
    M: int, K: int, N: int, R: int, precision: Precision, tiles: OnePassTiles, programs: int
) -> OnePassPlan:
    row_tiles, column_tiles = triton.cdiv(M, tiles.block_m), triton.cdiv(N, tiles.block_n)
    block_r = rank_block(R, precision)
    chunks = triton.cdiv(R, block_r)
    programs = min(programs, row_tiles * column_tiles)
    k_parts, shares = share_out(programs, row_tiles, column_tiles, triton.cdiv(K, tiles.block_k), chunks)
    return OnePassPlan(tiles, row_tiles, programs, block_r, chunks, k_parts, shares)


def plan_masked(
    chip: Chip, itemsize: int, M: int, K: int, N: int, R: int, precision: Precision, programs: int
) -> OnePassPlan:
    """The plan with a mask on S U and a rank above 16, where TMA is used.

    In tiles of 128 columns, none of which shared S, dx was wrong (docs/kernels.md, under "Traps"). Tiles of 256 were
    right, and pointers where nothing is shared.
    """
    wide = shipped_tiles(chip, itemsize, True, M, N, least_block_n=256)
    plan = plan_one_pass(M, K, N, R, precision, wide, programs)
    if plan.shares:
        return plan
    return plan_one_pass(M, K, N, R, precision, shipped_tiles(chip, itemsize, False, M, N), programs)


_one_pass_plans: dict[tuple[object, ...], OnePassPlan] = {}
_direct_kernels: dict[tuple[object, ...], DirectKernel | None] = {}


def one_pass(
    left: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    mask_left: bool,
    precision: Precision,
    *,
    tiles: OnePassTiles | None = None,
    spin_limit: int = SPIN_LIMIT,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out = left weight + mask(S up) + bias and S = scale * mask(left) down, in one launch.

    Args:
        left: [M, K] with contiguous rows.
        weight: [K, N]; one of its strides is 1.
        down: [K, R], up: [R, N]: views of the adapters.
        mask_left: whether the dropout mask sits on left (forward) or on S up (backward).
        tiles, spin_limit, programs: forced by tests and by tuning.
    Returns:
        out [M, N] in left's dtype; S [M, R], in float32 if precision is "split".
    """
    (M, K), N, R = left.shape, weight.shape[1], down.shape[1]
    device, dtype = left.device, left.dtype
    out = torch.empty(M, N, dtype=dtype, device=device)
    s = torch.empty(M, R, dtype=torch.float32 if precision == "split" else dtype, device=device)
    if M == 0:
        return out, s
    w_is_nk = weight.stride(0) == 1
    stored_w = weight.T if w_is_nk else weight
    use_tma = fits_tma(left) and fits_tma(stored_w) and fits_tma(out)
    mask_out = dropout is not None and not mask_left
    key = (device, dtype, precision, M, K, N, R, use_tma, mask_out, tiles, programs)
    plan = _one_pass_plans.get(key)
    if plan is None:
        chip = chip_of(device)
        width = programs or chip.multiprocessors
        if tiles is None and mask_out and use_tma and chip.has_tma and rank_block(R, precision) > 16:
            plan = plan_masked(chip, dtype.itemsize, M, K, N, R, precision, width)
        else:
            chosen = tiles or one_pass_tiles(chip, dtype.itemsize, use_tma, M, N)
            plan = plan_one_pass(M, K, N, R, precision, chosen, width)
        remember(_one_pass_plans, key, plan)
    tiles = plan.tiles
    workspace = torch.empty(plan.workspace_size, dtype=torch.float32, device=device)
    scale_tensor = scale if isinstance(scale, Tensor) else None
    seed = None if dropout is None else dropout.seed
    arguments = (
        left,
        stored_w,
        out,
        down,
        up,
        bias,
        s,
        workspace,
        zeros_for(device, plan.counters),
        seed,
        scale_tensor,
        1.0 if scale_tensor is not None else float(scale),
        0 if dropout is None else dropout.threshold,
        spin_limit if plan.shares else 0,
        M,
        N,
        K,
        R,
        plan.k_parts,
        plan.shares,
        left.stride(0),
        stored_w.stride(0),
        N,
        *down.stride(),
        *up.stride(),
        R,
    )
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_R": plan.rank_block,
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": plan.rank_chunks,
        "W_IS_NK": w_is_nk,
        "MASK_X": dropout is not None and mask_left,
        "MASK_OUT": mask_out,
        "HAS_BIAS": bias is not None,
        "SPLIT": precision == "split",
        "PRECISION": dot_precision(dtype),
        "USE_TMA": tiles.use_tma,
        "DTYPE": _TYPES[dtype],
        # With the mask in its epilogue, the flat loop's products would no longer overlap (ptxas C7515).
        "FLATTEN": tiles.use_tma and not mask_out,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    blocks = None
    if tiles.use_tma:
        w_block = (tiles.block_n, tiles.block_k) if w_is_nk else (tiles.block_k, tiles.block_n)
        blocks = ((tiles.block_m, tiles.block_k), w_block, (tiles.block_m, tiles.block_n // 2))
    kind = (
        "one_pass", device, dtype, precision, K, N, R, tiles, w_is_nk, mask_out, left.stride(0), stored_w.stride(0),
        down.stride(), up.stride(), down.dtype, seed is None, None if scale_tensor is None else scale_tensor.dtype, bias is not None and bias.dtype,
        alignment(left, stored_w, down, up, bias),
    )  # fmt: skip
    launch_kernel(one_pass_kernel, kind, (plan.programs, 1, 1), arguments, options, blocks)
    return out, s


def adapter_grads(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    *,
    tiles: GradTiles | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dA = T^T mask(x) [R, K] and dB = dy^T S [N, R], in `dtype`; None for what has no operands."""
    want_a, want_b = t is not None and x is not None, s is not None
    narrow = t if t is not None else s
    assert narrow is not None
    (M, N), R, device = dy.shape, narrow.shape[1], dy.device
    K = 0 if x is None else x.shape[1]
    dA = torch.empty(R, K, dtype=dtype, device=device) if want_a else None
    dB = torch.empty(N, R, dtype=dtype, device=device) if want_b else None
    if M == 0:
        return None if dA is None else dA.zero_(), None if dB is None else dB.zero_()
    chip = chip_of(device)
    tiles = tiles or grad_tiles(chip, dy.dtype.itemsize)
    block_r = rank_block(R, "native" if narrow.dtype == dy.dtype else "split")
    chunks = triton.cdiv(R, block_r)
    blocks = (triton.cdiv(K, tiles.block_c) if want_a else 0) + (triton.cdiv(N, tiles.block_c) if want_b else 0)
    parts, rows_per_part = row_parts(chip, tiles, M, blocks * chunks)
    workspace = torch.empty(parts * blocks * chunks * tiles.block_c * block_r, dtype=torch.float32, device=device)
    seed = None if dropout is None or not want_a else dropout.seed
    x_stride = 0 if x is None else x.stride(0)
    arguments = (
        x if want_a else None,
        dy,
        t if want_a else None,
        s,
        dA,
        dB,
        workspace,
        zeros_for(device, blocks * chunks),
        seed,
        0 if seed is None or dropout is None else dropout.threshold,
        M,
        K,
        N,
        R,
        x_stride,
        dy.stride(0),
        rows_per_part,
        parts,
    )
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": block_r,
        "WANT_A": want_a,
        "WANT_B": want_b,
        "MASKED": seed is not None,
        "PRECISION": dot_precision(dy.dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    kind = (
        "adapter_grads", device, dy.dtype, narrow.dtype, dtype, K, N, R, x_stride, dy.stride(0), want_a, want_b,
        seed is None, tiles, alignment(x, dy, t, s),
    )  # fmt: skip
    launch_kernel(adapter_grads_kernel, kind, (blocks, parts, chunks), arguments, options, None)
    return dA, dB


def launch_kernel(
    kernel: Any,
    kind: tuple[object, ...],
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    blocks: tuple[tuple[int, int], ...] | None,
) -> None:
    """Through the driver where a launch of this kind has gone through Triton before, which compiles it.

    Args:
        kind: everything that Triton's specialization of the arguments depends on.
        blocks: the tiles of the leading arguments that are to be TMA descriptors.
    """
    kind = (*kind, options.get("PRECISION"))
    direct = _direct_kernels.get(kind)
    if direct is not None and not _has_hooks():
        direct(grid, torch._C._cuda_getCurrentRawStream(kind[1].index), arguments)  # type: ignore[attr-defined]
        return
    if blocks is not None:
        described = (_descriptor(t, block) for t, block in zip(arguments, blocks, strict=False))
        compiled = kernel[grid](*described, *arguments[len(blocks) :], **options)
    else:
        compiled = kernel[grid](*arguments, **options)
    if kind not in _direct_kernels and arguments[1].is_cuda:
        remember(_direct_kernels, kind, direct_kernel(compiled))


def _has_hooks() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    knobs = getattr(triton, "knobs", None)
    hook = None if knobs is None else knobs.runtime.launch_enter_hook
    # Newer releases keep a chain of hooks there, which is false while it is empty.
    return bool(getattr(hook, "calls", hook))


def remember(memory: dict[tuple[object, ...], Any], key: tuple[object, ...], value: Any) -> None:
    if len(memory) >= _MOST_PLANS:
        memory.clear()
    memory[key] = value


def alignment(*tensors: Tensor | None) -> int:
    """Which of the tensors do not start on 16 bytes, as bits: Triton compiles other loads for them."""
    bits = 0
    for t in tensors:
        bits = 2 * bits + (t is not None and t.data_ptr() % 16 != 0)
    return bits


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products take the tensor cores' short mantissa only where the user allowed it to PyTorch as well."""
    if dtype == torch.float32 and not tf32_allowed():
        return "ieee"
    return "tf32"


def fits_tma(t: Tensor) -> bool:
    """Whether a TMA descriptor can describe a two-dimensional tensor: rows that start on 16 bytes."""
    stride = t.stride(0)
    return (
        t.dtype != torch.float32
        and t.data_ptr() % 16 == 0
        and stride * t.element_size() % 16 == 0
        and stride >= t.shape[1]
        and t.stride(1) == 1
    )


def _descriptor(t: Tensor, block: tuple[int, int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))
