"""The CUDA C++ backend: tensors to the extension that csrc/ is compiled to, installed or on first use."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends import Backend, NF4Path, Precision, Problem, Scale, cuda_build, eager
from lora_kernels.backends.sync import zeros_for
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import Weight

# In the order of problem.h.
_PRECISIONS: dict[Precision, int] = {"native": 0, "rounded": 1, "split": 2}
# Of a product that decodes an NF4 weight inside of it: the rows of x and of dy at most, and what divides in_features
# and, backward, out_features.
_MOST_TOKENS, _MOST_TOKENS_BACKWARD, LANE_CODES, GROUP = 48, 64, 32, 8
# Of a forward product past which the weight streams: x's rows at most, and the codes that must have one scale.
MOST_STREAM_TOKENS, RUN = 16, 64


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
    stored = weight if isinstance(weight, NF4Weight) else weight.T
    y, s = one_pass(x, stored, lora_A.T, lora_B.T, bias, scale, dropout, True, precision)
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
    return one_pass(dy, weight, lora_B, lora_A, None, scale, dropout, False, precision)


def backward_adapters(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """dA = T^T mask(x) where T and x are given, dB = dy^T S where S is given, both in `dtype`."""
    narrow = s if t is None else t
    assert narrow is not None
    # At least one for each tile: 128 columns of x or dy, and 64 of the rank.
    columns = dy.shape[1] + (0 if x is None else x.shape[1])
    zeros = zeros_for(dy.device, (columns // 128 + 2) * (narrow.shape[1] // 64 + 1))
    dA, dB = _extension(dy.device).adapter_grads(
        x, dy, s, t, *_mask(dropout), dtype == torch.float32, zeros, _stream(dy.device)
    )
    return dA, dB


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """What weight.dequantize(dtype) gives, to the bit, at the speed of a copy."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _extension(out.device).dequantize(_packed(weight), out, _stream(out.device))
    return out


def one_pass(
    left: Tensor,
    weight: Weight,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    forward: bool,
    precision: Precision,
    *,
    portable: bool = False,
) -> tuple[Tensor, Tensor]:
    """out = left weight + mask(S up) + bias and S = scale * mask(left) down.

    Args:
        left: [M, K] with contiguous rows.
        weight: [K, N] of any strides; an NF4 weight as it is stored, [N, K] forward and [K, N] backward.
        down: [K, R], up: [R, N]: views of the adapters.
        forward: the dropout mask sits on left, and not on S up.
        portable: forgo the kernel for the chip at hand, for the one that every chip runs.
    Returns:
        out [M, N] in left's dtype; S [M, R], in float32 if precision is "split".
    """
    dense, packed = (None, _packed(weight)) if isinstance(weight, NF4Weight) else (weight, None)
    number, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    out, s = _extension(left.device).one_pass(
        left,
        dense,
        packed,
        down,
        up,
        bias,
        number,
        scale_tensor,
        *_mask(dropout),
        forward,
        _PRECISIONS[precision],
        portable,
        zeros_for(left.device, _most_counters(left.shape[0], up.shape[1], up.shape[0], packed is not None)),
        _stream(left.device),
    )
    return out, s


def cannot_stream(x: Tensor, weight: NF4Weight) -> str | None:
    """Why a forward product cannot have the weight stream past few tokens; None if it can. nf4_stream_fits in words."""
    if x.shape[0] > MOST_STREAM_TOKENS:
        return f"{x.shape[0]} rows are more than {MOST_STREAM_TOKENS}"
    if weight.block_size < RUN:
        return f"blocks of {weight.block_size} are less than {RUN}"
    if weight.shape[1] % RUN != 0:
        return f"{weight.shape[1]} columns are no multiple of {RUN}"
    return cannot_decode_inside(x, weight, forward=True)


def forward_launch(
    x: Tensor, weight: NF4Weight, lora_A: Tensor, lora_B: Tensor, precision: Precision
) -> tuple[int, int, int]:
    """The address of what launches a forward product that decodes; the floats it works in, the zeros it counts in."""
    operands = (_packed(weight), lora_A.T, lora_B.T, _PRECISIONS[precision])
    return _extension(x.device).nf4_forward_launch(x, *operands)  # type: ignore[no-any-return]


def why_not_loaded(device: torch.device) -> str | None:
    """Why what is compiled for a device cannot be loaded; None if it is loaded now."""
    try:
        _extension(device)
    except (ImportError, OSError, RuntimeError) as error:
        return f"it cannot be loaded: {error}"
    return None


def _most_counters(M: int, N: int, rank: int, nf4: bool) -> int:
    """More than any kernel here counts in: some for each 64 rows of left and each 32 of the rank."""
    dense = 64 + (M // 64 + 4) * (2 + rank // 32)
    # A packed weight streams past a few tokens: one for each 16 of its rows, rounded up in each block, and of the rank.
    return max(dense, 2 * (4 + N // 16 + rank // 16)) if nf4 else dense


def _mask(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    return (None, 0) if dropout is None else (dropout.seed, dropout.threshold)


def _packed(weight: NF4Weight) -> tuple[Any, ...]:
    nested = (weight.nested_absmax, weight.nested_map, weight.offset)
    return (weight.packed, weight.absmax, *nested, weight.block_size, *weight.shape)


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)  # type: ignore[attr-defined,no-any-return]


@cache
def _extension(device: torch.device) -> Any:
    return cuda_build.load(torch.cuda.get_device_capability(device))


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"x is on {problem.device}, and its kernels run on CUDA GPUs"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if problem.in_features == 0 or problem.out_features == 0:
        return "in_features and out_features must be at least 1"
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < (8, 0):
        return f"compute capability is {capability[0]}.{capability[1]}, and the kernels need 8.0"
    stale = cuda_build.why_stale()
    if stale is not None:
        return f"what was compiled at installation cannot be used: {stale}"
    if cuda_build.is_built(capability):
        return None
    missing = cuda_build.missing() or cuda_build.cannot_keep()
    return None if missing is None else f"it is not compiled, and cannot be here: {missing}"


def _declines(problem: Problem) -> str | None:
    if not cuda_build.is_built(torch.cuda.get_device_capability(problem.device)):
        return "it is not compiled yet, which takes a minute or two: backend='cuda' does it on its first call"
    if problem.dtype == torch.float32:
        return "float32 takes no tensor cores here, where the libraries' kernels are faster"
    return None


def _describe(problem: Problem) -> str | None:
    capability = torch.cuda.get_device_capability(problem.device)
    if not cuda_build.is_built(capability):
        state = "compiled on the first call"
    else:
        state = "compiled at installation" if cuda_build.has_prebuilt() else "compiled before"
    kernels = "wgmma and TMA where they fit, else mma" if capability == (9, 0) else "mma"
    arithmetic = "float32 arithmetic" if problem.dtype == torch.float32 else f"tensor cores ({kernels})"
    return f"CUDA C++, {state}; {arithmetic}{_describe_nf4(problem) if problem.nf4 else ''}"


def _describe_nf4(problem: Problem) -> str:
    """What every call has in common; _nf4_paths says the rest."""
    decoded = "the NF4 weight is decoded by a launch of its own"
    if problem.dtype == torch.float32 or problem.in_features % LANE_CODES != 0:
        return f"; {decoded}"
    forward = f"up to {_MOST_TOKENS} tokens forward"
    if problem.out_features % GROUP != 0:
        return f"; {decoded}, {forward} inside of the product"
    return f"; {decoded}, {forward} and {_MOST_TOKENS_BACKWARD} backward inside of the product"


def _nf4_paths(x: Tensor, weight: NF4Weight) -> tuple[NF4Path, NF4Path]:
    """Those of the forward, and of the backward, whose dy starts on 16 bytes."""
    dy = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="meta")
    return _nf4_path(x, weight, forward=True), _nf4_path(dy, weight, forward=False)


def _nf4_path(left: Tensor, weight: NF4Weight, forward: bool) -> NF4Path:
    reason = cannot_decode_inside(left, weight, forward)
    if reason is not None:
        return NF4Path("by a launch of its own", reason)
    most = _MOST_TOKENS if forward else _MOST_TOKENS_BACKWARD
    return NF4Path("inside of the product", f"{left.shape[0]} rows are at most {most}")


def cannot_decode_inside(left: Tensor, weight: NF4Weight, forward: bool) -> str | None:
    """Why a product of x or dy cannot decode the weight inside of it; None if it can.

    nf4_forward_fits and nf4_backward_fits in words.
    """
    most = _MOST_TOKENS if forward else _MOST_TOKENS_BACKWARD
    rows, columns = weight.shape
    if left.dtype == torch.float32:
        return "float32 products are not written for packed weights"
    if left.shape[0] > most:
        return f"{left.shape[0]} rows are more than {most}"
    if columns % LANE_CODES != 0:
        return f"{columns} columns are no multiple of {LANE_CODES}"
    if not forward and rows % GROUP != 0:
        return f"{rows} columns of dy are no multiple of {GROUP}"
    if weight.packed.data_ptr() % 16 != 0:
        return "the packed codes do not start on 16 bytes"
    if (left.data_ptr() | left.stride(0) * left.element_size()) % 16 != 0:
        return f"the rows of {'x' if forward else 'dy'} do not start on 16 bytes"
    return None


BACKEND = Backend(
    "cuda",
    _refuses,
    _declines,
    forward,
    backward_input,
    backward_adapters,
    _describe,
    nf4_paths=_nf4_paths,
)
