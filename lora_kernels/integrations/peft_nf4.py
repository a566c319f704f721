"""PEFT's LoRA linear over an NF4 base of bitsandbytes, fused. Importing this imports bitsandbytes."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from bitsandbytes import nn as bnb_nn
from peft.tuners import lora
from torch import Tensor, nn

from lora_kernels.integrations import peft_layer
from lora_kernels.integrations.peft_layer import PLAIN, Base, Operands, describe, is_hooked, is_plain, operands_of
from lora_kernels.integrations.peft_scope import taken
from lora_kernels.limits import BASE_DTYPES
from lora_kernels.nf4 import NF4Weight

# bitsandbytes takes a parameter that lost its class for its own: FSDP hands out plain ones.
_PARAMETERS = (bnb_nn.Params4bit, *PLAIN)


# As for Linear: PEFT goes by the name, and prints it.
class Linear4bit(lora.Linear4bit):  # type: ignore[misc]
    """PEFT's `lora.Linear4bit`, fused: the equation of Linear, over the values that the NF4 base decodes to.

    Like Linear it has no state of its own, and runs PEFT's forward for whatever `why_not_fused` names.

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
            y = peft_layer.fused_forward(self, x, operands)
            # bitsandbytes returns x's dtype, also where autocast computes in another.
            return y if y.dtype == x.dtype else y.to(x.dtype)
        result: Tensor = super().forward(x, *args, **kwargs)
        if operands is not None:
            peft_layer.warn_of_mismatch(self, x, operands)
        return result

    @staticmethod
    def _read_base(base: nn.Module, x: Tensor | None) -> Base | str:
        return _nf4_base(base, x)


def _nf4_base(base: Any, x: Tensor | None) -> Base | str:
    if type(base) is not bnb_nn.Linear4bit and type(base) is not bnb_nn.LinearNF4:
        return f"its base layer is a {type(base).__name__}, not bitsandbytes' Linear4bit"
    if is_hooked(base):
        return "its base layer has hooks"
    stored, bias = base.weight, base.bias
    if type(stored) not in _PARAMETERS or not (bias is None or is_plain(bias, 1)):
        return f"its base weight or bias is not a plain tensor: {describe(stored)}, {describe(bias)}"
    if stored.requires_grad:
        return "its base weight is trained"
    device = stored.device
    if device.type == "meta":
        return "its base weight is on the meta device"
    weight = _nf4_weight(base, stored)
    if isinstance(weight, str):
        return weight
    if tuple(weight.shape) != (base.out_features, base.in_features):
        return f"its base weight is {list(weight.shape)}, not [{base.out_features}, {base.in_features}]"
    if x is not None:
        if type(x) not in PLAIN:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        if x.device != device:
            return f"the input is on {x.device}, its base weight on {device}"
        if not base.compute_type_is_set:
            # bitsandbytes settles this by the first input that it sees.
            base.set_compute_type(x)
            base.compute_type_is_set = True
    autocast = torch.is_autocast_enabled(device.type)
    product = _product_dtype(base, weight, x, torch.get_autocast_dtype(device.type) if autocast else None)
    if isinstance(product, str):
        return product
    if bias is not None and bias.dtype not in (product, torch.float32) and not autocast:
        return f"its bias is {bias.dtype}, where bitsandbytes computes in {product}"
    return Base(weight, bias, product, autocast)


def _product_dtype(base: Any, weight: NF4Weight, x: Tensor | None, autocast: torch.dtype | None) -> torch.dtype | str:
    """The dtype in which bitsandbytes computes x W^T, or why no single one does."""
    compute: torch.dtype | None = base.compute_dtype
    if autocast is not None:
        # Under autocast it casts x to compute_dtype first. From float32 that is no detour where a gradient is asked
        # for; without, it computes in float32 itself.
        detour = compute is not None and compute != autocast
        if detour and not (compute == torch.float32 and torch.is_grad_enabled()):
            return f"autocast is {autocast}, and bitsandbytes' compute_dtype {compute}"
        if x is not None and x.dtype not in (autocast, torch.float32):
            return f"the input is {x.dtype}, and autocast {autocast}"
        return autocast if autocast in BASE_DTYPES else f"autocast is {autocast}"
    given = weight.dtype if x is None else x.dtype
    product = compute or given
    if product not in BASE_DTYPES:
        return f"bitsandbytes' compute_dtype is {product}, not bfloat16, float16 or float32"
    if x is not None and x.dtype != product:
        return f"the input is {x.dtype}, and bitsandbytes' compute_dtype {product}"
    return product


class _Entry(NamedTuple):
    """An NF4Weight, and what it was read from: while that is the same, so is the weight.

    It shares the parameter's storage, so what is written there it has too.
    """

    parameter: ref[Tensor]
    parts: tuple[object, ...]
    weight: NF4Weight


# By the parameter's id. Not an attribute of the layer or the parameter: copies and checkpoints would carry it.
_entries: dict[int, _Entry] = {}


def _nf4_weight(base: Any, stored: Tensor) -> NF4Weight | str:
    """The NF4Weight that shares the base layer's storage, or why there is none."""
    state = getattr(stored, "quant_state", None)
    if state is None:
        # As bitsandbytes does: whatever re-creates a parameter loses its state, of which the layer has another.
        state = base.quant_state
    if torch.compiler.is_compiling():
        return _read(stored, state)
    # state2 is missing where bitsandbytes repacked the weight, which replaces the parameter's storage too.
    nested = getattr(state, "state2", None)
    parts = (state, getattr(state, "absmax", None), getattr(state, "offset", None), nested)
    entry = _entries.get(id(stored))
    if (
        entry is not None
        and entry.parameter() is stored
        and entry.weight.packed.data_ptr() == stored.data_ptr()
        and all(map(is_, entry.parts, parts))
    ):
        return entry.weight
    # Remembered beyond this call: views made in an inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        weight = _read(stored, state)
    if isinstance(weight, NF4Weight):
        key = id(stored)
        _entries[key] = _Entry(ref(stored, lambda _: _entries.pop(key, None)), parts, weight)
    return weight


def _read(stored: Tensor, state: Any) -> NF4Weight | str:
    try:
        return NF4Weight.from_bitsandbytes(stored, state)
    except ValueError as error:
        return f"its base weight is no NF4 weight: {error}"
