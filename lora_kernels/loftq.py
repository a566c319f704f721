"""LoftQ: a quantized weight and the adapter that takes up what quantization lost."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.autograd import outside_autocast
from lora_kernels.nf4 import NF4Weight


def loftq(
    weight: Tensor, rank: int, scaling: float, block_size: int = 64, double_quant: bool = True, steps: int = 5
) -> tuple[NF4Weight, Tensor, Tensor]:
    """Q in NF4, A and B such that Q + scaling * B A is near the weight, found in turns:

        Q = quantize(W - scaling * B A)       scaling * B A = the best approximation of W - Q of rank r

    Args:
        weight: [N, K] in bfloat16, float16 or float32, on any device. Each step takes the singular value
            decomposition of one matrix of its size in float32.
        rank: r, at most; no more than min(N, K) singular values exist.
        scaling: what the layer multiplies B A by; above 0.
        block_size, double_quant: as for NF4Weight.quantize.
        steps: turns, at least 1.
    Returns:
        Q, which decodes to weight's dtype; A: [min(r, N, K), K] and B: [N, min(r, N, K)] in float32.
    Raises:
        ValueError: the scaling is not above 0, or there is no step; or as for NF4Weight.quantize.

    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024.
    """
    if scaling <= 0:
        raise ValueError(f"scaling was {scaling}, but must be above 0: the adapter could take up nothing")
    if steps < 1:
        raise ValueError(f"steps was {steps}, but must be at least 1")
    target = weight.detach().float()
    residual = target
    with torch.no_grad(), outside_autocast(weight.device.type):
        for _ in range(steps):
            quantized = NF4Weight.quantize(residual, block_size, double_quant)
            # The error counts as the layer will see it: of the values that are decoded in the weight's dtype.
            u, s, v = torch.linalg.svd(target - quantized.dequantize(weight.dtype).float(), full_matrices=False)
            root = (s[:rank] / scaling).sqrt()
            lora_A, lora_B = root[:, None] * v[:rank], u[:, :rank] * root
            residual = torch.addmm(target, lora_B, lora_A, alpha=-scaling)
    return replace(quantized, dtype=weight.dtype), lora_A, lora_B
