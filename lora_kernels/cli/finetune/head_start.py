"""Has the kernels of a training step compiled while the weights are being loaded."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_kernels.selftest import failures

_VOCABULARY = 16


def head_start(
    config: Any,
    lora: LoraConfig,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    fuse: Callable[[PeftModel], object],
    device: torch.device,
) -> None:
    """Rehearses a training step of a model of one layer, whose kernels are those of the whole model.

    They are compiled on other threads from then on, which takes longer than anything else before the second step. It is
    there for their sake alone: what fails here fails again in training, or matters to nobody.

    Args:
        config: of the whole model.
        tokens: the sequences of a batch, and their length.
        dtype: of the weights, and of autocast.
        fuse: as training.execute takes it.
        device: on a CPU nothing is compiled, and nothing happens.
    """
    if device.type == "cpu" or not hasattr(config, "num_hidden_layers"):
        return
    with suppress(*failures()):
        from lora_kernels.backends.triton import ahead

        if ahead.compiles_in_threads():
            model = one_layer(config, lora, dtype, device)
            fuse(model)
            with ahead.rehearsal():
                forward(model, tokens, dtype)


def one_layer(config: Any, lora: LoraConfig, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """The adapted model of a config, but for all layers after the first and nearly all of its vocabulary."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    small.vocab_size, small.pad_token_id = _VOCABULARY, None
    with device:
        model: PeftModel = get_peft_model(AutoModelForCausalLM.from_config(small, dtype=dtype), lora)
    return model


def forward(model: PeftModel, tokens: tuple[int, int], dtype: torch.dtype) -> None:
    """The forward of a training step, as Trainer makes it."""
    device = next(model.parameters()).device
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    model.train()
    with torch.autocast(device.type, dtype):
        model(input_ids=ids, use_cache=False)
