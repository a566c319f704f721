"""Groups: the values and gradients of member after member, in one node that keeps no more than it needs."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HAS_GPU
from group_cases import GroupCase, Layer, backends_of, double, exact, leaves, peft, twin
from tolerance import assert_as_exact_as_peft
from torch import Tensor

from lora_kernels import GroupMember, dispatch, explain_group, lora_linear, lora_linear_group
from lora_kernels.backends import eager
from lora_kernels.dispatch import BackendRefused
from lora_kernels.dropout import Dropout, keep_mask

HALF = torch.bfloat16 if HAS_GPU else torch.float16
# As q, k and v; ranks that differ; a bias, a weight of another layout or in NF4 among them.
QKV = (Layer(64, 8), Layer(16, 8), Layer(16, 8))
MIXED = (Layer(63, 3, bias=True), Layer(80, 12, scaling=0.4, transposed_weight=True), Layer(17, 16))
NF4 = (Layer(64, 8, nf4=True), Layer(32, 8, bias=True, nf4=True))
# With few rows few numbers are rounded in 16 bits, and which of two ways gets nearer is chance.
ROWS = 8 if HAS_GPU else 1
CASES = [
    GroupCase(M * ROWS, K, layers, dtype, adapter_dtype, dropout, strided)
    for M, K, layers, dropout, strided in [
        (150, 17, QKV, 0.0, False),
        (129, 64, QKV, 0.3, False),
        (129, 96, MIXED, 0.0, True),
        (140, 63, MIXED, 0.5, False),
        (100, 64, NF4, 0.0, False),
        (129, 64, NF4, 0.2, False),
    ]
    for dtype, adapter_dtype in [(HALF, None), (torch.float32, None), (torch.bfloat16, torch.float32)]
]
CASES += [GroupCase(M, 17, MIXED, torch.float32, None, p) for M in (1, 3, 17) for p in (0.0, 0.3)]
CASES += [
    GroupCase(9, 48, (*QKV, Layer(40, 100)), torch.float32),
    GroupCase(64, 48, QKV, HALF, dropout=1.0),
    GroupCase(0, 48, QKV, HALF, dropout=0.1),
    GroupCase(129, 48, (Layer(24, 4, nf4=True), Layer(40, 8)), HALF),
    GroupCase(129, 48, QKV, torch.float16, torch.float32, dropout=0.2),
]
if HAS_GPU:
    LLAMA = (Layer(4096, 16), Layer(1024, 16), Layer(1024, 16))
    NF4_LLAMA = tuple(replace(layer, nf4=True) for layer in LLAMA)
    for rows, layers in [(500, LLAMA), (2000, LLAMA), (63, LLAMA), (2000, NF4_LLAMA)]:
        for p, adapters in [(0.0, None), (0.1, None), (0.0, torch.float32)]:
            CASES.append(GroupCase(rows, 4096, layers, torch.bfloat16, adapters, p))
    CASES += [
        GroupCase(2048, 1024, (Layer(3584, 64), Layer(3584, 12)), torch.bfloat16),
        GroupCase(2048, 1024, (Layer(3584, 64, bias=True), Layer(3584, 12)), torch.float16, dropout=0.1),
        GroupCase(300, 768, (Layer(1000, 100), Layer(260, 3)), torch.bfloat16, torch.float32, 0.3, True),
    ]
# The interpreter takes seconds for many rows; the kernels' own tests are in test_group_kernels.py.
GRID = [
    (case, backend)
    for case in CASES
    for backend in backends_of(case)
    if backend == "eager" or HAS_GPU or case.M < 20 or (case.dtype == HALF and case.layers == NF4)
]
SMALL = GroupCase(5, 24, (Layer(40, 3, bias=True), Layer(17, 4)), torch.float32)


def gradients(ys: list[Tensor], x: Tensor, members: list[GroupMember]) -> dict[str, Tensor]:
    """The outputs, and the gradients of everything for the same dy."""
    generator = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=generator).to(HALF).to(y) for y in ys]
    wanted = {"x": x, **leaves(members)}
    found = torch.autograd.grad(ys, list(wanted.values()), dys)
    return {**{f"y{i}": y.detach() for i, y in enumerate(ys)}, **dict(zip(wanted, found, strict=True))}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The seeds that are drawn, so that a test can make the masks again."""
    seeds: list[Tensor] = []
    draw = Dropout.draw

    def recording(p: float, device: torch.device) -> Dropout | None:
        dropout = draw(p, device)
        if dropout is not None:
            seeds.append(dropout.seed)
        return dropout

    monkeypatch.setattr(Dropout, "draw", staticmethod(recording))
    return seeds


@pytest.mark.parametrize(("case", "backend"), GRID, ids=str)
def test_is_as_exact_as_peft(case: GroupCase, backend: str, device: torch.device, drawn: list[Tensor]) -> None:
    x, members = case.x(device).requires_grad_(), case.members(device)
    torch.manual_seed(0)
    ours = gradients(lora_linear_group(x, members, dropout_p=case.dropout, backend=backend), x, members)
    for name, tensor in {"x": x, **leaves(members)}.items():
        assert ours[name].dtype == tensor.dtype
    keeps = [keep_mask(seed, case.M, case.K, case.dropout) for seed in drawn] or [None] * len(members)
    assert len(keeps) == len(members)
    theirs, right = [], []
    twins, doubles = [twin(m, case.dtype) for m in members], [double(m, case.dtype) for m in members]
    x_twin, x_double = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    for member, wide, keep in zip(twins, doubles, keeps, strict=True):
        theirs.append(peft(x_twin, member, keep, case.dropout))
        right.append(exact(x_double, wide, keep, case.dropout))
    assert_as_exact_as_peft(ours, gradients(theirs, x_twin, twins), gradients(right, x_double, doubles))


def one_by_one(x: Tensor, members: list[GroupMember], **options: Any) -> list[Tensor]:
    return [
        lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, **options)
        for weight, lora_A, lora_B, scaling, bias in members
    ]


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        torch.testing.assert_close(
            value, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_masks_are_those_of_single_calls(p: float, device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    results, after = [], []
    for call in (lora_linear_group, one_by_one):
        torch.manual_seed(3)
        results.append(gradients(call(x, members, dropout_p=p, backend=backend), x, members))
        after.append(torch.rand(1, device=device))
    assert_close(*results)
    assert torch.equal(*after), "the generator stands elsewhere than after single calls"
    torch.manual_seed(3)
    for y, expected in zip(
        lora_linear_group(x, members, dropout_p=p, training=False, backend=backend),
        one_by_one(x, members, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


NAMES = ["x", "lora_A0", "lora_B0", "bias0", "lora_A1", "lora_B1"]
SUBSETS = [subset for n in range(7) for subset in itertools.combinations(NAMES, n)]


def only(needed: tuple[str, ...], x: Tensor, members: list[GroupMember]) -> dict[str, Tensor]:
    tensors = {"x": x, **leaves(members)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needed)
    return tensors


@pytest.mark.parametrize("used", [(0, 1), (1,)], ids=["both outputs", "one output"])
def test_every_subset_of_gradients(used: tuple[int, ...], device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    wide = [double(m, x.dtype) for m in members]
    x_wide = x.detach().double().requires_grad_()
    right = [exact(x_wide, member, None, 0.0) for member in wide]
    dys = [torch.randn_like(y) for y in right]
    tensors = {"x": x_wide, **leaves(wide)}
    found = torch.autograd.grad(
        [right[i] for i in used], list(tensors.values()), [dys[i] for i in used], allow_unused=True
    )
    expected = dict(zip(tensors, found, strict=True))
    # The interpreter takes a tenth of a second for each.
    for needed in SUBSETS if backend == "eager" or HAS_GPU else SUBSETS[::5]:
        given = only(needed, x, members)
        ys = lora_linear_group(x, members, backend=backend)
        assert all(y.requires_grad == bool(needed) for y in ys)
        if not needed:
            continue
        torch.autograd.backward([ys[i] for i in used], [dys[i].to(x) for i in used])
        for name, tensor in given.items():
            wanted = expected[name] if name in needed else None
            assert (tensor.grad is None) == (wanted is None), (needed, name)
            if wanted is not None:
                torch.testing.assert_close(tensor.grad.double(), wanted, rtol=1e-4, atol=1e-4)
            tensor.grad = None


KEPT: dict[tuple[str, ...], set[str]] = {
    ("x",): {"weight0", "weight1", "lora_A0", "lora_A1", "lora_B0", "lora_B1"},
    ("lora_A0",): {"x", "lora_B0"},
    ("lora_B1",): {"S"},
    ("bias0",): set(),
    ("lora_A0", "lora_A1", "lora_B0", "lora_B1"): {"x", "lora_B0", "lora_B1", "S"},
}


@pytest.mark.parametrize(("needed", "kept"), KEPT.items(), ids=lambda v: "+".join(sorted(v)) or "nothing")
def test_what_is_kept(needed: tuple[str, ...], kept: set[str], device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device), SMALL.members(device)
    tensors = only(needed, x, members)
    tensors |= {f"weight{i}": member.weight for i, member in enumerate(members)}
    names = {t.data_ptr(): name for name, t in tensors.items()}
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lora_linear_group(x, members, backend=backend)
    assert {names.get(t.data_ptr(), "S") for t in packed} == kept
    assert sum(names.get(t.data_ptr()) == "x" for t in packed) <= 1, "x is kept once"


def test_x_is_not_kept_alive_for_frozen_lora_As(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device) * 1.0, SMALL.members(device)
    only(("lora_B0", "lora_B1"), x, members)
    ys = lora_linear_group(x, members, backend=backend)
    alive = weakref.ref(x)
    del x
    assert alive() is None
    sum(y.sum() for y in ys).backward()


def test_outputs_share_no_memory(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device), SMALL.members(device)
    first, second = lora_linear_group(x, members, backend=backend)
    expected = second.detach().clone()
    with torch.no_grad():
        first.fill_(7.0)
    assert torch.equal(second, expected)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_an_output_may_be_changed_in_place(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    first, second = (y[0] for y in lora_linear_group(x[None], members, backend=backend))
    first += 1
    expected = gradients(one_by_one(x, members, backend=backend), x, members)
    found = gradients([first, second], x, members)
    assert_close({k: v for k, v in found.items() if k != "y0"}, {k: v for k, v in expected.items() if k != "y0"})


def test_two_backwards_through_one_graph(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    ys = lora_linear_group(x, members, dropout_p=0.3, backend=backend)
    wanted, dys = [x, *leaves(members).values()], [torch.randn_like(y) for y in ys]
    first = torch.autograd.grad(ys, wanted, dys, retain_graph=True)
    second = torch.autograd.grad(ys, wanted, dys)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_an_error(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    y, _ = lora_linear_group(x, members, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "lora_A0", "lora_B1", "scaling"])
def test_a_change_in_place_is_an_error(name: str, device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    scaling = torch.full((), 2.0, device=device)
    members[1] = members[1]._replace(scaling=scaling)
    y, _ = lora_linear_group(x, members, backend=backend)
    with torch.no_grad():
        {"x": x, "scaling": scaling, **leaves(members)}[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(24,), (4, 24), (2, 0, 24), (2, 1, 3, 24)], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut out"])
def test_any_number_of_leading_dimensions(
    shape: tuple[int, ...], grad: bool, cut: bool, device: torch.device, backend: str
) -> None:
    x, members = torch.randn(shape, device=device), SMALL.members(device)
    if cut:
        x = torch.cat([x, x], dim=-1)[..., :24]
    with torch.set_grad_enabled(grad):
        ys = lora_linear_group(x, members, backend=backend)
    for y, member in zip(ys, members, strict=True):
        expected = exact(x.double(), double(member, x.dtype), None, 0.0)
        assert y.requires_grad == grad
        assert y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_members_are_tuples_with_defaults(device: torch.device) -> None:
    x, members = SMALL.x(device), SMALL.members(device)
    short = [(member.weight, member.lora_A, member.lora_B) for member in members]
    full = [GroupMember(*member[:3], 1.0, None) for member in members]
    for left, right in zip(lora_linear_group(x, short), lora_linear_group(x, full), strict=True):
        assert torch.equal(left, right)
    (alone,) = lora_linear_group(x, members[:1])
    torch.testing.assert_close(alone, one_by_one(x, members[:1])[0])


def test_autocast_casts_x_once_and_keeps_float32_gradients(device: torch.device) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    results = []
    for call in (lora_linear_group, one_by_one):
        with torch.autocast(device.type, torch.bfloat16):
            ys = call(x, members)
        assert all(y.dtype == torch.bfloat16 for y in ys)
        results.append(gradients(ys, x, members))
    assert_close(*results, tolerance=0.03)
    assert all(results[0][name].dtype == torch.float32 for name in ("x", "lora_A0", "lora_B1", "bias0"))
    with torch.autocast(device.type, torch.bfloat16):
        ys = lora_linear_group(x, members)
    node = ys[0].grad_fn
    names = [before.name() for before, _ in node.next_functions if before is not None]  # type: ignore[union-attr]
    assert sum("ToCopy" in name for name in names) == 1, "the adapters and biases stay float32"


BAD: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "members was a NoneType, but must be a list or a tuple"),
    ([], ValueError, "members was empty"),
    ([None], TypeError, r"members\[0\] was a NoneType, but must be a tuple \(weight, lora_A"),
    ([(1, 2)], ValueError, r"members\[0\] had 2 elements"),
    ("weight", ValueError, r"members\[1\]: weight had shape \[24\]"),
    ("lora_A", ValueError, r"members\[1\]: lora_A had shape \[3\], but must be \[r, 24\]"),
    ("lora_B", ValueError, r"members\[1\]: lora_B had shape \[3\]"),
    ("bias", ValueError, r"members\[1\]: bias had shape \[3\]"),
    ("scaling", TypeError, r"members\[1\]: scaling was a str"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=str)
def test_errors_name_member_and_argument(bad: Any, error: type[Exception], message: str, device: torch.device) -> None:
    x, members = SMALL.x(device), SMALL.members(device)
    if isinstance(bad, str):
        wrong = "2" if bad == "scaling" else torch.zeros(24 if bad == "weight" else 3, device=device)
        bad = [members[0], members[1]._replace(**{bad: wrong})]
    for call in (lora_linear_group, explain_group):
        with pytest.raises(error, match=message):
            call(x, bad)


def test_errors_in_what_is_shared(device: torch.device) -> None:
    x, members = SMALL.x(device), SMALL.members(device)
    with pytest.raises(ValueError, match=r"dropout_p was 1\.5"):
        lora_linear_group(x, members, dropout_p=1.5)
    with pytest.raises(ValueError, match="backend was 'best'"):
        lora_linear_group(x, members, backend="best")
    with pytest.raises(TypeError, match=r"x was torch\.float64"):
        lora_linear_group(x.double(), members)


@pytest.mark.usefixtures("cuda_refuses")
def test_a_backend_that_refuses_does_not_fall_back(device: torch.device) -> None:
    with pytest.raises(BackendRefused, match=r"backend='cuda' cannot run this call: members\[0\]: it is not in"):
        lora_linear_group(SMALL.x(device), SMALL.members(device), backend="cuda")


def test_explain(device: torch.device) -> None:
    x, members = SMALL.x(device), SMALL.members(device)
    text = str(explain_group(x, members, backend="eager"))
    assert text.startswith("as one group on eager\nmembers[0]\n  eager: library matrix products")
    alone = explain_group(x, members[:1], backend="eager")
    assert str(alone).startswith("member by member: it has one member")
    half = [GroupMember(*(t.detach().half() for t in member[:3])) for member in members]
    half[1] = GroupMember(half[1].weight, *members[1][1:3])
    assert explain_group(x.half(), half, backend="eager").reason == "the adapters of its members differ in dtype"


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The eager backend as one that has no functions on groups."""
    monkeypatch.setattr(dispatch.eager, "BACKEND", replace(eager.BACKEND, group=None, gated=None))
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    dispatch._load.cache_clear()
    dispatch.choose.cache_clear()
    yield
    dispatch._load.cache_clear()
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_without_functions_on_groups(p: float, device: torch.device) -> None:
    """Member by member in one node: bit for bit what single calls give, but for the sum in dx."""
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    assert explain_group(x, members, backend="eager").reason == "eager has no functions on groups"
    results = []
    for call in (lora_linear_group, one_by_one):
        torch.manual_seed(3)
        results.append(gradients(call(x, members, dropout_p=p, backend="eager"), x, members))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_adapters_of_two_dtypes(device: torch.device) -> None:
    """Member by member: one adapter in float32, one in the base's dtype."""
    case = replace(SMALL, dtype=torch.bfloat16)
    x, first = case.x(device).requires_grad_(), case.members(device)
    second = replace(case, adapter_dtype=torch.float32).members(device)
    members = [first[0], second[1]]
    results = [gradients(call(x, members, backend="eager"), x, members) for call in (lora_linear_group, one_by_one)]
    assert_close(*results, tolerance=0.02)


COMPILED = [(p, nf4, b) for p in (0.0, 0.4) for nf4 in (False, True) for b in ("eager", "triton")]


@pytest.mark.parametrize(("p", "nf4", "name"), COMPILED)
def test_compiled_into_one_graph(p: float, nf4: bool, name: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layers = tuple(replace(layer, nf4=nf4) for layer in SMALL.layers)
    x, members = SMALL.x(device).requires_grad_(), replace(SMALL, layers=layers).members(device)
    if nf4:
        members[0] = members[0]._replace(scaling=torch.tensor(1.3, device=device))
    results = []
    for call in (torch.compile(lora_linear_group, backend="aot_eager", fullgraph=True), lora_linear_group):
        torch.manual_seed(3)
        results.append(gradients(call(x, members, dropout_p=p, backend=name), x, members))
    assert_close(*results)


@pytest.mark.parametrize(
    "needed", [("x",), ("lora_A0",), ("lora_B1",), ("bias0",), ("lora_A1", "lora_B0")], ids="+".join
)
def test_compiled_with_some_gradients(needed: tuple[str, ...], device: torch.device) -> None:
    torch._dynamo.reset()
    x, members = SMALL.x(device), SMALL.members(device)
    wanted = [t for t in only(needed, x, members).values() if t.requires_grad]
    compiled = torch.compile(lora_linear_group, backend="aot_eager", fullgraph=True)
    found = [
        torch.autograd.grad([y.square().sum() for y in call(x, members)], wanted, allow_unused=True)
        for call in (compiled, lora_linear_group)
    ]
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_operator_follows_the_rules_of_torch_library(device: torch.device) -> None:
    from lora_kernels import compiled_group

    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    weights, As, Bs, scalings, biases = (list(column) for column in zip(*members, strict=True))
    layout = [0, 1, 1, 0, 0, 1, 0, 0]
    arguments = (x, As, Bs, biases[:1], weights, [], [], scalings, layout, 0.0, "native,native", "eager")
    torch.library.opcheck(compiled_group._forward, arguments)


def strided(t: Tensor) -> Tensor:
    """The same numbers column by column, as a hook that offloads may bring them back."""
    return t.T.contiguous().T if t.dim() == 2 and t.is_floating_point() else t


def test_saved_tensors_with_other_strides(device: torch.device, backend: str) -> None:
    x, members = SMALL.x(device).requires_grad_(), SMALL.members(device)
    expected = gradients(lora_linear_group(x, members, backend=backend), x, members)
    with torch.autograd.graph.saved_tensors_hooks(strided, lambda t: t):
        ys = lora_linear_group(x, members, backend=backend)
    assert_close(gradients(ys, x, members), expected)
