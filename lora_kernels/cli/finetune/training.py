"""One training run: load, measure, train with transformers' Trainer, save, measure again."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from lora_kernels import explain, revert_lora_kernels
from lora_kernels.cli.finetune.data import Corpus
from lora_kernels.cli.finetune.head_start import head_start
from lora_kernels.cli.finetune.memory import peak_bytes, reset_peak
from lora_kernels.cli.finetune.model import ModelSource, load_model, lora_config
from lora_kernels.cli.finetune.options import Options
from lora_kernels.cli.finetune.progress import Step, StepRecorder, StopOnInterrupt
from lora_kernels.cli.waiting import elapsed

PROMPT_TOKENS = 32
CONTINUATION_TOKENS = 40


@dataclass(frozen=True)
class Job:
    """What to train on what, all of it checked; the same for every run of it."""

    options: Options
    source: ModelSource
    config: Any
    tokenizer: Any
    corpus: Corpus
    device: torch.device


@dataclass
class Run:
    """What a run has done so far, so that an interrupted one can be reported as well."""

    name: str
    layers: dict[str, str | None] = field(default_factory=dict)
    """Each LoRA layer and why it is not fused, None where it is; empty where nothing was to be fused."""
    steps: list[Step] = field(default_factory=list)
    planned_steps: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    prompt: str | None = None
    text_before: str | None = None
    text_after: str | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    interrupted: bool = False
    saved: bool = False
    not_saved: str | None = None
    """Why the adapter could not be written."""
    backend: str | None = None
    """What a fused layer runs on."""

    @property
    def tokens_per_second(self) -> float | None:
        """That of the median step, which neither compilation in the first ones nor a hiccup moves."""
        if not self.steps:
            return None
        return statistics.median(step.tokens / step.seconds for step in self.steps)


def execute(job: Job, run: Run, *, fuse: Callable[[PeftModel], dict[str, str | None]], save: bool) -> None:
    """Fills in `run`; `fuse` gets the new PEFT model and says which layers run fused.

    What is measured after is measured on PEFT's own layers, as whoever loads the adapter will have it, and what is
    measured before on the model alone; so nothing is compiled for either. Ctrl-C keeps what was trained until then.
    """
    options = job.options
    weights_dtype, autocast = precision(job.device)
    tokens = (options.batch, options.seq)
    head_start(job.config, lora_config(options), tokens, weights_dtype, fuse, job.device)
    base = load_model(job.source, job.config, weights_dtype, options.quantize)
    set_seed(options.seed)
    model = get_peft_model(base, lora_config(options))

    interrupt = StopOnInterrupt()
    recorder = StepRecorder(run.steps, run.name, job.device)
    trainer = Trainer(
        model=model,
        args=_training_arguments(job, autocast),
        train_dataset=job.corpus.train,
        eval_dataset=job.corpus.held_out,
        callbacks=[recorder, interrupt],
    )
    trainer.remove_callback(PrinterCallback)

    # New adapters add exactly nothing, and without them text is generated in half the time.
    with model.disable_adapter(), elapsed(f"{run.name}: measuring the held-out loss"):
        run.loss_before = trainer.evaluate()["eval_loss"]
        run.prompt, run.text_before = _continue_text(model, job)
    run.layers = fuse(model)
    run.backend = _backend(job.device, weights_dtype)
    try:
        with interrupt:
            _train(trainer, run, job.device)
        run.interrupted = interrupt.stopped
    except KeyboardInterrupt:
        run.interrupted = True
    if save and run.steps:
        _save(model, options, run)
    if not run.interrupted:
        if run.layers:
            revert_lora_kernels(model)
        with elapsed(f"{run.name}: measuring the held-out loss"):
            run.loss_after = trainer.evaluate()["eval_loss"]
            _, run.text_after = _continue_text(model, job)


def _save(model: PeftModel, options: Options, run: Run) -> None:
    """Where it fails the run goes on: its figures are worth having."""
    try:
        # "auto" would ask the Hub for the base model's vocabulary, to learn whether it was resized here.
        model.save_pretrained(options.out, save_embedding_layers=False)
        run.saved = True
    except (OSError, SafetensorError) as error:
        run.not_saved = str(error).strip().partition("\n")[0]


def _backend(device: torch.device, dtype: torch.dtype) -> str:
    """What the automatic choice takes for these weights, and if that is not Triton, why."""
    x, weight = (torch.zeros(16, 16, device=device, dtype=dtype) for _ in range(2))
    adapter = torch.zeros(16, 16, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        choice = explain(x, weight, adapter, adapter)
    refusal = choice.refusals.get("triton")
    return choice.backend.name if refusal is None else f"{choice.backend.name} (not triton: {refusal})"


def precision(device: torch.device) -> tuple[torch.dtype, dict[str, bool]]:
    """The dtype of the frozen weights, and Trainer's autocast arguments; the adapters are float32."""
    if device.type == "cpu":
        return torch.float32, {}
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, {"bf16": True}
    return torch.float16, {"fp16": True}


def _training_arguments(job: Job, autocast: dict[str, bool]) -> TrainingArguments:
    options = job.options
    on_cpu = job.device.type == "cpu"
    args = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs or 1,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        prediction_loss_only=True,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        seed=options.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        label_names=["labels"],
        logging_steps=1,
        # A loss that is not a number must be seen as such.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **autocast,
    )
    # One process drives one GPU: where there are several, Trainer would use DataParallel over all of them.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _train(trainer: Trainer, run: Run, device: torch.device) -> None:
    reset_peak(device)
    start = time.perf_counter()
    # A last batch of another size would have kernels compiled for itself. Who asks for epochs gets them whole.
    batches = len(trainer.train_dataset) // trainer.args.train_batch_size
    trainer.args.dataloader_drop_last = trainer.args.max_steps > 0 and batches > 0
    try:
        trainer.train()
    finally:
        trainer.args.dataloader_drop_last = False
        run.planned_steps = trainer.state.max_steps
        run.train_seconds = time.perf_counter() - start
        run.peak_memory_bytes = peak_bytes(device)


def _continue_text(model: PeftModel, job: Job) -> tuple[str, str]:
    """The beginning of the first held-out sequence, and the likeliest continuation."""
    prompt_ids = job.corpus.held_out[0]["input_ids"][:PROMPT_TOKENS]
    input_ids = prompt_ids[None].to(job.device)
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=CONTINUATION_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=job.tokenizer.eos_token_id,
        )
    new_ids = output[0, len(prompt_ids) :]
    return job.tokenizer.decode(prompt_ids), job.tokenizer.decode(new_ids, skip_special_tokens=True)
