"""Measures tile configurations of the Triton kernels on this GPU and writes the table that they then use."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_kernels.cli.arguments import whole
from lora_kernels.cli.bench.cases import DTYPES, Case
from lora_kernels.cli.bench.clock import REGIMES, Clock, CpuClock, GpuClock
from lora_kernels.cli.bench.options import parse_shape
from lora_kernels.cli.bench.shapes import MODELS, projection_shapes
from lora_kernels.cli.errors import UserError
from lora_kernels.cli.files import require_writable, writing

if TYPE_CHECKING:
    from lora_kernels.backends.triton.tuned import TunedTable
    from lora_kernels.cli.tune.tuning import Tuning

HELP = "measure tile configurations on this GPU and write the table that the Triton kernels then use"
EXIT_INTERRUPTED = 130
_M = (512, 2048, 8192)


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
    parser.add_argument("--m", nargs="+", type=whole(1), help="with --projections: tokens (default: 512 2048 8192)")
    parser.add_argument("--rank", type=whole(1), default=16, help="default: 16")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--regime", choices=REGIMES, default="warm", help="default: warm, as in training")
    parser.add_argument("--samples", type=whole(2), default=15, help="of each configuration (default: 15)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the table there (default: where the package looks for it)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, writes, reports; 0, or 130 after Ctrl-C, which leaves an earlier table as it was."""
    if args.shapes and args.m:
        raise UserError("--m goes with --projections: --shapes has its own")
    device = _device()
    if importlib.util.find_spec("tqdm") is None:
        raise UserError('tune needs more packages (tqdm): pip install "lora-kernels[bench]"')
    from lora_kernels.backends.triton.tiles import chip_of, few_rows_tiles, is_wide_rank
    from lora_kernels.backends.triton.tuned import VARIABLE, table_path
    from lora_kernels.cli.tune.tuning import Tuning

    cases, chip = _cases(args), chip_of(device)
    for case in cases:
        if case.dtype == "float32" or case.K % 8 or case.N % 8:
            continue
        M, K, N = case.M, case.K, case.N
        products = ((N, K), (K, N))
        if all(few_rows_tiles(chip, M, C, L, case.rank, "native") is not None for C, L in products):
            reason = "take a kernel for few tokens on this chip, whose tiles are not tuned: more must be asked for"
            raise UserError(f"{M}x{K}x{N}: forward and dx {reason}")
        if chip.has_tma and case.rank % 8 == 0 and is_wide_rank(M, case.rank):
            reason = "takes kernels on this chip whose tiles are not tuned: a smaller one must be asked for"
            raise UserError(f"{M}x{K}x{N}: rank {case.rank} {reason}")
    path = args.out or table_path(chip)
    if path is None:
        raise UserError(f"--out: must say where the table goes, because {VARIABLE} says that none is used")
    require_writable(path.parent)
    if path.is_dir():
        raise UserError(f"--out {path}: is a directory")
    clock: Clock = GpuClock(args.regime, "graph") if device.type == "cuda" else CpuClock("cpu")
    tuning = Tuning(cases, device, clock, args.samples)
    tuning.run()
    if tuning.interrupted:
        return _keep_interrupted(tuning, path)
    table = tuning.table()
    earlier = _earlier_table(path, table)
    with writing(path):
        (table if earlier is None else table.over(earlier)).write(path)
    kept = "" if earlier is None else ", beside what it had of other layers"
    print(f"table       {path}{kept}")
    return 0


def _earlier_table(path: Path, table: TunedTable) -> TunedTable | None:
    """The table that is there, if it was made with the same versions on the same chip."""
    from lora_kernels.backends.triton.tuned import TableRefused, read_table

    if not path.exists():
        return None
    try:
        earlier = read_table(path, table.chip)
    except TableRefused:
        return None
    # After the date, "made" has two versions, and then how much there is of an interrupted run.
    return earlier if earlier.made.split(", ")[1:3] == table.made.split(", ")[1:3] else None


def _keep_interrupted(tuning: Tuning, path: Path) -> int:
    """A table of less than was asked for is written, but never over one that is there."""
    if not tuning.entries:
        print("table       none: nothing was complete")
        return EXIT_INTERRUPTED
    from lora_kernels.backends.triton.tuned import VARIABLE

    earlier = path.exists()
    written = path.with_suffix(".interrupted.json") if earlier else path
    with writing(written):
        tuning.table().write(written)
    stays = f"; {path} stays as it was, and {VARIABLE} can name this one instead" if earlier else ""
    print(f"table       {written}, {tuning.extent}{stays}")
    return EXIT_INTERRUPTED


def _cases(args: argparse.Namespace) -> list[Case]:
    shapes: Iterator[tuple[int, int, int]] | list[tuple[int, int, int]] = args.shapes or (
        (M, *kn) for name in args.projections for kn in projection_shapes(name) for M in args.m or _M
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
