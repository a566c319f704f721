"""Measures LoRA layers, or whole models, beside the frozen ones: PEFT, bitsandbytes and every backend here."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_kernels.cli.bench import options as bench_options
from lora_kernels.cli.bench.baseline import compare, require_comparable
from lora_kernels.cli.bench.cases import DTYPES
from lora_kernels.cli.bench.clock import CPU, CPU_TIME, Clock, CpuClock, GpuClock
from lora_kernels.cli.bench.generation import Generation
from lora_kernels.cli.bench.layers import Plan, ceilings_key, measure_case
from lora_kernels.cli.bench.models import EXACT, REFERENCE, build
from lora_kernels.cli.bench.options import LayerOptions, ModelOptions, Options, PlotOptions
from lora_kernels.cli.bench.progress import Progress
from lora_kernels.cli.bench.results import (
    RESULTS_FILE,
    Results,
    Setting,
    environment,
    read_results,
)
from lora_kernels.cli.bench.roofline import measure_ceilings
from lora_kernels.cli.bench.table import layer_tables, model_table
from lora_kernels.cli.bench.training import Training
from lora_kernels.cli.errors import UserError
from lora_kernels.cli.files import require_writable
from lora_kernels.cli.quiet import quieten_libraries
from lora_kernels.cli.waiting import bar

if TYPE_CHECKING:
    from lora_kernels.cli.bench.shapes import ModelShape

HELP = "time and memory of LoRA layers and whole models, beside PEFT and the frozen ones"
EXIT_WORSE, EXIT_INTERRUPTED = 1, 130

add_arguments = bench_options.add_arguments


def run(args: argparse.Namespace) -> int:
    """Checks everything, measures, reports; 0, 1 where a baseline was better, or 130 after Ctrl-C."""
    options = bench_options.from_args(args, has_gpu=torch.cuda.is_available())
    _require_packages(options)
    require_writable(options.out)
    if options.baseline is not None and options.baseline.resolve() == (options.out / RESULTS_FILE).resolve():
        raise UserError(f"--baseline {options.baseline}: this run would replace it; name another folder with --out")
    baseline = None if options.baseline is None else read_results(options.baseline)
    if isinstance(options, PlotOptions):
        _show(read_results(options.file), options.out, plots=True)
        return 0
    machine = environment(torch.device(options.device))
    results = Results(machine | {"note": args.note}, left_out=options.left_out)
    if baseline is not None:
        require_comparable(baseline, results.environment)
    try:
        _measure(options, results)
        if results.interrupted and not results.has_figures:
            print(f"nothing was finished; {options.out} is as it was")
            return EXIT_INTERRUPTED
        results.write(options.out)
    except UserError:
        # They cannot be written any more: this is the last chance to have them.
        _show(results, options.out, plots=False)
        raise
    _show(results, options.out, options.plots)
    print(f"results     {options.out / RESULTS_FILE}{', of what was finished' if results.interrupted else ''}")
    if results.interrupted:
        return EXIT_INTERRUPTED
    if baseline is not None:
        comparison = compare(baseline, results)
        print(comparison)
        return EXIT_WORSE if comparison.worse else 0
    return 0


def _require_packages(options: Options) -> None:
    needed = ["tqdm"]
    if options.plots or isinstance(options, PlotOptions):
        needed.append("matplotlib")
    if isinstance(options, ModelOptions):
        needed += ["transformers", "peft"] + (["bitsandbytes"] if options.quantize else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        instead = ", or --no-plots" if missing == ["matplotlib"] else ""
        raise UserError(f'bench needs more packages ({", ".join(missing)}): pip install "lora-kernels[bench]"{instead}')


def _measure(options: LayerOptions | ModelOptions, results: Results) -> None:
    """Leaves in `results` what was finished at Ctrl-C."""
    try:
        if isinstance(options, ModelOptions):
            _measure_model(options, results)
        else:
            _measure_layers(options, results)
    except KeyboardInterrupt:
        results.interrupted = True


def _measure_layers(options: LayerOptions, results: Results) -> None:
    """Case by case, each written as soon as it is measured."""
    from tqdm import tqdm

    started = time.perf_counter()
    device = torch.device(options.device)
    clocks = _clocks(options)
    if options.what == "time":
        for clock in bar(clocks, "clock", "ceilings"):
            results.ceilings[ceilings_key(clock)] = measure_ceilings(
                clock, device, DTYPES[options.cases[0].dtype], options.samples
            )
            clock.load()
            results.note_gpu(ceilings_key(clock))
    progress = Progress(options.cases)
    plan = Plan(
        device,
        options.providers,
        clocks,
        options.samples,
        parts=("step",) if options.what == "cpu-time" else ("forward", "step"),
        stage=progress.stage,
    )
    for done, case in enumerate(progress):
        if time.perf_counter() - started > options.seconds:
            left = f"{len(options.cases) - done} of {len(options.cases)}"
            # Around the progress bar.
            tqdm.write(f"time is up: {left} cases were not measured", file=sys.stderr)
            break
        for measurement in measure_case(case, plan, results.ceilings):
            results.measurements.append(measurement)
        results.write(options.out)
    results.note_gpu("at the end")


def _clocks(options: LayerOptions) -> list[Clock]:
    if options.what == "memory":
        return []
    if options.what == "cpu-time":
        return [CpuClock(CPU_TIME)]
    if options.device == "cpu":
        return [CpuClock(CPU)]
    return [GpuClock(regime, launches) for regime in options.regimes for launches in options.launches]


def _measure_model(options: ModelOptions, results: Results) -> None:
    """All providers in turns; what there is of them at Ctrl-C counts."""
    quieten_libraries()
    device = torch.device(options.device)
    shape: ModelShape = options.shape
    count = bar(range(options.layers), "layer", "building")
    base = build(shape, options.layers, options.seq, options.quantize, device, count)
    setting = Setting(
        options.model,
        options.layers,
        shape.layers,
        options.batch,
        options.seq,
        options.rank,
        options.quantize,
        options.checkpointing,
        dropout=options.dropout,
        generate=options.generate,
    )
    reference = EXACT if EXACT in options.providers else REFERENCE
    turns = (Generation if options.generate else Training)(setting, base, shape.vocabulary, reference)
    try:
        for name in bar(options.providers, "provider", "checking"):
            turns.prepare(name)
        turns.forget_reference()
        for _ in bar(turns.rounds(options.steps), "round", "measuring", options.steps):
            results.models = turns.measurements()
            results.write(options.out)
        results.note_gpu("at the end")
    finally:
        with suppress(KeyboardInterrupt):
            results.models = turns.measurements()


def _show(results: Results, folder: Path, plots: bool) -> None:
    if results.environment.get("device") == CPU:
        print("on a CPU: these times show that the command works, and nothing about a GPU\n")
    for text in (layer_tables(results), model_table(results.models, results.left_out)):
        if text:
            print(text, end="\n\n")
    if plots:
        from lora_kernels.cli.bench.plots import write_plots

        for path in write_plots(results, folder):
            print(f"plot        {path}")
