"""Large ranks, by two launches of products: sizes, layouts, kinds of adapters, groups, and who takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HAS_GPU, Case
from graphs import captured
from group_cases import GroupCase, Layer, double, exact, leaves, peft, twin
from test_linear import run
from tolerance import assert_as_exact_as_peft, peft_sequence
from torch import Tensor

from lora_kernels import lora_linear, lora_linear_group, lora_linear_reference
from lora_kernels.backends import Problem

pytest.importorskip("triton", reason="Triton is not installed")

from lora_kernels.backends import triton
from lora_kernels.backends.triton import ahead, backward_launch, group, launches, single, wide_ranks
from lora_kernels.backends.triton.tiles import Chip, chip_of, is_wide_rank, narrow_tiles

HOPPER = Chip((9, 0), 132, 232448, True)
HALF = torch.bfloat16 if HAS_GPU else torch.float16

# TMA takes ranks and sizes that 8 divides; elsewhere there are pointers, and in Triton's interpreter any size.
CASES = [
    Case(1, 64, 96, 72, HALF),
    Case(17, 24, 200, 80, HALF, bias=True),
    Case(63, 136, 64, 104, HALF, strided_x=True),
    Case(70, 96, 40, 136, HALF, torch.float32, bias=True),
]
GROUPS = [
    GroupCase(17, 72, (Layer(40, 72, bias=True), Layer(96, 16)), HALF),
    GroupCase(63, 40, (Layer(136, 80), Layer(24, 72), Layer(64, 136)), HALF, torch.float32),
    # More rows than products take that decode inside.
    GroupCase(300, 64, (Layer(40, 72, nf4=True), Layer(72, 80)), HALF, strided_x=True),
]
if not HAS_GPU:
    CASES += [
        Case(3, 17, 63, 65, torch.float32),
        Case(40, 33, 50, 100, torch.float32, bias=True),
    ]
    GROUPS.append(GroupCase(33, 17, (Layer(63, 65), Layer(3, 100), Layer(17, 3)), torch.float32))
else:
    CASES += [
        Case(500, 2000, 504, 256, HALF, bias=True),
        Case(2000, 504, 2000, 128, torch.float16),
        Case(2048, 4096, 1024, 512, HALF),
        Case(8192, 1024, 4096, 96, HALF, torch.float32),
        Case(1000, 2048, 512, 200, torch.float16, strided_x=True),
    ]
    GROUPS += [
        GroupCase(2048, 1024, (Layer(1024, 256), Layer(256, 128), Layer(256, 72)), HALF),
        GroupCase(500, 2000, (Layer(2000, 128, bias=True), *[Layer(504, 128, bias=True)] * 2), HALF),
        GroupCase(4096, 512, (Layer(1408, 256), Layer(1408, 256)), HALF, torch.float32),
        GroupCase(1000, 520, (Layer(264, 512), Layer(520, 8)), torch.float16, strided_x=True),
    ]


@pytest.fixture
def any_rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ranks beyond 64 are large at any number of rows; the sizes of the products that were launched."""
    launched: list[list[int]] = []
    launch = wide_ranks._launched

    def noting(outputs: Any, *arguments: Any) -> list[Tensor]:
        # Where a kernel is new, its backward is rehearsed.
        if not ahead.rehearsing():
            launched.append([len(pairs) for pairs in outputs])
        return launch(outputs, *arguments)

    monkeypatch.setattr(wide_ranks, "is_wide_rank", lambda rows, rank, members=1: rank > 64)
    monkeypatch.setattr(wide_ranks, "_launched", noting)
    monkeypatch.setattr("lora_kernels.backends.triton.launch.tiles_for_few_rows", lambda *arguments: None)
    return launched


def autocast(device: torch.device, case: Case | GroupCase) -> torch.autocast:
    return torch.autocast(device.type, case.dtype, enabled=case.adapter_dtype is not None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_peft(case: Case, device: torch.device, any_rows: list[list[int]]) -> None:
    tensors, double_tensors = case.tensors(device), case.tensors(device).double()

    def ours(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None) -> Tensor:
        return lora_linear(x, tensors.weight, lora_A, lora_B, scaling=case.scaling, bias=bias, backend="triton")

    def peft_of(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None) -> Tensor:
        rounded = (lora_A.to(case.dtype), lora_B.to(case.dtype))
        return peft_sequence(x, tensors.weight, *rounded, case.scaling, bias, None, 0.0)

    def exact_of(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None) -> Tensor:
        # Of what the adapters are rounded to.
        A, B = (t + (t.to(case.dtype).double() - t).detach() for t in (lora_A, lora_B))
        return lora_linear_reference(x, double_tensors.weight, A, B, scaling=case.scaling, bias=bias)

    with autocast(device, case):
        computed = run(ours, tensors)
    assert any_rows == [[1], [2]] * 2
    for name, value in computed.items():
        assert name == "y" or value.dtype == vars(tensors)[name[1:]].dtype
    assert_as_exact_as_peft(computed, run(peft_of, tensors), run(exact_of, double_tensors))


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_groups_are_as_exact_as_peft(case: GroupCase, device: torch.device, any_rows: list[list[int]]) -> None:
    x, members = case.x(device), case.members(device)
    dys = [torch.randn(case.M, layer.N, device=device).to(case.dtype) for layer in case.layers]

    def gradients(x: Tensor, members: Any, ys: list[Tensor]) -> dict[str, Tensor]:
        named = {"x": x, **leaves(members)}
        found = torch.autograd.grad(ys, list(named.values()), [dy.to(y) for y, dy in zip(ys, dys, strict=True)])
        outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return outputs | {f"d{name}": g for name, g in zip(named, found, strict=True)}

    def rounded(members: Any) -> Any:
        def as_used(t: Tensor) -> Tensor:
            return t + (t.to(case.dtype).to(t.dtype) - t).detach()

        return [m._replace(lora_A=as_used(m.lora_A), lora_B=as_used(m.lora_B)) for m in members]

    x_ours = x.detach().requires_grad_()
    with autocast(device, case):
        ours = gradients(x_ours, members, lora_linear_group(x_ours, members, backend="triton"))
    count = len(members)
    assert any_rows == [[1] * count, [2] * count, [1] * count, [2 * count]]
    x_peft, twins = x.detach().clone().requires_grad_(), [twin(m, case.dtype) for m in members]
    casts = [m._replace(lora_A=m.lora_A.to(case.dtype), lora_B=m.lora_B.to(case.dtype)) for m in twins]
    theirs = gradients(x_peft, twins, [peft(x_peft, m, None, 0.0) for m in casts])
    x_exact, doubles = x.detach().double().requires_grad_(), [double(m, case.dtype) for m in members]
    want = gradients(x_exact, doubles, [exact(x_exact, m, None, 0.0) for m in rounded(doubles)])
    assert_as_exact_as_peft(ours, theirs, want)


def test_a_bias_of_any_stride(device: torch.device, any_rows: list[list[int]]) -> None:
    t = Case(17, 64, 48, 72, HALF, bias=True).tensors(device)
    assert t.bias is not None
    wide = torch.stack([t.bias, torch.full_like(t.bias, float("nan"))], dim=1)[:, 0]

    def y(bias: Tensor) -> Tensor:
        return lora_linear(t.x, t.weight, t.lora_A, t.lora_B, bias=bias, backend="triton")

    assert torch.equal(y(wide), y(t.bias))
    assert [2] in any_rows


def layer(case: Case, device: torch.device, forward: bool = True) -> wide_ranks.Layer:
    t = case.tensors(device)
    if forward:
        return wide_ranks.Layer(t.x, t.weight.T, t.lora_A.T, t.lora_B.T, t.bias, 1.0)
    return wide_ranks.Layer(t.dy, t.weight, t.lora_B, t.lora_A, None, 1.0)


def test_which_layers_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(wide_ranks, "chip_of", lambda device: HOPPER)
    plain = Case(2048, 64, 96, 128, torch.bfloat16)

    def theirs(case: Case, forward: bool = True, masked: bool = False, precision: Any = "native") -> bool:
        return wide_ranks.are_wide([layer(case, cpu, forward)], masked, precision)

    assert theirs(plain)
    assert theirs(plain, forward=False)
    assert theirs(replace(plain, rank=72))
    assert theirs(replace(plain, adapter_dtype=torch.float32), precision="rounded")
    assert not theirs(replace(plain, adapter_dtype=torch.float32), precision="split")
    assert not theirs(plain, masked=True)
    # A rank of one chunk, few rows, and what TMA cannot read.
    for other in ({"rank": 64}, {"M": 511}, {"rank": 100}, {"N": 100}, {"K": 60}, {"dtype": torch.float32}):
        assert not theirs(replace(plain, **other)), other
    # Groups begin earlier.
    two = [layer(replace(plain, rank=40), cpu)] * 2
    assert wide_ranks.are_wide(two, False, "native")
    assert not wide_ranks.are_wide([layer(replace(plain, rank=32), cpu)] * 2, False, "native")
    # A B of one column lies like a transposed one.
    one = layer(replace(plain, rank=1), cpu, forward=False)
    assert not wide_ranks.are_wide([layer(plain, cpu, forward=False), one], False, "native")
    # U does not lie as W does.
    assert not theirs(replace(plain, transposed_weight=True))
    monkeypatch.setattr(wide_ranks, "chip_of", lambda device: Chip((8, 0), 108, 166912, False))
    assert not theirs(plain)


def test_tiles_of_s_are_about_one_wave() -> None:
    def chosen(M: int, *ranks: int) -> tuple[int, int]:
        tiles = narrow_tiles(HOPPER, M, ranks)
        return tiles.block_m, tiles.block_n

    assert chosen(8192, 512) == (128, 256)
    assert chosen(8192, 256) == (128, 128)
    assert chosen(8192, 128) == (64, 128)
    assert chosen(2048, 256) == chosen(2048, 128) == (64, 64)
    assert chosen(8192, 256, 256, 256) == (128, 128)
    for tiles in {narrow_tiles(HOPPER, M, [R]) for M in (64, 2048, 8192, 65536) for R in (72, 128, 256, 512)}:
        assert tiles.shared_memory(2) <= HOPPER.shared_memory


def test_explain_says_which_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton, backward_launch, wide_ranks):
        monkeypatch.setattr(module, "chip_of", lambda device: HOPPER)
    plain = Problem.of(torch.device("cuda"), torch.bfloat16, "native", 4096, 4096, 128)
    note = "from 512 rows on, without dropout, S and T in launches of their own"

    def described(**changes: Any) -> str:
        text = triton.BACKEND.describe(replace(plain, **changes))
        assert text is not None
        return text

    assert f"{note}, and dA and dB by the libraries" in described()
    for other in ({"rank": 64}, {"rank": 68}, {"precision": "split"}, {"in_features": 4100}, {"dtype": torch.float32}):
        assert note not in described(**other), other
    assert group.describe([replace(plain, rank=40), replace(plain, rank=8)]) == note
    assert group.describe([replace(plain, rank=32)] * 2) is None
    monkeypatch.setattr(wide_ranks, "chip_of", lambda device: Chip((8, 0), 108, 166912, False))
    assert note not in described()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [64, 128])
def test_a_call_of_a_large_rank_takes_them_on_hopper(rank: int, device: torch.device) -> None:
    t = Case(2048, 512, 768, rank, torch.bfloat16).tensors(device)
    x, A, B = t.x, t.lora_A, t.lora_B
    wide = chip_of(device).has_tma and is_wide_rank(2048, rank)
    with launches.noting() as made:
        _, s = single.forward(x, t.weight, A, B, None, 2.0, None, "native", True)
        single.backward(t.dy, t.weight, A, B, x, s, 2.0, None, "native", torch.bfloat16)
    expected = ["products"] * 4 if wide else ["one_pass", "one_pass", "adapter_grads"]
    assert [launch.name for launch in made] == expected


@pytest.mark.gpu
def test_a_captured_graph_replays(device: torch.device) -> None:
    case = GroupCase(2048, 512, (Layer(1024, 128), Layer(256, 72), Layer(256, 256)), torch.bfloat16)
    x, members = case.x(device), case.members(device)

    def step() -> tuple[Tensor, ...]:
        given = x.detach().requires_grad_()
        ys = lora_linear_group(given, members, backend="triton")
        return *(y.detach() for y in ys), *torch.autograd.grad(ys, [given, *leaves(members).values()], ys)

    graph, results = captured(step)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device=device))
        graph.replay()
        for got, want in zip(results, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_a_new_number_of_rows_compiles_nothing(device: torch.device) -> None:
    from lora_kernels.backends.triton.products import products_kernel

    t = Case(4096, 512, 256, 128, torch.bfloat16).tensors(device)

    def compiled(rows: int) -> int:
        lora_linear(t.x[:rows], t.weight, t.lora_A, t.lora_B, backend="triton")
        return len(products_kernel.device_caches[torch.cuda.current_device()][0])

    before = compiled(2048)
    assert {compiled(rows) for rows in (2000, 1999, 2047, 1920)} == {before}
