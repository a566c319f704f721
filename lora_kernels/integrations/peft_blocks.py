"""Blocks whose fused LoRA layers read the same input: attention as a group, an MLP as one node.

A block becomes one of them, or stops being one, by assignment of its `__class__`, like the layers: it has no state of
its own, and at each call it looks whether its layers, as they stand now, can run together. Otherwise it runs its own
forward, and each layer for itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lora_kernels.backends import Activation
from lora_kernels.gated_mlp import lora_gated_mlp
from lora_kernels.group import GroupMember, lora_linear_group
from lora_kernels.integrations.peft_layer import (
    Operands,
    is_fused,
    is_hooked,
    operands_of,
    with_adapter_biases,
)
from lora_kernels.integrations.peft_scope import Scope, scope
from lora_kernels.integrations.peft_traced import StandIn, Traits, takes_a_stand_in

SHARING = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
# By name: which of them there are depends on the release of transformers.
_ACTIVATIONS: dict[tuple[str, str], Activation] = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
}


class _Together(NamedTuple):
    """Layers that can run together: what each is as a member, and their one probability of dropout."""

    members: list[GroupMember]
    dropout_p: float


def why_never(block: nn.Module) -> str | None:
    """Why a block as it is made cannot run its layers together, whatever state they are in; None where it can."""
    if _is_mlp(stock_class(block)):
        return _why_no_mlp(block)
    few = len(_sharing_names(block)) < 2
    return f"fewer than two of {', '.join(SHARING)} are fused LoRA layers" if few else None


def _why_no_mlp(block: nn.Module) -> str | None:
    modules = block._modules
    for name in _GATED:
        if not is_fused(modules.get(name)):
            return f"{name} is no fused LoRA layer"
    act_fn = modules.get("act_fn")
    if act_fn is None or _activation(act_fn) is None:
        return f"its activation is {type(getattr(block, 'act_fn', None)).__name__}, not SiLU or GELU by tanh"
    return None


def why_not_together(block: nn.Module) -> str | None:
    """Why a block's layers, as they and autocast stand now, would run each for itself; None where together."""
    reason = why_never(block)
    if reason is not None:
        return reason
    if _is_mlp(stock_class(block)):
        found: object = _gated_operands(block, None)
    else:
        found = _together([(name, block._modules[name]) for name in _sharing_names(block)], None)
    return found if isinstance(found, str) else None


def is_block(block: nn.Module) -> bool:
    """Whether the block is of a class that is known here, and has a LoRA layer where it could share its input."""
    adapted = {name for name, module in block._modules.items() if isinstance(module, lora.LoraLayer)}
    kind = stock_class(block)
    # Only then by its class, whose code is read once.
    return bool((adapted & {*_GATED} and _is_mlp(kind)) or (adapted & {*SHARING} and _is_attention(kind)))


def is_grouped(block: nn.Module) -> bool:
    """Whether the block is of a class that was made here."""
    return hasattr(type(block), "_stock_class")


def stock_class(block: nn.Module) -> type:
    """The class that the block had before it was grouped."""
    kind: type = getattr(type(block), "_stock_class", type(block))
    return kind


@cache
def grouped_class(kind: type) -> type:
    """The class of blocks of a class, with a forward that runs their layers together."""
    own: dict[str, object] = {"_stock_class": kind, "__reduce_ex__": _reduce, "__doc__": kind.__doc__}
    if _is_mlp(kind):
        own |= {"forward": _forward_mlp, "_input_name": kind.forward.__code__.co_varnames[1]}  # type: ignore[attr-defined]
    else:
        own |= {"forward": _forward_attention, "_traits": Traits.of(kind)}
    # Whoever goes by the class's name, or prints it, finds the stock one.
    return type(kind.__name__, (kind,), own | {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _forward_mlp(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    # Whatever is no call with the one input, by position or by its own name, is the stock forward's to refuse.
    x: Any = args[0] if args else kwargs.get(self._input_name)
    operands = _gated_operands(self, x) if len(args) + len(kwargs) == 1 and x is not None else "it was called wrongly"
    if isinstance(operands, str):
        result: Tensor = self._stock_class.forward(self, *args, **kwargs)
        return result
    ((gate, up, down), p), activation = operands
    y = lora_gated_mlp(x, gate, up, down, activation=activation, dropout_p=p)
    return _as_layer(self._modules["down_proj"], y, x)


def _forward_attention(self: Any, *args: Any, **kwargs: Any) -> Any:
    layers = [self._modules[name] for name in _sharing_names(self)]
    compiling = torch.compiler.is_compiling()
    if len(layers) < 2 or (compiling and not takes_a_stand_in(self, self._stock_class, self._traits)):
        return self._stock_class.forward(self, *args, **kwargs)
    opened = Scope(layers, _compute)
    if compiling:
        return self._stock_class.forward(StandIn(self, SHARING, opened), *args, **kwargs)
    with scope(opened):
        return self._stock_class.forward(self, *args, **kwargs)


def _compute(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    together = _together([("", layer) for layer in layers], x)
    if isinstance(together, str):
        return None
    ys = lora_linear_group(x, together.members, dropout_p=together.dropout_p)
    return [_as_layer(layer, y, x) for layer, y in zip(layers, ys, strict=True)]


def _as_layer(layer: Any, y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype that the layer gives: bitsandbytes returns x's, also where autocast computes in another."""
    return y if isinstance(layer, lora.Linear) or y.dtype == x.dtype else y.to(x.dtype)


def _sharing_names(block: nn.Module) -> list[str]:
    modules = block._modules
    return [name for name in SHARING if is_fused(modules.get(name))]


def _gated_operands(block: nn.Module, x: Tensor | None) -> tuple[_Together, Activation] | str:
    reason = _why_no_mlp(block)
    if reason is not None:
        return reason
    modules = block._modules
    act_fn: Any = modules["act_fn"]
    if is_hooked(act_fn):
        return "act_fn has hooks"
    # The down projection reads h, which has x's dtype or the product's, and asks no more of it than of x.
    together = _together([(name, modules[name]) for name in _GATED], x)
    return together if isinstance(together, str) else (together, _activation(act_fn))  # type: ignore[return-value]


def _activation(module: nn.Module) -> Activation | None:
    kind = type(module)
    if kind is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get((kind.__module__, kind.__name__))


def _together(layers: Sequence[tuple[str, Any]], x: Tensor | None) -> _Together | str:
    """The layers as members of one call, or why each must run for itself. Every call passes here."""
    members: list[GroupMember] = []
    first: tuple[object, ...] | None = None
    for name, layer in layers:
        if is_hooked(layer):
            return f"{name} has hooks"
        if layer._compiled_call_impl is not None:
            return f"{name} is compiled by itself"
        operands = operands_of(layer, x)
        if not isinstance(operands, Operands):
            return f"{name}: {operands}"
        weight, bias, adapters, product = operands
        if len(adapters) != 1:
            return f"{name} has several active adapters"
        adapter = adapters[0]
        shared = (adapter.dropout_p, product, adapter.A.dtype)
        if first is None:
            first = shared
        elif shared != first:
            return f"{name} differs from the layers before it in its probability of dropout or its dtypes"
        members.append(GroupMember(weight, adapter.A, adapter.B, adapter.scaling, with_adapter_biases(bias, adapters)))
    assert first is not None
    return _Together(members, first[0])  # type: ignore[arg-type]


def _return_at_once(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _return_by_name(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _code(function: object) -> tuple[object, ...] | None:
    code: CodeType | None = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_argcount)


_MLPS = (_code(_return_at_once), _code(_return_by_name))


@cache
def _is_mlp(kind: type) -> bool:
    """Whether the class's forward is compiled to the gated MLP's code, and to nothing else."""
    return _code(getattr(kind, "forward", None)) in _MLPS


@cache
def _is_attention(kind: type) -> bool:
    """Whether the class's forward calls q_proj, k_proj and v_proj once each, in this order, with one variable."""
    try:
        source = inspect.getsource(getattr(kind, "forward", None))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return False
    mentioned = re.findall(r"\b([qkv]_proj)\b", source)
    called = re.findall(r"\bself\.([qkv]_proj)\((\w+)\)", source)
    return tuple(mentioned) == SHARING == tuple(name for name, _ in called) and len({x for _, x in called}) == 1


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    kind = self._stock_class
    reduced: tuple[Any, ...] = kind.__reduce_ex__(self, protocol)
    # Of a class that somebody else derived from this one, nothing is known.
    if type(self).__bases__ != (kind,):
        return reduced
    # Copies and pickles name the stock class, for this one is in no module.
    _, (_, *arguments), *state = reduced
    return _new_grouped, (kind, *arguments), *state


def _new_grouped(kind: type, *_: Any) -> Any:
    return object.__new__(grouped_class(kind))
