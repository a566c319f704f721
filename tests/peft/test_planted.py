"""Bugs planted in the fused layer: the checks that the other tests are made of must notice every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_checks as checks
import pytest
import torch
from peft.tuners import lora
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.integrations import peft_layer

lora_linear = peft_layer.lora_linear
fused_forward = peft_layer.fused_forward
Operands = peft_layer.Operands


def in_linear(**changes: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant by changing arguments of lora_linear: each is a function of all of them."""

    def planted(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
        values = {"x": x, "weight": weight, "lora_A": A, "lora_B": B, **options}
        return lora_linear(**(values | {name: change(values) for name, change in changes.items()}))

    return lambda monkeypatch: monkeypatch.setattr(peft_layer, "lora_linear", planted)


def in_adapters(change: Callable[[lora.Linear, Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Plant by changing each adapter's operands before the fused forward sees them; None leaves it out."""

    def planted(layer: lora.Linear, x: Tensor, operands: Operands) -> Tensor:
        changed = [change(layer, adapter) for adapter in operands.adapters]
        return fused_forward(layer, x, operands._replace(adapters=[a for a in changed if a is not None]))

    return lambda monkeypatch: monkeypatch.setattr(peft_layer, "fused_forward", planted)


def in_output(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(
        peft_layer, "fused_forward", lambda *arguments: change(fused_forward(*arguments))
    )


def negated_gradient(tensor: Tensor) -> Tensor:
    return 2 * tensor.detach() - tensor


def same_mask(options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    return float(options["dropout_p"])


def alpha_over_r(layer: lora.Linear, adapter: Any) -> Any:
    return adapter._replace(scaling=layer.lora_alpha[adapter.name] / layer.r[adapter.name])


def with_lora_bias(device: str) -> None:
    checks.check_against_stock(device, adapters=2, lora_bias=True)


def two_adapters(device: str) -> None:
    checks.check_against_stock(device, adapters=2)


MASK, STATISTICS, STOCK = (
    checks.check_dropout_mask,
    checks.check_dropout_statistics,
    checks.check_against_stock,
)
Check = Callable[[str], None]
BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], list[Check]]] = {
    "dropout is ignored": (in_linear(dropout_p=lambda o: 0.0), [MASK, STATISTICS]),
    "dropout is not rescaled": (
        in_linear(scaling=lambda o: o["scaling"] * (1 - o["dropout_p"])),
        [MASK, STATISTICS],
    ),
    "dropout reaches the base": (
        in_linear(x=lambda o: F.dropout(o["x"], o["dropout_p"]), dropout_p=lambda o: 0.0),
        [MASK],
    ),
    "every call draws the same mask": (in_linear(dropout_p=same_mask), [STATISTICS]),
    "dropout in evaluation": (in_linear(dropout_p=lambda o: o["dropout_p"] or 0.3), [STATISTICS]),
    "alpha / r in place of scaling": (in_adapters(alpha_over_r), [checks.check_set_scale]),
    "the gradient of A has the wrong sign": (
        in_linear(lora_A=lambda o: negated_gradient(o["lora_A"])),
        [STOCK],
    ),
    "the gradient of B has the wrong sign": (
        in_linear(lora_B=lambda o: negated_gradient(o["lora_B"])),
        [STOCK],
    ),
    "the gradient of x has the wrong sign": (in_linear(x=lambda o: negated_gradient(o["x"])), [STOCK]),
    "A has no gradient": (in_linear(lora_A=lambda o: o["lora_A"].detach()), [STOCK]),
    "the first active adapter only": (
        in_adapters(lambda layer, adapter: adapter if adapter.name == "default" else None),
        [two_adapters, with_lora_bias],
    ),
    "lora_B's bias is missing": (
        in_adapters(lambda layer, adapter: adapter._replace(c=None)),
        [with_lora_bias],
    ),
    "lora_B's bias is not scaled": (
        in_adapters(lambda layer, a: a if a.c is None else a._replace(c=a.c / a.scaling)),
        [with_lora_bias],
    ),
    "the base's bias is missing": (in_linear(bias=lambda o: None), [STOCK]),
    "the output is not cast back": (in_output(lambda y: y.float()), [checks.check_output_dtype]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_noticed(bug: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, noticing = BUGS[bug]
    for check in noticing:
        check(device)
    plant(monkeypatch)
    for check in noticing:
        with pytest.raises(AssertionError):
            check(device)
