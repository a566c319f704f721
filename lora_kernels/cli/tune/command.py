"""Measures tile configurations of the Triton kernels on this GPU and writes the table that they then use."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lora_kernels
from lora_kernels.cli.arguments import whole
from lora_kernels.cli.bench.cases import DTYPES, Case, Operands
from lora_kernels.cli.bench.clock import REGIMES, Clock, CpuClock, GpuClock, Times
from lora_kernels.cli.bench.options import parse_shape
from lora_kernels.cli.bench.shapes import MODELS, projection_shapes
from lora_kernels.cli.errors import UserError

if TYPE_CHECKING:
    from lora_kernels.backends.triton.tiles import GradTiles, OnePassTiles
    from lora_kernels.backends.triton.tuned import TunedTable

HELP = "measure tile configurations on this GPU and write the table that the Triton kernels then use"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--projections",
        nargs="+",
        choices=MODELS,
        default=["llama-8b"],
        metavar="MODEL",
        help=f"the layers of models, of {', '.join(MODELS)} (default: llama-8b)",
    )
    what.add_argument("--shapes", nargs="+", type=parse_shape, metavar="MxKxN", help="layers: tokens, in, out")
    parser.add_argument("--m", nargs="+", type=whole(1), default=[512, 2048, 8192], help="default: 512 2048 8192")
    parser.add_argument("--rank", type=whole(1), default=16, help="default: 16")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--regime", choices=REGIMES, default="warm", help="default: warm, as in training")
    parser.add_argument("--samples", type=whole(2), default=15, help="of each configuration (default: 15)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the table there (default: where the package looks for it)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, writes, reports; 0."""
    device = _device()
    if importlib.util.find_spec("tqdm") is None:
        raise UserError('tune needs more packages (tqdm): pip install "lora-kernels[bench]"')
    from lora_kernels.backends.triton.tiles import chip_of
    from lora_kernels.backends.triton.tuned import VARIABLE, table_path

    path = args.out or table_path(chip_of(device))
    if path is None:
        raise UserError(f"--out: must say where the table goes, because {VARIABLE} says that none is used")
    _require_writable(path)
    clock: Clock = GpuClock(args.regime, "graph") if device.type == "cuda" else CpuClock("cpu")
    table = tune(_cases(args), device, clock, args.samples)
    table.write(path)
    print(f"table       {path}")
    return 0


def tune(cases: list[Case], device: torch.device, clock: Clock, samples: int) -> TunedTable:
    """Measures every case and makes a table of what was fastest. Ctrl-C leaves an earlier table as it was."""
    import triton
    from tqdm import tqdm

    from lora_kernels.backends.triton.tiles import candidates, chip_of, shipped_grad_tiles, shipped_tiles
    from lora_kernels.backends.triton.tuned import GradEntry, OnePassEntry, TunedTable
    from lora_kernels.cli.tune.measure import OnePass, holds, measure_grads, measure_one_pass
    from lora_kernels.cli.tune.search import choose, grad_candidates, one_pass_candidates

    chip, dtype = chip_of(device), DTYPES[cases[0].dtype]
    itemsize = dtype.itemsize
    by_output: dict[tuple[bool, int, int], list[dict[OnePassTiles, Times | str]]] = {}
    grads = []
    for case in tqdm(cases, unit="case", dynamic_ncols=True):
        operands = Operands.make(case, device)
        for problem in OnePass.of(operands):
            use_tma = problem.use_tma() and chip.has_tma
            measured = measure_one_pass(problem, one_pass_candidates(chip, itemsize, use_tma), clock, samples)
            by_output.setdefault((use_tma, case.M, problem.weight.shape[1]), []).append(measured)
        grads.append(measure_grads(operands, grad_candidates(chip, itemsize), clock, samples))

    @cache
    def runs_everywhere(tiles: OnePassTiles | GradTiles) -> bool:
        shipped = (*candidates(chip, itemsize, True), *candidates(chip, itemsize, False), shipped_grads)
        return tiles in shipped or holds(tiles, dtype, device)

    shipped_grads = shipped_grad_tiles(chip, itemsize)
    entries = []
    for (use_tma, M, N), problems in sorted(by_output.items()):
        shipped = shipped_tiles(chip, itemsize, use_tma, M, N)
        chosen = choose(problems, shipped, runs_everywhere)
        _report(f"outputs {M} x {N}", chosen, shipped, [reason for p in problems for reason in p.values()])
        if chosen is not None:
            entries.append(OnePassEntry(itemsize, use_tma, M, N, chosen[0]))
    best = choose(grads, shipped_grads, runs_everywhere)
    _report("adapter gradients", best, shipped_grads, [reason for g in grads for reason in g.values()])
    made = f"{datetime.now(timezone.utc).date()}, lora_kernels {lora_kernels.__version__}, triton {triton.__version__}"
    grad_entries = () if best is None else (GradEntry(itemsize, best[0]),)
    return TunedTable(chip, made, tuple(entries), grad_entries)


def _report(title: str, chosen: tuple[object, float] | None, shipped: object, results: list[Times | str]) -> None:
    refused = sum(isinstance(result, str) for result in results)
    tail = f"   ({refused} of {len(results)} measurements without a time)" if refused else ""
    if chosen is None:
        print(f"{title}: no configuration ran, the shipped one stays{tail}")
    else:
        tiles, gain = chosen
        verdict = "the shipped one" if tiles == shipped else f"the shipped one takes {gain:.3f} of its time"
        print(f"{title}: {_short(tiles)}, {verdict}{tail}")


def _short(tiles: object) -> str:
    return "x".join(str(value) for value in vars(tiles).values() if type(value) is int)


def _cases(args: argparse.Namespace) -> list[Case]:
    shapes: Iterator[tuple[int, int, int]] | list[tuple[int, int, int]] = args.shapes or (
        (M, *kn) for name in args.projections for kn in projection_shapes(name) for M in args.m
    )
    return list(dict.fromkeys(Case(*shape, rank=args.rank, dtype=args.dtype, adapters=args.dtype) for shape in shapes))


def _device() -> torch.device:
    if importlib.util.find_spec("triton") is None:
        raise UserError("tune needs Triton, which is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    # The interpreter shows that the command works; its times are worth nothing.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    raise UserError("tune needs a GPU that torch can use, and there is none")


def _require_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"--out {path}: is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None
