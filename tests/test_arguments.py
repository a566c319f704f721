"""Bad input by bad input: the error's type, and that it names the argument, what it was and must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels import explain, lora_linear, lora_linear_reference
from lora_kernels.limits import MAX_RANK


def arguments(device: torch.device, **changes: Any) -> dict[str, Any]:
    """A valid call with K = 6, N = 10, r = 3, but for the changes: values, or functions of the device."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (4, 6), "weight": (10, 6), "lora_A": (3, 6), "lora_B": (10, 3), "bias": (10,)}
    call = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    return call | {k: v(device) if callable(v) else v for k, v in changes.items()}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Any:
    return lambda here: torch.zeros(shape, dtype=dtype, device=device or here)


half, double = torch.float16, torch.float64
BAD: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # What has the wrong type.
    ({"x": [1.0]}, TypeError, ["x was a list", "must be a tensor"]),
    ({"weight": None}, TypeError, ["weight was None", "must be a tensor"]),
    ({"lora_A": 3}, TypeError, ["lora_A was a int", "must be a tensor"]),
    ({"lora_B": "B"}, TypeError, ["lora_B was a str", "must be a tensor"]),
    ({"bias": 0.0}, TypeError, ["bias was a float", "must be a tensor or None"]),
    ({"scaling": True}, TypeError, ["scaling was a bool", "an int, a float or a tensor"]),
    ({"scaling": "2"}, TypeError, ["scaling was a str", "an int, a float or a tensor"]),
    ({"scaling": None}, TypeError, ["scaling was None", "an int, a float or a tensor"]),
    ({"scaling": zeros(1, dtype=torch.bool)}, TypeError, ["scaling was torch.bool", "real number"]),
    ({"scaling": zeros(dtype=torch.complex64)}, TypeError, ["scaling was torch.complex64", "real number"]),
    ({"dropout_p": None}, TypeError, ["dropout_p was None", "an int or a float"]),
    ({"dropout_p": "0.1"}, TypeError, ["dropout_p was a str", "an int or a float"]),
    ({"dropout_p": [0.1]}, TypeError, ["dropout_p was a list", "an int or a float"]),
    ({"dropout_p": True}, TypeError, ["dropout_p was a bool", "an int or a float"]),
    ({"dropout_p": zeros()}, TypeError, ["dropout_p was a Tensor", "an int or a float"]),
    # Dtypes.
    ({"x": zeros(4, 6, dtype=double)}, TypeError, ["x was torch.float64", "torch.bfloat16, torch.float16"]),
    (
        {"x": zeros(4, 6, dtype=torch.int64)},
        TypeError,
        ["x was torch.int64", "torch.bfloat16, torch.float16"],
    ),
    (
        {"weight": zeros(10, 6, dtype=half)},
        TypeError,
        ["weight was torch.float16", "x's dtype, torch.float32"],
    ),
    ({"weight": zeros(10, 6, dtype=torch.uint8)}, TypeError, ["weight was torch.uint8", "torch.float32"]),
    ({"lora_A": zeros(3, 6, dtype=half)}, TypeError, ["lora_A was torch.float16", "torch.float32"]),
    (
        {"lora_B": zeros(10, 3, dtype=half)},
        TypeError,
        ["lora_B was torch.float16", "lora_A's dtype, torch.float32"],
    ),
    ({"bias": zeros(10, dtype=half)}, TypeError, ["bias was torch.float16", "torch.float32"]),
    # Shapes.
    ({"x": zeros()}, ValueError, ["x had shape []", "K = 6"]),
    ({"x": zeros(4, 7)}, ValueError, ["x had shape [4, 7]", "K = 6"]),
    ({"weight": zeros(6)}, ValueError, ["weight had shape [6]", "[N, K]"]),
    ({"lora_A": zeros(3, 5)}, ValueError, ["lora_A had shape [3, 5]", "[r, 6]"]),
    ({"lora_A": zeros(6)}, ValueError, ["lora_A had shape [6]", "[r, 6]"]),
    ({"lora_A": zeros(0, 6)}, ValueError, ["lora_A had rank 0", f"from 1 to {MAX_RANK}"]),
    (
        {"lora_A": zeros(MAX_RANK + 1, 6)},
        ValueError,
        [f"lora_A had rank {MAX_RANK + 1}", f"from 1 to {MAX_RANK}"],
    ),
    ({"lora_B": zeros(3, 10)}, ValueError, ["lora_B had shape [3, 10]", "[10, 3]"]),
    ({"bias": zeros(6)}, ValueError, ["bias had shape [6]", "[10]"]),
    ({"scaling": zeros(2)}, ValueError, ["scaling had shape [2]", "one element"]),
    ({"scaling": zeros(0)}, ValueError, ["scaling had shape [0]", "one element"]),
    # Layouts.
    ({"x": lambda d: torch.ones(4, 6, device=d).to_sparse()}, TypeError, ["x had layout torch.sparse_coo"]),
    ({"weight": lambda d: torch.ones(10, 6, device=d).to_sparse_csr()}, TypeError, ["weight had layout torch.sparse"]),
    ({"lora_A": lambda d: torch.ones(3, 6, device=d).to_sparse()}, TypeError, ["lora_A had layout torch.sparse_coo"]),
    # Devices.
    ({"x": zeros(4, 6, device="meta")}, ValueError, ["x was on the meta device"]),
    ({"weight": zeros(10, 6, device="meta")}, ValueError, ["weight was on meta", "x's device"]),
    ({"lora_A": zeros(3, 6, device="meta")}, ValueError, ["lora_A was on meta", "x's device"]),
    ({"lora_B": zeros(10, 3, device="meta")}, ValueError, ["lora_B was on meta", "x's device"]),
    ({"bias": zeros(10, device="meta")}, ValueError, ["bias was on meta", "x's device"]),
    ({"scaling": zeros(1, device="meta")}, ValueError, ["scaling was on meta", "x's device"]),
    # Values.
    ({"dropout_p": -0.1}, ValueError, ["dropout_p was -0.1", "from 0 to 1"]),
    ({"dropout_p": 2}, ValueError, ["dropout_p was 2", "from 0 to 1"]),
    ({"dropout_p": float("nan")}, ValueError, ["dropout_p was nan", "from 0 to 1"]),
    ({"backend": "tpu"}, ValueError, ["backend was 'tpu'", "auto, triton, cuda, eager"]),
    ({"backend": 3}, ValueError, ["backend was 3", "auto, triton, cuda, eager"]),
    (
        {"weight": lambda d: torch.zeros(10, 6, device=d, requires_grad=True)},
        ValueError,
        ["weight required grad"],
    ),
    (
        {"scaling": lambda d: torch.ones(1, device=d, requires_grad=True)},
        ValueError,
        ["scaling required grad"],
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD)])
@pytest.mark.parametrize("call", [lora_linear, explain])
def test_bad_input(
    call: Any, changes: dict[str, Any], error: type[Exception], words: list[str], device: torch.device
) -> None:
    call(**arguments(device))  # so that a cached choice cannot hide what follows
    with pytest.raises(error) as caught:
        call(**arguments(device, **changes))
    assert caught.type is error
    for word in words:
        assert word in str(caught.value)


def test_what_equals_a_cached_value_is_still_checked(device: torch.device) -> None:
    # True == 1 and hash(True) == hash(1): a cache by value alone would take one for the other.
    lora_linear(**arguments(device, dropout_p=1, scaling=1))
    with pytest.raises(TypeError, match="dropout_p was a bool"):
        lora_linear(**arguments(device, dropout_p=True))
    with pytest.raises(TypeError, match="scaling was a bool"):
        lora_linear(**arguments(device, scaling=True))


def test_gradients_that_nobody_records_do_not_matter(device: torch.device) -> None:
    call = arguments(device)
    call["weight"].requires_grad_()
    with torch.no_grad():
        y = lora_linear(**call, scaling=torch.ones(1, device=device, requires_grad=True))
    torch.testing.assert_close(y, lora_linear_reference(**call).detach())


@pytest.mark.parametrize("scaling", [2, 2.0], ids=["int", "float"])
def test_scaling_may_be_a_number(scaling: float, device: torch.device, backend: str) -> None:
    call = arguments(device)
    torch.testing.assert_close(
        lora_linear(**call, scaling=scaling, backend=backend), lora_linear_reference(**call, scaling=2.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_scaling_may_be_a_tensor_of_one_element(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    call = arguments(device)
    scaling = torch.full(shape, 3, dtype=dtype, device=device)
    torch.testing.assert_close(
        lora_linear(**call, scaling=scaling, backend=backend), lora_linear_reference(**call, scaling=3.0)
    )


def test_a_scaling_tensor_is_not_rounded_to_the_base_dtype(device: torch.device) -> None:
    """On a GPU a tensor of shape [] would be: PyTorch lets it take the dtype of what it multiplies."""
    call = {k: t.to(torch.bfloat16) for k, t in arguments(device).items()}
    number = 1.0 + 2.0**-9
    expected = lora_linear(**call, scaling=number, backend="eager")
    for scaling in (torch.tensor(number, device=device), torch.tensor([number], device=device)):
        assert torch.equal(lora_linear(**call, scaling=scaling, backend="eager"), expected)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 3, 0)], ids=str)
def test_no_input_features(shape: tuple[int, ...], device: torch.device) -> None:
    call = arguments(device, x=zeros(*shape), weight=zeros(10, 0), lora_A=zeros(3, 0))
    call["lora_A"].requires_grad_()
    y = lora_linear(**call)
    assert torch.equal(y, call["bias"].expand(*shape[:-1], 10))
    y.sum().backward()
    assert call["lora_A"].grad.shape == (3, 0)


def test_no_output_features(device: torch.device) -> None:
    call = arguments(device, x=zeros(2, 3, 6), weight=zeros(0, 6), lora_B=zeros(0, 3), bias=None)
    call["x"].requires_grad_()
    y = lora_linear(**call)
    assert y.shape == (2, 3, 0)
    y.sum().backward()
    assert torch.equal(call["x"].grad, torch.zeros_like(call["x"]))
