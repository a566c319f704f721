"""A small case of every kernel and path, for compute-sanitizer: `make sanitize`."""

from __future__ import annotations

import torch
from cases import Case

from lora_kernels import lora_linear

CASES = [
    Case(200, 192, 136, 16, torch.bfloat16),
    Case(200, 192, 136, 16, torch.bfloat16, dropout=0.3, bias=True),
    Case(130, 100, 70, 80, torch.float16, dropout=0.3),
    Case(130, 128, 72, 24, torch.bfloat16, adapter_dtype=torch.float32),
    Case(65, 33, 20, 3, torch.float32),
]


def main() -> None:
    for case in CASES:
        t = case.tensors(torch.device("cuda", 0))
        leaves = [v.requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
        y = lora_linear(
            leaves[0], t.weight, *leaves[1:], bias=t.bias, dropout_p=case.dropout, scaling=2.0, backend="triton"
        )
        torch.autograd.grad(y, leaves, t.dy)
        torch.cuda.synchronize()
        print(f"{case} ran", flush=True)


if __name__ == "__main__":
    main()
