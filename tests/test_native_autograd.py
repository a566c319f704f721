"""The node that the launch path in C++ makes: what autograd, its hooks and activation checkpointing ask of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from launch_path import (
    NATIVE,
    LaunchPath,
    assert_same,
    bf16,
    in_python,
    make,
    native_y,
    run,
    shifted,
    with_strides,
)
from test_autograd import LEAVES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear

pytest_plugins = ("launch_path",)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_a_change_in_place_is_an_error(name: str, path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    y = native_y(tensors)
    with torch.no_grad():
        tensors[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_an_error(path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    (dx,) = torch.autograd.grad(native_y(tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("needed", [LEAVES, ("bias",)], ids=["all", "nothing kept"])
def test_two_backwards_through_one_graph(needed: tuple[str, ...], path: LaunchPath) -> None:
    tensors = make(*needed)
    y, dy = native_y(tensors, dropout_p=0.3), torch.randn(5, 40).to(bf16)
    leaves = [tensors[name] for name in needed]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert_same(list(first), list(second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, leaves, dy)


def test_nothing_is_kept_alive(path: LaunchPath) -> None:
    tensors = make("lora_B")
    native_y(tensors)
    x = tensors.pop("x") * 1.0
    y = lora_linear(x, **tensors, scaling=2.0, backend="triton")
    alive = weakref.ref(x)
    del x
    assert alive() is None
    tensors["x"] = torch.randn(5, 24).to(bf16).requires_grad_()
    y = native_y(tensors)
    kept = weakref.ref(tensors["weight"])
    y.sum().backward()
    tensors.clear()
    assert kept() is None, "a node keeps what it needs no more"


def test_hooks(path: LaunchPath) -> None:
    tensors, seen = make(*LEAVES), []
    y = native_y(tensors)
    y.register_hook(lambda gradient: gradient * 2)
    y.grad_fn.register_hook(lambda results, gradients: seen.append(len(results)))  # type: ignore[union-attr]
    y.backward(torch.ones_like(y))
    got = [tensors[name].grad for name in LEAVES]
    assert seen == [4]
    assert y.grad_fn.name() == "LoRALinearFunctionBackward"  # type: ignore[union-attr]
    assert_same(got, in_python(tensors, dy=torch.full_like(y, 2.0))[1:])


@pytest.mark.parametrize("moved", [torch.clone, shifted, lambda t: t.T.contiguous().T], ids=["", "shifted", "turned"])
def test_what_hooks_bring_back_may_lie_elsewhere(moved: Callable[[Tensor], Tensor], path: LaunchPath) -> None:
    tensors = make(*LEAVES, sizes=(9, 24, 40, 16))
    want = in_python(tensors)
    for _ in range(5):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, moved):
            assert_same(run(tensors), want)


@pytest.mark.parametrize("where", ["pack", "unpack"])
def test_what_hooks_raise_is_what_is_raised(where: str, path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    native_y(tensors)

    def fail(t: Tensor) -> Tensor:
        raise LookupError("not here")

    pack, unpack = (fail, torch.clone) if where == "pack" else (torch.clone, fail)
    path.who()
    with pytest.raises(LookupError, match="not here"), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        lora_linear(**tensors, scaling=2.0, backend="triton").sum().backward()
    # What is saved is saved before anything is computed.
    assert path.who() == (set() if where == "pack" else {NATIVE})


def test_what_the_backward_in_python_raises_is_what_is_raised(
    path: LaunchPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make("lora_A", "lora_B")
    y = native_y(tensors)
    monkeypatch.setattr("lora_kernels.autograd.backward", lambda *arguments: {}["not here"])
    with pytest.raises(KeyError, match="not here"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, path: LaunchPath) -> None:
    """Whoever computed it first and whoever computes it again: the mask is the same, and so is what is kept."""
    tensors = make(*LEAVES, sizes=(2, 7, 24, 40, 16))
    want = in_python(tensors, dropout_p=0.3)

    def gradients() -> list[Tensor | None]:
        leaves = {k: t.detach().requires_grad_(t.requires_grad) for k, t in tensors.items()}

        def layer(x: Tensor) -> Tensor:
            return lora_linear(**(leaves | {"x": x}), scaling=2.0, dropout_p=0.3, backend="triton")

        torch.manual_seed(3)
        y = checkpoint(layer, leaves["x"], use_reentrant=reentrant)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        return [y.detach(), *(leaves[name].grad for name in LEAVES)]

    for _ in range(5):
        assert_same(gradients(), want)
    path.driver.launches.clear()
    gradients()
    # y and its backward, each behind a mask; y again only where the recomputation does not end when all is saved.
    assert len(path.driver.launches) == (6 if reentrant else 4)
    assert path.who() == {NATIVE}


DY: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda y: torch.full((), 0.7, dtype=y.dtype).expand(y.shape),
    "one row expanded": lambda y: torch.linspace(-1, 1, y.shape[-1]).to(y.dtype).expand(y.shape),
    "transposed": lambda y: torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape[1], y.shape[0]).T,
    "rows apart": lambda y: with_strides(torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape), 48, 1),
    "elsewhere": lambda y: shifted(torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape)),
    "float64": lambda y: torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape),
}


@pytest.mark.parametrize("kind", DY)
def test_dy_of_any_kind(kind: str, path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    plain = in_python(tensors)
    dy = DY[kind](plain[0])  # type: ignore[arg-type]
    want = in_python(tensors, dy=dy)
    for _ in range(4):
        assert_same(run(tensors), plain)
        assert_same(run(tensors, dy=dy), want)
    path.who()
    run(tensors, dy=dy)
    assert path.who() == {NATIVE}


def pooled(y: Tensor) -> Tensor:
    """The dy of a sum over tokens: the rows of a sequence lie in one place, and sequences apart."""
    return torch.linspace(-1, 1, y[:, :1].numel()).to(y.dtype).view(y[:, :1].shape).expand(y.shape)


def test_dy_of_a_sum_over_tokens(path: LaunchPath) -> None:
    tensors = make(*LEAVES, sizes=(2, 3, 24, 40, 3))
    plain = in_python(tensors)
    dy = pooled(plain[0])  # type: ignore[arg-type]
    want = in_python(tensors, dy=dy)
    for _ in range(4):
        assert_same(run(tensors), plain)
        assert_same(run(tensors, dy=dy), want)


def test_y_may_be_changed_in_place(path: LaunchPath) -> None:
    tensors = make(*LEAVES, sizes=(2, 5, 24, 40, 3))
    y = native_y(tensors)
    y += 1
    y.mul_(2.0)
    y.sum().backward()
    dy = torch.full(y.shape, 2.0, dtype=bf16)
    assert_same([tensors[name].grad for name in LEAVES], in_python(tensors, dy=dy)[1:])
