"""Gradients for exactly what requires them, from exactly what must be kept."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, lora_linear_reference

LEAVES = ("x", "lora_A", "lora_B", "bias")
SUBSETS = [c for n in range(5) for c in itertools.combinations(LEAVES, n)]
M, K, N, R = 5, 24, 40, 3


def make(device: torch.device, *needed: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {
        name: torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(name in needed)
        for name, shape in shapes.items()
    }


def expected_gradients(tensors: dict[str, Tensor], dy: Tensor, scaling: float) -> dict[str, Tensor]:
    leaves = {k: t.detach().double().requires_grad_(k != "weight") for k, t in tensors.items()}
    y = lora_linear_reference(**leaves, scaling=scaling)
    gradients = torch.autograd.grad(y, [leaves[k] for k in LEAVES], dy.double())
    return dict(zip(LEAVES, gradients, strict=True))


def assert_gradients(tensors: dict[str, Tensor], dy: Tensor, scaling: float = 2.0) -> None:
    expected = expected_gradients(tensors, dy, scaling)
    for name, t in tensors.items():
        if t.requires_grad:
            assert t.grad is not None
            assert t.grad.dtype == t.dtype
            torch.testing.assert_close(t.grad.double(), expected[name], rtol=1e-4, atol=1e-4)
        else:
            assert t.grad is None, f"{name} got a gradient that nobody asked for"


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_every_subset_of_gradients(needed: tuple[str, ...], device: torch.device, backend: str) -> None:
    tensors = make(device, *needed)
    y = lora_linear(**tensors, scaling=2.0, backend=backend)
    assert y.requires_grad == bool(needed)
    if needed:
        dy = torch.randn_like(y)
        y.backward(dy)
        assert_gradients(tensors, dy)


def saved_tensors(y: Tensor) -> list[Tensor]:
    """What the node of y saved."""
    return [t for t in y.grad_fn.saved_tensors if t is not None] if y.grad_fn is not None else []  # type: ignore[attr-defined]


KEPT = {
    ("x",): {"weight", "lora_A", "lora_B"},
    ("lora_A",): {"x", "lora_B"},
    ("lora_B",): {"S"},
    ("bias",): set(),
    ("x", "lora_B"): {"weight", "lora_A", "lora_B", "S"},
    LEAVES: {"x", "weight", "lora_A", "lora_B", "S"},
}


@pytest.mark.parametrize(("needed", "kept"), KEPT.items(), ids=lambda v: "+".join(sorted(v)) or "nothing")
def test_what_is_kept(needed: tuple[str, ...], kept: set[str], device: torch.device, backend: str) -> None:
    tensors = make(device, *needed)
    names = {t.data_ptr(): name for name, t in tensors.items()}
    packed: list[Tensor] = []
    y = lora_linear(**tensors, backend=backend)
    assert {names.get(t.data_ptr(), "S") for t in saved_tensors(y)} == kept
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lora_linear(**tensors, backend=backend)
    # S is not computed yet when hooks take what is saved.
    assert {names.get(t.data_ptr(), "S") for t in packed} == kept - {"S"}


def test_x_is_not_kept_alive_for_a_frozen_lora_A(device: torch.device, backend: str) -> None:
    tensors = make(device, "lora_B")
    x = tensors.pop("x") * 1.0
    y = lora_linear(x, **tensors, backend=backend)
    alive = weakref.ref(x)
    del x
    assert alive() is None
    y.sum().backward()


def test_two_backwards_through_one_graph(device: torch.device, backend: str) -> None:
    tensors = make(device, *LEAVES)
    y = lora_linear(**tensors, scaling=2.0, dropout_p=0.3, backend=backend)
    leaves = [tensors[k] for k in LEAVES]
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), torch.sum], ids=["square", "sum"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_derivative_is_an_error(
    loss: Callable[[Tensor], Tensor], checkpointed: bool, device: torch.device, backend: str
) -> None:
    """Of whatever a gradient comes from: that of a sum has a dy that is a constant."""
    tensors = make(device, *LEAVES)
    call = partial(lora_linear, backend=backend)
    y = checkpoint(call, use_reentrant=False, **tensors) if checkpointed else call(**tensors)
    gradients = torch.autograd.grad(loss(y), list(map(tensors.__getitem__, LEAVES)), create_graph=True)
    for gradient in gradients:
        for leaf in LEAVES[:3]:
            with pytest.raises(RuntimeError, match="differentiated again"):
                torch.autograd.grad(gradient.sum(), tensors[leaf], retain_graph=True, allow_unused=True)


def test_a_gradient_that_comes_from_constants_needs_no_second_one(device: torch.device, backend: str) -> None:
    tensors = make(device, "bias")
    (db,) = torch.autograd.grad(
        lora_linear(**tensors, backend=backend).sum(), tensors["bias"], create_graph=True, materialize_grads=True
    )
    assert not db.requires_grad
    tensors = make(device, *LEAVES)
    lora_linear(**tensors, backend=backend).sum().backward(create_graph=True)
    assert_gradients(tensors, torch.ones(M, N, device=device), scaling=1.0)


DY = {
    "expanded": lambda y: torch.full((), 0.7, device=y.device).expand(y.shape),
    "one row expanded": lambda y: torch.randn(1, y.shape[1], device=y.device).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[1], y.shape[0], device=y.device).T,
    "strided": lambda y: torch.randn(y.shape[0], 2 * y.shape[1], device=y.device)[:, ::2],
}


def test_dy_of_a_sum_over_tokens(device: torch.device, backend: str) -> None:
    tensors = make(device, *LEAVES)
    x = tensors["x"].detach()[None].expand(2, -1, -1).clone().requires_grad_()
    y = lora_linear(**(tensors | {"x": x}), scaling=2.0, backend=backend)
    dy = torch.randn(2, 1, y.shape[2], device=device).expand(y.shape)
    y.backward(dy)
    want = tensors | {"x": x.detach().flatten(0, 1).requires_grad_()}
    for name in ("lora_A", "lora_B"):
        want[name] = tensors[name].detach().requires_grad_()
    lora_linear(**want, scaling=2.0, backend=backend).backward(dy.reshape(-1, y.shape[2]))
    assert x.grad is not None
    assert torch.equal(x.grad.flatten(0, 1), want["x"].grad)
    for name in ("lora_A", "lora_B"):
        assert torch.equal(tensors[name].grad, want[name].grad)


@pytest.mark.parametrize("kind", DY)
def test_dy_of_any_strides(kind: str, device: torch.device, backend: str) -> None:
    tensors = make(device, *LEAVES)
    y = lora_linear(**tensors, scaling=2.0, backend=backend)
    dy = DY[kind](y)
    y.backward(dy)
    assert_gradients(tensors, dy)


def test_dy_of_another_dtype(device: torch.device, backend: str) -> None:
    tensors = make(device, *LEAVES)
    dy = torch.randn(M, N, device=device, dtype=torch.float64)
    lora_linear(**tensors, scaling=2.0, backend=backend).backward(dy)
    assert_gradients(tensors, dy)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_a_change_in_place_is_an_error(name: str, device: torch.device, backend: str) -> None:
    tensors = make(device, *LEAVES)
    y = lora_linear(**tensors, backend=backend)
    with torch.no_grad():
        tensors[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_scaling_tensor(shape: tuple[int, ...], device: torch.device, backend: str) -> None:
    tensors = make(device, *LEAVES)
    y = lora_linear(**tensors, scaling=torch.full(shape, 2.0, device=device), backend=backend)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_gradients(tensors, dy)


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=str)
def test_a_change_of_the_scaling_tensor_is_an_error(shape: tuple[int, ...], device: torch.device, backend: str) -> None:
    tensors, scaling = make(device, "x"), torch.ones(shape, device=device)
    y = lora_linear(**tensors, scaling=scaling, backend=backend)
    scaling.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager mode", "compiled"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_gradient_of_a_float32_bias_is_summed_in_float32(
    compiled: bool, autocast: bool, device: torch.device
) -> None:
    tensors = make(device, "bias", dtype=torch.bfloat16)
    tensors["bias"] = tensors["bias"].detach().float().requires_grad_()
    tensors["x"] = tensors["x"][:1].expand(257, K)
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True) if compiled else lora_linear
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = call(**tensors, backend="eager")
    y.backward(torch.ones_like(y))
    # bfloat16 has 256 and 258, but no 257.
    assert torch.equal(tensors["bias"].grad, torch.full((N,), 257.0, device=device))
