"""From a build to what Triton compiles: the kernel, its constants, the types and alignments of the other arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl
from target_builds import GFX942, ITEMSIZE, Build, FewRowsTiles, GradTiles, NF4Tiles, OnePassTiles, PlainBlock, chip_of
from triton.compiler import ASTSource

from lora_kernels.backends.triton.adapter_grads import adapter_grads_kernel
from lora_kernels.backends.triton.backward import backward_kernel
from lora_kernels.backends.triton.few_rows import few_rows_kernel
from lora_kernels.backends.triton.gated import gated_backward_kernel, gated_forward_kernel
from lora_kernels.backends.triton.group_forward import group_forward_kernel
from lora_kernels.backends.triton.group_grads import group_grads_kernel
from lora_kernels.backends.triton.group_input import group_input_kernel
from lora_kernels.backends.triton.group_operands import up_block
from lora_kernels.backends.triton.launches import MOST_MEMBERS, divisor
from lora_kernels.backends.triton.mask import mask_kernel
from lora_kernels.backends.triton.nf4 import dequantize_kernel
from lora_kernels.backends.triton.nf4_product import nf4_product_kernel
from lora_kernels.backends.triton.one_pass import one_pass_kernel
from lora_kernels.backends.triton.products import products_kernel
from lora_kernels.backends.triton.tiles import own_columns, rank_block, share_stages, tail_grad_tiles

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
KERNELS = {
    "mask": mask_kernel,
    "one_pass": one_pass_kernel,
    "few_rows": few_rows_kernel,
    "products": products_kernel,
    "adapter_grads": adapter_grads_kernel,
    "backward": backward_kernel,
    "group_forward": group_forward_kernel,
    "group_input": group_input_kernel,
    "group_grads": group_grads_kernel,
    "nf4_product": nf4_product_kernel,
    "dequantize": dequantize_kernel,
    "gated_forward": gated_forward_kernel,
    "gated_backward": gated_backward_kernel,
}


def source(build: Build) -> tuple[ASTSource, dict[str, Any]]:
    kernel = KERNELS[build.kernel]
    arguments = {
        "mask": _mask,
        "one_pass": _one_pass,
        "few_rows": _few_rows,
        "products": _products,
        "adapter_grads": _adapter_grads,
        "backward": _backward,
        "group_forward": _group,
        "group_input": _group,
        "group_grads": _group_grads,
        "nf4_product": _nf4_product,
        "dequantize": _dequantize,
        "gated_forward": _gated,
        "gated_backward": _gated,
    }
    constants, types = arguments[build.kernel](build)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    numbers = {"N", "K", "columns", "elements", "packed_bytes"}
    numbers |= {f"{letter}{i}" for letter in ("N", "R", "RA", "RB", "L") for i in range(2 * MOST_MEMBERS)}
    aligned = [n for n in names if signature[n].startswith("*") or n.startswith("stride") or n in numbers]
    if build.rank % 16 != 0:
        of_rank = {"stride_sm", *(("stride_un", "stride_uc") if build.forward else ("stride_dk", "stride_dl"))}
        aligned = [n for n in aligned if not n.startswith("R") and n not in of_rank]
    if not build.aligned:
        # What is not aligned in these does not run on the fly.
        aligned = ["words_ptr", "x_ptr", "stride_xm", "K"] if build.kernel == "nf4_product" else []
    if build.eights:
        aligned = [n for n in aligned if signature[n].startswith("*")]
    attributes = {
        (names.index(n),): [["tt.divisibility", 16]] for n in aligned if signature[n] != "constexpr"
    }
    keyed = {(names.index(n),): value for n, value in constants.items()}
    options: dict[str, Any] = {"num_warps": build.tiles.num_warps, "num_stages": build.tiles.num_stages}
    if build.kernel in ("nf4_product", "dequantize"):
        options["enable_fp_fusion"] = False
    if isinstance(build.tiles, NF4Tiles):
        options["maxnreg"] = build.tiles.max_registers
    return ASTSource(kernel, signature, keyed, attributes), options


def _mask(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    assert isinstance(build.tiles, PlainBlock)
    return {"BELOW_HALF": build.forward, "BLOCK": build.tiles.block}, {"seed_ptr": "*i64", "bits_ptr": "*i32"}


def _one_pass(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, OnePassTiles)
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    mask_out = build.masked and not build.forward
    block_r = rank_block(build.rank, build.precision)
    constants: dict[str, Any] = {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "BLOCK_R": block_r,
        "OWN_R": own_columns(block_r, build.shared),
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": -(-build.rank // block_r),
        "RANK_ALIGN": 8,
        "DOWN_ALIGN": 1 if build.forward else 8,
        "UP_ALIGN": 8 if build.forward else 1,
        "ALONE": build.alone and build.shared and build.precision != "split" and not (build.masked and build.forward),
        "SHARE_STAGES": share_stages(tiles, block_r),
        "W_IS_NK": build.forward != build.turned,
        "MASK_X": build.masked and build.forward,
        "MASK_OUT": mask_out,
        "HAS_BIAS": build.masked and build.forward,
        "SPLIT": build.precision == "split",
        "PRECISION": "ieee" if build.ieee else "tf32",
        "USE_TMA": tiles.use_tma,
        "DTYPE": DTYPES[build.dtype],
        "FLATTEN": tiles.use_tma and build.flat,
        "scale_ptr": None,
        "stride_dk" if build.forward else "stride_dr": 1,
        "stride_ur" if build.forward else "stride_un": 1,
    }
    if not build.masked:
        constants |= {"mask_ptr": None, "bias_ptr": None}
    types = {
        "down_ptr": _adapter(build),
        "up_ptr": _adapter(build),
        "s_ptr": _branch(build),
        "bias_ptr": _adapter(build),
        "workspace_ptr": "*fp32",
        "sync_ptr": "*i32",
        "mask_ptr": "*i32",
        "scale": "fp32",
    }
    w = f"{n}, {k}" if build.forward != build.turned else f"{k}, {n}"
    for name, block in (("x_ref", f"{m}, {k}"), ("w_ref", w), ("out_ref", f"{m}, {n // 2}")):
        types[name] = f"tensordesc<{build.dtype}[{block}]>" if tiles.use_tma else f"*{build.dtype}"
    return constants, types


def _few_rows(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, FewRowsTiles)
    block_r = rank_block(build.rank, build.precision)
    constants: dict[str, Any] = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_R": block_r,
        "RANK_CHUNKS": -(-build.rank // block_r),
        "W_IS_NK": build.forward,
        "EVEN_K": not build.masked,
        **dict.fromkeys(("K_ALIGN", "N_ALIGN", "X_ALIGN", "W_ALIGN", "RANK_ALIGN"), 8),
        "DOWN_ALIGN": 1 if build.forward else 8,
        "UP_ALIGN": 8 if build.forward else 1,
        "MASK_X": build.masked and build.forward,
        "MASK_OUT": build.masked and not build.forward,
        "SPLIT": build.precision == "split",
        "scale_ptr": None,
        "stride_dk" if build.forward else "stride_dr": 1,
        "stride_ur" if build.forward else "stride_un": 1,
    }
    if not build.masked:
        constants |= {"mask_ptr": None, "bias_ptr": None}
    types = {name: f"*{build.dtype}" for name in ("x_ptr", "w_ptr", "out_ptr")}
    types |= {name: _adapter(build) for name in ("down_ptr", "up_ptr", "bias_ptr")} | {"s_ptr": _branch(build)}
    types |= {"workspace_ptr": "*fp32", "sync_ptr": "*i32", "mask_ptr": "*i32", "scale": "fp32"}
    return constants, types


def _products(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, OnePassTiles)
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    constants: dict[str, Any] = {
        "MEMBERS": build.members,
        "PAIRS": build.pairs,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": tiles.group_m,
        "RIGHT_IS_NK": build.forward,
        "HAS_BIAS": build.bias,
        "PRECISION": "tf32",
        "USE_TMA": True,
        "DTYPE": DTYPES[build.dtype],
        "FLATTEN": build.flat and build.pairs > 1,
    }
    each = {
        "out{}": f"tensordesc<{build.dtype}[{m}, {n // 2}]>",
        "bias{}": _adapter(build) if build.bias else None,
        "scale{}_ptr": None,
        "scale{}": "fp32" if build.pairs == 1 else None,
    }
    right = f"{n}, {k}" if build.forward else f"{k}, {n}"
    of_pairs = {"left{}": f"tensordesc<{build.dtype}[{m}, {k}]>", "right{}": f"tensordesc<{build.dtype}[{right}]>"}
    given = _of_members(each, build.members) | _of_members(of_pairs, build.members * build.pairs, 2 * MOST_MEMBERS)
    constants |= {name: None for name, kind in given.items() if kind is None}
    return constants, {name: kind for name, kind in given.items() if kind is not None}


def _adapter_grads(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, GradTiles)
    block_r = rank_block(build.rank, build.precision)
    constants: dict[str, Any] = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": block_r,
        "RANK_ALIGN": 8,
        "WANT_A": True,
        "WANT_B": True,
        "MASKED": build.masked,
        "PRECISION": "ieee" if build.ieee else "tf32",
    }
    if not build.masked:
        constants["mask_ptr"] = None
    types = {"x_ptr": f"*{build.dtype}", "dy_ptr": f"*{build.dtype}", "t_ptr": _branch(build), "s_ptr": _branch(build)}
    types |= {"dA_ptr": _adapter(build), "dB_ptr": _adapter(build)}
    return constants, types | {"workspace_ptr": "*fp32", "sync_ptr": "*i32", "mask_ptr": "*i32"}


def _backward(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    """The product of _one_pass that is not the forward's, and the adapters' gradients."""
    tiles = build.tiles
    assert isinstance(tiles, OnePassTiles)
    product, product_types = _one_pass(replace(build, forward=False))
    grads = tail_grad_tiles(chip_of(build.capability), ITEMSIZE[build.dtype])
    kept = set(backward_kernel.arg_names)
    constants = {k: v for k, v in product.items() if k in kept} | {
        "MASKED": build.masked,
        "WANT_A": True,
        "WANT_B": True,
        "GRAD_M": grads.block_m,
        "GRAD_C": grads.block_c,
        "GRAD_STAGES": grads.num_stages,
        "stride_br": 1,
        "stride_ak": 1,
    }
    types = {k: v for k, v in product_types.items() if k in kept}
    types |= {"dy_ref": product_types["x_ref"], "dx_ref": product_types["out_ref"]}
    types |= dict.fromkeys(("x_ptr", "dy_ptr"), f"*{build.dtype}") | dict.fromkeys(("s_ptr", "t_ptr"), _branch(build))
    return constants, types | dict.fromkeys(("lora_a_ptr", "lora_b_ptr", "dA_ptr", "dB_ptr"), _adapter(build))


def _group(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, OnePassTiles)
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    block_r = rank_block(build.rank, build.precision)
    chunks = -(-build.rank // block_r)
    constants: dict[str, Any] = {
        "MEMBERS": build.members,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "BLOCK_R": block_r,
        "OWN_R": own_columns(block_r, build.shared),
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": chunks,
        "RANK_ALIGN": divisor(build.rank),
        "ALONE": build.alone and build.shared and build.precision != "split" and not (build.masked and build.forward),
        "W_IS_NK": build.forward != build.turned,
        "SPLIT": build.precision == "split",
        "PRECISION": "ieee" if build.ieee else "tf32",
        "USE_TMA": tiles.use_tma,
        "DTYPE": DTYPES[build.dtype],
    }
    each: dict[str, Any] = {"down{}_ptr": _adapter(build), "up{}_ptr": _adapter(build)}
    each["w{}_ref"] = (n, k) if build.forward != build.turned else (k, n)
    single: dict[str, Any] = {}
    if build.forward:
        joint = 1 << (build.members * chunks * block_r - 1).bit_length()
        constants |= {"MASK_X": build.masked, "HAS_BIAS": build.masked, "ALIGNED": build.aligned}
        constants |= {"JOINT": joint, "SHARE_STAGES": share_stages(tiles, joint)}
        constants["ALONE"] &= joint <= 64
        single["x_ref"] = (m, k)
        each |= {"out{}_ref": (m, n // 2), "s{}_ptr": _branch(build)}
        each["bias{}_ptr"] = _adapter(build) if build.masked else None
    else:
        columns = block_r * chunks * build.members
        constants |= {"MASKED": build.masked, "FLATTEN": tiles.use_tma and not build.masked}
        constants["SHARE_STAGES"] = share_stages(tiles, block_r)
        constants["ALIGNED"] = build.aligned and build.rank % 8 == 0
        constants["BLOCK_U"] = up_block(columns, build.precision)
        single["out_ref"] = (m, n // 2)
        each |= {"dy{}_ref": (m, k), "t{}_ptr": _branch(build)}
    each |= {"mask{}_ptr": "*i32" if build.masked else None, "scale{}_ptr": None, "scale{}": "fp32"}
    types = {"workspace_ptr": "*fp32", "sync_ptr": "*i32"}
    for name, kind in (single | _of_members(each, build.members)).items():
        if kind is None:
            constants[name] = None
        elif isinstance(kind, str):
            types[name] = kind
        else:
            types[name] = f"tensordesc<{build.dtype}[{kind[0]}, {kind[1]}]>" if tiles.use_tma else f"*{build.dtype}"
    return constants, types


def _group_grads(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, GradTiles)
    constants: dict[str, Any] = {
        "A_COUNT": build.members,
        "B_COUNT": build.members,
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "RANK_ALIGN": divisor(build.rank),
        "BLOCK_R": rank_block(build.rank, build.precision),
        "MASKED": build.masked,
        "PRECISION": "ieee" if build.ieee else "tf32",
    }
    each: dict[str, Any] = {f"{name}{{}}_ptr": _branch(build) for name in ("t", "s")}
    each |= {f"{name}{{}}_ptr": _adapter(build) for name in ("dA", "dB")} | {"dy{}_ptr": f"*{build.dtype}"}
    types = {"x_ptr": f"*{build.dtype}", "workspace_ptr": "*fp32", "sync_ptr": "*i32"}
    for name, kind in _of_members(each | {"mask{}_ptr": "*i32" if build.masked else None}, build.members).items():
        if kind is None:
            constants[name] = None
        else:
            types[name] = kind
    return constants, types


def _of_members(each: dict[str, Any], members: int, most: int = MOST_MEMBERS) -> dict[str, Any]:
    """Each name with the number of every member; None for members that are not there."""
    return {n.format(i): kind if i < members else None for n, kind in each.items() for i in range(most)}


_NESTED = ("nested_absmax_ptr", "nested_map_ptr", "offset_ptr")


def _nf4(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    """What both kernels that decode take of the weight, and the dtype of what they write."""
    constants: dict[str, Any] = {"BLOCK_SIZE": build.block_size, "SHUFFLE": build.capability != GFX942}
    types = {"absmax_ptr": "*u8" if build.double_quant else "*fp32", "out_ptr": f"*{build.dtype}"}
    if build.double_quant:
        return constants, types | {name: "*fp32" for name in _NESTED}
    return constants | {name: None for name in _NESTED}, types


def _nf4_product(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, NF4Tiles)
    block_r = rank_block(build.rank, build.precision)
    constants, types = _nf4(build)
    constants |= {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_L": tiles.block_l,
        "BLOCK_R": block_r,
        "RANK_CHUNKS": -(-build.rank // block_r),
        "RANK_ALIGN": divisor(build.rank),
        "DOWN_ALIGN": 1 if build.forward else divisor(build.rank),
        "UP_ALIGN": divisor(build.rank) if build.forward else 1,
        "FORWARD": build.forward,
        "EVEN_L": build.aligned,
        "EVEN_K": build.aligned,
        "MASKED": build.masked,
        "SPLIT": build.precision == "split",
        "scale_ptr": None,
        "stride_dl" if build.forward else "stride_dr": 1,
        "stride_ur" if build.forward else "stride_uc": 1,
    }
    if not build.masked:
        constants |= {"mask_ptr": None, "bias_ptr": None}
    types |= {
        "x_ptr": f"*{build.dtype}",
        "words_ptr": "*i32",
        "down_ptr": _adapter(build),
        "up_ptr": _adapter(build),
        "s_ptr": _branch(build),
        "bias_ptr": _adapter(build),
        "workspace_ptr": "*fp32",
        "sync_ptr": "*i32",
        "mask_ptr": "*i32",
        "scale": "fp32",
    }
    return constants, types


def _dequantize(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    assert isinstance(build.tiles, PlainBlock)
    constants, types = _nf4(build)
    return constants | {"BLOCK": build.tiles.block}, types | {"packed_ptr": "*i32" if build.aligned else "*u8"}


def _gated(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    assert isinstance(build.tiles, PlainBlock)
    constants: dict[str, Any] = {"BLOCK": build.tiles.block, "ACTIVATION": build.activation}
    if not build.want_h:
        constants["h_ptr"] = None
    return constants, {f"{name}_ptr": f"*{build.dtype}" for name in ("g", "u", "h", "dh", "du")}


def _adapter(build: Build) -> str:
    """What points to adapters, to their gradients and to a bias."""
    return f"*{build.dtype}" if build.precision == "native" else "*fp32"


def _branch(build: Build) -> str:
    """What points to S and to T."""
    return "*fp32" if build.precision == "split" else f"*{build.dtype}"
