"""The grid of the accuracy tests: sizes that break kernels, as dataclasses that make their own tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    """One call of lora_linear; B is never zero."""

    M: int
    K: int
    N: int
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None = None
    dropout: float = 0.0
    bias: bool = False
    scaling: float = 1.7
    transposed_weight: bool = False
    strided_x: bool = False

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.N}r{self.rank}", _short(self.dtype)]
        if self.adapter_dtype is not None:
            words.append(f"adapters-{_short(self.adapter_dtype)}")
        if self.dropout:
            words.append(f"p{self.dropout}")
        words += [
            name for name in ("bias", "transposed_weight", "strided_x") if getattr(self, name)
        ]
        return "-".join(words)

    def tensors(self, device: torch.device) -> Tensors:
        generator = torch.Generator(device).manual_seed(self.M * 11 + self.K * 7 + self.N * 5 + self.rank * 3)

        def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device) * scale
            return values.to(dtype or self.dtype)

        adapters = self.adapter_dtype or self.dtype
        x = randn(self.M, self.K + 24)[:, 8 : self.K + 8] if self.strided_x else randn(self.M, self.K)
        weight = randn(self.N, self.K, scale=self.K**-0.5)
        return Tensors(
            x=x,
            weight=weight.T.contiguous().T if self.transposed_weight else weight,
            lora_A=randn(self.rank, self.K, scale=self.K**-0.5, dtype=adapters),
            lora_B=randn(self.N, self.rank, scale=self.rank**-0.5, dtype=adapters),
            bias=randn(self.N) if self.bias else None,
            dy=randn(self.M, self.N),
        )


@dataclass(frozen=True)
class Tensors:
    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor

    def double(self) -> Tensors:
        return Tensors(*(None if t is None else t.double() for t in vars(self).values()))  # type: ignore[arg-type]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SMALL_SIZES = [
    (1, 1, 1, 1),
    (3, 17, 63, 3),
    (17, 63, 3, 8),
    (63, 64, 80, 12),
    (65, 96, 130, 16),
    (5, 130, 40, 64),
    (70, 33, 48, 100),
]
_LARGE = [
    (500, 2000, 500, 16),
    (2000, 500, 2000, 64),
    (2048, 1024, 4096, 16),
    (1000, 2048, 512, 256),
    (300, 768, 1000, 512),
    (17, 4096, 1024, 8),
    (4096, 1024, 256, 100),
    (129, 64, 64, 512),
    (20000, 256, 264, 16),
    (500, 512, 768, 32),
    # x, and dy, of more than L2 holds: sharing tiles go through K in another order.
    (8192, 2048, 2056, 16),
]


def grid(gpu: bool) -> list[Case]:
    """Every size in every regime; a GPU takes the large ones and bfloat16 too."""
    half = torch.bfloat16 if gpu else torch.float16
    # float32 adapters over float16 are the eager backend's alone, and the interpreter has no bfloat16.
    cases: list[Case] = []
    for index, (M, K, N, rank) in enumerate(SMALL_SIZES + (_LARGE if gpu else [])):
        plain = Case(M, K, N, rank, half)
        masked = replace(plain, dropout=(0.1, 0.5, 0.3)[index % 3])
        cases += [
            plain,
            replace(masked, bias=True),
            replace(plain, dtype=torch.bfloat16, adapter_dtype=torch.float32, bias=True),
            replace(masked, dtype=torch.bfloat16, adapter_dtype=torch.float32),
            replace(plain, transposed_weight=True, strided_x=True),
        ]
        if gpu:
            cases.append(replace(plain, dtype=torch.float16))
        if M * K * N < 2**28:
            cases += [replace(plain, dtype=torch.float32), replace(masked, dtype=torch.float32)]
    cases.append(Case(33, 48, 40, 8, torch.float16, torch.float32, dropout=0.2))
    cases.append(Case(33, 48, 40, 8, half, dropout=1.0))
    # Rows that TMA can read, a mask and a rank above 16: a choice of its own in Triton's launcher.
    cases.append(Case(24, 64, 96, 40, half, dropout=0.3))
    cases.append(Case(0, 48, 40, 8, half, bias=True))
    return cases


def backends_of(case: Case, gpu: bool) -> list[str]:
    """The backends that can run a case on this machine."""
    split_half = case.dtype == torch.float16 and case.adapter_dtype == torch.float32
    interpreted_bfloat16 = case.dtype == torch.bfloat16 and not gpu
    return ["eager"] if split_half or interpreted_bfloat16 else ["eager", "triton"]
