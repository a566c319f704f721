"""Who computes a LoRA linear or a group, each made from the operands of a case, or the reason why it cannot be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import GroupMember, explain, explain_group, lora_linear, lora_linear_group
from lora_kernels.backends import cuda_build
from lora_kernels.cli.bench.cases import DTYPES, SCALING, Operands
from lora_kernels.dispatch import PREFERENCE, BackendRefused
from lora_kernels.nf4 import NF4Weight

FLOOR = "frozen"
_NOT_QUICK = "left out of --quick, because it is not compiled yet"


class Missing(Exception):
    """A provider that cannot take part in a case; the message says why."""


class WrongAnswer(Exception):
    """A provider whose output or gradient is not right; the message says which."""


@dataclass
class Layer:
    """A provider's layer: [y] = forward(x), and the adapters that it trains (A and B, or none).

    Of a group forward has every y, and the adapters are A and B of one layer after the other.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    adapters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """`make(operands, dropout)` builds the layer, or raises Missing. Without `lora` it computes x W^T alone.

    `own_masks`: it drops by the masks of dropout.py, so that the exact answer is known with dropout too.
    """

    make: Callable[[Operands, float], Layer]
    lora: bool = True
    own_masks: bool = False


def _frozen(operands: Operands, dropout: float) -> Layer:
    """The floor, in every case: the frozen 16-bit (or float32) linear, in a group one after the other."""
    weights = [member.weight for member in operands.members]
    return Layer(lambda x: [torch.nn.functional.linear(x, weight) for weight in weights])


def _backend(name: str) -> Callable[[Operands, float], Layer]:
    def make(operands: Operands, dropout: float) -> Layer:
        try:
            return (_group if operands.others else _single)(operands, dropout, name)
        except BackendRefused as refusal:
            raise Missing(refusal.reason) from None

    return make


def _single(operands: Operands, dropout: float, name: str) -> Layer:
    weight, lora_A, lora_B, scaling, _ = _member(operands)
    options: dict[str, Any] = {"scaling": scaling, "dropout_p": dropout, "backend": name}
    explain(operands.x, weight, lora_A, lora_B, **options)
    return Layer(lambda x: [lora_linear(x, weight, lora_A, lora_B, **options)], (lora_A, lora_B))


def _group(operands: Operands, dropout: float, name: str) -> Layer:
    members = [_member(member) for member in operands.members]
    options: dict[str, Any] = {"dropout_p": dropout, "backend": name}
    reason = explain_group(operands.x, members, **options).reason
    if reason is not None:
        raise Missing(f"it would go member by member: {reason}")
    adapters = tuple(t for member in members for t in (member.lora_A, member.lora_B))
    return Layer(lambda x: lora_linear_group(x, members, **options), adapters)


def _member(operands: Operands) -> GroupMember:
    weight = operands.weight if operands.quantized is None else operands.quantized
    return GroupMember(weight, operands.lora_A, operands.lora_B, SCALING)


def _bitsandbytes(operands: Operands, dropout: float) -> Layer:
    bases = [_linear4bit(m, m.quantized) for m in operands.members if m.quantized is not None]
    if not bases:
        raise Missing("it is for 4-bit weights")
    return Layer(lambda x: [base(x) for base in bases])


def _peft(operands: Operands, dropout: float) -> Layer:
    return _peft_layers(operands, dropout, operands.lora_A.dtype)


def _peft_float32(operands: Operands, dropout: float) -> Layer:
    if operands.lora_A.dtype == torch.float32:
        raise Missing("the case has float32 adapters: it is 'peft'")
    return _peft_layers(operands, dropout, torch.float32)


def _peft_compile(operands: Operands, dropout: float) -> Layer:
    layer = _peft_layers(operands, dropout, operands.lora_A.dtype)
    # Every case is a fresh layer; without this the compiler would give up after eight and run uncompiled, silently.
    torch._dynamo.reset()
    return Layer(torch.compile(layer.forward, fullgraph=True), layer.adapters)


def _peft_layers(operands: Operands, dropout: float, dtype: torch.dtype) -> Layer:
    """PEFT's own layers, one after the other; autograd adds up their dx."""
    _require("peft")
    modules, adapters = zip(*(_peft_layer(member, dropout, dtype) for member in operands.members), strict=True)
    return Layer(lambda x: [module(x) for module in modules], tuple(t for pair in adapters for t in pair))


def _peft_layer(
    operands: Operands, dropout: float, dtype: torch.dtype
) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    """PEFT's own layer around the case's tensors, and its A and B."""
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
    A, B = (torch.nn.Parameter(t.detach().to(dtype, copy=True)) for t in (operands.lora_A, operands.lora_B))
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B
    layer.train()
    return layer, (A, B)


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
    **{name: Provider(_backend(name), own_masks=True) for name in (*reversed(PREFERENCE), "auto")},
}
# Who takes part only where it is named.
NAMED_ONLY = {"auto": "left out, because it is made of the others: name it after --providers to have it"}


def left_out_of_quick() -> dict[str, str]:
    """Who would be compiled for longer than --quick may take, and how to have it all the same."""
    reasons = {"peft-compile": f"{_NOT_QUICK}: --quick --providers peft-compile compiles it for each layer"}
    if _cuda_would_compile():
        reasons["cuda"] = f"{_NOT_QUICK}: `python -m lora_kernels build --cuda` compiles it, once"
    return reasons


def _cuda_would_compile() -> bool:
    """False where it is compiled, and also where it cannot be: there it refuses at once, with the reason."""
    if not torch.cuda.is_available() or cuda_build.is_built(torch.cuda.get_device_capability()):
        return False
    return (cuda_build.missing() or cuda_build.cannot_keep()) is None
