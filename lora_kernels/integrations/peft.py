"""PEFT's LoRA linears on fused kernels, by a swap of their class: of new ones, or of a whole model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from peft.tuners import lora
from torch import nn

from lora_kernels import native
from lora_kernels.integrations.peft_blocks import (
    grouped_class,
    is_block,
    is_grouped,
    stock_class,
    why_never,
    why_not_together,
)
from lora_kernels.integrations.peft_contract import check_linear4bit, check_peft, is_checking
from lora_kernels.integrations.peft_layer import Linear, has_own_forward, is_fused, why_not_fused
from lora_kernels.switches import is_on

# By name: torch.distributed and torch._dynamo need not be imported, or even exist, to know their wrappers.
_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}
_VARIABLE = "LORA_KERNELS"
_OFF = f"{_VARIABLE}=0 in the environment"


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer: its name in the model, and why it is not fused (None where it is)."""

    name: str
    reason: str | None

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class BlockReport:
    """One attention or MLP block: its name, and why its layers do not run together (None where they do)."""

    name: str
    reason: str | None

    @property
    def grouped(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """Every LoRA layer of a model, fused or not, and why not; and every block that could run its layers together.

    Iterate over it for the layers, or print it.
    """

    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...] = ()

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(layer.fused for layer in self.layers)

    @property
    def not_fused(self) -> int:
        """How many layers run PEFT's own code."""
        return len(self.layers) - self.fused

    def __str__(self) -> str:
        if not self.layers:
            return "lora_kernels: the model has no LoRA layers (this comes after get_peft_model)"
        lines = [f"lora_kernels: {self.fused} of {len(self)} LoRA layers are fused"]
        lines += _by_reason(self.layers, "not fused")
        if self.blocks:
            grouped = sum(block.grouped for block in self.blocks)
            lines.append(f"lora_kernels: {grouped} of {len(self.blocks)} attention and MLP blocks are grouped")
            lines += _by_reason(self.blocks, "not grouped")
        if self.fused and (advice := native.advice()) is not None:
            lines.append(f"lora_kernels: {advice}")
        return "\n".join(lines)


def _by_reason(entries: Sequence[LayerReport | BlockReport], what: str) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        if entry.reason is not None:
            by_reason.setdefault(entry.reason, []).append(entry.name)
    lines = []
    for reason, names in by_reason.items():
        lines.append(f"  {len(names)} {what}: {reason}")
        lines += [f"    {name}" for name in names]
    return lines


class PeftPatch:
    """What patch_peft returns. As a context manager it undoes the patch at the end of the block.

    `reason` says why nothing was patched by this call; None where it was.
    """

    def __init__(
        self, stock: staticmethod[..., Any] | None, reason: str | None, groups: bool = False, inject: Any = None
    ) -> None:
        self._stock, self._groups, self._inject = stock, groups, inject
        self.reason = reason

    @property
    def active(self) -> bool:
        """Whether this handle holds a patch that can be undone."""
        return self._stock is not None

    def undo(self) -> None:
        """Layers that PEFT makes from now on are stock again; those that are fused stay so. Once is enough.

        Raises:
            RuntimeError: something else has patched PEFT since, and must be undone first.
        """
        if self._stock is None:
            return
        for name in ("_create_new_module", *(["inject_adapter"] if self._groups else [])):
            if not _is_ours(name):
                raise RuntimeError(
                    f"LoraModel.{name} was replaced by something else after patch_peft(), "
                    "and must be put back before undo()"
                )
        lora.LoraModel._create_new_module = self._stock
        if self._inject is not None:
            lora.LoraModel.inject_adapter = self._inject
        elif self._groups:
            # It is inherited.
            del lora.LoraModel.inject_adapter
        self._stock, self.reason = None, "it was undone"

    def __enter__(self) -> PeftPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "new LoRA layers are fused" if self.reason is None else f"nothing patched: {self.reason}"
        return f"<lora_kernels.patch_peft: {state}>"


def patch_peft(*, groups: bool = True) -> PeftPatch:
    """Make every LoRA linear that PEFT creates from now on, in this process, a fused one.

    Calling it again changes nothing, and then neither does undoing that second handle. With LORA_KERNELS=0 in
    the environment it does nothing, and the handle's `reason` says so.

    Args:
        groups: whether attention and MLP blocks run their fused layers together where they can.
    Returns:
        A handle with `undo()`, which is a context manager too.
    Raises:
        ValueError: LORA_KERNELS in the environment is neither 0 nor 1.
        RuntimeError: the installed PEFT is too old or too new for what this relies on.
    """
    if not is_on(_VARIABLE):
        return PeftPatch(None, _OFF)
    check_peft()
    if _is_ours("_create_new_module"):
        return PeftPatch(None, "it is patched already")
    stock, inject = (vars(lora.LoraModel).get(name) for name in ("_create_new_module", "inject_adapter"))
    lora.LoraModel._create_new_module = staticmethod(_fusing(stock.__func__))
    if groups:
        lora.LoraModel.inject_adapter = _grouping(lora.LoraModel.inject_adapter)
    return PeftPatch(stock, None, groups, inject if groups else None)


def apply_lora_kernels(model: nn.Module, *, groups: bool = True) -> Report:
    """Fuse the LoRA linears of a model that PEFT has made, and report on every LoRA layer.

    Layers that are fused already stay so: call it as often as a report is wanted. With LORA_KERNELS=0 in the
    environment it changes nothing and the report says so.

    Args:
        model: before DistributedDataParallel, FSDP or torch.compile wrap it.
        groups: whether attention and MLP blocks run their fused layers together where they can. Where it is False,
            blocks that do get their own forward back.
    Returns:
        Which layers run fused, as the model and autocast stand now, and why the others do not.
    Raises:
        TypeError: model is not an nn.Module.
        ValueError: model, or a part of it, is wrapped already; or LORA_KERNELS in the environment is neither 0 nor 1.
        RuntimeError: the installed PEFT is too old or too new for what this relies on.
    """
    layers = _lora_layers(model, "apply_lora_kernels")
    if not is_on(_VARIABLE):
        return Report(tuple(LayerReport(name, _OFF) for name in layers))
    check_peft()
    fused = tuple(LayerReport(name, _fuse(layer)) for name, layer in layers.items())
    if not groups:
        _ungroup(model)
        return Report(fused)
    return Report(fused, tuple(BlockReport(name, _group(block)) for name, block in _blocks(model).items()))


def revert_lora_kernels(model: nn.Module) -> int:
    """Give every fused LoRA linear of a model PEFT's class back, and grouped blocks theirs.

    Returns:
        How many layers were fused.
    Raises:
        TypeError: model is not an nn.Module.
        ValueError: model, or a part of it, is wrapped by DistributedDataParallel, FSDP or torch.compile; or the
            forward of a fused layer or a grouped block is wrapped by a hook of accelerate, which would go on
            calling it.
    """
    fused = {name: m for name, m in _lora_layers(model, "revert_lora_kernels").items() if is_fused(m)}
    for name, layer in fused.items():
        if has_own_forward(layer):
            raise ValueError(
                f"layer {name} had a forward of its own, wrapped around the fused one, and must have none: "
                "remove accelerate's hooks first"
            )
    _ungroup(model)
    for layer in fused.values():
        _set_class(layer, type(layer).__bases__[0])
    return len(fused)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_block(module)}


def _group(block: nn.Module) -> str | None:
    """Swap the class of a block; says why its layers would not run together."""
    if not is_grouped(block):
        reason = why_never(block)
        if reason is not None:
            return reason
        if has_own_forward(block):
            return "its forward is replaced on the instance already, for example by a hook of accelerate"
        _set_class(block, grouped_class(stock_class(block)))
    return why_not_together(block)


def _ungroup(model: nn.Module) -> None:
    grouped = {name: module for name, module in model.named_modules() if is_grouped(module)}
    for name, block in grouped.items():
        if has_own_forward(block):
            raise ValueError(
                f"block {name} had a forward of its own, wrapped around the grouped one, and must have none: "
                "remove accelerate's hooks first"
            )
    for block in grouped.values():
        _set_class(block, stock_class(block))


def _fuse(layer: nn.Module) -> str | None:
    """Swap the class of a layer where there is a fused one; says why the layer would not run fused."""
    if not is_fused(layer):
        fused = _fused_class(type(layer))
        if isinstance(fused, str):
            return fused
        if has_own_forward(layer):
            return "its forward is replaced on the instance already, for example by a hook of accelerate"
        _set_class(layer, fused)
    return why_not_fused(layer)


def _fused_class(kind: type) -> type | str:
    """The fused class of one of PEFT's, or why there is none.

    Only of these exact classes: a subclass of somebody else has a reason to exist.
    """
    if kind is lora.Linear:
        return Linear
    # By name: the class exists only where bitsandbytes does, which is not imported before a layer needs it.
    if (kind.__module__, kind.__name__) == ("peft.tuners.lora.bnb", "Linear4bit"):
        from lora_kernels.integrations import peft_nf4

        return check_linear4bit() or peft_nf4.Linear4bit
    return f"lora.{kind.__name__} has no fused kernel"


def _set_class(layer: nn.Module, kind: type) -> None:
    # accelerate leaves the class's method on the instance when it removes a hook: it would hide the new one.
    vars(layer).pop("forward", None)
    layer.__class__ = kind


def _fusing(create: Any) -> Any:
    @functools.wraps(create)
    def create_fused(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        module: nn.Module = create(lora_config, adapter_name, target, **kwargs)
        # A check asks for a layer while it is itself what the class of a fused one waits for.
        fused = None if is_checking() else _fused_class(type(module))
        if isinstance(fused, type):
            _set_class(module, fused)
        return module

    create_fused._fuses_lora = True  # type: ignore[attr-defined]
    return create_fused


def _grouping(inject: Any) -> Any:
    @functools.wraps(inject)
    def inject_grouped(self: lora.LoraModel, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        for block in _blocks(model).values():
            _group(block)

    inject_grouped._fuses_lora = True  # type: ignore[attr-defined]
    return inject_grouped


def _is_ours(name: str) -> bool:
    return getattr(getattr(lora.LoraModel, name), "_fuses_lora", False)


def _lora_layers(model: nn.Module, caller: str) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model was {type(model).__name__}, but must be an nn.Module")
    layers = {}
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS:
                raise _wrapped(name, _WRAPPERS[base.__name__], caller)
        if module._compiled_call_impl is not None:
            raise _wrapped(name, "torch.compile", caller)
        if isinstance(module, lora.LoraLayer):
            layers[name] = module
    return layers


def _wrapped(name: str, wrapper: str, caller: str) -> ValueError:
    where = f"model's part {name!r}" if name else "model"
    return ValueError(
        f"{where} was wrapped by {wrapper} already, and must not be: "
        f"call {caller} before DistributedDataParallel, FSDP or torch.compile"
    )
