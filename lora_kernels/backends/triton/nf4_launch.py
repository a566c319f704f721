"""Launches of the NF4 kernels: a decoded copy of a weight, and products with it on the path that a table chooses."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lora_kernels.backends import Precision, Scale
from lora_kernels.backends.sync import zeros_for
from lora_kernels.backends.triton import launch, launches
from lora_kernels.backends.triton.mask_launch import bits_of
from lora_kernels.backends.triton.nf4 import dequantize_kernel
from lora_kernels.backends.triton.nf4_product import nf4_product_kernel
from lora_kernels.backends.triton.nf4_tiles import (
    NF4Tiles,
    Path,
    cannot_fly,
    path_for,
    product_parts,
    product_tiles,
)
from lora_kernels.backends.triton.parts_plan import plan_by_parts
from lora_kernels.backends.triton.tiles import INTERPRETER, chip_of, share_parts
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight

# Elements that a program of the dequantizing kernel writes.
DEQUANTIZE_BLOCK = 4096

_decodings: dict[tuple[object, ...], launches.Launch] = {}


def dequantize(weight: NF4Weight, dtype: torch.dtype, *, block: int = DEQUANTIZE_BLOCK) -> Tensor:
    """The weight [N, K] in `dtype`, bit for bit what NF4Weight.dequantize gives, in one launch.

    Args:
        block: forced by tests and by tuning.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    words = _words(weight.packed)
    kind = (
        "dequantize", weight.device, dtype, weight.shape, weight.block_size, weight.double_quant, block,
        words.dtype, launches.alignment(*weight.tensors()),
    )  # fmt: skip
    found = _decodings.get(kind)
    if found is None:
        options = {
            "BLOCK": block,
            "BLOCK_SIZE": weight.block_size,
            "SHUFFLE": _has_shuffles(weight.device),
            "enable_fp_fusion": False,
        }
        grid, numbers = (triton.cdiv(out.numel(), block), 1, 1), (out.numel(), weight.packed.numel())
        found = launches.Launch(dequantize_kernel, kind, grid, options, None, 0, 0, numbers)
        launches.remember(_decodings, kind, found)
    nested = (weight.nested_absmax, weight.nested_map, weight.offset)
    found(weight.device, (words, weight.absmax, *nested, out))
    return out


def one_pass(
    left: Tensor,
    weight: NF4Weight,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    forward: bool,
    precision: Precision,
    *,
    path: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """launch.one_pass with an NF4 weight: forward out = x W^T + S up + bias, else out = dy W + mask(S up).

    W is what weight.dequantize(left.dtype) gives, bit for bit, on either path.

    Args:
        left: [M, K] forward, [M, N] backward, with contiguous rows.
        weight: [N, K].
        down, up: as launch.one_pass takes them.
        path: forced by tests and by tuning.
    Raises:
        ValueError: the path was forced to be on the fly, and these operands cannot go it.
    """
    chip = chip_of(left.device)
    if path is None:
        path = "fly" if flies(left, weight, forward) else "scratch"
    elif path == "fly" and (reason := cannot_fly(chip, left, weight)) is not None:
        raise ValueError(f"path was 'fly', but must be 'scratch': {reason}")
    if path == "fly":
        return product(left, weight, down, up, bias, scale, dropout, forward, precision)
    # The allocator hands the same memory to the next layer: there is one copy in 16 bits at any time, not one a layer.
    scratch = dequantize(weight, left.dtype)
    return launch.one_pass(
        left, scratch.T if forward else scratch, down, up, bias, scale, dropout, forward, precision
    )


def flies(left: Tensor, weight: NF4Weight, forward: bool) -> bool:
    """Whether a product of these operands decodes the weight where it uses it, without a copy."""
    path, _ = path_for(chip_of(left.device), left, weight, forward)
    return path == "fly"


_products: dict[tuple[object, ...], launches.Launch] = {}


def product(
    left: Tensor,
    weight: NF4Weight,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    forward: bool,
    precision: Precision,
    *,
    tiles: NF4Tiles | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """one_pass on the path that decodes on the fly: one launch, and no decoded copy of the weight anywhere.

    Args:
        tiles, parts: forced by tests and by tuning.
    """
    M, R, device, dtype = left.shape[0], down.shape[1], left.device, left.dtype
    out = torch.empty(M, weight.shape[0 if forward else 1], dtype=dtype, device=device)
    s = torch.empty(M, R, dtype=torch.float32 if precision == "split" else dtype, device=device)
    if M == 0:
        return out, s
    words = _words(weight.packed)
    mask = bits_of(dropout, M, weight.shape[1])
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    kind = (
        "nf4_product", device, dtype, precision, forward, *weight.shape, R, weight.block_size, weight.double_quant, words.dtype,
        left.stride(0), down.stride(), up.stride(), down.dtype, mask is None, None if tensor is None else tensor.dtype,
        bias is not None and bias.dtype, launches.alignment(left, *weight.tensors(), down, up, bias),
    )  # fmt: skip
    key = (M, tiles, parts, *kind)
    launch = _products.get(key)
    if launch is None:
        launch = _plan_launch(left, weight, down, up, mask is not None, forward, precision, kind, tiles, parts)
        launches.remember(_products, key, launch)
    workspace = torch.empty(launch.workspace_size, dtype=torch.float32, device=device)
    scales = (weight.absmax, weight.nested_absmax, weight.nested_map, weight.offset)
    zeros = zeros_for(device, launch.counters)
    launch(device, (left, words, *scales, out, down, up, bias, s, workspace, zeros, mask, tensor, number))
    return out, s


def _plan_launch(
    left: Tensor,
    weight: NF4Weight,
    down: Tensor,
    up: Tensor,
    masked: bool,
    forward: bool,
    precision: Precision,
    kind: tuple[object, ...],
    tiles: NF4Tiles | None,
    parts: int | None,
) -> launches.Launch:
    (M, L), R, (N, K), chip = left.shape, down.shape[1], weight.shape, chip_of(left.device)
    C = N if forward else K
    tiles = tiles or product_tiles(chip, M, C, forward)
    steps = triton.cdiv(L, tiles.block_l)
    if parts is None:
        tile_count = triton.cdiv(M, tiles.block_m) * triton.cdiv(C, tiles.block_c)
        parts = product_parts(chip, tiles, tile_count, steps)
    plan = plan_by_parts(M, C, tiles.block_m, tiles.block_c, parts, share_parts(steps), R, precision)
    numbers = (M, N, K, R, plan.s_parts, plan.parts, left.stride(0), *down.stride(), *up.stride())
    columns = tiles.block_l if forward else tiles.block_c
    options = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_L": tiles.block_l,
        "BLOCK_R": plan.rank_block,
        "RANK_CHUNKS": plan.rank_chunks,
        "RANK_ALIGN": launches.divisor(R),
        "DOWN_ALIGN": launches.divisor(down.stride(0)),
        "UP_ALIGN": launches.divisor(up.stride(1)),
        "BLOCK_SIZE": weight.block_size,
        "FORWARD": forward,
        "EVEN_L": L % tiles.block_l == 0,
        "EVEN_K": K % columns == 0,
        "MASKED": masked,
        "SPLIT": precision == "split",
        "SHUFFLE": _has_shuffles(left.device),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "maxnreg": tiles.max_registers,
        "enable_fp_fusion": False,
    }
    grid = (plan.programs, 1, 1)
    return launches.Launch(
        nf4_product_kernel, (*kind, tiles), grid, options, None, plan.workspace_size, plan.counters, numbers
    )


def _words(packed: Tensor) -> Tensor:
    """The packed codes as words of eight; as they are if they do not start and end between words."""
    if packed.numel() % 4 or packed.data_ptr() % 4 or packed.storage_offset() % 4:
        return packed
    return packed.view(torch.int32)


def _has_shuffles(device: torch.device) -> bool:
    """Whether the kernels are compiled for CUDA; neither Triton's interpreter nor ROCm knows PTX."""
    return chip_of(device) != INTERPRETER and torch.version.cuda is not None
