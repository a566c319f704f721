"""What the PEFT integration relies on, checked against the PEFT that is installed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import CodeType

import peft
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

# Every name that lora.Linear.forward mentions, the same from 0.18 to 0.21. New behaviour brings a new name.
_FORWARD_NAMES = {
    *(
        "VARIANT_KWARG_KEYS",
        "_cast_input_dtype",
        "_check_forward_args",
        "_mixed_batch_forward",
        "active_adapters",
    ),
    *("base_layer", "disable_adapters", "dtype", "forward", "keys", "lora_A", "lora_B", "lora_dropout"),
    *("lora_variant", "merged", "pop", "scaling", "to", "unmerge", "weight"),
}
# The same of lora.Linear4bit.forward.
_FORWARD_4BIT_NAMES = _FORWARD_NAMES | {"clone", "is_autocast_enabled", "torch"}
_CREATE_PARAMETERS = ["lora_config", "adapter_name", "target", "kwargs"]
_FORWARD_PARAMETERS = ["self", "x", "args", "kwargs"]
_MINIMUM = (0, 18)


class _Checking(threading.local):
    """Whether this thread is making layers of its own, to compare them with what PEFT's compute."""

    now = False


_checking = _Checking()


def is_checking() -> bool:
    """Whether the layer that PEFT creates now is one that a check compares, and must stay PEFT's."""
    return _checking.now


@cache
def check_peft() -> None:
    """Check that the installed PEFT makes and runs LoRA linears in the way that the fused layer reproduces.

    Raises:
        RuntimeError: PEFT is older than 0.18, or what is relied on has changed; the message says how.
    """
    if tuple(int(part) for part in peft.__version__.split(".")[:2]) < _MINIMUM:
        raise RuntimeError(f"peft was {peft.__version__}, but must be 0.18 or newer")
    if not isinstance(vars(lora.LoraModel).get("_create_new_module"), staticmethod):
        raise _changed("LoraModel._create_new_module is no static method of its own")
    _check_parameters("LoraModel._create_new_module", lora.LoraModel._create_new_module, _CREATE_PARAMETERS)
    _check_parameters("lora.Linear.forward", lora.Linear.forward, _FORWARD_PARAMETERS)
    names = _names(lora.Linear.forward.__code__)
    if names != _FORWARD_NAMES:
        difference = ", ".join(sorted(names ^ _FORWARD_NAMES))
        raise _changed(f"lora.Linear.forward uses other names than it did: {difference}")
    with _undisturbed():
        _check_equation()


@cache
def check_linear4bit() -> str | None:
    """What is different about lora.Linear4bit in the installed PEFT and bitsandbytes; None if nothing is.

    No error: its layers then run PEFT's own code, and the others fused.
    """
    difference = sorted(_names(lora.Linear4bit.forward.__code__) ^ _FORWARD_4BIT_NAMES)
    if difference:
        return f"lora.Linear4bit.forward of peft {peft.__version__} uses other names: {', '.join(difference)}"
    with _undisturbed():
        return _check_equation_4bit()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """For layers of our own on the CPU, whatever the caller is in the middle of."""
    with ExitStack() as stack:
        # What PEFT draws to initialise a layer must not move the stream of a script that was seeded.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for context in (torch.device("cpu"), torch.inference_mode(False), torch.no_grad()):
            stack.enter_context(context)
        # PEFT and bitsandbytes leave casts to autocast where CUDA's is on, though the layer is on the CPU.
        for device_type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        before, _checking.now = _checking.now, True
        try:
            yield
        finally:
            _checking.now = before


def _check_equation_4bit() -> str | None:
    """As _check_equation, over an NF4 base of 64 x 32; the bias is bitsandbytes' to cast."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    base = Linear4bit(64, 32, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = base.weight.data.to(torch.bfloat16)
    base.weight = Params4bit(weight, quant_type="nf4", module=base).to("cpu")
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, lora_bias=True, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, model)[0]
    lora_A, lora_B = layer.lora_A["default"].float(), layer.lora_B["default"].float()
    nn.init.normal_(lora_B.weight)
    nn.init.normal_(lora_B.bias)
    layer.scaling["default"] = 0.7
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    for dropout_p in (0.0, 0.5):
        # Not by eval(): in it, bitsandbytes repacks the base weight on some CPUs, and rounds its scales.
        layer.lora_dropout["default"].p = dropout_p
        torch.manual_seed(1)
        result = lora.Linear4bit.forward(layer, x)
        torch.manual_seed(1)
        branch = lora_B(lora_A(F.dropout(x.float(), dropout_p))) * 0.7
        if not torch.equal(result, base(x) + branch.to(torch.bfloat16)):
            return f"lora.Linear4bit.forward of peft {peft.__version__} computes another equation than it did"
    return None


def _check_equation() -> None:
    """Run PEFT's forward on a layer of 4 x 3 and compare, bit for bit, with what the fused layer computes."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, lora_bias=True, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3, dtype=torch.bfloat16)))
    layer = model[0]
    if type(layer) is not lora.Linear:
        raise _changed(f"the LoRA layer of an nn.Linear is a {type(layer).__name__}")
    lora_A, lora_B = layer.lora_A["default"].float(), layer.lora_B["default"].float()
    nn.init.normal_(lora_B.weight)
    nn.init.normal_(lora_B.bias)
    layer.scaling["default"] = 0.7
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    for training in (False, True):
        layer.train(training)
        torch.manual_seed(1)
        result = lora.Linear.forward(layer, x)
        torch.manual_seed(1)
        expected = _expected(layer.base_layer, lora_A, lora_B, x, 0.7, 0.5 if training else 0.0)
        if not torch.equal(result, expected):
            raise _changed("lora.Linear.forward does not compute W x + b + s (B A dropout(x) + c)")


def _expected(
    base: nn.Module, lora_A: nn.Module, lora_B: nn.Module, x: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    branch: Tensor = lora_B(lora_A(F.dropout(x.float(), dropout_p))) * scaling
    result: Tensor = base(x)
    return (result + branch).to(result.dtype)


def _check_parameters(name: str, function: object, expected: list[str]) -> None:
    found = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    if found != expected:
        raise _changed(f"{name} takes ({', '.join(found)}), and took ({', '.join(expected)})")


def _names(code: CodeType) -> frozenset[str]:
    """The attributes and globals that a function mentions, those of its inner functions included."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"lora_kernels does not know peft {peft.__version__}: {what}. "
        "Nothing was changed; PEFT works as it is without patch_peft() or apply_lora_kernels()."
    )
