"""The two rates that stand for the machine's ceilings, measured in the run itself, and what a case asks of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.cli.bench.cases import DTYPES, Case
from lora_kernels.cli.bench.clock import Clock, interleaved

# Of NF4 with double quantization: half a byte of codes, and an 8-bit scale for each block of 64.
_NF4_BYTES = 0.5 + 1 / 64
_GPU_COPY_BYTES, _CPU_COPY_BYTES = 1 << 30, 1 << 26
_GPU_SIZE, _CPU_SIZE = 8192, 512


@dataclass(frozen=True)
class Ceilings:
    """What a copy moves and what a large matrix product computes, per second, in one regime.

    A yardstick and no bound: a product of another shape may be faster than that one, and a chip's clock varies.
    """

    bytes_per_second: float
    flops_per_second: float

    def microseconds(self, work: Work) -> float:
        """What the work takes at these rates; some layers were measured at less."""
        return 1e6 * max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


@dataclass(frozen=True)
class Work:
    """What must be computed and moved: each input read once, each output written once."""

    flops: float
    bytes: float


def measure_ceilings(clock: Clock, device: torch.device, dtype: torch.dtype, samples: int) -> Ceilings:
    """A copy from device memory to device memory, and a square matrix product by the library."""
    on_gpu = device.type == "cuda"
    count = (_GPU_COPY_BYTES if on_gpu else _CPU_COPY_BYTES) // 4
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    size = _GPU_SIZE if on_gpu else _CPU_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right)}, clock, samples
    )
    copy, product = times["copy"], times["product"]
    if isinstance(copy, str) or isinstance(product, str):
        raise RuntimeError(f"the ceilings of this machine cannot be measured: {copy}, {product}")
    return Ceilings(
        bytes_per_second=2 * source.nbytes / copy.median * 1e6,
        flops_per_second=2 * size**3 / product.median * 1e6,
    )


def work_of(case: Case, part: str, lora: bool, adapter_bytes: int, weight_nf4: bool) -> Work:
    """The least work of a `part` of a case: "forward", or "step", which is that and the gradients."""
    # Layers that share x are one as wide as all of them together, but each has an A of its own.
    M, K, N, r = case.M, case.K, sum(case.widths), case.rank
    adapter_rows = len(case.widths) * K + N
    itemsize = DTYPES[case.dtype].itemsize
    weight = K * N * (_NF4_BYTES if weight_nf4 else itemsize)
    adapters = r * adapter_rows * adapter_bytes
    x, y = M * K * itemsize, M * N * itemsize
    flops, moved = 2 * M * N * K, x + weight + y
    if lora:
        flops += 2 * M * r * adapter_rows
        moved += adapters
    if part == "step":
        # dx reads dy and the weight and writes as much as x.
        flops += 2 * M * N * K
        moved += y + weight + x
        if lora:
            # T, T A, dA and dB; S and T are small enough to be forgotten, x and the adapters are read again.
            flops += 4 * M * r * adapter_rows
            moved += x + 2 * adapters
    return Work(flops, moved)
