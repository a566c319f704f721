"""The launch that draws a dropout mask as bits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lora_kernels.backends.triton import ahead
from lora_kernels.backends.triton.launches import Launch, remember
from lora_kernels.backends.triton.mask import mask_kernel
from lora_kernels.dropout import Dropout

# Words of 32 elements, four for a thread.
MASK_BLOCK = 512

_launches: dict[tuple[object, ...], Launch] = {}


def bits_of(dropout: Dropout | None, rows: int, columns: int) -> Tensor | None:
    """The mask [rows, columns] of a draw as mask.py packs it; dx and dA of one backward share it. None for no dropout."""
    if dropout is None:
        return None
    device, shape = dropout.seed.device, (rows, 4 * triton.cdiv(columns, 128))
    if dropout.bits is not None:
        assert dropout.bits.shape == shape, "a draw has one mask"
        return dropout.bits
    bits = torch.empty(shape, dtype=torch.int32, device=device)
    assert bits.numel() < 1 << 31, "the kernel counts words in 32 bits"
    key = (device, rows, columns, dropout.threshold)
    launch = _launches.get(key)
    if launch is None:
        grid = (triton.cdiv(bits.numel(), MASK_BLOCK), 1, 1)
        numbers = (dropout.threshold, rows, columns)
        options = {"BELOW_HALF": dropout.threshold < 1 << 15, "BLOCK": MASK_BLOCK, "num_warps": 4}
        kind = ("mask", device, columns, options["BELOW_HALF"])
        launch = Launch(mask_kernel, kind, grid, options, None, 0, 0, numbers)
        remember(_launches, key, launch)
    launch(device, (dropout.seed, bits))
    # A rehearsal draws nothing.
    if not ahead.rehearsing():
        dropout.bits = bits
    return bits
