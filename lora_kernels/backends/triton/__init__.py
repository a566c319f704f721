"""The Triton backend: one launch forward, one for the input's gradient, one for both adapters' gradients."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lora_kernels.backends import Backend, Precision, Problem, Scale, eager
from lora_kernels.backends.triton import gated, group_launch, launch, nf4_launch, nf4_tiles
from lora_kernels.backends.triton.tiles import INTERPRETER, candidates, chip_of
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import Weight


def forward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    want_s: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + S B^T + b and S = scale * mask(x) A^T."""
    down, up = lora_A.T, lora_B.T
    if isinstance(weight, NF4Weight):
        y, s = nf4_launch.one_pass(x, weight, down, up, bias, scale, dropout, True, precision)
    else:
        y, s = launch.one_pass(x, _strided(weight).T, down, up, bias, scale, dropout, True, precision)
    return y, s if want_s else None


def backward_input(
    dy: Tensor,
    weight: Weight | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    want_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """T = scale * dy B and dx = dy W + mask(T A)."""
    if not want_dx:
        # No big product to share a pass with: what is left is a library's business.
        return eager.backward_input(dy, None, None, lora_B, scale, None, precision, want_dx=False)
    assert weight is not None and lora_A is not None
    if isinstance(weight, NF4Weight):
        return nf4_launch.one_pass(dy, weight, lora_B, lora_A, None, scale, dropout, False, precision)
    return launch.one_pass(dy, _strided(weight), lora_B, lora_A, None, scale, dropout, False, precision)


def _strided(weight: Tensor) -> Tensor:
    """The kernels read weights stored as [N, K] or as [K, N]; any other is copied."""
    return weight if 1 in weight.stride() else weight.contiguous()


def _refuses(problem: Problem) -> str | None:
    if problem.in_features == 0 or problem.out_features == 0:
        return "in_features and out_features must be at least 1"
    if problem.device.type != "cuda" and not (problem.device.type == "cpu" and _interpreted()):
        return f"x is on {problem.device}, and Triton's kernels run on CUDA and ROCm GPUs"
    if problem.precision == "split" and problem.dtype == torch.float16:
        return "float32 adapters over a float16 base, outside autocast, do not fit into float16 halves"
    chip = chip_of(problem.device)
    if chip != INTERPRETER and torch.version.cuda is not None and chip.capability < (8, 0):
        return f"compute capability is {chip.capability[0]}.{chip.capability[1]}, and the kernels need 8.0"
    return None


def _declines(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return "Triton's interpreter is for tests"
    if problem.dtype == torch.float32 and not problem.tf32:
        return "float32 without TF32 has no tensor cores, where the libraries' kernels are faster"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _describe(problem: Problem) -> str | None:
    chip = chip_of(problem.device)
    rows = problem.in_features * problem.dtype.itemsize % 16 == 0
    columns = problem.out_features * problem.dtype.itemsize % 16 == 0
    use_tma = chip.has_tma and rows and columns and problem.dtype != torch.float32
    tiles = ", ".join(
        f"{t.block_m}x{t.block_n}x{t.block_k}" for t in candidates(chip, problem.dtype.itemsize, use_tma)
    )
    path = "TMA descriptors" if use_tma else "pointers"
    nf4 = f"; {nf4_tiles.describe(chip, problem.dtype, problem.in_features)}" if problem.nf4 else ""
    return f"one launch forward, two backward; {path}; tiles by M from {tiles}{nf4}"


BACKEND = Backend(
    "triton",
    _refuses,
    _declines,
    forward,
    backward_input,
    launch.adapter_grads,
    _describe,
    group=group_launch.GROUP,
    gated=gated.GATED,
)
