"""The node of a group or a gated MLP made in C++: what autograd, its hooks and activation checkpointing ask of it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from launch_path import NATIVE, LaunchPath, assert_same, bf16, shifted, with_strides
from native_calls import (
    KINDS,
    Layers,
    assert_learned_call,
    checkpointed_step,
    dy_of,
    native_ys,
    step,
    step_in_python,
)
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

pytest_plugins = ("launch_path",)


@pytest.fixture(params=KINDS)
def layers(request: pytest.FixtureRequest) -> Layers:
    return KINDS[request.param]((5,))


def total(ys: list[Tensor]) -> Tensor:
    return torch.stack([y.sum() for y in ys]).sum()


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_a_change_in_place_is_an_error(name: str, index: int, layers: Layers, path: LaunchPath) -> None:
    ys, member = native_ys(layers), layers.members[index % len(layers.members)]
    with torch.no_grad():
        (layers.x if name == "x" else getattr(member, name)).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total(ys).backward()


def test_a_second_derivative_is_an_error(layers: Layers, path: LaunchPath) -> None:
    (dx,) = torch.autograd.grad(total(native_ys(layers)), layers.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()


def test_two_backwards_through_one_graph(layers: Layers, path: LaunchPath) -> None:
    ys = native_ys(layers, dropout_p=0.3)
    dys, leaves = [dy_of(y) for y in ys], layers.leaves()
    first = torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    assert_same(torch.autograd.grad(ys, leaves, dys), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(ys, leaves, dys)


def test_each_gradient_alone(layers: Layers, path: LaunchPath) -> None:
    ys = native_ys(layers)
    dys, leaves = [dy_of(y) for y in ys], layers.leaves()
    every = torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    for tensor, want in zip(leaves, every, strict=True):
        (got,) = torch.autograd.grad(ys, tensor, dys, retain_graph=True)
        assert torch.equal(got, want)


def test_nothing_is_kept_alive(layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    layers = replace(layers, x=layers.x * 1.0).adapters(torch.clone, "weight")
    ys = layers()
    kept = [weakref.ref(t) for t in (layers.x, *(member.weight for member in layers.members))]
    del layers
    assert all(t() is not None for t in kept)
    total(ys).backward()
    assert all(t() is None for t in kept), "a node keeps what it needs no more"


def test_a_graph_that_nobody_went_back_through_goes(layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    layers = replace(layers, x=layers.x * 1.0)
    ys, alive = layers(), weakref.ref(layers.x)
    del layers
    assert alive() is not None
    del ys
    assert alive() is None


def test_hooks(layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers, [2 * dy_of(y) for y in layers()])
    seen: list[int] = []
    ys = native_ys(layers)
    for y in ys:
        y.register_hook(lambda gradient: gradient * 2)
    node = ys[0].grad_fn
    assert node is not None
    node.register_hook(lambda results, gradients: seen.append(len(results)))
    torch.autograd.backward(ys, [dy_of(y) for y in ys])
    assert seen == [1 + 2 * len(layers.members)]
    assert node.name() == ("GatedMLPFunctionBackward" if layers.activation else "LoRAGroupFunctionBackward")
    assert_same([None if t is None else t.grad for t in layers.tensors()], want[len(ys) :])


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "elsewhere": torch.clone,
    "shifted": shifted,
    "g and u shifted": lambda t: shifted(t) if t.shape in ((5, 40), (5, 63)) else t.clone(),
    "turned": lambda t: t.T.contiguous().T if t.dim() == 2 else t.clone(),
}


@pytest.mark.parametrize("moved", MOVED)
def test_what_hooks_bring_back_may_lie_elsewhere(moved: str, layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers, dropout_p=0.3)
    native_ys(layers, dropout_p=0.3)
    for _ in range(4):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, MOVED[moved]):
            assert_same(step(layers, dropout_p=0.3), want)


@pytest.mark.parametrize("where", ["pack", "unpack"])
def test_what_hooks_raise_is_what_is_raised(where: str, layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    last = layers.members[-1].lora_B.shape

    def fail(t: Tensor) -> Tensor:
        if t.shape == last:
            raise LookupError("not here")
        return t

    pack, unpack = (fail, torch.clone) if where == "pack" else (torch.clone, fail)
    path.who()
    with pytest.raises(LookupError, match="not here"), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        total(layers()).backward()
    names = [launched.name for launched in path.driver.launches]
    # What a gated MLP saves is saved before its down projection is computed.
    assert ("one_pass" in names) == (where == "unpack" and layers.activation is not None)
    assert path.who() == {NATIVE}


def test_what_the_backward_in_python_raises_is_what_is_raised(
    layers: Layers, path: LaunchPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        layers()
    ys = layers()
    module = "autograd_gated" if layers.activation else "autograd_group"
    monkeypatch.setattr(f"lora_kernels.{module}.backward", lambda *arguments: {}["not here"])
    with pytest.raises(KeyError, match="not here"):
        total(ys).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_python_saves(kind: str, path: LaunchPath) -> None:
    """In the same order and shapes: what Python kept may be computed again by C++."""
    layers = KINDS[kind]((2, 3), bias=True)
    packed: list[list[tuple[torch.dtype, torch.Size]]] = []

    def pack(t: Tensor) -> Tensor:
        packed[-1].append((t.dtype, t.shape))
        return t

    for _ in range(4):
        packed.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layers(dropout_p=0.3)
    assert path.who() >= {NATIVE}
    assert packed[0] == packed[-1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind: str, reentrant: bool, path: LaunchPath) -> None:
    """Whoever computed it first and whoever computes it again: the masks are the same, and so is what is kept."""
    layers = KINDS[kind]((2, 3))
    want = step_in_python(layers, dropout_p=0.3)
    # By the calls before, it is Python or C++ that computes first, and that computes again.
    for before in range(4):
        path.extension.clear()
        for _ in range(before):
            layers(dropout_p=0.3)
        for _ in range(6):
            assert_same(checkpointed_step(layers, reentrant), want)
    assert_same(checkpointed_step(layers, reentrant, forget=path.extension.clear), want)
    for _ in range(4):
        checkpointed_step(layers, reentrant)
    path.who()
    checkpointed_step(layers, reentrant)
    launched = Counter(launch.name for launch in path.driver.launches)
    assert path.who() == {NATIVE}
    if layers.activation is None:
        assert launched == {"mask": 3 * len(layers.members), "group_forward": 2, "group_input": 1, "group_grads": 1}
    else:
        # The down projection's product and h are computed again only where the recomputation goes to the end; one more
        # is dh.
        again = 1 if reentrant else 0
        assert launched == {
            "mask": 8 + again, "group_forward": 2, "gated_forward": 1 + again, "one_pass": 2 + again,
            "gated_backward": 1, "adapter_grads": 1, "group_input": 1, "group_grads": 1,
        }  # fmt: skip


def test_a_recomputation_that_goes_to_the_end(layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers, dropout_p=0.3)
    with set_checkpoint_early_stop(False):
        for _ in range(5):
            assert_same(checkpointed_step(layers, reentrant=False), want)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_outputs_that_nobody_uses(used: int, path: LaunchPath) -> None:
    layers = KINDS["three"]((5,))
    dys = [dy_of(y) if i == used else None for i, y in enumerate(layers())]
    every, want = step_in_python(layers), step_in_python(layers, dys)
    for _ in range(4):
        assert_same(step(layers, dys), want)
        assert_same(step(layers), every)
    path.who()
    assert_same(step(layers), every)
    assert path.who() == {NATIVE}


DY: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda y: torch.full((), 0.7, dtype=y.dtype).expand(y.shape),
    "one row expanded": lambda y: dy_of(y[0]).expand(y.shape),
    "transposed": lambda y: dy_of(y).T.contiguous().T,
    "rows apart": lambda y: with_strides(dy_of(y), 72, 1),
    "elsewhere": lambda y: shifted(dy_of(y)),
    "float64": lambda y: dy_of(y).double(),
}


@pytest.mark.parametrize("kind", DY)
def test_dys_of_any_kind(kind: str, layers: Layers, path: LaunchPath) -> None:
    plain = step_in_python(layers)
    ys = layers()
    assert_learned_call(path, layers, [DY[kind](y.detach()) for y in ys])
    assert_same(step(layers), plain)
    # Of one kind for the first output alone.
    dys = [DY[kind](y.detach()) if i == 0 else dy_of(y) for i, y in enumerate(ys)]
    want = step_in_python(layers, dys)
    for _ in range(3):
        assert_same(step(layers, dys), want)
        assert_same(step(layers), plain)


def test_dy_of_more_dimensions(path: LaunchPath) -> None:
    layers = KINDS["two"]((2, 3))
    dys = [torch.full((), 0.7, dtype=bf16).expand(y.shape) for y in layers()]
    assert_learned_call(path, layers, dys)
    assert_learned_call(path, layers, [dy_of(y).transpose(0, 1).contiguous().transpose(0, 1) for y in layers()])
    # Of a sum over tokens.
    assert_learned_call(path, layers, [dy_of(y)[:, :1].expand(y.shape) for y in layers()])


def test_outputs_may_be_changed_in_place(layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers, [2 * dy_of(y) for y in layers()])
    ys = native_ys(layers)
    for y in ys:
        y += 1
        y.mul_(2.0)
    torch.autograd.backward(ys, [dy_of(y) for y in ys])
    assert_same([None if t is None else t.grad for t in layers.tensors()], want[len(ys) :])


def test_one_output_changed_in_place_leaves_the_others(path: LaunchPath) -> None:
    ys = native_ys(KINDS["three"]((5,)))
    others = [y.detach().clone() for y in ys[1:]]
    with torch.no_grad():
        ys[0].fill_(7.0)
    assert_same([y.detach() for y in ys[1:]], others)


def test_a_backward_under_autocast(layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers)
    ys = native_ys(layers)
    with torch.autocast("cpu", torch.float16):
        torch.autograd.backward(ys, [dy_of(y) for y in ys])
    assert_same([None if t is None else t.grad for t in layers.tensors()], want[len(ys) :])


def test_a_backward_whose_plan_is_forgotten(layers: Layers, path: LaunchPath) -> None:
    want = step_in_python(layers, dropout_p=0.3)
    native_ys(layers, dropout_p=0.3)
    torch.manual_seed(3)
    ys = layers(dropout_p=0.3)
    path.extension.clear()
    torch.autograd.backward(ys, [dy_of(y) for y in ys])
    assert_same([None if t is None else t.grad for t in layers.tensors()], want[len(ys) :])
