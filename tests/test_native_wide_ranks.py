"""Large ranks in the launch path in C++: two launches in the place of one, and the libraries in that of another."""

from __future__ import annotations

import pytest
import torch
from launch_path import LaunchPath, assert_learned, assert_same, bf16, in_python, make, run, with_strides
from native_calls import assert_learned_call, assert_llama_learned, gated, group, leaf
from test_autograd import LEAVES, SUBSETS

pytest_plugins = ("launch_path",)

TWICE = ["products", "products"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapters", [bf16, torch.float32], ids=str)
def test_the_values_and_bits_of_the_python_path(adapters: torch.dtype, bias: bool, wide_ranks: LaunchPath) -> None:
    tensors = make(*LEAVES, sizes=(2, 8, 24, 40, 48))
    if not bias:
        tensors["bias"] = None  # type: ignore[assignment]
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].detach().to(adapters).requires_grad_()
    with torch.autocast("cpu", bf16, enabled=adapters == torch.float32):
        assert_learned(wide_ranks, tensors)
        wide_ranks.launched()
        wide = run(tensors)
    assert wide_ranks.launched() == [*TWICE, *TWICE]
    # With a mask, as with a smaller rank, it is the one-pass kernel's.
    assert_learned(wide_ranks, tensors, dropout_p=0.3)
    assert not set(TWICE) & set(wide_ranks.launched())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_kernels.backends.triton.wide_ranks.is_wide_rank", lambda rows, rank, members=1: False)
        wide_ranks.extension.clear()
        with torch.autocast("cpu", bf16, enabled=adapters == torch.float32):
            one_pass = run(tensors)
    assert wide_ranks.launched() == ["one_pass", "one_pass", "adapter_grads"]
    for got, want in zip(wide, one_pass, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_halves_are_not_theirs(wide_ranks: LaunchPath) -> None:
    tensors = make(*LEAVES, sizes=(5, 24, 40, 48))
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].detach().float().requires_grad_()
    assert_learned(wide_ranks, tensors)
    assert "products" not in wide_ranks.launched()


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_every_subset_of_gradients(needed: tuple[str, ...], wide_ranks: LaunchPath) -> None:
    tensors = make(*needed, sizes=(5, 24, 40, 48))
    want = in_python(tensors)
    for _ in range(4):
        assert_same(run(tensors), want)
    assert "one_pass" not in wide_ranks.launched()


def test_what_tma_cannot_read_is_not_theirs(wide_ranks: LaunchPath) -> None:
    tensors = make(*LEAVES, sizes=(5, 24, 40, 48))
    for other in (
        {"x": with_strides(tensors["x"], 25, 1)},
        {"lora_A": with_strides(tensors["lora_A"], 1, 48)},
        {"lora_B": with_strides(tensors["lora_B"], 49, 1)},
        make(*LEAVES, sizes=(5, 24, 40, 49)),
        make(*LEAVES, sizes=(5, 24, 36, 48)),
    ):
        assert_learned(wide_ranks, tensors | other)
        assert wide_ranks.launched()[:2] != TWICE


@pytest.mark.parametrize("adapters", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("layers", [((40, 16), (24, 8)), ((40, 16), (16, 24), (64, 16))], ids=len)
def test_groups(layers: tuple[tuple[int, int], ...], adapters: torch.dtype, wide_ranks: LaunchPath) -> None:
    call = group((5,), *layers, bias=True).adapters(lambda t: leaf(t, lambda t: t.to(adapters)), "lora_A", "lora_B")
    with torch.autocast("cpu", bf16, enabled=adapters == torch.float32):
        assert_learned_call(wide_ranks, call)
        wide_ranks.launched()
        ys = call()
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert wide_ranks.launched() == [*TWICE, *TWICE]


def test_a_gated_mlp(wide_ranks: LaunchPath) -> None:
    """Of which only gate and up have a large rank."""
    call = gated((5,), "silu").adapters(leaf, "lora_A", "lora_B")
    wide = group((5,), (40, 16), (40, 24)).members
    call = call.member(0, lora_A=wide[0].lora_A, lora_B=wide[0].lora_B)
    call = call.member(1, lora_A=wide[1].lora_A, lora_B=wide[1].lora_B)
    assert_learned_call(wide_ranks, call)
    wide_ranks.launched()
    (y,) = call()
    assert wide_ranks.launched() == [*TWICE, "gated_forward", "one_pass"]
    y.sum().backward()
    assert wide_ranks.launched() == ["one_pass", "gated_backward", "adapter_grads", *TWICE]


def test_a_gated_mlp_all_of_which_is_wide(wide_ranks: LaunchPath) -> None:
    call = gated((5,), "gelu_tanh").adapters(leaf, "lora_A", "lora_B")
    wide = [*group((5,), (40, 16), (40, 24)).members, *group((5,), (24, 48), columns=40).members]
    for index, member in enumerate(wide):
        call = call.member(index, lora_A=member.lora_A, lora_B=member.lora_B)
    assert_learned_call(wide_ranks, call)
    wide_ranks.launched()
    (y,) = call()
    assert wide_ranks.launched() == [*TWICE, "gated_forward", *TWICE]
    y.sum().backward()
    assert wide_ranks.launched() == [*TWICE, "gated_backward", *TWICE]


def test_a_decoder_layer_of_peft_s(wide_ranks: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters in float32, as PEFT makes them, under autocast, as Trainer has it."""
    with torch.autocast("cpu", bf16):
        assert_llama_learned("cpu", monkeypatch, rank=40)
    assert set(wide_ranks.launched()) == {"products", "gated_forward", "gated_backward"}
