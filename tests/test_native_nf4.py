"""NF4 weights in the launch path in C++: decoded by a launch before each product, with the bits of the Python path."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch_path import NATIVE, PYTHON, LaunchPath, assert_learned, assert_same, in_python, make, run, shifted
from native_calls import (
    KINDS,
    Layers,
    assert_learned_call,
    checkpointed_step,
    dy_of,
    leaf,
    native_ys,
    step,
    step_in_python,
)
from torch import Tensor

from lora_kernels import NF4Weight

pytest_plugins = ("launch_path",)


# Where K is no multiple of a block, products do not decode on the fly.
def nf4(weight: Tensor, double_quant: bool = True, block_size: int = 64) -> Any:
    return NF4Weight.quantize(weight.detach().float(), block_size, double_quant)


@pytest.fixture
def flies(path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> LaunchPath:
    """Where products decode on the fly: on CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return path


@pytest.fixture(params=KINDS)
def layers(request: pytest.FixtureRequest) -> Layers:
    return KINDS[request.param]((5,)).adapters(nf4, "weight")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer(adapters: torch.dtype, double_quant: bool, dropout: float, path: LaunchPath) -> None:
    tensors: dict[str, Any] = make("x", "lora_A", "lora_B", sizes=(2, 3, 24, 40, 3))
    for name in ("lora_A", "lora_B"):
        tensors[name] = leaf(tensors[name], lambda t: t.to(adapters))
    assert_learned(path, tensors | {"weight": nf4(tensors["weight"], double_quant)}, dropout_p=dropout)


@pytest.mark.parametrize("needed", [(), ("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids="+".join)
def test_subsets_of_gradients(needed: tuple[str, ...], path: LaunchPath) -> None:
    tensors: dict[str, Any] = make(*needed)
    tensors["weight"] = nf4(tensors["weight"])
    want = in_python(tensors, dropout_p=0.3)
    for _ in range(5):
        path.who()
        assert_same(run(tensors, dropout_p=0.3), want)
    assert NATIVE in path.who()


def test_kinds_of_weights_find_no_plan_of_each_other(path: LaunchPath) -> None:
    tensors: dict[str, Any] = make("x", "lora_A", "lora_B")
    weight = tensors["weight"]
    kinds = [{"weight": w} for w in (weight, *(nf4(weight, *kind) for kind in ((True, 32), (False, 32), (True, 128))))]
    wants = [in_python(tensors | kind) for kind in kinds]
    for _ in range(4):
        path.who()
        for kind, want in zip(kinds, wants, strict=True):
            assert_same(run(tensors | kind), want)
    assert path.who() == {NATIVE}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_groups(dropout: float, layers: Layers, path: LaunchPath) -> None:
    assert_learned_call(path, layers, dropout_p=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_that_decodes_on_the_fly(
    adapters: torch.dtype, double_quant: bool, dropout: float, flies: LaunchPath
) -> None:
    """Its forward is C++, and its backward Python's."""
    tensors: dict[str, Any] = make("x", "lora_A", "lora_B", sizes=(2, 3, 128, 40, 3))
    for name in ("lora_A", "lora_B"):
        tensors[name] = leaf(tensors[name], lambda t: t.to(adapters))
    tensors["weight"] = nf4(tensors["weight"], double_quant)
    want = in_python(tensors, dropout_p=dropout)
    for _ in range(4):
        flies.who()
        assert_same(run(tensors, dropout_p=dropout), want)
    launched = [(launched.name, launched.stream) for launched in flies.driver.launches]
    products = [("nf4_product", NATIVE), ("nf4_product", PYTHON)]
    drawn = [[("mask", who), (name, who)] if dropout else [(name, who)] for name, who in products]
    assert launched == [*drawn[0], *drawn[1], ("adapter_grads", PYTHON)]
    frozen = {k: v.detach() if isinstance(v, Tensor) else v for k, v in tensors.items()}
    want = in_python(frozen)
    for _ in range(4):
        flies.who()
        assert_same(run(frozen), want)
    assert flies.who() == {NATIVE}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_decode_on_the_fly(kind: str, dropout: float, flies: LaunchPath) -> None:
    layers = KINDS[kind]((2, 3), columns=128, bias=True).adapters(nf4, "weight")
    want = step_in_python(layers, dropout_p=dropout)
    for _ in range(4):
        assert_same(step(layers, dropout_p=dropout), want)
    flies.who()
    ys = layers(dropout_p=dropout)
    assert flies.who() == {NATIVE}
    assert not hasattr(ys[0].grad_fn, "plan"), "the node was made in Python"


def test_an_mlp_whose_down_projection_alone_decodes_ahead(flies: LaunchPath) -> None:
    layers = KINDS["silu"]((5,), columns=128).adapters(nf4, "weight")
    for _ in range(3):
        layers()
    flies.driver.launches.clear()
    layers()
    found = [launched.name for launched in flies.driver.launches]
    assert found == ["nf4_product", "nf4_product", "gated_forward", "dequantize", "one_pass"]
    assert flies.who() == {NATIVE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, -1])
def test_one_of_the_weights(index: int, kind: str, path: LaunchPath) -> None:
    layers = KINDS[kind]((2, 3), bias=True)
    index %= len(layers.members)
    mixed = layers.member(index, weight=nf4(layers.members[index].weight, double_quant=False))
    base, want = step_in_python(layers), step_in_python(mixed)
    for _ in range(3):
        assert_same(step(layers), base)
        assert_same(step(mixed), want)
    assert_learned_call(path, mixed)
    assert_same(step(layers), base)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_weights_stored_transposed(kind: str, path: LaunchPath) -> None:
    """The group's kernels take one layout: the dense ones are copied, by Python."""
    layers = KINDS[kind]((5,)).adapters(lambda t: t.T.contiguous().T, "weight")
    layers = layers.member(1, weight=nf4(layers.members[1].weight))
    want = step_in_python(layers)
    for _ in range(4):
        path.who()
        assert_same(step(layers), want)
    assert path.who() == {PYTHON}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers, dropout_p=0.3)
    for before in range(3):
        path.extension.clear()
        for _ in range(before):
            layers(dropout_p=0.3)
        for _ in range(5):
            assert_same(checkpointed_step(layers, reentrant), want)
    assert_same(checkpointed_step(layers, reentrant, forget=path.extension.clear), want)


@pytest.mark.parametrize("moved", [torch.clone, lambda t: shifted(t) if t.is_floating_point() else t.clone()])
def test_what_hooks_bring_back_may_lie_elsewhere(
    moved: Callable[[Tensor], Tensor], layers: Layers, path: LaunchPath
) -> None:
    want = step_in_python(layers, dropout_p=0.3)
    for _ in range(5):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, moved):
            assert_same(step(layers, dropout_p=0.3), want)


@pytest.mark.parametrize("name", ["packed", "absmax", "nested_absmax", "nested_map", "offset"])
def test_a_change_in_place_is_an_error(name: str, layers: Layers, path: LaunchPath) -> None:
    ys = native_ys(layers)
    getattr(layers.members[-1].weight, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, [dy_of(y) for y in ys])


def test_packed_codes_that_were_freed_are_an_error(layers: Layers, path: LaunchPath) -> None:
    ys = native_ys(layers)
    layers.members[0].weight.packed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="packed storage was freed"):
        torch.autograd.backward(ys, [dy_of(y) for y in ys])


def test_nothing_is_kept_alive(layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    layers = layers.adapters(lambda weight: NF4Weight.of([t.clone() for t in weight.tensors()], weight.form), "weight")
    ys = layers()
    kept = [weakref.ref(t) for member in layers.members for t in member.weight.tensors()]
    del layers
    assert all(t() is not None for t in kept)
    torch.autograd.backward(ys, [dy_of(y) for y in ys])
    assert all(t() is None for t in kept), "a node keeps what it needs no more"


def test_a_second_derivative_is_an_error(layers: Layers, path: LaunchPath) -> None:
    ys = native_ys(layers)
    (dx,) = torch.autograd.grad(ys[0].sum(), layers.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
