"""Tiny models of the families whose blocks run together, with every projection adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_models import VOCABULARY, batch, lora_layers, randomize_adapters
from torch import nn

from lora_kernels import apply_lora_kernels
from lora_kernels.integrations import peft_blocks

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def base(family: str = "Llama", **options: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, num_hidden_layers=2, pad_token_id=0, eos_token_id=None, **(SIZES | options)
    )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def quantized(device: str, compute: torch.dtype, storage: torch.dtype = torch.uint8) -> nn.Module:
    """A Llama whose linears are bitsandbytes' in NF4, packed in tensors of dtype `storage`."""
    bnb = pytest.importorskip("bitsandbytes")
    model = base(hidden_size=64, intermediate_size=128, head_dim=16)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is not nn.Linear:
                    continue
                kind: dict[str, Any] = {"quant_type": "nf4", "quant_storage": storage}
                sizes = linear.in_features, linear.out_features
                new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=compute, **kind)
                new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=new, **kind)
                new.support_avx512bf16_for_cpu = False
                setattr(parent, name, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model.to(device)


def adapted(
    family: str = "Llama", device: str = "cpu", model: nn.Module | None = None, **options: Any
) -> peft.PeftModel:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ALL} | options
    model = peft.get_peft_model(model or base(family), peft.LoraConfig(**config))
    randomize_adapters(model)
    return model.to(device)


def grouped(model: peft.PeftModel) -> peft.PeftModel:
    model = copy.deepcopy(model)
    report = apply_lora_kernels(model)
    assert report.fused == len(report), str(report)
    assert report.blocks
    assert all(block.grouped for block in report.blocks), str(report)
    return model


def ungrouped(model: peft.PeftModel) -> peft.PeftModel:
    model = copy.deepcopy(model)
    report = apply_lora_kernels(model, groups=False)
    assert report.fused == len(report), str(report)
    assert report.blocks == ()
    return model


class Calls:
    """How often layers ran together since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._counts = {"lora_linear_group": 0, "lora_gated_mlp": 0}
        for name in self._counts:
            monkeypatch.setattr(peft_blocks, name, self._counting(name, getattr(peft_blocks, name)))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._counts[name] += 1
            return function(*arguments, **options)

        return counted

    def take(self) -> tuple[int, int]:
        """Of attention groups and of MLPs."""
        found = tuple(self._counts.values())
        self._counts.update(dict.fromkeys(self._counts, 0))
        return found  # type: ignore[return-value]


def train(model: nn.Module, device: str, steps: int = 4) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    torch.manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch("llama", device), labels=batch("llama", device)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith(("mlp", "self_attn"))}


def layer(model: nn.Module, name: str) -> Any:
    return next(module for path, module in lora_layers(model).items() if path.endswith(name))


def decoder(model: nn.Module) -> Any:
    return model.base_model.model.model.layers[0]  # type: ignore[union-attr]
