"""Every backend against float64 over the whole grid: output and all gradients."""

from __future__ import annotations

import pytest
import torch
from cases import HAS_GPU, Case, Tensors, backends_of, grid
from tolerance import assert_as_exact_as_peft, peft_sequence

from lora_kernels import lora_linear, lora_linear_reference
from lora_kernels.dropout import Dropout, drop_threshold, keep_mask


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The seeds that lora_linear draws, so that a test can regenerate the masks."""
    seeds: list[torch.Tensor] = []
    draw = Dropout.draw

    def recording(p: float, device: torch.device) -> Dropout | None:
        dropout = draw(p, device)
        if dropout is not None:
            seeds.append(dropout.seed)
        return dropout

    monkeypatch.setattr(Dropout, "draw", staticmethod(recording))
    return seeds


def run(call, tensors: Tensors) -> dict[str, torch.Tensor]:
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in vars(tensors).items()
        if t is not None and name not in ("weight", "dy")
    }
    y = call(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors.dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


GRID = [(case, backend) for case in grid(HAS_GPU) for backend in backends_of(case, HAS_GPU)]


@pytest.mark.parametrize(("case", "backend"), GRID, ids=str)
def test_is_as_exact_as_peft(case: Case, backend: str, device: torch.device, drawn: list[torch.Tensor]) -> None:
    tensors = case.tensors(device)
    torch.manual_seed(0)
    ours = run(
        lambda x, lora_A, lora_B, bias=None: lora_linear(
            x,
            tensors.weight,
            lora_A,
            lora_B,
            scaling=case.scaling,
            bias=bias,
            dropout_p=case.dropout,
            backend=backend,
        ),
        tensors,
    )
    keep = keep_mask(drawn[0], case.M, case.K, case.dropout) if drawn else None
    # The mask's own probability: p in steps of 2^-16.
    p = drop_threshold(case.dropout) / 65536
    peft = run(
        lambda x, lora_A, lora_B, bias=None: peft_sequence(
            x, tensors.weight, lora_A, lora_B, case.scaling, bias, keep, p
        ),
        tensors,
    )
    double = tensors.double()
    exact = run(
        lambda x, lora_A, lora_B, bias=None: lora_linear_reference(
            x, double.weight, lora_A, lora_B, scaling=case.scaling, bias=bias, keep=keep, dropout_p=case.dropout
        ),
        double,
    )
    for name, value in ours.items():
        if name != "y":
            assert value.dtype == vars(tensors)[name[1:]].dtype
    assert_as_exact_as_peft(ours, peft, exact)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 0, 6), (2, 3, 6), (2, 1, 3, 6)], ids=str)
def test_any_number_of_leading_dimensions(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(*shape, generator=generator, device=device)
    weight, lora_A, lora_B = (
        torch.randn(*size, generator=generator, device=device) for size in ((10, 6), (3, 6), (10, 3))
    )
    y = lora_linear(x, weight, lora_A, lora_B, scaling=0.5, backend=backend)
    expected = lora_linear_reference(*(t.double() for t in (x, weight, lora_A, lora_B)), scaling=0.5)
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_same_inputs_same_bits(backend: str, device: torch.device) -> None:
    case = Case(300, 256, 200, 16, torch.float16, dropout=0.2, bias=True)
    tensors = case.tensors(device)

    def once() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return run(
            lambda x, lora_A, lora_B, bias: lora_linear(
                x, tensors.weight, lora_A, lora_B, bias=bias, dropout_p=0.2, backend=backend
            ),
            tensors,
        )

    first = once()
    # Triton's interpreter takes a quarter of a minute each time, and runs one program after the other.
    for _ in range(3 if device.type == "cuda" else 1):
        for name, value in once().items():
            assert torch.equal(value, first[name]), name
