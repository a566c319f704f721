"""What is measured: cases, the suites they come in, and their operands. lora_B is never zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.cli.bench.shapes import MODELS, projection_groups, projection_shapes
from lora_kernels.nf4 import NF4Weight

SCALING = 2.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One LoRA linear: [M, K] to [M, N]. `nf4` says that its frozen weight is kept in 4 bits.

    `others` makes it a group: the N of the layers that read the same x after it, all else being alike.
    """

    M: int
    K: int
    N: int
    rank: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"
    adapters: str = "bfloat16"
    nf4: bool = False
    others: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The N of every layer."""
        return self.N, *self.others

    @property
    def outputs(self) -> str:
        """The same as text, 4096 or 4096+1024+1024."""
        return "+".join(map(str, self.widths))

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.outputs}", f"r{self.rank}", "nf4" if self.nf4 else self.dtype]
        if self.adapters != self.dtype:
            words.append(f"adapters-{self.adapters}")
        if self.dropout:
            words.append(f"dropout-{self.dropout:g}")
        return " ".join(words)


@dataclass
class Operands:
    """The tensors of a case. In one of NF4, `weight` is what `quantized` decodes to.

    In a group these are the first layer's, and `others` has the rest: each with all of its own but x.
    """

    case: Case
    x: Tensor
    dy: Tensor
    weight: Tensor
    quantized: NF4Weight | None
    lora_A: Tensor
    lora_B: Tensor
    others: tuple[Operands, ...] = ()

    @property
    def members(self) -> tuple[Operands, ...]:
        """The operands of every layer."""
        return self, *self.others

    @property
    def dys(self) -> tuple[Tensor, ...]:
        """The gradient of every output."""
        return tuple(member.dy for member in self.members)

    @staticmethod
    def make(case: Case, device: torch.device) -> Operands:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int, dtype: str, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator, device=device) * scale).to(DTYPES[dtype])

        x = randn(case.M, case.K, dtype=case.dtype).requires_grad_()

        def layer(N: int) -> Operands:
            weight = randn(N, case.K, dtype=case.dtype, scale=case.K**-0.5)
            quantized = None
            if case.nf4:
                quantized = NF4Weight.quantize(weight, block_size=64, double_quant=True)
                weight = quantized.dequantize(weight.dtype)
            return Operands(
                case,
                x=x,
                dy=randn(case.M, N, dtype=case.dtype),
                weight=weight,
                quantized=quantized,
                lora_A=randn(case.rank, case.K, dtype=case.adapters, scale=case.K**-0.5).requires_grad_(),
                lora_B=randn(N, case.rank, dtype=case.adapters, scale=case.rank**-0.5).requires_grad_(),
            )

        first, *others = map(layer, case.widths)
        return replace(first, others=tuple(others))


# The layer of the sweeps over one variable: q_proj and up_proj of an 8B model.
_SQUARE, _WIDE, _TALL = (4096, 4096), (4096, 14336), (14336, 4096)
SWEEP_M = (1, 4, 16, 64, 256, 1024, 4096, 16384)
RANKS = (8, 16, 32, 64, 128, 256)


def _shapes() -> Iterator[Case]:
    for K, N in dict.fromkeys(kn for model in MODELS for kn in projection_shapes(model)):
        for M in (8192, 2048):
            yield Case(M, K, N)


def _sweep_m() -> Iterator[Case]:
    for K, N in (_SQUARE, _WIDE, _TALL):
        for M in SWEEP_M:
            yield Case(M, K, N)
            yield Case(M, K, N, nf4=True)


def _nf4() -> Iterator[Case]:
    for K, N in projection_shapes("llama-8b"):
        for M in (8192, 2048):
            yield Case(M, K, N, nf4=True)


def _groups() -> Iterator[Case]:
    for K, (N, *others) in projection_groups("llama-8b"):
        for M in (8192, 2048):
            yield Case(M, K, N, others=tuple(others))


def _tiny() -> Iterator[Case]:
    plain = Case(128, 256, 320, dtype="float32", adapters="float32")
    yield from (plain, replace(plain, M=1), replace(plain, rank=64), replace(plain, dropout=0.1))


SUITES = {
    "shapes": tuple(_shapes()),
    "m": tuple(_sweep_m()),
    "ranks": tuple(Case(M, *_SQUARE, rank=rank) for M in (8192, 2048) for rank in RANKS),
    "dropout": tuple(Case(8192, K, N, dropout=0.1) for K, N in projection_shapes("llama-8b")),
    "float32-adapters": tuple(Case(8192, K, N, adapters="float32") for K, N in projection_shapes("llama-8b")),
    "nf4": tuple(_nf4()),
    "groups": tuple(_groups()),
    "quick": (
        Case(8192, *_SQUARE),
        Case(2048, 4096, 1024),
        Case(2048, *_SQUARE, nf4=True),
        Case(16, *_WIDE, nf4=True),
    ),
    "tiny": tuple(_tiny()),
}
