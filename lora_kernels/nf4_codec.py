"""The arithmetic of NF4 on flat tensors: codes, scales and the scales of the scales.

Everything is a float32 operation of its own, rounded on its own: a product and a sum that a compiler made one
fused operation would give other bits than the ones that checkpoints were made with.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# What a weight is beside its tensors: block size, shape and original dtype.
Form = tuple[int, torch.Size, torch.dtype]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# How many scales share one scale of their own.
NESTED_BLOCK_SIZE = 256

_CODE_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_ZERO = _CODE_TABLE.index(0.0)
# Elements in one go: what is computed in float32 on the way stays at tens of megabytes, whatever the weight.
_CHUNK = 2**22
# The reciprocal of anything smaller may be infinite, and its product with zero no number.
_SMALLEST_DIVISOR = 1e-38


# What is cached outlives the call that made it: a tensor made in somebody's inference mode could never be saved for
# a backward.
@cache
@torch.inference_mode(False)
def code_table(device: torch.device) -> Tensor:
    """The 16 values that a code stands for: float32, ascending."""
    return torch.tensor(_CODE_TABLE, dtype=torch.float32, device=device)


@cache
@torch.inference_mode(False)
def nested_map(device: torch.device) -> Tensor:
    """The 256 values that an 8-bit scale stands for: float32, ascending.

    Source: Dettmers et al., "8-Bit Optimizers via Block-wise Quantization", ICLR 2022 (the dynamic map).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        for mean in (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist():
            values += [mean, -mean]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encode(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The packed codes, uint8 [(n + 1) // 2], and the largest magnitude of each block, float32 [blocks].

    `weight` is [N, K] with any strides; blocks run over its flattened elements. A NaN or an infinity shows in
    the magnitude of its block.
    """
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=weight.device)
    table = code_table(weight.device)
    thresholds = (table[:-1] + table[1:]) / 2
    for start in range(0, n, _CHUNK):
        values = _flat(weight, start, min(start + _CHUNK, n)).float()
        scaled, largest = _scaled(values, block_size)
        absmax[start // block_size :][: largest.numel()] = largest
        # The number of thresholds that a value exceeds: on a tie, the lower code.
        codes = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1), value=_ZERO)
        packed[start // 2 :][: codes.numel() // 2] = (codes[0::2] << 4) | codes[1::2]
    return packed, absmax


def decode(packed: Tensor, scales: Tensor, block_size: int, out: Tensor) -> None:
    """Writes round(code * scale), rounded once to out's dtype, into the flat tensor `out`."""
    n = out.numel()
    pairs = _pairs(out.device)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        values = pairs.index_select(0, packed[start // 2 : (stop + 1) // 2].to(torch.int32)).view(-1)
        of_blocks = scales[start // block_size : -(-stop // block_size)]
        out[start:stop] = values[: stop - start] * of_blocks.repeat_interleave(block_size)[: stop - start]


def encode_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: uint8 [blocks], float32 [ceil(blocks / 256)] and the offset, float32 [1]."""
    offset = absmax.mean().reshape(1)
    scaled, nested_absmax = _scaled(absmax - offset, NESTED_BLOCK_SIZE)
    values = nested_map(absmax.device)
    midpoints = (values[:-1] + values[1:]) * 0.5
    codes = torch.bucketize(scaled, midpoints)
    # Nearest value; a tie takes the even code, as the binary search of the GPU kernels that made the checkpoints.
    tie = torch.nn.functional.pad(midpoints, (0, 1), value=torch.inf)[codes] == scaled
    return (codes + (tie & (codes % 2 == 1))).to(torch.uint8), nested_absmax, offset


def decode_scales(codes: Tensor, nested_absmax: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """round(round(map * scale) + offset): float32 [blocks]."""
    products = values.index_select(0, codes.to(torch.int32))
    products *= nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return products.add_(offset)


@cache
@torch.inference_mode(False)
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two values of a byte, that of the high nibble first."""
    table, byte = code_table(device), torch.arange(256, device=device)
    return torch.stack((table[byte >> 4], table[byte & 15]), dim=1)


def _flat(weight: Tensor, start: int, stop: int) -> Tensor:
    """Elements start to stop of the flattened weight; what is copied of a strided one is their rows alone."""
    columns = weight.shape[1]
    first = start // columns
    rows = weight[first : -(-stop // columns)].reshape(-1)
    return rows[start - first * columns : stop - first * columns]


def _scaled(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """values * (1 / absmax of their block), and absmax."""
    n = values.numel()
    whole = torch.nn.functional.pad(values, (0, -n % block_size)).view(-1, block_size)
    absmax = whole.abs().amax(1)
    reciprocal = absmax.clamp_min(_SMALLEST_DIVISOR).reciprocal_()
    return (whole * reciprocal[:, None]).view(-1)[:n], absmax
