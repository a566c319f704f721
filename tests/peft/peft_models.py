"""Small random models with LoRA adapters whose B is not zero, and the comparison of two runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_kernels import apply_lora_kernels

VOCABULARY = 64


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 40)
        self.lin1 = nn.Linear(40, 17, bias=False)
        self.head = nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.lin0(x).relu()))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def gpt2() -> nn.Module:
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, **dropouts)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "llama": llama, "gpt2": gpt2}
TARGETS = {
    "mlp": ["lin0", "lin1"],
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


def base_model(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def lora_config(kind: str = "llama", **options: Any) -> peft.LoraConfig:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind]}
    if kind == "gpt2":
        defaults["fan_in_fan_out"] = True
    return peft.LoraConfig(**(defaults | options))


def randomize_adapters(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter weight a value that depends on its name and the seed alone; B is never zero."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and "magnitude" not in name:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            with torch.no_grad():
                parameter.copy_(value)


def lora_model(kind: str = "llama", device: str = "cpu", **options: Any) -> peft.PeftModel:
    model = peft.get_peft_model(base_model(kind), lora_config(kind, **options))
    randomize_adapters(model)
    return model.to(device)


def stock_and_fused(kind: str = "llama", device: str = "cpu", **options: Any) -> tuple[nn.Module, nn.Module]:
    stock = lora_model(kind, device, **options)
    fused = copy.deepcopy(stock)
    apply_lora_kernels(fused)
    return stock, fused


def batch(kind: str, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "mlp":
        return torch.randn(3, 7, 24, generator=generator).to(device)
    return torch.randint(VOCABULARY, (2, 9), generator=generator).to(device)


def output(model: nn.Module, kind: str, device: str, **arguments: Any) -> Tensor:
    result = model(batch(kind, device), **arguments)
    return result if isinstance(result, Tensor) else result.logits


def gradients(model: nn.Module, kind: str, device: str) -> dict[str, Tensor]:
    """The output and the gradient of every parameter that has one."""
    model.zero_grad()
    y = output(model, kind, device)
    torch.manual_seed(3)
    y.float().mul(torch.randn(y.shape).to(device)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in found), "no gradient reached an adapter"
    return {"output": y.detach(), **found}


def lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


def assert_same(left: Any, right: Any, tolerance: float, where: str = "") -> None:
    """Two nested results agree: tensors to `tolerance` in the relative 2-norm, all else exactly."""
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key, value in left.items():
            assert_same(value, right[key], tolerance, f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, tolerance, f"{where}/{index}")
    elif isinstance(left, Tensor):
        assert left.shape == right.shape, where
        assert left.dtype == right.dtype, where
        size = left.double().norm().item()
        error = (left.double() - right.double()).norm().item()
        assert error <= tolerance * size, f"{where}: {error:.2e} off, where the norm is {size:.2e}"
    else:
        assert left == right, where
