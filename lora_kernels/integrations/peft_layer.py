"""PEFT's LoRA linear with the forward of this package, and the conditions under which it runs fused."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lora_kernels import native
from lora_kernels.functional import lora_linear
from lora_kernels.integrations.peft_scope import taken
from lora_kernels.limits import MAX_RANK
from lora_kernels.weights import Weight

_BASES = (nn.Linear, Conv1D)
_DROPOUTS = (nn.Dropout, nn.Identity)
PLAIN = (nn.Parameter, Tensor)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# PEFT recognises its layers by "Linear" in the class's name, and prints that name: it stays the stock one.
class Linear(lora.Linear):  # type: ignore[misc]
    """PEFT's `lora.Linear`, fused: y = x W^T + b + sum over the active adapters of s (D(x) A^T B^T + c).

    c is lora_B's bias, where there is one. The class has no state of its own: a layer becomes one, or stops
    being one, by assignment of its `__class__`. Whatever `why_not_fused` names runs PEFT's forward.

    Raises:
        ValueError: the last dimension of x is not in_features. For the rest, what PEFT's forward raises.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not args and not kwargs
        shared = taken(self, x) if plain else None
        if shared is not None:
            return shared
        operands = operands_of(self, x) if plain else None
        if isinstance(operands, Operands):
            return fused_forward(self, x, operands)
        result: Tensor = super().forward(x, *args, **kwargs)
        if operands is not None:
            warn_of_mismatch(self, x, operands)
        return result

    @staticmethod
    def _read_base(base: nn.Module, x: Tensor | None) -> Base | str:
        """The base layer for an input, None if there is none yet, or why the fused forward must not run."""
        return _dense_base(base, x)


def is_fused(layer: nn.Module | None) -> bool:
    """Whether the layer is of a fused class; each is a direct subclass of PEFT's."""
    return hasattr(type(layer), "_read_base")


def why_not_fused(layer: lora.LoraLayer) -> str | None:
    """Why the layer, as it and autocast stand now, would run PEFT's own forward; None where it runs fused."""
    operands = operands_of(layer, None)
    return operands if isinstance(operands, str) else None


class _Adapter(NamedTuple):
    """An active adapter of a layer: A [r, K], B [N, r], lora_B's bias c, and the dropout that is in force."""

    name: str
    A: Tensor
    B: Tensor
    c: Tensor | None
    scaling: float | Tensor
    dropout_p: float


class Base(NamedTuple):
    """A base layer as the fused forward takes it: W [N, K], and the dtype in which x W^T is computed."""

    weight: Weight
    bias: Tensor | None
    product: torch.dtype
    autocast: bool


class Operands(NamedTuple):
    """What the fused forward works on, and the dtype in which x W^T is computed."""

    weight: Weight
    bias: Tensor | None
    adapters: list[_Adapter]
    product: torch.dtype


def operands_of(layer: lora.LoraLayer, x: Tensor | None) -> Operands | str:
    """What the fused forward works on, or why it must not run. Every call passes here: it must stay cheap."""
    plain = None if x is None else _read_in_cpp(layer, x)
    return _read(layer, x) if plain is None else plain


def _read(layer: lora.LoraLayer, x: Tensor | None) -> Operands | str:
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return f"adapters are merged into its base weight: {', '.join(layer.merged_adapters)}"
    if x is not None and is_transformed():
        return "torch.func, forward-mode automatic differentiation or torch.jit.trace looks into it"
    # A registered module is found in a fifth of the time that an attribute of a Module takes.
    modules = layer._modules
    base = layer._read_base(modules["base_layer"], x)
    if isinstance(base, str):
        return base
    weight, bias, product, autocast = base
    device = weight.device
    adapters = []
    for name in layer.active_adapters:
        if name in modules["lora_A"]:
            adapter = _adapter(layer, name, device, product, autocast)
            if isinstance(adapter, str):
                return f"adapter {name!r} {adapter}"
            adapters.append(adapter)
    if not adapters:
        return "it has none of the active adapters"
    rank = sum(adapter.A.shape[0] for adapter in adapters)
    if rank > MAX_RANK:
        return f"the ranks of its active adapters add up to {rank}, more than {MAX_RANK}"
    return Operands(weight, bias, adapters, product)


def _read_in_cpp(layer: lora.LoraLayer, x: Tensor) -> Operands | None:
    """What _read finds, of a layer as plain as most are; None of any other, or where the launch path is not in use."""
    if torch.compiler.is_compiling() or native.operands is None or is_transformed():
        return None
    found = native.operands(layer, x, type(layer) is Linear, MAX_RANK)
    if found is None:
        return None
    weight, bias, product, name, A, B, scaling, p = found
    return Operands(weight, bias, [_Adapter(name, A, B, None, scaling, p)], product)


# A graph that is being traced asks once, while tracing: PyTorch guards it against another state of these.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether something looks into this very call that needs PyTorch's own operators, and no node of ours."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def warn_of_mismatch(layer: lora.LoraLayer, x: Tensor, reason: str) -> None:
    """Warn, once for each reason, where a layer that is reported fused ran PEFT's code because of a dtype or a device.

    What somebody did to the layer, or with the call, on purpose is not that.
    """
    if type(x) in PLAIN and not is_transformed() and _is_reported_fused(layer, x.device.type):
        _warn_once(reason)


def _is_reported_fused(layer: lora.LoraLayer, device_type: str) -> bool:
    """Whether a report of now would call the layer fused, or one that was made outside of autocast."""
    if why_not_fused(layer) is None:
        return True
    if not torch.is_autocast_enabled(device_type):
        return False
    with torch.autocast(device_type, enabled=False):
        return why_not_fused(layer) is None


_warned: set[str] = set()


# A graph that is being traced takes the call for a constant: it is made while tracing, and does not break the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"a LoRA layer that lora_kernels could fuse runs PEFT's own code: {reason}. Run the model under autocast "
            "in the dtype in which it computes (bf16=True or fp16=True of a Trainer, torch.autocast in a loop), or "
            "bring input, base weight and adapters to one dtype and device. Said once for each reason.",
            stacklevel=2,
        )


def _dense_base(base: Any, x: Tensor | None) -> Base | str:
    if type(base) not in _BASES:
        return f"its base layer is a {type(base).__name__}, not an nn.Linear or a Conv1D"
    if is_hooked(base):
        return "its base layer has hooks"
    weight, bias = parameter(base, "weight"), parameter(base, "bias")
    if not is_plain(weight, 2) or not (bias is None or is_plain(bias, 1)):
        return f"its base weight or bias is not a plain tensor: {describe(weight)}, {describe(bias)}"
    if weight.requires_grad:
        return "its base weight is trained"
    device, dtype = weight.device, weight.dtype
    if device.type == "meta":
        return "its base weight is on the meta device"
    autocast = torch.is_autocast_enabled(device.type)
    # In autocast all meet in its dtype; elsewhere PEFT casts x to the adapters' dtype and nothing else.
    product = torch.get_autocast_dtype(device.type) if autocast else dtype
    if dtype not in _DTYPES or product not in _DTYPES:
        return f"its base weight is {dtype}, not bfloat16, float16 or float32"
    if bias is not None and bias.dtype != dtype and not autocast:
        return f"its base weight is {dtype}, its bias {bias.dtype}, and there is no autocast"
    if x is not None:
        if type(x) not in PLAIN:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        if x.device != device:
            return f"the input is on {x.device}, its base weight on {device}"
        if x.dtype != dtype and not (autocast and x.dtype in _DTYPES):
            return f"the input is {x.dtype}, its base weight {dtype}"
    return Base(weight.T if type(base) is Conv1D else weight, bias, product, autocast)


def _adapter(
    layer: lora.LoraLayer, name: str, device: torch.device, product: torch.dtype, autocast: bool
) -> _Adapter | str:
    """The operands of one adapter, or what it is that the fused forward does not take."""
    if name in layer.lora_variant:
        return f"is a variant of LoRA: {type(layer.lora_variant[name]).__name__}"
    modules = layer._modules
    lora_A, lora_B, dropout = modules["lora_A"][name], modules["lora_B"][name], modules["lora_dropout"][name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or type(dropout) not in _DROPOUTS:
        kinds = ", ".join(type(module).__name__ for module in (lora_A, lora_B, dropout))
        return f"is not made of nn.Linear and nn.Dropout: {kinds}"
    if is_hooked(lora_A) or is_hooked(lora_B) or is_hooked(dropout):
        return "has hooks on lora_A, lora_B or lora_dropout"
    A, B, scaling = parameter(lora_A, "weight"), parameter(lora_B, "weight"), layer.scaling[name]
    if not is_plain(A, 2) or not is_plain(B, 2):
        return f"has weights that are not plain matrices: {describe(A)}, {describe(B)}"
    if A.device != device or B.device != device:
        return f"is on {A.device} and {B.device}, the base weight on {device}"
    if isinstance(scaling, Tensor):
        if scaling.device != device:
            return f"has its scaling on {scaling.device}, the base weight on {device}"
        if scaling.numel() != 1 or scaling.requires_grad or scaling.is_complex() or scaling.dtype == torch.bool:
            return f"has a scaling that is no real constant: {describe(scaling)}, {scaling.dtype}"
    elif type(scaling) is not float:
        # NumPy's numbers and a bool are real to PEFT, too.
        if not isinstance(scaling, Real):
            return f"has a scaling that is no real number but a {type(scaling).__name__}"
        scaling = float(scaling)
    if A.dtype != B.dtype or A.dtype not in (product, torch.float32):
        return f"is {A.dtype} and {B.dtype}, where the base product is {product}"
    if A.dtype != product and not autocast and not layer.cast_input_dtype_enabled:
        return f"is {A.dtype}, the base weight {product}, and casting of inputs is disabled"
    p = float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0
    return _Adapter(name, A, B, parameter(lora_B, "bias"), scaling, p)


def fused_forward(layer: lora.LoraLayer, x: Tensor, operands: Operands) -> Tensor:
    """The base and all adapters, in one call of lora_linear where no second adapter drops anything."""
    weight, bias, adapters, _ = operands
    fused, apart = adapters, []
    # Masks differ from adapter to adapter, so only adapters without one can share a pass over x.
    if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
        fused, apart = adapters[:1], adapters[1:]
    bias = with_adapter_biases(bias, fused)
    _, A, B, _, scaling, p = fused[0] if len(fused) == 1 else _stacked(fused)
    y = lora_linear(x, weight, A, B, scaling=scaling, bias=bias, dropout_p=p)
    if not apart:
        return y
    dtype = y.dtype
    for adapter in apart:
        name = adapter.name
        x = layer._cast_input_dtype(x, adapter.A.dtype)
        y = y + layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * adapter.scaling
    return y.to(dtype)


def with_adapter_biases(bias: Tensor | None, adapters: list[_Adapter]) -> Tensor | None:
    """The base's bias and those of the adapters' lora_B, which scaling multiplies too, as in PEFT."""
    for adapter in adapters:
        if adapter.c is not None:
            c = adapter.c * adapter.scaling
            bias = c if bias is None else bias + c
    return bias


def _stacked(adapters: list[_Adapter]) -> _Adapter:
    """Several adapters without dropout as one: its rank is the sum of theirs, its B holds their scalings."""
    A = torch.cat([adapter.A for adapter in adapters])
    B = torch.cat([adapter.B * adapter.scaling for adapter in adapters], dim=1)
    return _Adapter("stacked", A, B, None, 1.0, 0.0)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `forward` is replaced on the instance, as accelerate's offloading does.

    Where it has undone that, the method of the class is left on the instance, which replaces nothing.
    """
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_own_forward(module)
    )


def parameter(module: nn.Module, name: str) -> Any:
    """module.name, sooner than as an attribute where it is a parameter; parametrized modules have none of that name."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_plain(tensor: Tensor, dim: int) -> bool:
    """Neither a DTensor or another subclass, nor a flat shard or the empty placeholder of ZeRO-3."""
    return type(tensor) in PLAIN and tensor.dim() == dim


def describe(tensor: Tensor | None) -> str:
    """Type and shape, for a reason."""
    return "None" if tensor is None else f"{type(tensor).__name__}{list(tensor.shape)}"
