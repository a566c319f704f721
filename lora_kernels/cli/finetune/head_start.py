"""Has the kernels of a training step compiled while the weights are being loaded."""

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_kernels.selftest import failures

_VOCABULARY = 16


@contextmanager
def head_start(
    config: Any,
    lora: LoraConfig,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    fuse: Callable[[PeftModel], object],
    device: torch.device,
) -> Iterator[None]:
    """Inside of the `with` block a model of one layer, with weights that mean nothing, takes a training step.

    Its kernels are those of the whole model, and compiling them takes longer than all else before the second step. It
    is there for their sake alone: what fails here fails again in training, or matters to nobody.

    Args:
        config: of the whole model.
        tokens: the sequences of a batch, and their length.
        dtype: of the weights, and of autocast.
        fuse: as training.execute takes it.
        device: on a CPU nothing is compiled, and nothing happens.
    """
    if device.type == "cpu" or not hasattr(config, "num_hidden_layers"):
        yield
        return
    model = None
    # Made here, because transformers and PyTorch build models under settings that all threads share.
    with suppress(*failures()):
        model = one_layer(config, lora, dtype, device)
        fuse(model)
    thread = threading.Thread(target=_step_and_forget, args=([model], tokens, dtype), name="head start")
    del model
    thread.start()
    try:
        yield
    finally:
        # Before anything draws random numbers, as the step does.
        thread.join()


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


def step(model: PeftModel, tokens: tuple[int, int], dtype: torch.dtype) -> None:
    """A training step but for the optimizer's, as Trainer makes it."""
    device = next(model.parameters()).device
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    model.train()
    with torch.autocast(device.type, dtype):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def _step_and_forget(models: list[PeftModel | None], tokens: tuple[int, int], dtype: torch.dtype) -> None:
    model = models.pop()
    if model is None:
        return
    with suppress(*failures()):
        step(model, tokens, dtype)
        torch.cuda.synchronize()
    del model
    gc.collect()
    torch.cuda.empty_cache()
