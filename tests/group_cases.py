"""Groups for the tests: a few layers that read one x, and what they must compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from cases import HAS_GPU
from tolerance import peft_sequence
from torch import Tensor

from lora_kernels import GroupMember, NF4Weight, lora_linear_reference
from lora_kernels.dropout import drop_threshold

Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """One member: its width, rank and what is special about it."""

    N: int
    rank: int
    bias: bool = False
    nf4: bool = False
    transposed_weight: bool = False
    scaling: float = 1.7


@dataclass(frozen=True)
class GroupCase:
    """One call of lora_linear_group, or with three layers of one gated MLP."""

    M: int
    K: int
    layers: tuple[Layer, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None = None
    dropout: float = 0.0
    strided_x: bool = False

    def __str__(self) -> str:
        layers = "+".join(f"{layer.N}r{layer.rank}{'nf4' if layer.nf4 else ''}" for layer in self.layers)
        dtypes = "-".join(str(d).removeprefix("torch.") for d in (self.dtype, self.adapter_dtype) if d is not None)
        rest = f"-p{self.dropout}" if self.dropout else ""
        return f"{self.M}x{self.K}-{layers}-{dtypes}{rest}{'-strided_x' if self.strided_x else ''}"

    def x(self, device: torch.device) -> Tensor:
        x = _randn(_generator(self, device), self.M, self.K + 24, dtype=self.dtype)
        return x[:, 8 : self.K + 8] if self.strided_x else x[:, 8 : self.K + 8].contiguous()

    def members(self, device: torch.device, widths: Sequence[int] | None = None) -> list[GroupMember]:
        """The members; B is never zero. `widths` are the K of each, where that is not the group's."""
        generator = _generator(self, device)
        widths = widths or [self.K] * len(self.layers)
        return [self._member(layer, K, generator) for layer, K in zip(self.layers, widths, strict=True)]

    def _member(self, layer: Layer, K: int, generator: torch.Generator) -> GroupMember:
        adapters = self.adapter_dtype or self.dtype
        weight = _randn(generator, layer.N, K, scale=K**-0.5, dtype=self.dtype)
        if layer.transposed_weight:
            weight = weight.T.contiguous().T
        return GroupMember(
            NF4Weight.quantize(weight) if layer.nf4 else weight,
            _randn(generator, layer.rank, K, scale=K**-0.5, dtype=adapters).requires_grad_(),
            _randn(generator, layer.N, layer.rank, scale=layer.rank**-0.5, dtype=adapters).requires_grad_(),
            layer.scaling,
            _randn(generator, layer.N, dtype=self.dtype).requires_grad_() if layer.bias else None,
        )


def _generator(case: GroupCase, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(case.M * 11 + case.K * 7 + len(case.layers))


def _randn(generator: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def leaves(members: Sequence[GroupMember]) -> dict[str, Tensor]:
    """What can have a gradient, by name."""
    named = {
        f"{name}{i}": tensor
        for i, member in enumerate(members)
        for name, tensor in (("lora_A", member.lora_A), ("lora_B", member.lora_B), ("bias", member.bias))
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def double(member: GroupMember, dtype: torch.dtype) -> GroupMember:
    """The member in float64, its weight as it decodes to the dtype in which it is used."""
    weight = member.weight.dequantize(dtype) if isinstance(member.weight, NF4Weight) else member.weight
    _, lora_A, lora_B, scaling, bias = member
    return GroupMember(weight.double(), *(_leaf(t) for t in (lora_A, lora_B)), scaling, _leaf(bias))


def twin(member: GroupMember, dtype: torch.dtype) -> GroupMember:
    """The member with leaves of its own and a dense weight."""
    weight = member.weight.dequantize(dtype) if isinstance(member.weight, NF4Weight) else member.weight
    copies = [None if t is None else t.detach().clone().requires_grad_() for t in member[1:3]]
    bias = None if member.bias is None else member.bias.detach().clone().requires_grad_()
    return GroupMember(weight, *copies, member.scaling, bias)


def _leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double().requires_grad_()


def exact(x: Tensor, member: GroupMember, keep: Tensor | None, p: float) -> Tensor:
    weight, lora_A, lora_B, scaling, bias = member
    return lora_linear_reference(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, keep=keep, dropout_p=p)


def peft(x: Tensor, member: GroupMember, keep: Tensor | None, p: float) -> Tensor:
    weight, lora_A, lora_B, scaling, bias = member
    # The mask's own probability: p in steps of 2^-16.
    return peft_sequence(x, weight, lora_A, lora_B, scaling, bias, keep, drop_threshold(p) / 65536)


def backends_of(case: GroupCase) -> list[str]:
    """The interpreter has no bfloat16, and the kernels no float32 adapters over float16."""
    split_half = case.dtype == torch.float16 and case.adapter_dtype == torch.float32
    return ["eager"] if split_half or (case.dtype == torch.bfloat16 and not HAS_GPU) else ["eager", "triton"]
