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
from lora_kernels.backends import Precision, Problem
from lora_kernels.dropout import Dropout, inverse_keep, keep_mask

pytest.importorskip("triton", reason="Triton is not installed")

from lora_kernels.backends import sync, triton
from lora_kernels.backends.triton import backward_launch, launch, launches, single
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
TILES = (
    few_rows_table(HOPPER)
    if HAS_GPU
    else (FewRowsTiles(16, 32, 64, 4, 2), FewRowsTiles(32, 64, 32, 4, 2), FewRowsTiles(128, 32, 64, 4, 2))
)


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
    FewRowsCase(Case(65, 300, 130, 8, HALF, bias=True), 8),
    FewRowsCase(Case(100, 192, 200, 24, HALF, dropout=0.3, transposed_weight=True), 132),
    FewRowsCase(Case(129, 500, 72, 16, HALF, dropout=0.1), 6),
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
        FewRowsCase(Case(128, 4096, 1024, 16, HALF, strided_x=True), 132),
        FewRowsCase(Case(200, 1000, 2000, 64, HALF, dropout=0.1, bias=True), 132),
        FewRowsCase(Case(200, 520, 264, 40, HALF, torch.float32, dropout=0.3), 132),
        FewRowsCase(Case(65, 14336, 4096, 16, HALF), 132),
        FewRowsCase(Case(256, 14336, 4096, 16, HALF), 132),
        FewRowsCase(Case(129, 2728, 1032, 64, HALF, dropout=0.3, transposed_weight=True), 132),
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
    least, _, narrow, wide = few_rows_table(HOPPER)
    for tiles, M, C, L, parts in (
        # S goes beside.
        (least, 1, 4096, 14336, (2, 8)),
        (narrow, 64, 14336, 4096, (1, 8)),
        (narrow, 64, 1024, 4096, (8, 8)),
        (least, 1, 64, 128000, (16, 8)),
        (least, 1, 64, 640, (2, 1)),
        (least, 1, 64, 1, (1, 1)),
        # S has places of its own, and as many parts as a tile. These were measured to be best.
        (narrow, 65, 1024, 4096, (3, 8)),
        (narrow, 192, 1024, 4096, (2, 8)),
        (wide, 65, 4096, 14336, (2, 4)),
        (wide, 128, 4096, 14336, (2, 4)),
        (wide, 129, 4096, 4096, (1, 2)),
        (wide, 256, 4096, 14336, (1, 2)),
        (wide, 256, 14336, 4096, (1, 1)),
    ):
        assert few_rows_parts(132, tiles, M, C, L) == parts, (tiles, M, C, L)


def test_a_configuration_holds_all_rows_of_a_block() -> None:
    for M in range(1, 65):
        tiles = few_rows_tiles(HOPPER, M, 14336, 64, 512, "split")
        assert tiles is not None
        assert M <= tiles.block_m < max(17, 2 * M)
    assert few_rows_tiles(Chip((8, 0), 108, 166912, False), 1, 4096, 4096, 8, "native") is None


def test_more_rows_take_it_where_there_are_few_tiles() -> None:
    def chosen(M: int, L: int, C: int, R: int = 16, precision: Precision = "native") -> FewRowsTiles | None:
        return few_rows_tiles(HOPPER, M, C, L, R, precision)

    *_, narrow, wide = few_rows_table(HOPPER)
    for M in (65, 128, 129, 256):
        assert chosen(M, 14336, 4096) == wide
        assert chosen(M, 4096, 14336) is None
        assert chosen(M, 4096, 4096) == (wide if M > 128 else None)
        assert chosen(M, 4096, 1024) == (wide if M == 256 else narrow)
        assert chosen(M, 1024, 4096) is None
    assert chosen(257, 14336, 4096) is chosen(257, 4096, 64) is None
    assert chosen(256, 14336, 4096, 64) == wide
    assert chosen(100, 14336, 4096, 65) is chosen(100, 4096, 64, 17, "split") is None
    # A wave without a place for S is none.
    assert chosen(128, 14336, 131 * 64) == wide
    assert chosen(128, 14336, 132 * 64) is None


def test_explain_says_which_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton, backward_launch):
        monkeypatch.setattr(module, "chip_of", lambda device: HOPPER)

    def described(K: int, N: int) -> str:
        text = triton.BACKEND.describe(Problem.of(torch.device("cuda"), torch.bfloat16, "native", K, N, 16))
        assert text is not None
        return text

    assert "; another kernel for y of 1 to 64 and 129 to 256 rows and for dx of 1 to 64 and 129 to 256, " in described(
        4096, 4096
    )
    assert "; another kernel for y of 1 to 64 rows and for dx of 1 to 256, " in described(4096, 14336)
    assert "another kernel" not in described(4096, 14338)


def test_what_tma_cannot_read_is_the_one_pass_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "chip_of", lambda device: HOPPER)
    x, weight = torch.zeros(3, 80, dtype=HALF, device=device), torch.zeros(40, 80, dtype=HALF, device=device)
    assert launch.tiles_for_few_rows(x, weight.T, 8, "native") is not None
    assert launch.tiles_for_few_rows(x[:, :40], weight, 8, "native") is not None
    for left, right in (
        (x.float(), weight.float().T),
        (x[:, 1:41], weight),
        (x, weight[:39].T),
        (torch.zeros(257, 80, dtype=HALF, device=device), weight.T),
    ):
        assert launch.tiles_for_few_rows(left, right, 8, "native") is None


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N"), [(2048, 256), (8192, 2176)], ids=["narrow", "wide"])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128, 129, 256, 257])
def test_a_call_of_few_rows_takes_it_on_hopper(rows: int, K: int, N: int, device: torch.device) -> None:
    t, chip = Case(rows, K, N, 8, torch.bfloat16).tensors(device), chip_of(device)
    with launches.noting() as made:
        _, s = single.forward(t.x, t.weight, t.lora_A, t.lora_B, None, 2.0, None, "native", True)
    with launches.noting() as made_backward:
        adapters = (t.lora_A, t.lora_B)
        single.backward(t.dy, t.weight, *adapters, t.x, s, 2.0, None, "native", torch.bfloat16)

    def kernels(made: list[launches.Launch]) -> list[str]:
        return [launch._kernel.fn.__name__ for launch in made]

    forward, dx = (few_rows_tiles(chip, rows, C, L, 8, "native") is not None for C, L in ((N, K), (K, N)))
    assert kernels(made) == ["few_rows_kernel" if forward else "one_pass_kernel"]
    if chip.has_tma:
        assert (forward, dx) == (rows <= 256, rows <= 64)
    if dx:
        assert kernels(made_backward) == ["few_rows_kernel", "adapter_grads_kernel"]
    else:
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
@pytest.mark.parametrize(("rows", "K", "N"), [(1, 1024, 768), (50, 1024, 768), (100, 1024, 768), (200, 4096, 4096)])
def test_a_captured_graph_replays(rows: int, K: int, N: int, device: torch.device) -> None:
    t = Case(rows, K, N, 16, torch.bfloat16).tensors(device)

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
