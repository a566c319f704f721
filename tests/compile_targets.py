"""Compiles every kernel in every shipped configuration for chips that need not be there; prints a line of JSON each.

Run by test_targets.py in a process of its own, because Triton's interpreter must be off here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels.backends.triton.adapter_grads import adapter_grads_kernel
from lora_kernels.backends.triton.group_forward import group_forward_kernel
from lora_kernels.backends.triton.group_grads import group_grads_kernel
from lora_kernels.backends.triton.group_input import group_input_kernel
from lora_kernels.backends.triton.group_launch import MOST_MEMBERS
from lora_kernels.backends.triton.group_operands import up_block
from lora_kernels.backends.triton.nf4 import dequantize_kernel
from lora_kernels.backends.triton.nf4_launch import DEQUANTIZE_BLOCK
from lora_kernels.backends.triton.nf4_product import nf4_product_kernel
from lora_kernels.backends.triton.nf4_tiles import NF4Tiles, fly_table
from lora_kernels.backends.triton.one_pass import one_pass_kernel
from lora_kernels.backends.triton.tiles import (
    Chip,
    GradTiles,
    OnePassTiles,
    candidates,
    grad_tiles,
    group_grad_tiles,
    rank_block,
)

# Compute capability -> bytes of shared memory that a block can have.
CHIPS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


KERNELS = {
    "one_pass": one_pass_kernel,
    "adapter_grads": adapter_grads_kernel,
    "group_forward": group_forward_kernel,
    "group_input": group_input_kernel,
    "group_grads": group_grads_kernel,
    "nf4_product": nf4_product_kernel,
    "dequantize": dequantize_kernel,
}


@dataclass(frozen=True)
class DequantizeBlock:
    """The one configuration of the kernel that decodes a whole NF4 weight."""

    block: int = DEQUANTIZE_BLOCK
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Build:
    """One kernel, as the launcher would ask for it."""

    capability: int
    kernel: str
    tiles: OnePassTiles | GradTiles | NF4Tiles | DequantizeBlock
    forward: bool = True
    masked: bool = False
    split: bool = False
    rank: int = 16
    aligned: bool = True
    members: int = 1

    def __str__(self) -> str:
        tiles = "x".join(str(v) for k, v in asdict(self.tiles).items() if k.startswith("block"))
        flags = [k for k in ("forward", "masked", "split", "aligned") if getattr(self, k)]
        if self.members > 1:
            flags.append(f"{self.members} members")
        return " ".join([f"sm_{self.capability}", self.kernel, tiles, f"r{self.rank}", *flags])


def builds() -> Iterator[Build]:
    for capability, shared in CHIPS.items():
        chip = Chip((capability // 10, capability % 10), 132, shared, capability == 90)
        tables = {t for use_tma in (True, False) for t in candidates(chip, 2, use_tma)}
        for tiles in sorted(tables, key=str):
            for forward in (True, False):
                plain = Build(capability, "one_pass", tiles, forward)
                yield plain
                # Compiling takes its time, and the kernels of 89 are those of 86.
                if capability == 89:
                    continue
                yield replace(plain, masked=True, rank=64)
                yield replace(plain, split=True)
                if not tiles.use_tma:
                    yield replace(plain, split=True, aligned=False)
                if tiles.use_tma or capability in (80, 86):
                    yield from group_builds(plain)
        for split in (False, True):
            yield Build(capability, "adapter_grads", grad_tiles(chip, 2), masked=split, split=split, rank=64)
        for masked, rank in ((False, 16), (True, 64)):
            three = group_grad_tiles(chip, 2, MOST_MEMBERS * rank, masked)
            yield Build(capability, "group_grads", three, masked=masked, rank=rank, members=MOST_MEMBERS)
        for forward in (True, False):
            for nf4_tiles in fly_table(chip, forward).tiles:
                plain = Build(capability, "nf4_product", nf4_tiles, forward)
                yield plain
                if capability != 89:
                    yield replace(plain, masked=True, rank=64)
                    yield replace(plain, split=True, aligned=False)
        yield Build(capability, "dequantize", DequantizeBlock())
        yield Build(capability, "dequantize", DequantizeBlock(), aligned=False)


def group_builds(single: Build) -> Iterator[Build]:
    """A group's kernel in the tiles of a single one. The flat loop (TMA) is where products could be serialized."""
    tiles = single.tiles
    assert isinstance(tiles, OnePassTiles)
    plain = replace(single, kernel="group_forward" if single.forward else "group_input", members=MOST_MEMBERS)
    yield plain
    # What registers and overlap are scarcest for; compiling all variants in all tiles would take minutes more.
    if not tiles.use_tma or tiles.block_n < 256:
        return
    yield replace(plain, masked=True, rank=64)
    if not single.forward:
        yield replace(plain, members=2)
        yield replace(plain, rank=64)
        yield replace(plain, split=True)


def source(build: Build) -> tuple[ASTSource, dict[str, Any]]:
    kernel = KERNELS[build.kernel]
    arguments = {
        "one_pass": _one_pass,
        "adapter_grads": _adapter_grads,
        "group_forward": _group,
        "group_input": _group,
        "group_grads": _group_grads,
        "nf4_product": _nf4_product,
        "dequantize": _dequantize,
    }
    constants, types = arguments[build.kernel](build)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    numbers = {"N", "K", "elements", "packed_bytes"}
    numbers |= {f"{letter}{i}" for letter in ("N", "R", "RA", "RB") for i in range(MOST_MEMBERS)}
    aligned = [n for n in names if signature[n].startswith("*") or n.startswith("stride") or n in numbers]
    if not build.aligned:
        # What is not aligned in these does not run on the fly.
        aligned = ["words_ptr", "x_ptr", "stride_xm", "K"] if build.kernel == "nf4_product" else []
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


def _one_pass(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, OnePassTiles)
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    mask_out = build.masked and not build.forward
    block_r = rank_block(build.rank, "split" if build.split else "native")
    constants: dict[str, Any] = {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "BLOCK_R": block_r,
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": -(-build.rank // block_r),
        "W_IS_NK": build.forward,
        "MASK_X": build.masked and build.forward,
        "MASK_OUT": mask_out,
        "HAS_BIAS": build.masked,
        "SPLIT": build.split,
        "PRECISION": "tf32",
        "USE_TMA": tiles.use_tma,
        "DTYPE": tl.bfloat16,
        "FLATTEN": tiles.use_tma and not mask_out,
        "scale_ptr": None,
        "stride_dk" if build.forward else "stride_dr": 1,
        "stride_ur" if build.forward else "stride_un": 1,
    }
    if not build.masked:
        constants |= {"seed_ptr": None, "bias_ptr": None}
    adapter = "*fp32" if build.split else "*bf16"
    types = {
        "down_ptr": adapter,
        "up_ptr": adapter,
        "s_ptr": adapter,
        "bias_ptr": "*bf16",
        "workspace_ptr": "*fp32",
        "sync_ptr": "*i32",
        "seed_ptr": "*i64",
        "scale": "fp32",
    }
    w = f"{n}, {k}" if build.forward else f"{k}, {n}"
    for name, block in (("x_ref", f"{m}, {k}"), ("w_ref", w), ("out_ref", f"{m}, {n // 2}")):
        types[name] = f"tensordesc<bf16[{block}]>" if tiles.use_tma else "*bf16"
    return constants, types


def _adapter_grads(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, GradTiles)
    block_r = rank_block(build.rank, "split" if build.split else "native")
    constants: dict[str, Any] = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": block_r,
        "WANT_A": True,
        "WANT_B": True,
        "MASKED": build.masked,
        "PRECISION": "tf32",
    }
    if not build.masked:
        constants["seed_ptr"] = None
    narrow = "*fp32" if build.split else "*bf16"
    types = {name: "*bf16" for name in ("x_ptr", "dy_ptr")}
    types |= {name: narrow for name in ("t_ptr", "s_ptr", "dA_ptr", "dB_ptr")}
    return constants, types | {"workspace_ptr": "*fp32", "sync_ptr": "*i32", "seed_ptr": "*i64"}


def _group(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, OnePassTiles)
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    block_r = rank_block(build.rank, "split" if build.split else "native")
    chunks = -(-build.rank // block_r)
    constants: dict[str, Any] = {
        "MEMBERS": build.members,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "BLOCK_R": block_r,
        "GROUP_M": tiles.group_m,
        "RANK_CHUNKS": chunks,
        "W_IS_NK": build.forward,
        "SPLIT": build.split,
        "PRECISION": "tf32",
        "USE_TMA": tiles.use_tma,
        "DTYPE": tl.bfloat16,
    }
    adapter = "*fp32" if build.split else "*bf16"
    each = {"down{}_ptr": adapter, "up{}_ptr": adapter, "w{}_ref": (n, k) if build.forward else (k, n)}
    single: dict[str, Any] = {}
    if build.forward:
        constants |= {"MASK_X": build.masked, "HAS_BIAS": build.masked}
        single["x_ref"] = (m, k)
        each |= {"out{}_ref": (m, n // 2), "s{}_ptr": adapter, "bias{}_ptr": "*bf16" if build.masked else None}
    else:
        columns = block_r * chunks * build.members
        constants |= {"MASKED": build.masked, "FLATTEN": tiles.use_tma and not build.masked}
        constants["BLOCK_U"] = up_block(columns, "split" if build.split else "native")
        single["out_ref"] = (m, n // 2)
        each |= {"dy{}_ref": (m, k), "t{}_ptr": adapter}
    each |= {"seed{}_ptr": "*i64" if build.masked else None, "scale{}_ptr": None, "scale{}": "fp32"}
    types = {"workspace_ptr": "*fp32", "sync_ptr": "*i32"}
    for name, kind in (single | _of_members(each, build.members)).items():
        if kind is None:
            constants[name] = None
        elif isinstance(kind, str):
            types[name] = kind
        else:
            types[name] = f"tensordesc<bf16[{kind[0]}, {kind[1]}]>" if tiles.use_tma else "*bf16"
    return constants, types


def _group_grads(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, GradTiles)
    constants: dict[str, Any] = {
        "A_COUNT": build.members,
        "B_COUNT": build.members,
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": rank_block(build.rank, "native"),
        "MASKED": build.masked,
        "PRECISION": "tf32",
    }
    each = {f"{name}{{}}_ptr": "*bf16" for name in ("dy", "t", "s", "dA", "dB")}
    types = {"x_ptr": "*bf16", "workspace_ptr": "*fp32", "sync_ptr": "*i32"}
    for name, kind in _of_members(each | {"seed{}_ptr": "*i64" if build.masked else None}, build.members).items():
        if kind is None:
            constants[name] = None
        else:
            types[name] = kind
    return constants, types


def _of_members(each: dict[str, Any], members: int) -> dict[str, Any]:
    """Each name with the number of every member; None for members that are not there."""
    return {n.format(i): kind if i < members else None for n, kind in each.items() for i in range(MOST_MEMBERS)}


_NF4_TYPES = {
    "absmax_ptr": "*u8",
    "nested_absmax_ptr": "*fp32",
    "nested_map_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "out_ptr": "*bf16",
}


def _nf4_product(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    tiles = build.tiles
    assert isinstance(tiles, NF4Tiles)
    block_r = rank_block(build.rank, "split" if build.split else "native")
    constants: dict[str, Any] = {
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_L": tiles.block_l,
        "BLOCK_R": block_r,
        "RANK_CHUNKS": -(-build.rank // block_r),
        "BLOCK_SIZE": 64,
        "FORWARD": build.forward,
        "EVEN_L": build.aligned,
        "EVEN_K": build.aligned,
        "MASKED": build.masked,
        "SPLIT": build.split,
        "SHUFFLE": True,
        "scale_ptr": None,
        "stride_dl" if build.forward else "stride_dr": 1,
        "stride_ur" if build.forward else "stride_uc": 1,
    }
    if not build.masked:
        constants |= {"seed_ptr": None, "bias_ptr": None}
    adapter = "*fp32" if build.split else "*bf16"
    types = _NF4_TYPES | {
        "x_ptr": "*bf16",
        "words_ptr": "*i32",
        "down_ptr": adapter,
        "up_ptr": adapter,
        "s_ptr": adapter,
        "bias_ptr": "*bf16",
        "workspace_ptr": "*fp32",
        "sync_ptr": "*i32",
        "seed_ptr": "*i64",
        "scale": "fp32",
    }
    return constants, types


def _dequantize(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    assert isinstance(build.tiles, DequantizeBlock)
    constants = {"BLOCK": build.tiles.block, "BLOCK_SIZE": 64, "SHUFFLE": True}
    return constants, _NF4_TYPES | {"packed_ptr": "*i32" if build.aligned else "*u8"}


def compile_one(build: Build) -> dict[str, Any]:
    src, options = source(build)
    target = GPUTarget("cuda", build.capability, 32)
    compiled = triton.compile(src, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        serialized = ""
        # Those of NF4 weights may be serialized: decoding takes longer, and other programs fill the gaps.
        # Pointer loads keep the products waiting anyway.
        if build.capability == 90 and build.kernel != "nf4_product" and getattr(build.tiles, "use_tma", True):
            # Products that ptxas cannot overlap cost a third of the speed; it says so, and nothing else does.
            ptx.write_text(compiled.asm["ptx"])
            notes = _output("ptxas", "-arch=sm_90a", "-v", ptx, "-o", Path(folder, "out"))
            serialized = "; ".join(re.findall(r"\(C75\d\d\)[^\n]*", notes))
    return {
        "build": str(build),
        "shared": compiled.metadata.shared,
        "limit": CHIPS[build.capability],
        "registers": int(found[1]),
        "stack": int(found[2]),
        "serialized": serialized,
        "reshaped": "memdesc_reshape" in compiled.asm["ttgir"],
        "moved": _moved(build, compiled.asm["ttgir"]),
        "pipelined": not build.aligned or compiled.metadata.shared >= _stages(build),
    }


def _moved(build: Build, ttgir: str) -> bool:
    """Whether decoded weights pass through shared memory on their way to the tensor cores, which slows decoding."""
    tiles = build.tiles
    if not isinstance(tiles, NF4Tiles):
        return False
    tile = {f"{tiles.block_c}x{tiles.block_l}", f"{tiles.block_l}x{tiles.block_c}"}
    moves = rf"(?:convert_layout|local_alloc) %(?:codes|scales|w|operand)\w* : \(?tensor<({'|'.join(tile)})x"
    return re.search(moves, ttgir) is not None


def _stages(build: Build) -> int:
    """The shared memory that a main loop with all its stages in flight takes at least."""
    tiles = build.tiles
    if isinstance(tiles, GradTiles):
        if build.capability < 90:
            return 0  # docs/kernels.md: not pipelined there yet
        return tiles.num_stages * tiles.block_m * tiles.block_c * 2
    if isinstance(tiles, DequantizeBlock):
        return 0
    if isinstance(tiles, NF4Tiles):
        # Before Hopper, one stage is in registers; of the codes it is everywhere.
        codes = (tiles.num_stages - 1) * tiles.block_c * tiles.block_l // 2
        return codes + (tiles.num_stages - 1) * tiles.block_m * tiles.block_l * 2
    # Before Hopper the products read registers, and one stage is in them.
    stages = tiles.num_stages - (0 if tiles.use_tma else 1)
    return stages * (tiles.block_m + tiles.block_n) * tiles.block_k * 2


def _output(tool: str, *arguments: object) -> str:
    done = subprocess.run([str(BIN / tool), *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> None:
    only = int(sys.argv[1])
    chosen = [b for b in builds() if b.capability == only]
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(compile_one, chosen):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
