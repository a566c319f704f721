"""`finetune` compiles while it loads: a model of one layer takes a step, with the kernels of the whole one."""

import time
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_kernels import apply_lora_kernels
from lora_kernels.cli.finetune import head_start as module
from lora_kernels.cli.finetune.head_start import head_start, one_layer, step

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=400,
)
TOKENS = (2, 8)


def _lora() -> LoraConfig:
    return LoraConfig(r=3, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


def _layers(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """The shapes of the first decoder layer's parameters."""
    return {n: tuple(p.shape) for n, p in model.named_parameters() if ".layers.0." in n}


def test_a_step_of_one_layer_gives_gradients_to_adapters_of_the_whole_models_shapes() -> None:
    small = one_layer(CONFIG, _lora(), torch.bfloat16, CPU)
    assert not apply_lora_kernels(small).not_fused
    whole = get_peft_model(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16), _lora())
    assert _layers(small) == _layers(whole)
    assert not any(".layers.1." in name for name, _ in small.named_parameters())
    assert CONFIG.num_hidden_layers == 3
    step(small, TOKENS, torch.bfloat16)
    adapters = {n: p for n, p in small.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapters.values())


def test_the_step_is_over_when_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def slow(model: PeftModel, tokens: tuple[int, int], dtype: torch.dtype) -> None:
        time.sleep(0.2)
        events.append((tokens, dtype))

    monkeypatch.setattr(module, "step", slow)
    with head_start(CONFIG, _lora(), TOKENS, torch.bfloat16, lambda model: events.append("fused"), META):
        events.append("loaded")
    events.append("after")
    assert events == ["fused", "loaded", (TOKENS, torch.bfloat16), "after"]


@pytest.mark.parametrize("where", ["fuse", "step"])
def test_what_fails_in_it_is_left_to_training(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(module, "step", fails)
    loaded = False
    with head_start(CONFIG, _lora(), TOKENS, torch.bfloat16, fails if where == "fuse" else lambda model: None, META):
        loaded = True
    assert loaded


def test_on_a_cpu_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "one_layer", lambda *arguments: pytest.fail("built a model"))
    with head_start(CONFIG, _lora(), TOKENS, torch.float32, lambda model: None, CPU):
        pass
