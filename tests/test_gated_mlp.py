"""The gated MLP as one node: no less exact than the usual operations, and neither h nor a mask is kept."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import HAS_GPU
from graphs import captured
from group_cases import GroupCase, Layer, backends_of, double, exact, leaves, peft, twin
from test_autograd import saved_tensors
from test_group import HALF, assert_close, drawn, no_group, strided
from tolerance import assert_as_exact_as_peft, relative_error
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import GroupMember, explain_gated_mlp, lora_gated_mlp, lora_linear
from lora_kernels.backends import GatedBackend
from lora_kernels.backends.eager import GATED
from lora_kernels.dispatch import BackendRefused, _load
from lora_kernels.dropout import keep_mask

__all__ = ["drawn", "no_group"]
ACTIVATIONS = ["silu", "gelu_tanh"]


def mlp(M: int, K: int, hidden: int, dtype: torch.dtype, *options: Any, **special: Any) -> GroupCase:
    """A gated MLP K -> hidden -> K; gate, up and down differ in rank."""
    layers = tuple(Layer(N, rank, **special) for N, rank in ((hidden, 3), (hidden, 8), (K, 12)))
    return GroupCase(M, K, layers, dtype, *options)


# With few rows few numbers are rounded, and which of two ways gets nearer is chance: those are float32's, below.
ROWS = 8 if HAS_GPU else 1
CASES = [
    mlp(M * ROWS, K, hidden, dtype, adapter_dtype, p, **special)
    for M, K, hidden, p, special in [
        (150, 17, 63, 0.0, {}),
        (129, 64, 48, 0.3, {"bias": True}),
        (129, 40, 96, 0.0, {"transposed_weight": True}),
        (100, 64, 96, 0.2, {"nf4": True}),
    ]
    for dtype, adapter_dtype in [(HALF, None), (torch.float32, None), (torch.bfloat16, torch.float32)]
]
CASES += [mlp(0, 24, 40, HALF), mlp(129, 24, 40, torch.float16, torch.float32)]
CASES += [mlp(M, 17, 63, torch.float32, None, p) for M in (1, 3) for p in (0.0, 0.3)]
if HAS_GPU:
    CASES += [
        mlp(M, 2048, 7168, torch.bfloat16, adapters, p, nf4=nf4)
        for M in (63, 500, 2000)
        for adapters, p, nf4 in [(None, 0.0, False), (None, 0.1, True), (torch.float32, 0.1, False)]
    ]
GRID = [
    (case, backend, activation)
    for case in CASES
    for backend in backends_of(case)
    for activation in ACTIVATIONS
    # The interpreter takes seconds for many rows.
    if backend == "eager" or HAS_GPU or case.M < 20 or (activation == "silu" and case.dtype == HALF and case.M < 110)
]
SMALL = mlp(5, 24, 40, torch.float32)
NAMES = ("gate", "up", "down")


def members_of(case: GroupCase, device: torch.device) -> list[GroupMember]:
    return case.members(device, (case.K, case.K, case.layers[0].N))


def act(g: Tensor, activation: str) -> Tensor:
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")


def composed(
    linear: Any, x: Tensor, members: list[GroupMember], activation: str, keeps: list[Tensor | None], p: float
) -> Tensor:
    """What transformers' MLPs do: the activation and the product are each rounded to the base's dtype."""
    g, u = (linear(x, member, keep, p) for member, keep in zip(members[:2], keeps[:2], strict=True))
    y: Tensor = linear(act(g, activation) * u, members[2], keeps[2], p)
    return y


def gradients(y: Tensor, x: Tensor, members: list[GroupMember]) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(HALF).to(y)
    wanted = {"x": x, **leaves(members)}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))}


@pytest.mark.parametrize(("case", "backend", "activation"), GRID, ids=str)
def test_is_as_exact_as_peft(
    case: GroupCase, backend: str, activation: str, device: torch.device, drawn: list[Tensor]
) -> None:
    x, members = case.x(device).requires_grad_(), members_of(case, device)
    torch.manual_seed(0)
    ours = gradients(
        lora_gated_mlp(x, *members, activation=activation, dropout_p=case.dropout, backend=backend), x, members
    )
    for name, tensor in {"x": x, **leaves(members)}.items():
        assert ours[name].dtype == tensor.dtype
    widths = (case.K, case.K, case.layers[0].N)
    keeps: list[Tensor | None] = [None] * 3
    if case.dropout:
        keeps = [keep_mask(s, case.M, width, case.dropout) for s, width in zip(drawn, widths, strict=True)]
    twins, doubles = [twin(m, case.dtype) for m in members], [double(m, case.dtype) for m in members]
    x_twin, x_double = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    theirs = composed(peft, x_twin, twins, activation, keeps, case.dropout)
    right = composed(exact, x_double, doubles, activation, keeps, case.dropout)
    assert_as_exact_as_peft(ours, gradients(theirs, x_twin, twins), gradients(right, x_double, doubles))


def by_calls(x: Tensor, *members: GroupMember, activation: str = "silu", **options: Any) -> Tensor:
    """The same of lora_linear and float32 operations that are rounded once."""

    def linear(x: Tensor, member: GroupMember) -> Tensor:
        weight, lora_A, lora_B, scaling, bias = member
        return lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, **options)

    g, u = (linear(x, member) for member in members[:2])
    return linear((act(g.float(), activation) * u).to(g.dtype), members[2])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_masks_are_those_of_single_calls(p: float, activation: str, device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    results = []
    for call in (lora_gated_mlp, by_calls):
        torch.manual_seed(3)
        y = call(x, *members, activation=activation, dropout_p=p, backend=backend)
        results.append({**gradients(y, x, members), "next": torch.rand(1, device=device)})
    assert_close(*results)


@pytest.mark.usefixtures("no_group")
def test_without_functions_of_its_own(device: torch.device) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    assert explain_gated_mlp(x, *members, backend="eager").group.reason == "eager has no functions on groups"
    results = [gradients(call(x, *members, backend="eager"), x, members) for call in (lora_gated_mlp, by_calls)]
    assert_close(*results, tolerance=1e-5)


LEAVES = ["x", *(f"{name}{i}" for i in range(3) for name in ("lora_A", "lora_B"))]


def test_every_subset_of_gradients(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    expected = gradients(by_calls(x, *members, backend="eager"), x, members)
    subsets = [subset for n in range(8) for subset in itertools.combinations(LEAVES, n)]
    # The interpreter takes tenths of a second for each.
    for needed in subsets if backend == "eager" or HAS_GPU else subsets[::25]:
        tensors = {"x": x, **leaves(members)}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in needed)
        y = lora_gated_mlp(x, *members, backend=backend)
        assert y.requires_grad == bool(needed)
        if not needed:
            continue
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(HALF).to(y))
        for name, tensor in tensors.items():
            assert (tensor.grad is not None) == (name in needed), (needed, name)
            if tensor.grad is not None:
                torch.testing.assert_close(tensor.grad, expected[name], rtol=2e-4, atol=2e-4)
            tensor.grad = None


# By what needs a gradient: what is kept of the call's tensors, and how many tensors [M, 40] and how many S.
KEPT: dict[tuple[str, ...], tuple[set[str], int, int]] = {
    ("x",): ({"weight0", "weight1", "weight2", *(f"lora_{k}{i}" for k in "AB" for i in range(3))}, 2, 0),
    ("lora_A0",): ({"x", "lora_B0", "weight2", "lora_A2", "lora_B2"}, 2, 0),
    ("lora_A2",): ({"lora_B2"}, 2, 0),
    ("lora_B2",): (set(), 0, 1),
    tuple(LEAVES): ({"x", *(f"{k}{i}" for k in ("weight", "lora_A", "lora_B") for i in range(3))}, 2, 3),
}


@pytest.mark.parametrize("needed", KEPT, ids="+".join)
def test_what_is_kept(needed: tuple[str, ...], device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device), members_of(SMALL, device)
    tensors = {"x": x, **leaves(members)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needed)
    tensors |= {f"weight{i}": member.weight for i, member in enumerate(members)}
    names = {t.data_ptr(): name for name, t in tensors.items()}
    kept, hidden, ranks = KEPT[needed]
    saved = saved_tensors(lora_gated_mlp(x, *members, backend=backend))
    assert {names[t.data_ptr()] for t in saved if t.data_ptr() in names} == kept
    others = [tuple(t.shape) for t in saved if t.data_ptr() not in names]
    assert others.count((5, 40)) == hidden, "g and u, and not h"
    assert len(others) == hidden + ranks


def test_dropout_keeps_seeds_alone(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lora_gated_mlp(x, *members, dropout_p=0.3, backend=backend)
    assert not any(t.dtype == torch.bool for t in packed)
    assert sum(t.dtype == torch.int64 and t.numel() == 1 for t in packed) == 3


def test_two_backwards_through_one_graph(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    y = lora_gated_mlp(x, *members, dropout_p=0.3, backend=backend)
    wanted, dy = [x, *leaves(members).values()], torch.randn_like(y)
    kept = dy.clone()
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(dy, kept)


def test_a_second_derivative_is_an_error(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    y = lora_gated_mlp(x, *members, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(24,), (4, 24), (2, 0, 24), (2, 1, 3, 24)], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut out"])
def test_any_number_of_leading_dimensions(
    shape: tuple[int, ...], grad: bool, cut: bool, device: torch.device, backend: str
) -> None:
    x, members = torch.randn(shape, device=device), members_of(SMALL, device)
    if cut:
        x = torch.cat([x, x], dim=-1)[..., : shape[-1]]
    with torch.set_grad_enabled(grad):
        y = lora_gated_mlp(x, *members, backend=backend)
    doubles = [double(member, x.dtype) for member in members]
    expected = composed(exact, x.double(), doubles, "silu", [None] * 3, 0.0)
    assert y.requires_grad == grad
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_autocast(p: float, device: torch.device) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    results = []
    for call in (lora_gated_mlp, by_calls):
        torch.manual_seed(3)
        with torch.autocast(device.type, torch.bfloat16):
            y = call(x, *members, dropout_p=p)
        assert y.dtype == torch.bfloat16
        results.append(gradients(y, x, members))
    for name, value in results[0].items():
        assert value.dtype == (torch.bfloat16 if name == "y" else torch.float32)
        assert relative_error(value, results[1][name]) < 0.01, name


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"activation": "relu"}, ValueError, "activation was 'relu', but must be one of silu, gelu_tanh"),
    ({"up": None}, TypeError, "up was a NoneType, but must be a tuple"),
    ({"down": (1,)}, ValueError, "down had 1 elements"),
    ({"gate": ("lora_A", 3)}, ValueError, r"gate: lora_A had shape \[3\]"),
    ({"up": ("lora_B", 3)}, ValueError, r"up: lora_B had shape \[3\]"),
    ({"down": ("bias", 3)}, ValueError, r"down: bias had shape \[3\], but must be \[24\]"),
    ({"down": ("weight", 24)}, ValueError, r"down: weight had shape \[24\]"),
    ({"down": "gate"}, ValueError, "down: weight had K = 24, but must have gate's N = 40"),
    ({"up": "down"}, ValueError, r"up: x had shape \[5, 24\], but its last dimension must be weight's K = 40"),
    ({"dropout_p": 2}, ValueError, "dropout_p was 2"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors_name_projection_and_argument(
    changes: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    given: dict[str, Any] = dict(zip(NAMES, members_of(SMALL, device), strict=True))
    call = dict(given)
    for name, change in changes.items():
        if name in NAMES and isinstance(change, str):
            change = given[change]
        elif isinstance(change, tuple) and isinstance(change[0], str):
            change = given[name]._replace(**{change[0]: torch.zeros(change[1], device=device)})
        call[name] = change
    for function in (lora_gated_mlp, explain_gated_mlp):
        with pytest.raises(error, match=message):
            function(SMALL.x(device), **call)


def test_hidden_widths_must_agree(device: torch.device) -> None:
    gate, _, down = members_of(SMALL, device)
    wide = replace(SMALL, layers=(Layer(48, 4),) * 3).members(device, (24, 24, 48))
    with pytest.raises(ValueError, match="up: weight had N = 48, but must have gate's N = 40"):
        lora_gated_mlp(SMALL.x(device), gate, wide[1], down)


@pytest.mark.usefixtures("cuda_refuses")
def test_a_backend_that_refuses_does_not_fall_back(device: torch.device) -> None:
    with pytest.raises(BackendRefused, match="backend='cuda' cannot run this call: gate: it is not in the mood"):
        lora_gated_mlp(SMALL.x(device), *members_of(SMALL, device), backend="cuda")


def test_explain(device: torch.device) -> None:
    text = str(explain_gated_mlp(SMALL.x(device), *members_of(SMALL, device), backend="eager"))
    assert text.startswith("gate and up as one group on eager\ngate\n  eager: library")
    assert "\nup\n" in text
    assert "\ndown\n  eager: library" in text


# The elementwise part alone. The interpreter cuts bfloat16 off.
ELEMENTWISE = [(eager, *rest) for eager in (True, False) for rest in itertools.product(
    [(1, 1), (3, 17), (63, 500), (65, 2000)], [torch.float16, torch.float32, torch.bfloat16]
) if eager or HAS_GPU or rest[1] != torch.bfloat16]  # fmt: skip


def elementwise(eager: bool) -> GatedBackend:
    record = GATED
    if not eager:
        backend, _ = _load("triton")
        assert backend is not None
        assert backend.gated is not None
        record = backend.gated
    return record


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("eager", "shape", "dtype"), ELEMENTWISE, ids=str)
def test_elementwise_part_rounds_once(
    eager: bool, shape: tuple[int, int], dtype: torch.dtype, activation: str, device: torch.device
) -> None:
    record = elementwise(eager)
    generator = torch.Generator().manual_seed(0)
    g, u, dh = (torch.randn(shape, generator=generator).mul(4).to(device, dtype) for _ in range(3))
    before = [t.clone() for t in (g, u)]
    wide = [t.double().requires_grad_() for t in (g, u)]
    h = act(wide[0], activation) * wide[1]
    expected = [h.detach(), *torch.autograd.grad(h, wide, dh.double())]
    forward = record.forward(g, u, activation)  # type: ignore[arg-type]
    dg, du, again = record.backward(dh.clone(), g, u, activation, True)  # type: ignore[arg-type]
    assert again is not None
    assert torch.equal(forward, again), "h is the same both times"
    *_, nothing = record.backward(dh.clone(), g, u, activation, False)  # type: ignore[arg-type]
    assert nothing is None
    assert all(torch.equal(t, old) for t, old in zip((g, u), before, strict=True)), "g and u are autograd's"
    # Half an ulp for the one rounding, and the float32 arithmetic before it: a difference of two near numbers in the
    # derivative's zero, whose size is that of the terms.
    half_ulp = torch.finfo(dtype).eps / 2
    for value, right in zip((forward, dg, du), expected, strict=True):
        assert value.dtype == dtype
        slack = half_ulp * right.abs() + 1e-5 * (1 + dh.double().abs() * u.double().abs()) + 1e-7
        assert ((value.double() - right).abs() <= slack).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "triton"])
def test_elementwise_part_of_large_numbers(eager: bool, activation: str, device: torch.device) -> None:
    """Far from zero the activation is 0 or g, and its slope 0 or 1."""
    g = torch.tensor([[-3e4, -200.0, -90.0, 90.0, 200.0, 3e4]], device=device)
    u, dh = torch.full_like(g, 2.0), torch.full_like(g, 3.0)
    record = elementwise(eager)
    dg, du, h = record.backward(dh, g, u, activation, True)  # type: ignore[arg-type]
    assert h is not None
    positive = torch.relu(g)
    torch.testing.assert_close(h, 2 * positive)
    torch.testing.assert_close(dg, 6.0 * (g > 0))
    torch.testing.assert_close(du, 3 * positive)


def test_elementwise_part_of_nothing(device: torch.device) -> None:
    empty = torch.empty(0, 40, device=device)
    for eager in (True, False):
        assert elementwise(eager).forward(empty, empty, "silu").shape == (0, 40)
        assert all(t.shape == (0, 40) for t in elementwise(eager).backward(empty, empty, empty, "silu", True))


def test_saved_tensors_with_other_strides(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), members_of(SMALL, device)
    expected = gradients(lora_gated_mlp(x, *members, backend=backend), x, members)
    with torch.autograd.graph.saved_tensors_hooks(strided, lambda t: t):
        y = lora_gated_mlp(x, *members, backend=backend)
    assert_close(gradients(y, x, members), expected)


def step(x: Tensor, members: list[GroupMember], p: float) -> list[Tensor]:
    y = lora_gated_mlp(x, *members, dropout_p=p, backend="triton")
    wanted = [x, *leaves(members).values()]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True], ids=["", "nf4"])
def test_a_captured_graph_replays(nf4: bool) -> None:
    device = torch.device("cuda")
    case = mlp(384, 512, 1024, torch.bfloat16, nf4=nf4)
    x, members = case.x(device).requires_grad_(), members_of(case, device)
    graph, results = captured(partial(step, x, members, 0.0))
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for got, want in zip(results, step(x, members, 0.0), strict=True):
            assert torch.equal(got, want)
    graph, results = captured(partial(step, x, members, 0.5))
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(results[0].clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "triton"])
def test_memory_that_is_kept_and_used(name: str) -> None:
    """Two tensors [M, hidden] wait for the backward, which at its widest has three more of them."""
    device = torch.device("cuda")
    M, K, hidden = 4096, 512, 4096
    case = mlp(M, K, hidden, torch.bfloat16)
    x, members = case.x(device).requires_grad_(), members_of(case, device)
    wide = 2 * M * hidden
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = lora_gated_mlp(x, *members, dropout_p=0.1 if name == "triton" else 0.0, backend=name)
        kept = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        y.backward(torch.ones_like(y))
        peak = torch.cuda.max_memory_allocated() - before
        del y
        for tensor in (x, *leaves(members).values()):
            tensor.grad = None
    assert kept < 2 * wide + 2 * M * K + 2**21
    # The eager backend's float32 numbers come on top of that, a block of rows at a time.
    assert peak < 5 * wide + 8 * M * K + 2 ** (25 if name == "triton" else 28)
