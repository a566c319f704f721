"""The one accuracy rule: no less exact than PEFT's own operations in the same dtypes, against float64.

An error is ||value - exact|| / ||exact||. PEFT's sequence is a linear layer, then for the branch a cast of x to the
adapters' dtype, dropout, two linear layers, a multiplication, and an addition that is rounded to the base's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = dict[str, Tensor]

# The last digit of a value: two implementations that round once each may differ by it.
_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}


def relative_error(value: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm()
    difference = (value.double() - exact.double()).norm()
    return float(difference if norm == 0 else difference / norm)


def assert_as_exact_as_peft(ours: Gradients, peft: Gradients, exact: Gradients) -> None:
    for name, reference in exact.items():
        value = ours[name]
        if value.numel() == 0:
            assert value.shape == reference.shape
            continue
        assert not torch.isnan(value).any(), f"{name} has NaN: an element was not written"
        error, allowed = relative_error(value, reference), relative_error(peft[name], reference)
        # Two sums that each round once may differ by one ulp in an element; over many elements that averages out.
        # float32 sums differ by the order of their additions as well.
        floor = _ULP[value.dtype] * (value.numel() ** -0.5 + (8.0 if value.dtype == torch.float32 else 0.1))
        assert error <= 1.1 * allowed + floor, f"{name}: error {error:.2e}, where PEFT has {allowed:.2e}"


def peft_sequence(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    keep: Tensor | None,
    p: float,
) -> Tensor:
    """What peft.tuners.lora.Linear.forward computes, operation by operation, with the mask given."""
    result = torch.nn.functional.linear(x, weight, bias)
    dtype = result.dtype
    branch = x.to(lora_A.dtype)
    if keep is not None:
        branch = torch.where(keep, branch, 0.0) * (0.0 if p == 1 else 1 / (1 - p))
    branch = torch.nn.functional.linear(torch.nn.functional.linear(branch, lora_A), lora_B)
    return (result + branch * scaling).to(dtype)
