"""Groups with NF4 weights: decoded for one launch, or at few rows member by member."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HAS_GPU
from graphs import captured
from group_cases import GroupCase as LayersCase
from group_cases import Layer, double, exact, leaves
from tolerance import assert_as_exact_as_peft
from torch import Tensor

from lora_kernels import explain_group, lora_linear_group, native
from lora_kernels.backends import Problem
from lora_kernels.nf4 import NF4Weight

pytest.importorskip("triton", reason="Triton is not installed")

from test_group_kernels import Group, GroupCase, by_autograd, computed

from lora_kernels.backends.triton import ahead, group_launch, launches, nf4_launch, single
from lora_kernels.backends.triton.group import GROUP, backward_input, describe, forward

# More rows than any product decodes on the fly for, and few enough for all. With very few, which way gets nearer
# to the truth in 16 bits is chance.
MANY, FEW = (300, 100) if HAS_GPU else (65, 33)


def quantized(group: Group, which: str) -> Group:
    """The group with the weights that `which` marks with "4" in NF4."""
    members = [
        member._replace(weight=NF4Weight.quantize(member.weight)) if mark == "4" else member  # type: ignore[arg-type]
        for member, mark in zip(group.members, which, strict=True)
    ]
    return replace(group, members=members)


def decoded(group: Group) -> Group:
    """The group with its NF4 weights as PyTorch's operations decode them."""
    dtype = group.x.dtype
    members = [
        member._replace(weight=member.weight.dequantize(dtype)) if isinstance(member.weight, NF4Weight) else member
        for member in group.members
    ]
    return replace(group, members=members)


def make(case: GroupCase, which: str, device: torch.device) -> Group:
    torch.manual_seed(case.M)
    return quantized(case.tensors(device), which)


TOGETHER = [
    (GroupCase(MANY, 128, (72, 16, 17), (16, 3, 20), dropout=0.3, biases=2), "444"),
    (GroupCase(MANY, 64, (40, 72, 33), (8, 8, 4), mixed=True), "4-4"),
    (GroupCase(MANY, 64, (130, 40), (5, 16), torch.float32, dropout=0.2), "-4"),
    # No products on the fly: the blocks of a row do not end with it.
    (GroupCase(3, 63, (17, 63), (3, 5), biases=1), "44"),
]
if HAS_GPU:
    TOGETHER += [
        (GroupCase(MANY, 64, (40, 72), (8, 16), adapter_dtype=torch.float32, precision="split"), "44"),
        (GroupCase(2048, 1024, (1024, 256, 256), (16, 16, 16)), "444"),
        (GroupCase(500, 2000, (504, 2000), (16, 64), dropout=0.1), "44"),
        (GroupCase(2048, 1024, (1408, 1408), (16, 16), adapter_dtype=torch.float32, precision="split"), "44"),
    ]


@pytest.mark.parametrize(("case", "which"), TOGETHER, ids=str)
def test_many_rows_have_the_bits_of_a_dense_group(case: GroupCase, which: str, device: torch.device) -> None:
    group = make(case, which, device)
    dense = decoded(group)
    ours, expected = computed(case, group, GROUP), computed(case, dense)
    assert list(ours) == list(expected)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
    assert_as_exact_as_peft(ours, by_autograd(case, dense, False), by_autograd(case, dense, True))


APART = [
    (GroupCase(FEW, 128, (72, 16, 17), (16, 3, 20), dropout=0.3, biases=2), "444"),
    (GroupCase(FEW, 64, (40, 72, 33), (8, 8, 4), mixed=True), "4-4"),
]
if HAS_GPU:
    APART += [
        (GroupCase(16, 1024, (1024, 256, 256), (16, 16, 16), dropout=0.1), "444"),
        (GroupCase(63, 1024, (1408, 1408), (16, 16), adapter_dtype=torch.float32, precision="split"), "44"),
    ]


@pytest.mark.parametrize(("case", "which"), APART, ids=str)
def test_few_rows_have_the_bits_of_single_layers(case: GroupCase, which: str, device: torch.device) -> None:
    group = make(case, which, device)
    ours = computed(case, group, GROUP)
    dx: Tensor | None = None
    for i, (member, dy) in enumerate(zip(group.members, group.dys, strict=True)):
        weight, lora_A, lora_B, _, scale, dropout = member
        y, s = single.forward(group.x, *member, case.precision, True)  # type: ignore[arg-type]
        part, t = single.backward_input(dy, weight, lora_A, lora_B, scale, dropout, case.precision, True)  # type: ignore[arg-type]
        for name, value in (("y", y), ("s", s), ("t", t)):
            assert torch.equal(ours[f"{name}{i}"], value), f"{name}{i}"  # type: ignore[arg-type]
        dx = part if dx is None else dx.add_(part)  # type: ignore[arg-type]
    assert torch.equal(ours["dx"], dx)  # type: ignore[arg-type]
    dense = decoded(group)
    assert_as_exact_as_peft(ours, by_autograd(case, dense, False), by_autograd(case, dense, True))


def test_both_ways_may_be_forced(device: torch.device) -> None:
    case = GroupCase(1, 64, (40, 72), (8, 16))
    group = make(case, "44", device)
    ys, ss = forward(group.x, group.members, "native", True, together=True)
    expected = group_launch.forward(group.x, decoded(group).members, "native", True)
    assert all(map(torch.equal, (*ys, *ss), (*expected[0], *expected[1])))  # type: ignore[arg-type]
    case = GroupCase(MANY, 64, (40, 72), (8, 16))
    group = make(case, "44", device)
    dx, ts = backward_input(group.dys, group.members, "native", True, together=False)
    parts = []
    for i, (member, dy) in enumerate(zip(group.members, group.dys, strict=True)):
        weight, lora_A, lora_B, _, scale, dropout = member
        part, t = single.backward_input(dy, weight, lora_A, lora_B, scale, dropout, "native", True)  # type: ignore[arg-type]
        assert torch.equal(ts[i], t)
        parts.append(part)
    assert torch.equal(dx, parts[0] + parts[1])  # type: ignore[arg-type, operator]


@pytest.fixture
def kernels_launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, and not only rehearsed."""
    names: list[str] = []
    launch_kernel = launches.launch_kernel

    def recording(kernel: Any, kind: tuple[Any, ...], *rest: Any) -> Any:
        if not ahead.rehearsing():
            names.append(kind[0])
        return launch_kernel(kernel, kind, *rest)

    monkeypatch.setattr(launches, "launch_kernel", recording)
    # With hooks, no launch goes around it.
    monkeypatch.setattr(launches, "_has_hooks", lambda: True)
    return names


LAUNCHES = {
    ("44", MANY): (["dequantize", "dequantize", "group_forward"], ["dequantize", "dequantize", "group_input"]),
    ("4-", MANY): (["dequantize", "group_forward"], ["dequantize", "group_input"]),
    ("44", 17): (["nf4_product", "nf4_product"], ["nf4_product", "nf4_product"]),
    ("4-", 17): (["nf4_product", "one_pass"], ["nf4_product", "one_pass"]),
    ("--", 17): (["group_forward"], ["group_input"]),
}


@pytest.mark.parametrize(("which", "rows"), LAUNCHES)
def test_which_kernels_run(which: str, rows: int, device: torch.device, kernels_launched: list[str]) -> None:
    layers = tuple(Layer(N, 8, nf4=mark == "4") for N, mark in zip((40, 72), which, strict=True))
    case = LayersCase(rows, 64, layers, torch.float16, dropout=0.3)
    x, members = case.x(device).requires_grad_(), case.members(device)
    ys = lora_linear_group(x, members, backend="triton")
    expected_forward, expected_backward = LAUNCHES[which, rows]
    assert kernels_launched == expected_forward
    kernels_launched.clear()
    torch.autograd.grad(ys, [x, *leaves(members).values()], [torch.ones_like(y) for y in ys])
    assert kernels_launched == [*expected_backward, "group_grads"]
    kernels_launched.clear()
    with torch.no_grad():
        lora_linear_group(x, members, backend="triton")
    assert kernels_launched == expected_forward


SMALL = (Layer(40, 3, bias=True, nf4=True), Layer(17, 4, nf4=True))
SUBSETS = [
    (("x",), (0, 1)),
    (("lora_A0", "lora_A1", "lora_B0", "lora_B1"), (0, 1)),
    (("lora_A0",), (0, 1)),
    (("lora_B1",), (0, 1)),
    (("x", "bias0", "lora_B0"), (0, 1)),
    (("x", "lora_A1", "lora_B1"), (1,)),
]


@pytest.mark.parametrize("rows", [9, MANY])
@pytest.mark.parametrize(("needed", "used"), SUBSETS, ids=str)
def test_some_gradients(needed: tuple[str, ...], used: tuple[int, ...], rows: int, device: torch.device) -> None:
    case = LayersCase(rows, 64, SMALL, torch.float32)
    x, members = case.x(device).requires_grad_(), case.members(device)
    wide, x_wide = [double(member, x.dtype) for member in members], x.detach().double().requires_grad_()
    right = [exact(x_wide, member, None, 0.0) for member in wide]
    dys = [torch.randn_like(y) for y in right]
    tensors = {"x": x_wide, **leaves(wide)}
    found = torch.autograd.grad(
        [right[i] for i in used], [tensors[name] for name in needed], [dys[i] for i in used], allow_unused=True
    )
    given = {"x": x, **leaves(members)}
    for name, tensor in given.items():
        tensor.requires_grad_(name in needed)
    ys = lora_linear_group(x, members, backend="triton")
    for y, want in zip(ys, right, strict=True):
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.autograd.backward([ys[i] for i in used], [dys[i].to(x) for i in used])
    for name, want in zip(needed, found, strict=True):
        gradient = given[name].grad
        assert (gradient is None) == (want is None), name
        if want is not None:
            assert gradient is not None
            torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-4)


def test_decoded_weights_are_freed_right_away(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    dequantize = nf4_launch.dequantize

    def recording(*arguments: Any) -> Tensor:
        out = dequantize(*arguments)
        if not ahead.rehearsing():
            alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(nf4_launch, "dequantize", recording)
    # Where the same sizes have run before, C++ may launch the decoding.
    monkeypatch.setattr(native, "enabled", False)
    case = LayersCase(MANY, 64, (Layer(40, 8, nf4=True), Layer(72, 8, nf4=True)), torch.float16)
    x, members = case.x(device).requires_grad_(), case.members(device)
    ys = lora_linear_group(x, members, backend="triton")
    assert [ref() for ref in alive] == [None] * 2
    torch.autograd.grad(ys, [x, *leaves(members).values()], [torch.ones_like(y) for y in ys])
    assert [ref() for ref in alive] == [None] * 4


def test_no_rows_at_all(device: torch.device) -> None:
    for K in (64, 63):
        case = GroupCase(0, K, (33, 64), (3, 16))
        results = computed(case, make(case, "44", device), GROUP)
        assert results["y1"].shape == (0, 64)
        assert results["dx"].shape == (0, K)
        assert all(not results[name].any() for name in ("dA0", "dA1", "dB0", "dB1"))


def test_explain_says_what_runs(device: torch.device) -> None:
    case = LayersCase(3, 64, (Layer(40, 8, nf4=True), Layer(72, 8)), torch.float16)
    text = str(explain_group(case.x(device), case.members(device), backend="triton"))
    way = "where its NF4 weights are decoded inside of products, member by member but for dA and dB"
    assert text.splitlines()[0] == f"as one group on triton; {way}"
    assert describe([Problem.of(device, torch.float16, "native", 64, 64, 8)] * 2) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 200, 777])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_captured_graph_replays(dropout: float, rows: int, device: torch.device) -> None:
    case = GroupCase(rows, 1024, (1024, 256, 256), (16, 16, 16), dropout=dropout)
    group = make(case, "444", device)
    graph, results = captured(lambda: computed(case, group, GROUP))
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for t in (group.x, *group.dys):
            t.copy_(torch.randn(t.shape, generator=generator, device="cuda"))
        graph.replay()
        expected = computed(case, group, GROUP)
        for name, value in results.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.gpu
def test_at_its_peak_a_group_holds_its_decoded_weights(device: torch.device) -> None:
    case = GroupCase(512, 2048, (4096, 4096), (16, 16))
    group = make(case, "44", device)
    computed(case, group, GROUP)
    torch.cuda.synchronize()
    for run in (
        lambda: GROUP.forward(group.x, group.members, "native", True),
        lambda: GROUP.backward_input(group.dys, group.members, "native", True),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        kept = torch.cuda.memory_allocated() - before
        peak = torch.cuda.max_memory_allocated() - before
        del outputs
        weights, workspace = 2 * 2 * 4096 * 2048, 4 << 20
        assert weights <= peak <= kept + weights + workspace, f"{peak / 2**20:.1f} MiB"
