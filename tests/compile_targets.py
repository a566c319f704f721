"""Compiles every kernel in every shipped configuration for chips that need not be there; prints a line of JSON each.

Run by test_targets.py in a process of its own, because Triton's interpreter must be off here.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import triton
from target_builds import GFX942, ITEMSIZE, SHARED_MEMORY, Build, FewRowsTiles, GradTiles, NF4Tiles, PlainBlock, builds
from target_sources import source
from triton.backends.compiler import GPUTarget

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_one(build: Build) -> dict[str, Any]:
    src, options = source(build)
    amd = build.capability == GFX942
    target = GPUTarget("hip", "gfx942", 64) if amd else GPUTarget("cuda", build.capability, 32)
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(src, target=target, options=options)
    registers, stack, serialized = _amd_usage(compiled) if amd else _usage(build, compiled, log.getvalue())
    return {
        "build": str(build),
        "kernel": build.kernel,
        "shared": compiled.metadata.shared,
        "limit": SHARED_MEMORY[build.capability],
        "registers": registers,
        "stack": stack,
        "serialized": serialized,
        "reshaped": "memdesc_reshape" in compiled.asm["ttgir"],
        "moved": _moved(build, compiled.asm["ttgir"]),
        "by_number": _by_number(build, compiled.asm),
        "in_pairs": _in_pairs(build, compiled.asm),
        "pipelined": not build.aligned or compiled.metadata.shared >= _stages(build),
    }


def _amd_usage(compiled: Any) -> tuple[int, int, str]:
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): *(\d+)", compiled.asm["amdgcn"]))
    return int(numbers["vgpr_count"]), int(numbers["private_segment_fixed_size"]), ""


def _usage(build: Build, compiled: Any, log: str) -> tuple[int, int, str]:
    """The registers and the bytes of stack of a thread, and what ptxas says of products that it serialized.

    `log` is what ptxas said, and empty where Triton had the kernel in its cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        serialized = ""
        # Those of few rows may be serialized: decoding NF4 or waiting for W takes longer, and others fill the gaps.
        # Pointer loads keep the products waiting anyway, as do float32 rows that are turned in registers.
        turned_in_registers = isinstance(build.tiles, GradTiles) and build.dtype == "fp32"
        by_parts = build.kernel in ("nf4_product", "few_rows")
        may_wait = by_parts or not getattr(build.tiles, "use_tma", True) or turned_in_registers
        if build.capability == 90 and not may_wait:
            # Products that ptxas cannot overlap cost a third of the speed; it says so, and nothing else does.
            if not log:
                ptx.write_text(compiled.asm["ptx"])
                log = _output("ptxas", "-arch=sm_90a", "-v", ptx, "-o", Path(folder, "out"))
            serialized = "; ".join(re.findall(r"\(C75\d\d\)[^\n]*", log))
    return int(found[1]), int(found[2]), serialized


def _moved(build: Build, ttgir: str) -> bool:
    """Whether decoded weights pass through shared memory on their way to the tensor cores, which slows decoding."""
    tiles = build.tiles
    if not isinstance(tiles, NF4Tiles):
        return False
    tile = {f"{tiles.block_c}x{tiles.block_l}", f"{tiles.block_l}x{tiles.block_c}"}
    moves = rf"(?:convert_layout|local_alloc) %(?:codes|scales|w|operand)\w* : \(?tensor<({'|'.join(tile)})x"
    return re.search(moves, ttgir) is not None


def _by_number(build: Build, asm: dict[str, Any]) -> int:
    """How many loads there are of one 16-bit number, where all that is loaded is aligned. A bias is loaded so."""
    if build.masked or build.bias or build.eights or not build.aligned or ITEMSIZE[build.dtype] != 2:
        return 0
    return len(re.findall(r"ld\.global[.\w:]*\.b16\b", asm.get("ptx", "")))


def _in_pairs(build: Build, asm: dict[str, Any]) -> bool:
    """Whether a mask on 16-bit X is applied to two numbers at a time, wherever there is one."""
    masks_x = build.forward or build.kernel == "backward"
    if build.capability == GFX942 or not (build.masked and masks_x) or ITEMSIZE[build.dtype] != 2:
        return True
    return "0xffbb" in asm["ptx"]


def _stages(build: Build) -> int:
    """The shared memory that a main loop with all its stages in flight takes at least."""
    tiles, itemsize = build.tiles, ITEMSIZE[build.dtype]
    if isinstance(tiles, GradTiles):
        if build.capability not in (90, 100) or build.ieee:
            return 0  # docs/kernels.md: not pipelined there yet, nor without tensor cores
        return tiles.num_stages * tiles.block_m * tiles.block_c * itemsize
    if isinstance(tiles, PlainBlock):
        return 0
    if isinstance(tiles, NF4Tiles):
        # Before Hopper, one stage is in registers; of the codes it is everywhere.
        codes = (tiles.num_stages - 1) * tiles.block_c * tiles.block_l // 2
        return codes + (tiles.num_stages - 1) * tiles.block_m * tiles.block_l * itemsize
    if isinstance(tiles, FewRowsTiles):
        return (tiles.num_stages - 1) * (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize
    # Before Hopper the products read registers, and one stage is in them.
    stages = tiles.num_stages - (0 if tiles.use_tma else 1)
    return stages * (tiles.block_m + tiles.block_n) * tiles.block_k * itemsize


def _output(tool: str, *arguments: object) -> str:
    done = subprocess.run([str(BIN / tool), *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> None:
    # Triton then prints what ptxas says.
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    chosen = list(builds(int(sys.argv[1])))
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(compile_one, chosen):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
