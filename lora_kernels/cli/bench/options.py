"""The options of the bench command, and what follows from the device."""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_kernels.cli.arguments import number, whole
from lora_kernels.cli.bench.cases import DTYPES, SUITES, Case
from lora_kernels.cli.bench.clock import LAUNCHES, REGIMES
from lora_kernels.cli.bench.models import LEFT_OUT, MODEL_PROVIDERS
from lora_kernels.cli.bench.providers import FLOOR, NAMED_ONLY, PROVIDERS, left_out_of_quick
from lora_kernels.cli.bench.shapes import MODELS, TINY, ModelShape, projection_shapes
from lora_kernels.cli.errors import UserError

EVERYTHING = tuple(name for name in SUITES if name not in ("quick", "tiny"))
# The architecture that whole models are built with.
WHOLE_MODELS = {**{name: MODELS[name] for name in ("llama-8b", "llama-70b", "mistral-7b")}, "tiny": TINY}
QUICK_SECONDS = 35.0
_SAMPLES, _QUICK_SAMPLES, _CPU_TIME_SAMPLES = 30, 10, 200
_M = (8192, 2048)
_CASE_OPTIONS = ("ranks", "dropout", "adapters", "dtype", "nf4", "m")
_LAYER_OPTIONS = ("regimes", "launches", "samples", "cpu_time", "memory")
_MODEL_OPTIONS = ("layers", "batch", "seq", "rank", "quantize", "no_checkpointing", "steps", "generate")
_RUN_OPTIONS = ("providers", "device", "baseline", "note", "no_plots")


@dataclass(frozen=True)
class Common:
    """What every kind of run has. `baseline` is compared with, `plots` are drawn, `out` gets the files."""

    device: str
    baseline: Path | None
    plots: bool
    out: Path


@dataclass(frozen=True)
class LayerOptions(Common):
    """A run over single layers. No case is started after `seconds`; `what` is "time", "cpu-time" or "memory".

    `left_out` says why a provider that nobody named takes no part.
    """

    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    regimes: tuple[str, ...]
    launches: tuple[str, ...]
    samples: int
    seconds: float
    what: str
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelOptions(Common):
    """A run over a whole model; `layers` of it are built. `left_out` is as with layers.

    It trains, or generates so many tokens behind prompts of `seq`.
    """

    model: str
    layers: int
    batch: int
    seq: int
    rank: int
    quantize: str | None
    checkpointing: bool
    dropout: float
    providers: tuple[str, ...]
    steps: int
    generate: int
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model."""
        return WHOLE_MODELS[self.model]


@dataclass(frozen=True)
class PlotOptions(Common):
    """No run: the tables and pictures of an earlier one."""

    file: Path


Options = LayerOptions | ModelOptions | PlotOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    kinds = parser.add_argument_group("what to run (default: all suites, which takes a while)")
    kind = kinds.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="a few cases, within a minute on a GPU")
    kind.add_argument("--suite", nargs="+", choices=SUITES, metavar="NAME", help=f"of {', '.join(SUITES)}")
    kind.add_argument("--shapes", nargs="+", type=parse_shape, metavar="MxKxN", help="layers: tokens, in, out")
    kind.add_argument("--group", nargs="+", type=parse_group, metavar="MxKxN+N", help="groups: layers that share x")
    kind.add_argument("--projections", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    kind.add_argument("--model", choices=WHOLE_MODELS, help="a whole model with random weights: training steps")
    kind.add_argument("--plot", type=Path, metavar="FILE", help="show an earlier results.json; measure nothing")

    layers = parser.add_argument_group("layers")
    layers.add_argument("--m", nargs="+", type=whole(1), help="with --projections: tokens (default: 8192 2048)")
    layers.add_argument(
        "--ranks", nargs="+", type=whole(1), help="with --shapes, --group or --projections (default: 16)"
    )
    layers.add_argument("--dropout", type=number(from_=0, below=1), help="likewise, and with --model (default: 0)")
    layers.add_argument("--dtype", choices=DTYPES, help="likewise (default: bfloat16; on a CPU float32)")
    layers.add_argument("--adapters", choices=DTYPES, help="likewise (default: as --dtype)")
    layers.add_argument("--nf4", action="store_true", default=None, help="likewise: 4-bit frozen weights")
    layers.add_argument("--regimes", nargs="+", choices=REGIMES, help="default: both")
    layers.add_argument("--launches", nargs="+", choices=LAUNCHES, help="default: both")
    layers.add_argument(
        "--samples", type=whole(2), help=f"of each figure (default: {_SAMPLES}; {_CPU_TIME_SAMPLES} of CPU time)"
    )
    figure = layers.add_mutually_exclusive_group()
    figure.add_argument("--cpu-time", action="store_true", help="the CPU's time for a forward and backward, instead")
    figure.add_argument("--memory", action="store_true", help="peak memory alone, instead")

    model = parser.add_argument_group("whole models")
    model.add_argument("--layers", type=whole(1), help="build only so many (default: all); nothing is extrapolated")
    model.add_argument("--batch", type=whole(1), help="default: 2; with --generate 1")
    model.add_argument("--seq", type=whole(2), help="default: 4096; on a CPU, or with --generate, 64")
    model.add_argument("--rank", type=whole(1), help="default: 16")
    model.add_argument("--quantize", choices=["nf4"], help="keep the frozen weights in 4 bits")
    model.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    model.add_argument("--steps", type=whole(1), help="measured steps of each provider (default: 5)")
    model.add_argument(
        "--generate", type=whole(1), metavar="N", help="time N tokens behind prompts of --seq, in place of steps"
    )

    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(PROVIDERS)}; with --model of {', '.join(MODEL_PROVIDERS)}",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier results.json; worse is exit status 1")
    parser.add_argument("--note", metavar="TEXT", help="kept in results.json: the commit, where this is no checkout")
    parser.add_argument("--no-plots", action="store_true", help="write results.json alone")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="where results go; earlier ones there are replaced (default: runs/bench)",
    )


def from_args(args: argparse.Namespace, *, has_gpu: bool) -> Options:
    """Fills in the defaults that depend on the device, and refuses what does not fit together."""
    if args.plot:
        _refuse_beside_plot(args)
    if args.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: there is no GPU that torch can use")
    device = args.device or ("cuda" if has_gpu else "cpu")
    common = (device, args.baseline, not args.no_plots, args.out)
    if args.plot:
        return PlotOptions(*common, file=args.plot)
    _refuse_unused(args)
    return _model_options(args, common) if args.model else _layer_options(args, common)


def _layer_options(args: argparse.Namespace, common: tuple[str, Path | None, bool, Path]) -> LayerOptions:
    on_cpu = common[0] == "cpu"
    if on_cpu and (args.regimes or args.launches):
        raise UserError("--regimes and --launches: a CPU has neither")
    if on_cpu and args.memory:
        raise UserError("--memory: only a GPU's memory is accounted for")
    left_out = {} if args.providers else NAMED_ONLY | (left_out_of_quick() if args.quick else {})
    return LayerOptions(
        *common,
        cases=tuple(dict.fromkeys(_cases(args, on_cpu))),
        providers=_providers(args.providers, list(PROVIDERS), left_out),
        regimes=tuple(args.regimes or (REGIMES[:1] if args.quick else REGIMES)),
        launches=tuple(args.launches or LAUNCHES),
        samples=args.samples or (_CPU_TIME_SAMPLES if args.cpu_time else _QUICK_SAMPLES if args.quick else _SAMPLES),
        seconds=QUICK_SECONDS if args.quick else float("inf"),
        what="cpu-time" if args.cpu_time else "memory" if args.memory else "time",
        left_out=left_out,
    )


def _model_options(args: argparse.Namespace, common: tuple[str, Path | None, bool, Path]) -> ModelOptions:
    every = WHOLE_MODELS[args.model].layers
    if (args.layers or 1) > every:
        raise UserError(f"--layers {args.layers}: {args.model} has {every}")
    for name in ("dropout", "no_checkpointing"):
        if args.generate and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} does not go with --generate: it is for training")
    left_out = {} if args.providers else LEFT_OUT
    return ModelOptions(
        *common,
        model=args.model,
        layers=args.layers or every,
        batch=args.batch or (1 if args.generate else 2),
        seq=args.seq or (64 if common[0] == "cpu" or args.generate else 4096),
        rank=args.rank or 16,
        quantize=args.quantize,
        checkpointing=not (args.no_checkpointing or args.generate),
        dropout=args.dropout or 0.0,
        providers=_providers(args.providers, list(MODEL_PROVIDERS), left_out),
        steps=args.steps or 5,
        generate=args.generate or 0,
        left_out=left_out,
    )


def _cases(args: argparse.Namespace, on_cpu: bool) -> Iterator[Case]:
    if args.shapes or args.group or args.projections:
        shapes = (
            args.group
            or args.shapes
            or [(M, *kn) for name in args.projections for M in args.m or _M for kn in projection_shapes(name)]
        )
        dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
        adapters, dropout = args.adapters or dtype, args.dropout or 0.0
        for M, K, N, *others in shapes:
            for rank in args.ranks or [16]:
                yield Case(M, K, N, rank, dropout, dtype, adapters, bool(args.nf4), tuple(others))
    else:
        small = ["tiny"] if on_cpu else ["quick"] if args.quick else None
        for name in args.suite or small or EVERYTHING:
            yield from SUITES[name]


def _refuse_beside_plot(args: argparse.Namespace) -> None:
    for name in (*_CASE_OPTIONS, *_LAYER_OPTIONS, *_MODEL_OPTIONS, *_RUN_OPTIONS):
        # Not only its truth: --dropout 0 was given as well.
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise UserError(f"--{name.replace('_', '-')} does not go with --plot, which measures nothing")


def _refuse_unused(args: argparse.Namespace) -> None:
    """An option that would change nothing is a misunderstanding."""
    case_options = [name for name in _CASE_OPTIONS if not (args.model and name == "dropout")]
    given = {name for name in case_options if getattr(args, name) is not None}
    if given and not (args.shapes or args.group or args.projections):
        raise UserError(f"--{min(given)} goes with --shapes, --group or --projections: suites are what they are")
    if args.m and not args.projections:
        raise UserError(f"--m goes with --projections: --{'shapes' if args.shapes else 'group'} has its own")
    for name in _LAYER_OPTIONS if args.model else _MODEL_OPTIONS:
        if getattr(args, name):
            goes = "does not go" if args.model else "goes"
            raise UserError(f"--{name.replace('_', '-')} {goes} with --model")
    for name in ("regimes", "launches"):
        if getattr(args, name) and (args.cpu_time or args.memory):
            raise UserError(f"--{name} does not go with --{'memory' if args.memory else 'cpu-time'}: it has none")


def _providers(named: list[str] | None, known: list[str], left_out: Container[str]) -> tuple[str, ...]:
    for name in named or ():
        if name not in known:
            raise UserError(f"--providers {name}: must be of {', '.join(known)}")
    names = named or [name for name in known if name not in left_out]
    # The floor always takes part: every figure is a ratio to it.
    return tuple(name for name in known if name == FLOOR or name in names)


def parse_shape(text: str) -> tuple[int, int, int]:
    """An argparse type: MxKxN."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be MxKxN, three whole numbers from 1 up, not {text!r}")
    M, K, N = map(int, found.groups())
    return M, K, N


def parse_group(text: str) -> tuple[int, ...]:
    """An argparse type: MxKxN+N, with two N or more."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*(?:\+[1-9]\d*)+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be MxKxN+N, whole numbers from 1 up and two N or more, not {text!r}")
    M, K, widths = found.groups()
    return int(M), int(K), *map(int, widths.split("+"))
