"""Bugs planted in the groups: the checks that the other tests are made of must notice every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from group_models import adapted, grouped, train, ungrouped
from peft_models import assert_same, gradients
from test_group_scope import test_a_change_in_place_between_the_calls as in_place
from test_group_scope import test_what_happens_between_the_calls as between
from torch import Tensor

from lora_kernels.integrations import peft_blocks, peft_scope
from lora_kernels.integrations.peft_scope import Scope

Plant = Callable[[pytest.MonkeyPatch], None]


def in_group(change: Callable[[list[Tensor]], list[Tensor]]) -> Plant:
    compute = peft_blocks.lora_linear_group
    return lambda monkeypatch: monkeypatch.setattr(
        peft_blocks, "lora_linear_group", lambda *a, **k: change(compute(*a, **k))
    )


def in_mlp(change: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]) -> Plant:
    compute = peft_blocks.lora_gated_mlp

    def planted(*arguments: Any, **options: Any) -> Tensor:
        arguments, options = change(arguments, options)
        return compute(*arguments, **options)

    return lambda monkeypatch: monkeypatch.setattr(peft_blocks, "lora_gated_mlp", planted)


def check_stock() -> None:
    stock = adapted("Qwen2")
    assert_same(gradients(stock, "llama", "cpu"), gradients(grouped(stock), "llama", "cpu"), 1e-4)


def check_dropout() -> None:
    stock = adapted(lora_dropout=0.3)
    assert train(grouped(stock), "cpu") == pytest.approx(train(ungrouped(stock), "cpu"), rel=1e-4)


def check_another_tensor() -> None:
    between("another tensor", "cpu")


BUGS: dict[str, tuple[Plant, Callable[[], None]]] = {
    "siblings' outputs are swapped": (in_group(lambda ys: [ys[0], *reversed(ys[1:])]), check_stock),
    "an output has no gradient": (in_group(lambda ys: [*ys[:-1], ys[-1].detach()]), check_stock),
    "gate and up are swapped": (in_mlp(lambda a, k: ((a[0], a[2], a[1], a[3]), k)), check_stock),
    "the other activation": (in_mlp(lambda a, k: (a, k | {"activation": "gelu_tanh"})), check_stock),
    "a bias is left out": (in_mlp(lambda a, k: ((*a[:3], a[3]._replace(scaling=1.0)), k)), check_stock),
    "the MLP drops nothing": (in_mlp(lambda a, k: (a, k | {"dropout_p": 0.0})), check_dropout),
    "masks are drawn in another order": (in_group(lambda ys: torch.rand(1) is not None and ys), check_dropout),  # type: ignore[arg-type, return-value]
    "identity is not checked": (
        lambda monkeypatch: monkeypatch.setattr(
            Scope, "take", lambda self, layer, x, take=Scope.take: take(self, layer, x if self._x is None else self._x)
        ),
        check_another_tensor,
    ),
    "changes in place are not seen": (
        lambda monkeypatch: monkeypatch.setattr(peft_scope, "_state", lambda x: ()),
        in_place,
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = BUGS[bug]
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
