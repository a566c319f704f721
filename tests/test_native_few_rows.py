"""Few rows in the launch path in C++, where their kernel stands in the place of the one-pass kernel."""

from __future__ import annotations

import pytest
import torch
from launch_path import LaunchPath, assert_learned, assert_same, bf16, in_python, make, run, with_strides
from native_calls import KINDS, assert_learned_call, leaf
from test_autograd import LEAVES, SUBSETS

pytest_plugins = ("launch_path",)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapters", [bf16, torch.float32], ids=str)
def test_the_values_and_bits_of_the_python_path(
    adapters: torch.dtype, dropout: float, few_rows: LaunchPath
) -> None:
    tensors = make(*LEAVES, sizes=(2, 8, 24, 40, 3))
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].detach().to(adapters).requires_grad_()
    assert_learned(few_rows, tensors, dropout_p=dropout)
    few_rows.launched()
    few, *_ = run(tensors, dropout_p=dropout)
    mask = ["mask"] if dropout else []
    assert few_rows.launched() == [*mask, "few_rows", *mask, "few_rows", "adapter_grads"]
    # A row more is one too many, and the backward one launch again.
    more = tensors | {"x": torch.cat([tensors["x"].detach().view(16, 24)] * 2)[:17].requires_grad_()}
    many, *_ = run(more, dropout_p=dropout)
    assert few_rows.launched() == [*mask, "one_pass", *mask, "backward"]
    assert few is not None
    assert many is not None
    torch.testing.assert_close(few.view(16, -1), many[:16], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_every_subset_of_gradients(needed: tuple[str, ...], few_rows: LaunchPath) -> None:
    tensors = make(*needed)
    want = in_python(tensors, dropout_p=0.3)
    for _ in range(4):
        assert_same(run(tensors, dropout_p=0.3), want)
    assert "one_pass" not in few_rows.launched()


def test_what_tma_cannot_read_is_not_theirs(few_rows: LaunchPath) -> None:
    tensors = make(*LEAVES)
    assert_learned(few_rows, tensors | {"x": with_strides(tensors["x"], 25, 1)})
    assert "few_rows" not in few_rows.launched()
    assert_learned(few_rows, tensors | {"x": with_strides(tensors["x"], 32, 1)})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_down_projection_of_a_gated_mlp(dropout: float, few_rows: LaunchPath) -> None:
    layers = KINDS["silu"]((5,)).adapters(lambda t: leaf(t), "lora_A", "lora_B")
    assert_learned_call(few_rows, layers, dropout_p=dropout)
    few_rows.launched()
    layers(dropout_p=dropout)
    mask = ["mask"] if dropout else []
    assert few_rows.launched() == [*mask * 2, "group_forward", "gated_forward", *mask, "few_rows"]
