"""Who computes a LoRA linear, each made from the operands of a case, or the reason why it cannot be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import explain, lora_linear
from lora_kernels.cli.bench.cases import DTYPES, SCALING, Operands
from lora_kernels.dispatch import PREFERENCE, BackendRefused
from lora_kernels.nf4 import NF4Weight

FLOOR = "frozen"


class Missing(Exception):
    """A provider that cannot take part in a case; the message says why."""


class WrongAnswer(Exception):
    """A provider whose output or gradient is not right; the message says which."""


@dataclass
class Layer:
    """A provider's layer: y = forward(x), and the adapters that it trains (A and B, or none)."""

    forward: Callable[[Tensor], Tensor]
    adapters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """`make(operands, dropout)` builds the layer, or raises Missing. Without `lora` it computes x W^T alone."""

    make: Callable[[Operands, float], Layer]
    lora: bool = True


def _frozen(operands: Operands, dropout: float) -> Layer:
    """The floor, in every case: the frozen 16-bit (or float32) linear."""
    weight = operands.weight
    return Layer(lambda x: torch.nn.functional.linear(x, weight))


def _backend(name: str) -> Callable[[Operands, float], Layer]:
    def make(operands: Operands, dropout: float) -> Layer:
        weight: object = operands.weight if operands.quantized is None else operands.quantized
        adapters = operands.lora_A, operands.lora_B
        options = {"scaling": SCALING, "dropout_p": dropout, "backend": name}
        try:
            explain(operands.x, weight, *adapters, **options)  # type: ignore[arg-type]
        except BackendRefused as refusal:
            raise Missing(refusal.reason) from None
        return Layer(lambda x: lora_linear(x, weight, *adapters, **options), adapters)  # type: ignore[arg-type]

    return make


def _bitsandbytes(operands: Operands, dropout: float) -> Layer:
    if operands.quantized is None:
        raise Missing("it is for 4-bit weights")
    base = _linear4bit(operands, operands.quantized)
    return Layer(lambda x: base(x))


def _peft(operands: Operands, dropout: float) -> Layer:
    return _peft_layer(operands, dropout, operands.lora_A.dtype)


def _peft_float32(operands: Operands, dropout: float) -> Layer:
    if operands.lora_A.dtype == torch.float32:
        raise Missing("the case has float32 adapters: it is 'peft'")
    return _peft_layer(operands, dropout, torch.float32)


def _peft_compile(operands: Operands, dropout: float) -> Layer:
    layer = _peft_layer(operands, dropout, operands.lora_A.dtype)
    # Every case is a fresh layer; without this the compiler would give up after eight and run uncompiled, silently.
    torch._dynamo.reset()
    return Layer(torch.compile(layer.forward, fullgraph=True), layer.adapters)


def _peft_layer(operands: Operands, dropout: float, dtype: torch.dtype) -> Layer:
    """PEFT's own layer around the case's tensors."""
    _require("peft")
    from peft import LoraConfig
    from peft.tuners import lora

    case = operands.case
    if operands.quantized is not None:
        base = _linear4bit(operands, operands.quantized)
        from peft.tuners.lora.bnb import Linear4bit as Wrapper
    else:
        base = _plain_linear(operands.weight)
        from peft.tuners.lora.layer import Linear as Wrapper
    config = LoraConfig(r=case.rank, lora_alpha=int(SCALING * case.rank), lora_dropout=dropout)
    try:
        layer: lora.LoraLayer = Wrapper(base, "default", config=config, r=case.rank, lora_alpha=config.lora_alpha)
    except TypeError:  # before PEFT 0.19 the constructor took the fields one by one
        layer = Wrapper(base, "default", r=case.rank, lora_alpha=config.lora_alpha, lora_dropout=dropout)
    adapters = tuple(
        torch.nn.Parameter(t.detach().to(dtype, copy=True)) for t in (operands.lora_A, operands.lora_B)
    )
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = adapters
    layer.train()
    return Layer(lambda x: layer(x), adapters)


def _plain_linear(weight: Tensor) -> torch.nn.Module:
    N, K = weight.shape
    base = torch.nn.Linear(K, N, bias=False, device="meta")
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    return base


def _linear4bit(operands: Operands, quantized: NF4Weight) -> torch.nn.Module:
    """bitsandbytes' layer around the very bits that we compute with."""
    _require("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit

    N, K = quantized.shape
    dtype = DTYPES[operands.case.dtype]
    base: torch.nn.Module = Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    state = quantized.state_dict("weight")
    packed = state.pop("weight")
    base.weight = Params4bit.from_prequantized(packed, state, device=quantized.device, module=base)
    return base


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed")


PROVIDERS: dict[str, Provider] = {
    FLOOR: Provider(_frozen, lora=False),
    "bitsandbytes": Provider(_bitsandbytes, lora=False),
    "peft": Provider(_peft),
    "peft-float32": Provider(_peft_float32),
    "peft-compile": Provider(_peft_compile),
    **{name: Provider(_backend(name)) for name in reversed(PREFERENCE)},
}
# Both may have to be compiled first, which takes longer than --quick is allowed to.
NOT_QUICK = ("peft-compile", "cuda")
