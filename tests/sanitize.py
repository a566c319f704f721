"""A small case of every kernel and path of a backend, for compute-sanitizer: `make sanitize`."""

from __future__ import annotations

import sys
from functools import partial
from unittest import mock

import torch
from cases import Case

from lora_kernels import NF4Weight, lora_gated_mlp, lora_linear, lora_linear_group
from lora_kernels.backends import cuda

CASES = [
    Case(300, 192, 136, 16, torch.bfloat16),
    Case(300, 192, 136, 16, torch.bfloat16, dropout=0.3, bias=True),
    Case(300, 192, 136, 40, torch.bfloat16, dropout=0.3),
    Case(300, 192, 136, 16, torch.bfloat16, transposed_weight=True),
    Case(300, 128, 72, 24, torch.bfloat16, adapter_dtype=torch.float32),
    Case(130, 100, 70, 80, torch.float16, dropout=0.3),
    Case(130, 128, 72, 24, torch.bfloat16, adapter_dtype=torch.float32),
    # So few rows that they have a kernel of their own on Hopper.
    Case(5, 192, 136, 16, torch.bfloat16, bias=True),
    Case(20, 200, 136, 16, torch.bfloat16, adapter_dtype=torch.float32, dropout=0.3),
    Case(40, 192, 72, 70, torch.bfloat16, dropout=0.3, transposed_weight=True),
    Case(100, 192, 136, 16, torch.bfloat16, dropout=0.3),
    Case(200, 192, 136, 40, torch.bfloat16, transposed_weight=True),
    Case(200, 2728, 1032, 16, torch.bfloat16, bias=True),
    # A rank so large that S has a launch of its own on Hopper.
    Case(520, 192, 136, 72, torch.bfloat16, bias=True),
    # Sizes of which none is even: other loads are compiled for them.
    Case(17, 63, 3, 9, torch.bfloat16, adapter_dtype=torch.float32, dropout=0.3),
    Case(65, 33, 20, 3, torch.float32),
]

# Under autocast, where float32 adapters are rounded on load.
AUTOCAST_CASES = [
    Case(130, 128, 72, 24, torch.bfloat16, adapter_dtype=torch.float32, dropout=0.3),
    Case(520, 128, 72, 80, torch.bfloat16, adapter_dtype=torch.float32),
]


NF4_CASES = [
    Case(5, 128, 72, 24, torch.bfloat16, bias=True),
    Case(40, 192, 128, 16, torch.bfloat16, dropout=0.3),
    # Float32 adapters split into three numbers each.
    Case(9, 320, 72, 40, torch.bfloat16, adapter_dtype=torch.float32, bias=True),
    # Runs of 32 codes, and other numbers of tokens.
    Case(12, 96, 136, 70, torch.bfloat16, adapter_dtype=torch.float32, dropout=0.3),
    Case(30, 160, 264, 3, torch.bfloat16, dropout=0.3),
    Case(200, 100, 70, 16, torch.float16),
    Case(65, 64, 20, 3, torch.float32),
]


# Two members of a group.
GROUP_CASES = [
    (Case(200, 192, 136, 16, torch.bfloat16), Case(200, 192, 72, 24, torch.bfloat16)),
    (Case(130, 100, 70, 80, torch.float16, dropout=0.3), Case(130, 100, 70, 8, torch.float16, dropout=0.3)),
]
# So many rows that the weights are decoded for a group.
NF4_GROUP_CASES = [
    (Case(300, 192, 136, 16, torch.bfloat16), Case(300, 192, 72, 24, torch.bfloat16)),
]


# Of a large rank, whose T are written by TMA. initcheck before version 2025.4, of CUDA 13.1, does not see that, and
# takes the reading of all T into one matrix for an error: not for initcheck.
WIDE_GROUP_CASES = [
    (Case(520, 192, 136, 72, torch.bfloat16), Case(520, 192, 72, 136, torch.bfloat16)),
]


# Gate and up and, transposed, the down projection. Here kernels read what others wrote, too. So that initcheck can
# take them, no row is a multiple of 16 bytes long, as TMA needs it, and all is written through pointers. What the other
# cases write by TMA, only TMA reads, or nobody.
GATED_CASES = [
    Case(200, 192, 132, 16, torch.bfloat16),
    Case(130, 100, 70, 80, torch.float16, dropout=0.3),
]


def run(case: Case, weight: torch.Tensor | NF4Weight, backend: str) -> None:
    t = case.tensors(torch.device("cuda", 0))
    leaves = [v.requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
    y = lora_linear(leaves[0], weight, *leaves[1:], bias=t.bias, dropout_p=case.dropout, scaling=2.0, backend=backend)
    torch.autograd.grad(y, leaves, t.dy)
    torch.cuda.synchronize()
    print(f"{case} ran on {backend}, {type(weight).__name__}", flush=True)


def run_group(cases: tuple[Case, ...], backend: str, nf4: bool = False) -> None:
    tensors = [case.tensors(torch.device("cuda", 0)) for case in cases]
    x, dropout = tensors[0].x.requires_grad_(), cases[0].dropout
    weights = [NF4Weight.quantize(t.weight) if nf4 else t.weight for t in tensors]
    members = [
        (weight, t.lora_A.requires_grad_(), t.lora_B.requires_grad_(), 2.0, t.bias)
        for weight, t in zip(weights, tensors, strict=True)
    ]
    leaves = [x, *(adapter for member in members for adapter in member[1:3])]
    ys = lora_linear_group(x, members, dropout_p=dropout, backend=backend)
    torch.autograd.grad(ys, leaves, [t.dy for t in tensors])
    torch.cuda.synchronize()
    print(f"{' and '.join(map(str, cases))} ran on {backend}, as a group{' in NF4' * nf4}", flush=True)


def run_gated(case: Case, backend: str) -> None:
    t = case.tensors(torch.device("cuda", 0))
    leaves = x, lora_A, lora_B = [v.requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
    gate = (t.weight, lora_A, lora_B, 2.0)
    down = (t.weight.T, lora_B.T, lora_A.T, 2.0)
    y = lora_gated_mlp(x, gate, gate, down, dropout_p=case.dropout, backend=backend)
    torch.autograd.grad(y.float().square().sum(), leaves)
    torch.cuda.synchronize()
    print(f"{case} ran on {backend}, as a gated MLP", flush=True)


def run_all(backend: str, initcheck: bool) -> None:
    device = torch.device("cuda", 0)
    for case in CASES:
        run(case, case.tensors(device).weight, backend)
    with torch.autocast("cuda", torch.bfloat16):
        for case in AUTOCAST_CASES:
            run(case, case.tensors(device).weight, backend)
    for case in NF4_CASES:
        for double_quant in (True, False):
            run(case, NF4Weight.quantize(case.tensors(device).weight, double_quant=double_quant), backend)
    for cases in GROUP_CASES if initcheck else [*GROUP_CASES, *WIDE_GROUP_CASES]:
        run_group(cases, backend)
    for cases in NF4_GROUP_CASES:
        run_group(cases, backend, nf4=True)
    for case in GATED_CASES:
        run_gated(case, backend)


def main() -> None:
    """sanitize.py [initcheck] [BACKEND ...]"""
    initcheck = "initcheck" in sys.argv
    for backend in [name for name in sys.argv[1:] if name != "initcheck"] or ["triton", "cuda"]:
        run_all(backend, initcheck)
        if backend == "cuda":
            # The kernels of other chips, where this one has its own.
            with mock.patch.object(cuda, "one_pass", partial(cuda.one_pass, portable=True)):
                run_all(backend, initcheck)


if __name__ == "__main__":
    main()
