"""The product for few rows: every size, layout and kind of adapter, in one part and in many, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import HAS_GPU, Case
from graphs import captured
from tolerance import assert_as_exact_as_peft, peft_sequence
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.backends import Precision
from lora_kernels.dropout import Dropout, inverse_keep, keep_mask

pytest.importorskip("triton", reason="Triton is not installed")

from lora_kernels.backends import sync
from lora_kernels.backends.triton import launch, launches, single
from lora_kernels.backends.triton.tiles import (
    Chip,
    FewRowsTiles,
    chip_of,
    few_rows_parts,
    few_rows_table,
    few_rows_tiles,
)

HOPPER = Chip((9, 0), 132, 232448, True)
HALF = torch.bfloat16 if HAS_GPU else torch.float16
# What the shipped ones are on Hopper; elsewhere the kernel is right as well, though nobody is given it.
TILES = few_rows_table(HOPPER) if HAS_GPU else (FewRowsTiles(16, 32, 64, 4, 2), FewRowsTiles(32, 64, 32, 4, 2))


@dataclass(frozen=True)
class FewRowsCase:
    """A layer, and how many programs may run at once, from which the number of parts follows."""

    case: Case
    programs: int

    def __str__(self) -> str:
        return f"{self.case}-{self.programs}"


CASES = [
    FewRowsCase(Case(1, 1, 1, 1, HALF), 1),
    FewRowsCase(Case(1, 500, 63, 8, HALF), 4),
    FewRowsCase(Case(3, 17, 63, 3, HALF, bias=True), 132),
    FewRowsCase(Case(17, 200, 130, 40, HALF, dropout=0.3), 7),
    FewRowsCase(Case(40, 330, 96, 16, HALF, transposed_weight=True, strided_x=True), 9),
    FewRowsCase(Case(63, 130, 72, 100, HALF, dropout=0.5, bias=True), 132),
    FewRowsCase(Case(5, 48, 40, 8, HALF, dropout=1.0), 2),
]
if not HAS_GPU:
    CASES.append(FewRowsCase(Case(33, 256, 80, 12, torch.float32, dropout=0.1), 6))
else:
    # The interpreter has no products of bfloat16, which split adapters are made of.
    CASES += [
        FewRowsCase(Case(1, 14336, 4096, 16, HALF), 132),
        FewRowsCase(Case(64, 4096, 14336, 64, HALF, dropout=0.1), 132),
        FewRowsCase(Case(16, 2000, 500, 512, HALF, bias=True), 132),
        FewRowsCase(Case(17, 500, 2000, 8, HALF, torch.float32, dropout=0.3), 132),
        FewRowsCase(Case(3, 17, 63, 3, HALF, torch.float32), 132),
        FewRowsCase(Case(50, 2048, 1024, 32, torch.float16, dropout=0.3), 132),
    ]


@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}")
@pytest.mark.parametrize("few", CASES, ids=str)
def test_as_exact_as_peft_and_the_same_bits_again(few: FewRowsCase, tiles: FewRowsTiles, device: torch.device) -> None:
    case, t = few.case, few.case.tensors(device)
    precision: Precision = "split" if case.adapter_dtype == torch.float32 else "native"
    dropout = Dropout.draw(case.dropout, device)
    p = case.dropout
    scale = case.scaling * (inverse_keep(p) if p else 1.0)
    keep = None if dropout is None else keep_mask(dropout.seed, case.M, case.K, p)

    def computed() -> dict[str, Tensor]:
        forced = {"tiles": tiles, "programs": few.programs}
        A, B = t.lora_A, t.lora_B
        y, s = launch.one_pass(t.x, t.weight.T, A.T, B.T, t.bias, scale, dropout, True, precision, **forced)
        number = torch.tensor(scale, device=device)
        dx, given = launch.one_pass(t.dy, t.weight, B, A, None, number, dropout, False, precision, **forced)
        return {"y": y, "s": s, "dx": dx, "t": given}

    def by_autograd(t: object, exact: bool) -> dict[str, Tensor]:
        x, weight, A, B, bias, dy = vars(t).values()
        x = x.detach().requires_grad_()
        if exact:
            masked = x if keep is None else torch.where(keep, x, 0.0)
            y = torch.nn.functional.linear(x, weight, bias) + scale * masked @ A.T @ B.T
        else:
            y = peft_sequence(x, weight, A, B, case.scaling, bias, keep, p)
        (dx,) = torch.autograd.grad(y, x, dy)
        return {"y": y.detach(), "dx": dx}

    first = computed()
    for name, value in computed().items():
        assert torch.equal(value, first[name]), name
    assert_as_exact_as_peft(first, by_autograd(t, False), by_autograd(t.double(), True))
    d = t.double()
    masked = d.x if keep is None else torch.where(keep, d.x, 0.0)
    for name, left, down in (("s", masked, d.lora_A.T), ("t", d.dy, d.lora_B)):
        exact = scale * left @ down
        assert float((first[name].double() - exact).norm()) <= 4e-3 * float(exact.norm()), name
    assert all(int(piece.abs().sum()) == 0 for piece in sync._pieces.values())


def test_parts_give_the_programs_work() -> None:
    assert few_rows_parts(132, 64, 112) == 2
    assert few_rows_parts(132, 224, 32) == 1
    assert few_rows_parts(132, 16, 32) == 8
    assert few_rows_parts(132, 1, 1000) == 16
    assert few_rows_parts(132, 1, 5) == 2
    assert few_rows_parts(132, 1, 1) == 1


def test_a_configuration_holds_all_rows_or_there_is_none() -> None:
    largest = few_rows_table(HOPPER)[-1].block_m
    for M in range(1, largest + 1):
        tiles = few_rows_tiles(HOPPER, M)
        assert tiles is not None
        assert M <= tiles.block_m < max(17, 2 * M)
    assert few_rows_tiles(HOPPER, largest + 1) is None
    assert few_rows_tiles(Chip((8, 0), 108, 166912, False), 1) is None


def test_what_tma_cannot_read_is_the_one_pass_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "chip_of", lambda device: HOPPER)
    x, weight = torch.zeros(3, 80, dtype=HALF, device=device), torch.zeros(40, 80, dtype=HALF, device=device)
    assert launch.tiles_for_few_rows(x, weight.T) is not None
    assert launch.tiles_for_few_rows(x[:, :40], weight) is not None
    for left, right in (
        (x.float(), weight.float().T),
        (x[:, 1:41], weight),
        (x, weight[:39].T),
        (torch.zeros(65, 80, dtype=HALF, device=device), weight.T),
    ):
        assert launch.tiles_for_few_rows(left, right) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65])
def test_a_call_of_few_rows_takes_it_on_hopper(rows: int, device: torch.device) -> None:
    t, chip = Case(rows, 512, 256, 8, torch.bfloat16).tensors(device), chip_of(device)
    with launches.noting() as made:
        _, s = single.forward(t.x, t.weight, t.lora_A, t.lora_B, None, 2.0, None, "native", True)
    with launches.noting() as made_backward:
        adapters = (t.lora_A, t.lora_B)
        single.backward(t.dy, t.weight, *adapters, t.x, s, 2.0, None, "native", torch.bfloat16)

    def kernels(made: list[launches.Launch]) -> list[str]:
        return [launch._kernel.fn.__name__ for launch in made]

    if few_rows_tiles(chip, rows) is not None:
        assert kernels(made) == ["few_rows_kernel"]
        assert kernels(made_backward) == ["few_rows_kernel", "adapter_grads_kernel"]
    else:
        assert kernels(made) == ["one_pass_kernel"]
        assert kernels(made_backward) == (
            ["backward_kernel"] if chip.has_tma else ["one_pass_kernel", "adapter_grads_kernel"]
        )


@pytest.mark.gpu
def test_a_new_number_of_rows_compiles_nothing(device: torch.device) -> None:
    from lora_kernels.backends.triton.few_rows import few_rows_kernel

    t = Case(16, 512, 256, 16, torch.bfloat16).tensors(device)

    def compiled(rows: int) -> int:
        launch.one_pass(t.x[:rows], t.weight.T, t.lora_A.T, t.lora_B.T, None, 1.0, None, True, "native", tiles=TILES[0])
        return len(few_rows_kernel.device_caches[torch.cuda.current_device()][0])

    before = compiled(16)
    assert {compiled(rows) for rows in (1, 2, 3, 8, 15)} == {before}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_a_captured_graph_replays(rows: int, device: torch.device) -> None:
    t = Case(rows, 1024, 768, 16, torch.bfloat16).tensors(device)

    def step() -> tuple[Tensor, ...]:
        A, B = (adapter.detach().requires_grad_() for adapter in (t.lora_A, t.lora_B))
        x = t.x.detach().requires_grad_()
        y = lora_linear(x, t.weight, A, B, backend="triton")
        return y.detach(), *torch.autograd.grad(y, [x, A, B], t.dy)

    graph, results = captured(step)
    for seed in range(3):
        t.x.copy_(torch.randn(t.x.shape, generator=torch.Generator("cuda").manual_seed(seed), device=device))
        graph.replay()
        for got, want in zip(results, step(), strict=True):
            assert torch.equal(got, want)
