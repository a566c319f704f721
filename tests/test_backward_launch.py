"""A layer's whole backward in one launch: who takes which part of it, and when T is complete, changes no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import HAS_GPU, Case
from tolerance import relative_error

from lora_kernels import lora_linear
from lora_kernels.backends import Precision
from lora_kernels.backends.triton import backward_launch, launch
from lora_kernels.backends.triton.tiles import OnePassTiles, candidates, chip_of
from lora_kernels.dropout import Dropout

HALF = torch.bfloat16 if HAS_GPU else torch.float16
CASES = [
    Case(70, 65, 96, 5, HALF),
    Case(100, 64, 130, 20, HALF, dropout=0.3),
    Case(33, 40, 64, 70, torch.float32, transposed_weight=True, strided_x=True),
    Case(1, 3, 1, 1, torch.float32, dropout=0.5),
]
if HAS_GPU:
    CASES += [
        Case(4096, 1024, 2048, 16, HALF),
        Case(1000, 768, 512, 256, HALF, dropout=0.1),
        Case(500, 2000, 520, 64, HALF, strided_x=True),
        # More of dA and dB than there are programs, with parts of unequal length.
        Case(9000, 4096, 4096, 8, HALF),
    ]
Gradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Problem:
    """What a backward is given, and what it must give."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.t = t = case.tensors(device)
        self.dropout = Dropout(case.dropout, torch.tensor([77], device=device)) if case.dropout else None
        keep = 1.0 if self.dropout is None else self.dropout.keep(case.M, case.K).double()
        branch = 2.0 * keep * t.x.double() @ t.lora_A.double().T
        self.s = branch.to(t.x.dtype)
        narrow = 2.0 * t.dy.double() @ t.lora_B.double()
        dx = t.dy.double() @ t.weight.double() + keep * (narrow @ t.lora_A.double())
        self.exact = dx, narrow.T @ (keep * t.x.double()), t.dy.double().T @ self.s.double()

    def backward(self, x: bool = True, s: bool = True, precision: Precision = "native", **forced: object) -> Gradients:
        t = self.t
        return backward_launch.backward(
            t.dy, t.weight, t.lora_A, t.lora_B, t.x if x else None, self.s if s else None, 2.0, self.dropout, precision,
            t.lora_A.dtype, **forced,
        )  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(autouse=True)
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On chips as well where two were not measured to be slower, and of few rows; and none of them made."""

    def refused(*arguments: object) -> None:
        raise AssertionError("there was a second launch")

    monkeypatch.setattr(backward_launch, "is_for_one_launch", lambda device, rank: True)
    monkeypatch.setattr(backward_launch, "tiles_for_few_rows", lambda *arguments: None)
    monkeypatch.setattr(backward_launch, "adapter_grads", refused)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_right_whoever_finds_t_complete(case: Case, device: torch.device) -> None:
    problem = Problem(case, device)
    limit = 4e-3 if case.dtype != torch.float32 else 1e-5
    expected = problem.backward()
    for value, exact in zip(expected, problem.exact, strict=True):
        assert value is not None
        assert relative_error(value, exact) < limit
    for _ in range(2):
        # Who never looks leaves all of dA to the last program.
        for value, wanted in zip(problem.backward(spin_limit=0), expected, strict=True):
            assert torch.equal(value, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("programs", [1, 3])
def test_it_is_right_with_few_programs(programs: int, device: torch.device) -> None:
    problem = Problem(CASES[1], device)
    expected = problem.backward(programs=programs)
    for value, exact in zip(expected, problem.exact, strict=True):
        assert value is not None
        assert relative_error(value, exact) < 4e-3
    for value, wanted in zip(problem.backward(programs=programs, spin_limit=0), expected, strict=True):
        assert torch.equal(value, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(("x", "s"), [(True, False), (False, True)])
def test_what_nobody_asked_for_is_not_computed(x: bool, s: bool, device: torch.device) -> None:
    problem = Problem(CASES[1], device)
    dx, dA, dB = problem.backward(x=x, s=s)
    full = problem.backward()
    assert torch.equal(dx, full[0])
    assert (dA is None, dB is None) == (not x, not s)
    for value, exact in ((dA, problem.exact[1]), (dB, problem.exact[2])):
        assert value is None or relative_error(value, exact) < 4e-3


@pytest.mark.skipif(not HAS_GPU, reason="the interpreter has one configuration")
@pytest.mark.parametrize("tiles", candidates(chip_of(torch.device("cuda", 0)), 2, True) if HAS_GPU else [], ids=str)
@pytest.mark.parametrize(
    "case", [Case(3000, 1024, 768, 16, HALF), Case(700, 512, 1536, 40, HALF, dropout=0.2)], ids=str
)
def test_it_is_right_in_every_configuration(case: Case, tiles: OnePassTiles, device: torch.device) -> None:
    problem = Problem(case, device)
    for value, exact in zip(problem.backward(tiles=tiles), problem.exact, strict=True):
        assert value is not None
        assert relative_error(value, exact) < 4e-3


def test_two_launches_where_nothing_is_shared(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with more chunks than there are tiles: T would be complete with the last tile, and dA be one program's."""
    problem = Problem(Case(40, 20, 30, 512, HALF), device)
    monkeypatch.undo()
    monkeypatch.setattr(backward_launch, "is_for_one_launch", lambda device, rank: True)
    made = []
    grads = backward_launch.adapter_grads

    def noted(*arguments: object) -> object:
        made.append(1)
        return grads(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backward_launch, "adapter_grads", noted)
    # One program has no tile less than others.
    for value, exact in zip(problem.backward(programs=1), problem.exact, strict=True):
        assert value is not None
        assert relative_error(value, exact) < 4e-3
    assert made


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_layer_takes_it(dropout: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("there was a launch for dx alone")

    case = replace(CASES[0], dropout=dropout)
    t = case.tensors(device)
    leaves = [v.detach().requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(5)
        y = lora_linear(leaves[0], t.weight, *leaves[1:], scaling=2.0, dropout_p=dropout, backend=backend)
        monkeypatch.setattr(launch, "one_pass", refused)
        return torch.autograd.grad(y, leaves, t.dy)

    expected = gradients("eager")
    monkeypatch.undo()
    monkeypatch.setattr(backward_launch, "is_for_one_launch", lambda device, rank: True)
    for value, wanted in zip(gradients("triton"), expected, strict=True):
        assert relative_error(value, wanted) < 6e-3


def test_a_row_of_stride_0_is_no_missing_x(device: torch.device) -> None:
    """One row of an expanded tensor: its stride equals False, and so would their keys."""
    t = Case(1, 48, 40, 8, HALF).tensors(device)
    x = t.x.expand(5, 48)[:1]
    assert x.stride(0) == 0

    def grads(left: torch.Tensor | None) -> Gradients:
        s = torch.ones(1, 8, dtype=HALF, device=device)
        return backward_launch.backward(
            t.dy, t.weight, t.lora_A, t.lora_B, left, s, 2.0, None, "native", HALF
        )

    exact = (2.0 * t.dy.double() @ t.lora_B.double()).T @ t.x.double()
    for left in (None, x, None, x):
        dA = grads(left)[1]
        assert (dA is None) == (left is None)
        assert dA is None or relative_error(dA, exact) < 4e-3


def test_a_dropout_that_rounds_to_nothing_is_not_none(device: torch.device) -> None:
    """Its threshold is 0, which equals False: training with it and evaluation have kernels of their own."""
    case = Case(33, 48, 40, 8, HALF, dropout=1e-6)
    masked, plain = Problem(case, device), Problem(replace(case, dropout=0.0), device)
    assert masked.dropout is not None
    assert masked.dropout.threshold == 0
    for problem in (masked, plain, masked, plain):
        for value, exact in zip(problem.backward(), problem.exact, strict=True):
            assert value is not None
            assert relative_error(value, exact) < 4e-3
        y, _ = launch.one_pass(
            problem.t.x, problem.t.weight.T, problem.t.lora_A.T, problem.t.lora_B.T, None, 2.0, problem.dropout, True,
            "native",
        )  # fmt: skip
        exact_y = problem.t.x.double() @ problem.t.weight.double().T
        exact_y += 2.0 * problem.t.x.double() @ problem.t.lora_A.double().T @ problem.t.lora_B.double().T
        assert relative_error(y, exact_y) < 4e-3


def test_another_thread_may_empty_the_cache(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    remember = backward_launch.remember

    def remembered_and_forgotten(memory: dict[tuple[object, ...], object], *entry: object) -> None:
        remember(memory, *entry)  # type: ignore[arg-type]
        memory.clear()

    monkeypatch.setattr(backward_launch, "remember", remembered_and_forgotten)
    monkeypatch.setattr(backward_launch, "_whole", {})
    problem = Problem(CASES[0], device)
    assert relative_error(problem.backward()[0], problem.exact[0]) < 4e-3
