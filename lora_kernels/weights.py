"""What a frozen base weight can be: a dense tensor or an NF4Weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.nf4 import NF4Weight

Weight = Tensor | NF4Weight


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix: a dense one as it is, an NF4 weight decoded to `dtype` into a new tensor."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)
