"""The Triton backend: one launch forward, and one or two backward; with dropout one more before each."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lora_kernels.backends import Backend, NF4Path, Problem
from lora_kernels.backends.triton import backward_launch, gated, group, nf4_tiles, single, wide_ranks
from lora_kernels.backends.triton.tiles import INTERPRETER, MOST_FEW_ROWS, Chip, candidates, chip_of, few_rows_tiles
from lora_kernels.nf4 import NF4Weight


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
    backward = "one" if backward_launch.is_for_one_launch(problem.device, problem.rank) else "two"
    notes = [
        f"one launch forward, {backward} backward, with dropout one more each",
        path,
        f"tiles by M from {tiles}",
        _describe_few_rows(chip, problem) if use_tma else None,
        wide_ranks.describe([problem]),
        nf4_tiles.describe(chip, problem.dtype, problem.in_features) if problem.nf4 else None,
    ]
    return "; ".join(note for note in notes if note is not None)


def _describe_few_rows(chip: Chip, problem: Problem) -> str:
    """Which numbers of rows another kernel takes."""

    def ranges(C: int, L: int) -> str:
        taken = [M for M in range(1, MOST_FEW_ROWS + 1) if few_rows_tiles(chip, M, C, L, problem.rank, problem.precision)]
        firsts = [M for M in taken if M - 1 not in taken]
        lasts = [M for M in taken if M + 1 not in taken]
        return " and ".join(f"{first} to {last}" for first, last in zip(firsts, lasts, strict=True))

    K, N = problem.in_features, problem.out_features
    return f"another kernel for y of {ranges(N, K)} rows and for dx of {ranges(K, N)}, with which a backward is two launches"


def _nf4_paths(x: Tensor, weight: NF4Weight) -> tuple[NF4Path, NF4Path]:
    return nf4_tiles.describe_paths(chip_of(x.device), x, weight)


BACKEND = Backend(
    "triton",
    _refuses,
    _declines,
    single.forward,
    single.backward_input,
    backward_launch.adapter_grads,
    _describe,
    group=group.GROUP,
    gated=gated.GATED,
    nf4_paths=_nf4_paths,
    backward=single.backward,
)
