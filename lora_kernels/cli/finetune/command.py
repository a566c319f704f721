"""Fine-tunes a language model with LoRA on your text, its LoRA layers fused where that is possible."""

import argparse
import gc
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

from lora_kernels.cli.errors import UserError
from lora_kernels.cli.files import require_writable, writing
from lora_kernels.cli.finetune import options as finetune_options
from lora_kernels.cli.finetune.options import Options
from lora_kernels.cli.quiet import quieten_libraries
from lora_kernels.cli.waiting import elapsed
from lora_kernels.switches import is_on

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_kernels.cli.finetune.training import Job, Run

HELP = "fine-tune a language model with LoRA; without options, a small one that comes as a package"
OURS, STOCK = "lora_kernels", "stock PEFT"
PLOT_FILE, RESULTS_FILE = "loss.png", "results.json"
EXIT_INTERRUPTED = 130

add_arguments = finetune_options.add_arguments


def run(args: argparse.Namespace) -> int:
    """Checks everything, trains, reports; 0, or 130 after Ctrl-C."""
    options = finetune_options.from_args(args, on_gpu=torch.cuda.is_available())
    _require_packages(options)
    with elapsed("importing the libraries"):
        _import_libraries()
    from lora_kernels.cli.finetune.model import gguf_read_once

    with gguf_read_once():
        with elapsed("reading the text and the model's description"):
            job = _prepare(options)
        runs = _execute_all(job)
    _report(options, runs)
    return EXIT_INTERRUPTED if runs[-1].interrupted else 0


def _require_packages(options: Options) -> None:
    needed = ["transformers", "peft", "accelerate", "matplotlib", "tqdm"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'finetune needs more packages ({", ".join(missing)}): pip install "lora-kernels[finetune]"'
        )
    if options.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {options.quantize} needs bitsandbytes: {sys.executable} -m pip install bitsandbytes"
        )


def _import_libraries() -> None:
    """Imports what takes seconds."""
    # All that an import makes stays: to look for garbage in it again and again is a fifth of those seconds.
    collects = gc.isenabled()
    gc.disable()
    try:
        quieten_libraries()
        importlib.import_module("lora_kernels.cli.finetune.training")
    finally:
        if collects:
            gc.enable()


def _require_readable_switch() -> None:
    # apply_lora_kernels reads it when the weights are loaded.
    try:
        is_on("LORA_KERNELS")
    except ValueError as error:
        raise UserError(str(error)) from None


def _prepare(options: Options) -> "Job":
    """Everything that can be refused, refused before any weight is loaded; cheap checks first."""
    from lora_kernels.cli.finetune import data, model
    from lora_kernels.cli.finetune.training import Job

    _require_readable_switch()
    documents = data.read_documents(options.data)
    source = model.find_model(options.model)
    config = model.read_config(source)
    adapter_bytes = model.check_without_weights(source, config, options)
    tokenizer = model.read_tokenizer(source)
    corpus = data.split(data.tokenize(documents, tokenizer), options.seq)
    require_writable(options.out, adapter_bytes)
    return Job(
        options=options,
        source=source,
        config=config,
        tokenizer=tokenizer,
        corpus=corpus,
        device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
    )


def _execute_all(job: "Job") -> list["Run"]:
    """Our run and, where asked for, the same one with stock PEFT; ends early at Ctrl-C."""
    from lora_kernels.cli.finetune.training import Run, execute

    _say(
        f"{job.source.name} on {job.device}: {len(job.corpus.train)} sequences of {job.options.seq} tokens"
        f" to train on, {len(job.corpus.held_out)} held out"
    )
    variants = [(OURS, _fuse)] + ([(STOCK, _leave_as_it_is)] if job.options.compare else [])
    runs = []
    for name, fuse in variants:
        run = Run(name)
        runs.append(run)
        try:
            _say(f"{name}: loading the weights")
            execute(job, run, fuse=fuse, save=name == OURS)
        except BaseException as error:
            if not _is_interrupt(error):
                raise
            run.interrupted = True
        if run.interrupted:
            break
    return runs


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or came of it: in the middle of a library's clean-up it can end as an error there."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _fuse(model: "PeftModel") -> dict[str, str | None]:
    from lora_kernels import apply_lora_kernels

    return {layer.name: layer.reason for layer in apply_lora_kernels(model)}


def _leave_as_it_is(model: "PeftModel") -> dict[str, str | None]:
    return {}


def _report(options: Options, runs: list["Run"]) -> None:
    from lora_kernels.cli.finetune import plot, report

    print()
    for run in runs:
        print(report.summary(run), end="\n\n")
    if len(runs) == 2:
        print(report.comparison(*runs), end="\n\n")
    if runs[0].interrupted and not runs[0].steps:
        # There is nothing to put in the place of an earlier run's.
        print("adapter      none: interrupted before the first step")
        return
    if runs[0].not_saved is not None:
        raise UserError(f"--out {options.out}: the adapter cannot be written ({runs[0].not_saved})")
    with writing(options.out):
        report.write_results(options, runs, options.out / RESULTS_FILE)
        plot.write_plot(runs, options.out / PLOT_FILE)
    print(f"loss curve   {options.out / PLOT_FILE}")
    print(f"results      {options.out / RESULTS_FILE}")
    print(f"adapter      {options.out if runs[0].saved else 'none: interrupted while it was saved'}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
