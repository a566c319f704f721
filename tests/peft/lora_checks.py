"""Checks of one fused layer against stock PEFT or the equation. Each fails with an AssertionError.

They are functions, not tests, so that test_planted.py can see that they fail when a bug is planted.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft_models import assert_same, randomize_adapters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import apply_lora_kernels, lora_linear_reference
from lora_kernels.dropout import Dropout, inverse_keep

IN, OUT, ROWS = 48, 40, 32
Pair = tuple[lora.Linear, lora.Linear]


def stock_and_fused_layer(device: str, base: str = "linear", adapters: int = 1, **options: Any) -> Pair:
    """A LoRA layer 48 -> 40 of stock PEFT and its fused twin. Adapter i has rank 4 + 3 i and alpha 6 + i."""
    torch.manual_seed(0)
    linear: nn.Module = Conv1D(OUT, IN) if base == "conv1d" else nn.Linear(IN, OUT)
    model: nn.Module = nn.Sequential(linear)
    names = ["default", "second", "third"][:adapters]
    dropouts = options.pop("dropouts", [0.0] * adapters)
    for i, (name, p) in enumerate(zip(names, dropouts, strict=True)):
        config = peft.LoraConfig(
            r=4 + 3 * i,
            lora_alpha=6 + i,
            lora_dropout=p,
            target_modules=["0"],
            fan_in_fan_out=base == "conv1d",
            **options,
        )
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
    model[0].set_adapter(names)
    randomize_adapters(model)
    with torch.no_grad():
        model[0].base_layer.weight.normal_(std=0.2)
        model[0].base_layer.bias.normal_()
    fused = copy.deepcopy(model)
    report = apply_lora_kernels(fused)
    assert report.fused == len(report) == 1, str(report)
    return model.to(device)[0], fused.to(device)[0]


def some_input(device: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*(shape or (4, ROWS // 4)), IN, generator=generator).to(device)


def run(layer: nn.Module, x: Tensor, seed: int = 8) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every parameter that has one."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(output_gradient(y))
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def output_gradient(y: Tensor) -> Tensor:
    """Random, and a bfloat16 number whatever y's dtype, so that runs in several dtypes get the same."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).to(y)


def check_against_stock(device: str, adapters: int = 1, base: str = "linear", **options: Any) -> None:
    stock, fused = stock_and_fused_layer(device, base, adapters, **options)
    x = some_input(device)
    assert_same(run(stock, x), run(fused, x), 1e-5)


def check_set_scale(device: str, adapters: int = 1) -> None:
    stock, fused = stock_and_fused_layer(device, adapters=adapters)
    for layer in (stock, fused):
        layer.set_scale("default", 2.5)
        layer.scale_layer(0.6)
    x = some_input(device)
    assert_same(run(stock, x), run(fused, x), 1e-5)


def check_output_dtype(device: str) -> None:
    """Float32 adapters over a bfloat16 base: the sum is wider, the output is not."""
    for dropouts in ([0.0, 0.0], [0.3, 0.0]):
        stock, fused = stock_and_fused_layer(device, adapters=2, dropouts=dropouts)
        for layer in (stock, fused):
            layer.base_layer.to(torch.bfloat16)
        x = some_input(device).to(torch.bfloat16)
        assert fused(x).dtype == stock(x).dtype == torch.bfloat16


def check_dropout_mask(device: str, p: float = 0.4) -> None:
    """Output and gradients equal the equation with the very mask that the generator's state gives."""
    stock, fused = stock_and_fused_layer(device, dropouts=[p])
    x = some_input(device)
    result = run(fused, x, seed=8)
    torch.manual_seed(8)
    mask = Dropout.draw(p, x.device)
    assert mask is not None

    exact = copy.deepcopy(stock).double()
    double = x.double().requires_grad_()
    A, B = exact.lora_A["default"].weight, exact.lora_B["default"].weight
    y = lora_linear_reference(
        double,
        exact.base_layer.weight,
        A,
        B,
        scaling=exact.scaling["default"],
        bias=exact.base_layer.bias,
        keep=mask.keep(x[..., 0].numel(), IN).view(x.shape),
        dropout_p=p,
    )
    y.backward(output_gradient(y))
    assert double.grad is not None
    assert A.grad is not None
    assert B.grad is not None
    expected = {
        "y": y.detach(),
        "x": double.grad,
        "lora_A.default.weight": A.grad,
        "lora_B.default.weight": B.grad,
    }
    assert_same({name: value.float() for name, value in expected.items()}, result, 1e-5)


def check_dropout_statistics(device: str, p: float = 0.3) -> None:
    """With W = 0, A = B = 1 and s = 1 the output is D(x): of ones, 0 with probability p, else 1 / (1 - p).

    That p is the one that a mask has, a multiple of 2^-16.
    """
    layer = peft.inject_adapter_in_model(
        peft.LoraConfig(r=8, lora_alpha=8, lora_dropout=p, target_modules=["0"]),
        nn.Sequential(nn.Linear(8, 8, bias=False)),
    )
    apply_lora_kernels(layer)
    layer.to(device)
    with torch.no_grad():
        layer[0].base_layer.weight.zero_()
        layer[0].lora_A["default"].weight.copy_(torch.eye(8))
        layer[0].lora_B["default"].weight.copy_(torch.eye(8))
        first, second = layer(torch.ones(4096, 8, device=device)), layer(torch.ones(4096, 8, device=device))
    kept = first > 0.5
    assert_same(kept * inverse_keep(p), first, 1e-6)
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * deviation
    # Two calls draw two masks: they agree where both keep or both drop, by chance alone.
    agreement = (kept == (second > 0.5)).float().mean().item()
    assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.02
    layer.eval()
    assert_same(torch.ones(2, 8, device=device), layer(torch.ones(2, 8, device=device)).detach(), 1e-6)
