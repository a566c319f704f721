"""Whether a provider's output and gradients are right: a wrong answer gets no time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from lora_kernels.cli.bench.cases import DTYPES, SCALING, Operands
from lora_kernels.cli.bench.providers import Layer, WrongAnswer
from lora_kernels.dropout import Dropout
from lora_kernels.reference import lora_linear_reference

# ||value - exact|| / ||exact||. Two roundings to bfloat16 make 2.7e-3; a lost term of the sum makes far more.
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
_ROWS = 4096
# Masks are a function of what the device's generator gives: a layer that is checked starts from this.
_SEED = 0


@dataclass
class Exact:
    """y, dx, dA and dB in float64, kept in float32 (which is exact enough for every limit); dA, dB may not exist.

    In a group every layer has its own y[0], dA[0], dB[0], y[1] ...; dx is one sum.
    """

    values: dict[str, Tensor]

    @staticmethod
    def of(operands: Operands, with_lora: bool, dropout: float = 0.0) -> Exact:
        """Computed by the reference, one layer after the other; `dropout` with the masks that `check` has them draw."""
        values: dict[str, Tensor] = {}
        for index, (member, keep) in enumerate(zip(operands.members, _masks(operands, dropout), strict=True)):
            for kind, value in _exact_layer(member, with_lora, keep, dropout).items():
                name = kind if kind == "dx" else _name(kind, index, operands)
                values[name] = values[name] + value if name in values else value
        return Exact(values)


def _name(kind: str, index: int, operands: Operands) -> str:
    return f"{kind}[{index}]" if operands.others else kind


def _masks(operands: Operands, dropout: float) -> list[Tensor | None]:
    """The masks of dropout.py: every layer draws one, in their order."""
    torch.manual_seed(_SEED)
    M, K = operands.x.shape
    draws = [Dropout.draw(dropout, operands.x.device) for _ in operands.members]
    return [None if draw is None else draw.keep(M, K) for draw in draws]


def _exact_layer(operands: Operands, with_lora: bool, keep: Tensor | None, dropout: float) -> dict[str, Tensor]:
    """Some rows at a time: float64 is large."""
    weight = operands.weight.double()
    lora_A, lora_B = operands.lora_A.detach().double(), operands.lora_B.detach().double()
    scaling = SCALING if with_lora else 0.0
    sums = {"dA": torch.zeros_like(lora_A), "dB": torch.zeros_like(lora_B)}
    rows: dict[str, list[Tensor]] = {"y": [], "dx": []}
    blocks = [torch.split(t, _ROWS) for t in (operands.x.detach(), operands.dy)]
    kept = repeat(None) if keep is None else torch.split(keep, _ROWS)
    for x, dy, stays in zip(*blocks, kept, strict=False):
        leaves = [t.requires_grad_() for t in (x.double(), lora_A, lora_B)]
        x64, A, B = leaves
        y = lora_linear_reference(x64, weight, A, B, scaling=scaling, keep=stays, dropout_p=dropout)
        dx, dA, dB = torch.autograd.grad(y, leaves, dy.double())
        rows["y"].append(y.detach().float())
        rows["dx"].append(dx.float())
        sums["dA"] += dA
        sums["dB"] += dB
    values = {name: torch.cat(parts) for name, parts in rows.items()}
    if with_lora:
        values |= {name: total.float() for name, total in sums.items()}
    return values


def check(layer: Layer, operands: Operands, exact: Exact) -> dict[str, float]:
    """The relative error of the output and of each gradient. A layer that drops must drop what `exact` does.

    Raises:
        WrongAnswer: one of them is off by more than its dtype explains.
    """
    torch.manual_seed(_SEED)
    ys = layer.forward(operands.x)
    gradients = torch.autograd.grad(ys, (operands.x, *layer.adapters), operands.dys)
    layers = range(len(operands.members))
    names = [_name("y", index, operands) for index in layers] + ["dx"]
    names += [_name(kind, index, operands) for index in layers for kind in ("dA", "dB")]
    got = dict(zip(names, (*(y.detach() for y in ys), *gradients), strict=False))
    limit = LIMITS[DTYPES[operands.case.dtype]]
    errors = {}
    for name, expected in exact.values.items():
        errors[name] = float((got[name].float() - expected).norm() / expected.norm())
        # The negation also catches NaN.
        if not errors[name] < limit:
            raise WrongAnswer(f"wrong answer: {name} is off by {errors[name]:.1e}, more than {limit:.0e}")
    return errors
