"""Autocast: the dtypes of torch.nn.functional.linear, and no rounding that nobody asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from lora_kernels import LoRALinear, lora_linear, lora_linear_reference

bf16, half, single = torch.bfloat16, torch.float16, torch.float32
LEAVES = ("x", "lora_A", "lora_B", "bias")


def make(device: torch.device, base: torch.dtype, adapters: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (9, 24), "weight": (40, 24), "lora_A": (3, 24), "lora_B": (40, 3), "bias": (40,)}
    return {
        name: torch.randn(shape, generator=generator, device=device)
        .to(adapters if name.startswith("lora") else base)
        .requires_grad_(name != "weight")
        for name, shape in shapes.items()
    }


def autocast(device: torch.device, dtype: torch.dtype, enabled: bool = True) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype, enabled=enabled)


def run(
    tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, inside: bool, backward_inside: bool
) -> list[Tensor]:
    leaves = {k: t.detach().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    with autocast(device, dtype, inside):
        y = lora_linear(**leaves, scaling=2.0, backend="eager")
    dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype)
    with autocast(device, dtype, backward_inside):
        y.backward(dy)
    return [y.detach(), *(leaves[k].grad for k in LEAVES)]  # type: ignore[list-item]


@pytest.mark.parametrize("target", [bf16, half], ids=str)
@pytest.mark.parametrize("adapters", [bf16, half, single], ids=str)
@pytest.mark.parametrize("base", [bf16, half, single], ids=str)
def test_dtypes_and_values(base: torch.dtype, adapters: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    tensors = make(device, base, adapters)
    y, *gradients = run(tensors, device, target, inside=True, backward_inside=False)
    with autocast(device, target):
        assert y.dtype == torch.nn.functional.linear(tensors["x"], tensors["weight"]).dtype == target
    double = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    result = lora_linear_reference(**double, scaling=2.0)
    expected = result.detach()
    dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(target).double()
    wanted = torch.autograd.grad(result, [double[k] for k in LEAVES], dy)
    assert float((y.double() - expected).norm() / expected.norm()) < 0.01
    for name, gradient, exact in zip(LEAVES, gradients, wanted, strict=True):
        assert gradient.dtype == tensors[name].dtype, name
        assert float((gradient.double() - exact).norm() / exact.norm()) < 0.01, name


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "bias"])
def test_the_gradients_of_float32_parameters_are_not_rounded(name: str, device: torch.device) -> None:
    gradients = dict(zip(LEAVES, run(make(device, single, single), device, bf16, True, True)[1:], strict=True))
    assert not torch.equal(gradients[name], gradients[name].bfloat16().float())


@pytest.mark.parametrize("forward_inside", [False, True])
@pytest.mark.parametrize(("base", "adapters"), [(single, single), (bf16, single), (bf16, bf16)], ids=str)
def test_a_backward_does_not_care_where_it_is_called(
    base: torch.dtype, adapters: torch.dtype, forward_inside: bool, device: torch.device
) -> None:
    tensors = make(device, base, adapters)
    inside = run(tensors, device, bf16, forward_inside, backward_inside=True)
    outside = run(tensors, device, bf16, forward_inside, backward_inside=False)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [False, True])
def test_float32_adapters_over_bfloat16_are_rounded_under_autocast_only(grad: bool, device: torch.device) -> None:
    """Under autocast, even to the base's own dtype, the branch is rounded."""
    tensors = make(device, bf16, single) | {
        "weight": torch.zeros(40, 24, device=device, dtype=bf16),
        "bias": None,
    }
    exact = lora_linear_reference(**{k: t if t is None else t.double() for k, t in tensors.items()})
    with torch.set_grad_enabled(grad):
        y = lora_linear(**tensors, backend="eager")
        with autocast(device, bf16):
            rounded = lora_linear(**tensors, backend="eager")
    assert torch.equal(y, exact.to(bf16))
    assert not torch.equal(rounded, y)


def test_float64_is_an_error_as_it_is_to_a_linear_layer(device: torch.device) -> None:
    tensors = make(device, single, single)
    with autocast(device, bf16):
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(tensors["x"].double(), tensors["weight"])
        for name in tensors:
            with pytest.raises(TypeError, match=f"{name} was torch.float64"):
                lora_linear(**(tensors | {name: tensors[name].detach().double()}))
        with pytest.raises(TypeError, match=r"x was torch\.int64"):
            lora_linear(**(tensors | {"x": tensors["x"].long()}))


def test_autocast_is_on_again_afterwards(device: torch.device) -> None:
    tensors = make(device, single, single)
    with autocast(device, bf16):
        lora_linear(**tensors).sum().backward()
        assert torch.is_autocast_enabled(device.type)
        assert (tensors["x"] @ tensors["weight"].T).dtype == bf16


def test_a_module_under_autocast(device: torch.device) -> None:
    layer = LoRALinear(24, 40, r=3, dropout=0.2, device=device)
    with autocast(device, bf16):
        y = layer(torch.randn(2, 9, 24, device=device))
        layer.merge()
        assert layer(torch.randn(2, 24, device=device)).dtype == bf16
    assert y.dtype == bf16


@pytest.mark.parametrize("compiled_inside", [False, True])
def test_compiled(compiled_inside: bool, device: torch.device) -> None:
    """Forward outside and backward inside, or the converse, of the operators that compiled code calls."""
    tensors = make(device, bf16, single)
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)

    def gradients(function: object) -> list[Tensor]:
        leaves = {k: t.detach().requires_grad_(t.requires_grad) for k, t in tensors.items()}
        with autocast(device, bf16, compiled_inside):
            y = function(**leaves, scaling=2.0)  # type: ignore[operator]
        with autocast(device, bf16, not compiled_inside):
            y.float().square().sum().backward()
        return [y.detach(), *(leaves[k].grad for k in LEAVES)]  # type: ignore[list-item]

    for a, b in zip(gradients(call), gradients(lora_linear), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
