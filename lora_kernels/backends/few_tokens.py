"""The automatic choice for NF4 weights on Hopper, where the CUDA backend is compiled: Triton's, but for a few tokens.

Their products are the CUDA backend's, which are faster there (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lora_kernels.backends import Backend, Member, NF4Path, Precision, Problem, Scale, cuda, cuda_build
from lora_kernels.backends.triton import BACKEND as TRITON
from lora_kernels.backends.triton import backward_launch, group, launches, single
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import Weight

# Of x forward, and by measurement of dy backward.
MOST_TOKENS = cuda.MOST_STREAM_TOKENS
# As csrc/host/ knows the launch.
_LAUNCH = "nf4_stream"


def beside(backend: Backend, problem: Problem, refusal: str) -> tuple[Backend, str]:
    """The backend for a problem that Triton's was chosen for, and why not the CUDA backend, at first `refusal`."""
    forward = problem.in_features % cuda.RUN == 0
    backward = problem.in_features % cuda.LANE_CODES == 0 and problem.out_features % cuda.GROUP == 0
    if problem.dtype == torch.float32 or not (forward or backward):
        return backend, refusal
    usable, broken = _is_usable(problem.device)
    if not usable:
        return backend, refusal if broken is None else f"{refusal}, and {broken}"
    return BACKEND, f"{refusal}, but for up to {MOST_TOKENS} tokens where its kernels take them"


@cache
def _is_usable(device: torch.device) -> tuple[bool, str | None]:
    """Whether the CUDA backend is compiled for a chip on which it was measured, and what is wrong with it if it is.

    Settled by the first who asks: what is compiled later is for other processes, or layers would differ in one.
    """
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False, None
    if cuda_build.why_stale() is not None or not cuda_build.is_built((9, 0)):
        return False, None
    broken = cuda.why_not_loaded(device)
    return broken is None, broken


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
    if not _streams(x, weight):
        return single.forward(x, weight, lora_A, lora_B, bias, scale, dropout, precision, want_s)
    assert isinstance(weight, NF4Weight)
    launches.note(lambda: launches.Foreign(_LAUNCH, *cuda.forward_launch(x, weight, lora_A, lora_B, precision)))
    return cuda.forward(x, weight, lora_A, lora_B, bias, scale, dropout, precision, want_s)


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
    of = cuda.backward_input if want_dx and _decodes_inside(dy, weight) else single.backward_input
    return of(dy, weight, lora_A, lora_B, scale, dropout, precision, want_dx)


def backward(
    dy: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx = dy W + mask(T A), and of dA = T^T mask(x) and dB = dy^T S what has an operand."""
    if not _decodes_inside(dy, weight):
        return single.backward(dy, weight, lora_A, lora_B, x, s, scale, dropout, precision, dtype)
    dx, t = cuda.backward_input(dy, weight, lora_A, lora_B, scale, dropout, precision, True)
    assert dx is not None
    return dx, *backward_launch.adapter_grads(x, dy, s, None if x is None else t, dropout, dtype)


def group_forward(
    x: Tensor, members: Sequence[Member], precision: Precision, want_s: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each member's y and S."""
    if not any(_streams(x, member.weight) for member in members):
        return group.forward(x, members, precision, want_s)
    results = [forward(x, *member, precision, want_s) for member in members]  # type: ignore[arg-type]
    return [y for y, _ in results], [s for _, s in results]


def group_backward_input(
    dys: list[Tensor], members: Sequence[Member], precision: Precision, want_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = sum of dy_i W_i + mask_i(T_i A_i) and each T_i."""
    takes = any(_decodes_inside(dy, member.weight) for dy, member in zip(dys, members, strict=True))
    if not (want_dx and takes):
        return group.backward_input(dys, members, precision, want_dx)
    return group.one_by_one(backward_input, dys, members, precision)


def _streams(x: Tensor, weight: Weight | None) -> bool:
    """Whether the CUDA backend has the forward."""
    return isinstance(weight, NF4Weight) and cuda.cannot_stream(x, weight) is None


def _decodes_inside(dy: Tensor, weight: Weight | None) -> bool:
    """Whether the CUDA backend has dx."""
    if not isinstance(weight, NF4Weight) or dy.shape[0] > MOST_TOKENS:
        return False
    return cuda.cannot_decode_inside(dy, weight, forward=False) is None


_NOTE = f"up to {MOST_TOKENS} tokens by the CUDA backend's kernels where those take them"


def _describe(problem: Problem) -> str | None:
    return f"{TRITON.describe(problem)}; {_NOTE}"


def _describe_group(problems: Sequence[Problem]) -> str | None:
    return f"{group.describe(problems)}; {_NOTE}"


def _nf4_paths(x: Tensor, weight: NF4Weight) -> tuple[NF4Path, NF4Path]:
    assert TRITON.nf4_paths is not None
    forward, backward = TRITON.nf4_paths(x, weight)
    dy = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="meta")
    path = NF4Path("inside of the CUDA backend's product", f"{x.shape[0]} rows are at most {MOST_TOKENS}")
    return path if _streams(x, weight) else forward, path if _decodes_inside(dy, weight) else backward


BACKEND = replace(
    TRITON,
    forward=forward,
    backward_input=backward_input,
    backward=backward,
    describe=_describe,
    nf4_paths=_nf4_paths,
    group=replace(
        group.GROUP, forward=group_forward, backward_input=group_backward_input, describe=_describe_group
    ),
)
