"""The dtype regimes: against the exact result, the fused layer's error is no larger than stock PEFT's."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import pytest
import torch
from lora_checks import run, some_input, stock_and_fused_layer
from peft.tuners import lora
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Regime:
    name: str
    base: torch.dtype
    adapters: torch.dtype
    autocast: torch.dtype | None
    x: torch.dtype

    def __str__(self) -> str:
        return self.name

    @property
    def product(self) -> torch.dtype:
        """The dtype of the products of the base; and of the branch's, unless its accuracy is float32."""
        return self.autocast or self.base

    def accuracy(self, name: str) -> torch.dtype:
        """The dtype that the gradient `name`, or the output, is rounded to on the way."""
        return FP32 if "lora_" in name and self.autocast is None and self.adapters == FP32 else self.product


REGIMES = [
    Regime("R1", BF16, FP32, BF16, BF16),
    Regime("R1, float32 x", BF16, FP32, BF16, FP32),
    Regime("R1, float32 base", FP32, FP32, BF16, FP32),
    Regime("R2", BF16, BF16, None, BF16),
    Regime("R2, autocast", BF16, BF16, BF16, BF16),
    Regime("R2, autocast, float32 x", BF16, BF16, BF16, FP32),
    Regime("R3", BF16, FP32, None, BF16),
    Regime("R3, float16", FP16, FP32, None, FP16),
    Regime("R4, float16 base", FP16, FP32, FP16, FP16),
    Regime("R4, float32 base", FP32, FP32, FP16, FP32),
    Regime("float16", FP16, FP16, None, FP16),
    Regime("float32", FP32, FP32, None, FP32),
    Regime("bfloat16 adapters over float32", FP32, BF16, BF16, FP32),
]


def cast(layer: lora.Linear, regime: Regime) -> lora.Linear:
    layer = copy.deepcopy(layer).to(regime.adapters)
    layer.base_layer.to(regime.base)
    return layer


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
def test_no_less_accurate_than_peft(device: str, regime: Regime, adapters: int, lora_bias: bool) -> None:
    stock, fused = (
        cast(layer, regime) for layer in stock_and_fused_layer(device, adapters=adapters, lora_bias=lora_bias)
    )
    for layer in (stock, fused):
        layer.base_layer.bias.requires_grad_()
    x = some_input(device, 256).to(regime.x)
    exact = run(copy.deepcopy(stock).double(), x.double())
    with autocast(device, regime):
        theirs, ours = run(stock, x), run(fused, x)
    assert list(ours) == list(theirs) == list(exact)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert_no_worse(name, ours[name], theirs[name], value, regime.accuracy(name))


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_runs_fused(device: str, regime: Regime, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = stock_and_fused_layer(device, adapters=2)
    fused = cast(fused, regime)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("PEFT's own forward ran")

    monkeypatch.setattr(lora.Linear, "forward", refuse)
    with autocast(device, regime):
        fused(some_input(device).to(regime.x))


def test_mixed_adapter_dtypes(device: str) -> None:
    """PEFT casts x from adapter to adapter; between a 16-bit dtype and float32 nothing is lost on the way."""
    for first, second in [(BF16, FP32), (FP32, BF16)]:
        stock, fused = stock_and_fused_layer(device, adapters=2)
        for layer in (stock, fused):
            layer.base_layer.to(BF16)
            for name, dtype in [("default", first), ("second", second)]:
                layer.lora_A[name].to(dtype)
                layer.lora_B[name].to(dtype)
        x = some_input(device, 256).to(BF16)
        exact = run(copy.deepcopy(stock).double(), x.double())
        theirs, ours = run(stock, x), run(fused, x)
        for name, value in exact.items():
            assert ours[name].dtype == theirs[name].dtype
            assert_no_worse(name, ours[name], theirs[name], value, BF16)


def assert_no_worse(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, accuracy: torch.dtype) -> None:
    """Our error is at most PEFT's and a floor: a fifth of an ulp, about what one rounding adds to the norm.

    In float32 the order of the additions, which is anybody's, weighs more than that.
    """
    error, peft_error = distance(ours, exact), distance(theirs, exact)
    floor = (32 if accuracy == FP32 else 0.2) * torch.finfo(accuracy).eps
    assert error <= peft_error + floor, f"{name}: {error:.1e} off, PEFT {peft_error:.1e}"


def autocast(device: str, regime: Regime) -> contextlib.AbstractContextManager[object]:
    if regime.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=regime.autocast)


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
