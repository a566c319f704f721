"""Which layers the launch path reads in C++. That it reads what Python does, conftest.py sees to in every test here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from lora_checks import run, some_input, stock_and_fused_layer
from peft.tuners import lora
from peft_models import assert_same
from torch import nn

Change = Callable[[lora.Linear], Any]

PLAIN: dict[str, Change] = {
    "as it is": lambda layer: None,
    "in evaluation": lambda layer: layer.eval(),
    "without a bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "another scaling": lambda layer: layer.set_scale("default", 2.5),
    "a scaling that is set": lambda layer: layer.scaling.update(default=0.3),
    "dropout of no probability": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.0)}),
    "enabled again": lambda layer: (layer.enable_adapters(False), layer.enable_adapters(True)),
}

SPECIAL: dict[str, Change] = {
    "a hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "a hook before lora_A": lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda *_: None),
    "a hook on lora_B": lambda layer: layer.lora_B["default"].register_forward_hook(lambda *_: None),
    "a hook on the dropout": lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda *_: None),
    "a hook on gradients": lambda layer: layer.base_layer.register_full_backward_hook(lambda *_: None),
    "a forward of its own": lambda layer: setattr(
        layer.base_layer, "forward", MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, layer.base_layer)
    ),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "a trained base": lambda layer: layer.base_layer.weight.requires_grad_(),
    "a subclass of Linear": lambda layer: setattr(layer, "base_layer", _replaced(layer.base_layer)),
    "another dropout": lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.0)}),
    "a scaling of NumPy's": lambda layer: layer.scaling.update(default=np.float64(0.3)),
    "a scaling that is a tensor": lambda layer: layer.scaling.update(default=torch.tensor(0.3)),
    "a variant": lambda layer: layer.lora_variant.update(default=_Variant()),
    "float64 adapters": lambda layer: layer.lora_A.double(),
    "no casting": lambda layer: (layer.base_layer.bfloat16(), setattr(layer, "cast_input_dtype_enabled", False)),
}
MIXED = {"float64 adapters", "no casting"}


class _Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class _Variant:
    @staticmethod
    def forward(layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        return result


def _replaced(linear: nn.Linear) -> nn.Linear:
    made = _Linear(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    return made.to(linear.weight).requires_grad_(False)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_layers_are_read(name: str, device: str, read_in_cpp: list[Any]) -> None:
    stock, fused = stock_and_fused_layer(device)
    for layer in (stock, fused):
        PLAIN[name](layer)
    x = some_input(device)
    assert_same(run(stock, x), run(fused, x), 1e-5)
    assert read_in_cpp == [fused]


@pytest.mark.parametrize("name", SPECIAL)
def test_others_are_not(name: str, device: str, read_in_cpp: list[Any]) -> None:
    _, fused = stock_and_fused_layer(device)
    SPECIAL[name](fused)
    x = some_input(device).to(fused.base_layer.weight.dtype)
    # Dtypes that do not fit, PEFT itself cannot run.
    with pytest.raises(RuntimeError, match="dtype") if name in MIXED else nullcontext():
        fused(x)
    assert read_in_cpp == []


@pytest.mark.parametrize("options", [{"adapters": 2}, {"lora_bias": True}, {"base": "conv1d"}], ids=str)
def test_other_kinds_are_not(options: dict[str, Any], device: str, read_in_cpp: list[Any]) -> None:
    stock, fused = stock_and_fused_layer(device, **options)
    x = some_input(device)
    assert_same(run(stock, x), run(fused, x), 1e-5)
    assert read_in_cpp == []


def test_what_autocast_says_is_read(device: str, read_in_cpp: list[Any]) -> None:
    stock, fused = stock_and_fused_layer(device)
    with torch.autocast(device, torch.bfloat16):
        ys = [layer(some_input(device)) for layer in (stock, fused)]
    assert ys[0].dtype == ys[1].dtype == torch.bfloat16
    assert read_in_cpp == [fused]


def test_inputs_that_do_not_fit_are_not(device: str, read_in_cpp: list[Any]) -> None:
    _, fused = stock_and_fused_layer(device)
    with pytest.raises(RuntimeError):
        fused(some_input(device).bfloat16())
    with pytest.raises(TypeError):
        fused("x")
    assert read_in_cpp == []
