"""Groups and gated MLPs in the launch path in C++: the bits of the Python path, and which calls stay Python's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from launch_path import NATIVE, PYTHON, TRITON, LaunchPath, assert_same, bf16, only_python, shifted, with_strides
from native_calls import (
    KINDS,
    Layers,
    assert_learned_call,
    assert_llama_learned,
    dy_of,
    leaf,
    native_ys,
    step,
    step_in_python,
)
from test_gated_mlp import act
from torch import Tensor

from lora_kernels import lora_linear_reference

pytest_plugins = ("launch_path",)

single = torch.float32


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layers(kind: str) -> Layers:
    return KINDS[kind]((5,))


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("leading", [(5,), (63,), (2, 3), (1,), ()], ids=str)
@pytest.mark.parametrize("adapters", [bf16, single], ids=str)
def test_the_bits_of_the_python_path(
    adapters: torch.dtype, leading: tuple[int, ...], dropout: float, kind: str, path: LaunchPath
) -> None:
    layers = KINDS[kind](leading).adapters(lambda t: leaf(t, lambda t: t.to(adapters)), "lora_A", "lora_B")
    assert_learned_call(path, layers, dropout_p=dropout)


def test_what_comes_again_is_learned(layers: Layers, path: LaunchPath) -> None:
    """The second call learns the forward; its backward, made in C++ for the first time, is learned by the third."""
    makers = []
    for _ in range(4):
        step(layers)
        makers.append(path.who())
    assert makers == [{TRITON}, {PYTHON}, {NATIVE, PYTHON}, {NATIVE}]


def exact_step(layers: Layers) -> list[Tensor]:
    """The outputs and gradients in float64."""
    exact = layers.each(lambda t: leaf(t, torch.Tensor.double))

    def linear(x: Tensor, member: Any) -> Tensor:
        weight, lora_A, lora_B, scaling, bias = member
        return lora_linear_reference(x, weight.double(), lora_A, lora_B, scaling=scaling, bias=bias)

    ys = [linear(exact.x, member) for member in exact.members[: 2 if layers.activation else 3]]
    if layers.activation:
        ys = [linear(act(ys[0], layers.activation) * ys[1], exact.members[2])]
    dys = [dy_of(y.to(layers.x.dtype)).double() for y in ys]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, exact.leaves(), dys)]


def test_the_values(kind: str, path: LaunchPath) -> None:
    layers = KINDS[kind]((63,), bias=True, dtype=torch.float16)
    native_ys(layers)
    path.who()
    found = [t for t in step(layers) if t is not None]
    assert path.who() == {NATIVE}
    for value, reference in zip(found, exact_step(layers), strict=True):
        assert float((value.double() - reference).norm() / reference.norm()) < 1e-3


def test_a_bias_of_every_member(kind: str, path: LaunchPath) -> None:
    layers = KINDS[kind]((5,), bias=True)
    assert_learned_call(path, layers)
    assert_learned_call(path, layers.adapters(torch.Tensor.float, "bias"), dropout_p=0.3)


def test_float16(kind: str, path: LaunchPath) -> None:
    assert_learned_call(path, KINDS[kind]((5,), dtype=torch.float16))


def test_weights_stored_transposed(layers: Layers, path: LaunchPath) -> None:
    assert_learned_call(path, layers.adapters(transposed, "weight"))
    if layers.activation:
        assert_learned_call(path, layers.member(2, weight=transposed(layers.members[2].weight)))


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_with_a_stride_of_their_own(rows: int, kind: str, path: LaunchPath) -> None:
    layers = KINDS[kind]((rows,))
    assert_learned_call(path, replace(layers, x=with_strides(layers.x, 32, 1)))


@pytest.mark.parametrize("frozen", [False, True])
def test_where_nothing_is_differentiated(frozen: bool, layers: Layers, path: LaunchPath) -> None:
    if frozen:
        layers = layers.each(torch.Tensor.detach)
    with torch.set_grad_enabled(frozen):
        want = step_in_python(layers, dropout_p=0.3)
        for _ in range(4):
            path.who()
            assert_same(step(layers, dropout_p=0.3), want)
        assert path.who() == {NATIVE}
        assert not layers()[0].requires_grad


@pytest.mark.parametrize("x_dtype", [bf16, single], ids=str)
@pytest.mark.parametrize("adapters", [bf16, single], ids=str)
def test_autocast(adapters: torch.dtype, x_dtype: torch.dtype, kind: str, path: LaunchPath) -> None:
    layers = KINDS[kind]((5,), bias=True)
    layers = layers.adapters(lambda t: leaf(t, lambda t: t.to(adapters)), "lora_A", "lora_B")
    layers = replace(layers, x=leaf(layers.x, lambda t: t.to(x_dtype)))
    for _ in range(2):
        if x_dtype == bf16:
            assert_same(step(layers), step_in_python(layers))
        with torch.autocast("cpu", bf16):
            assert_same(step(layers), step_in_python(layers))
    with torch.autocast("cpu", bf16):
        native_ys(layers)
        want = step_in_python(layers)
        path.who()
        assert_same(step(layers), want)
        assert path.who() == {NATIVE}


def test_masks_are_drawn_in_the_order_of_the_layers(path: LaunchPath) -> None:
    calls = [KINDS[kind]((5,)) for kind in KINDS]

    def outputs() -> list[Tensor]:
        torch.manual_seed(7)
        with torch.no_grad():
            ys = [y for call in calls for y in call(dropout_p=0.3)]
        return [*ys, torch.get_rng_state()]

    with only_python():
        want = outputs()
    for _ in range(4):
        path.who()
        assert_same(outputs(), want)
    assert path.who() == {NATIVE}


CHANGES: dict[str, Callable[[Layers], Layers]] = {
    "fewer rows": lambda a: replace(a, x=leaf(a.x, lambda t: t[:3])),
    "more dimensions": lambda a: replace(a, x=leaf(a.x, lambda t: t.view(5, 1, -1))),
    "strided rows": lambda a: replace(a, x=with_strides(a.x, 32, 1)),
    "columns of x": lambda a: replace(a, x=with_strides(a.x, 1, 8)),
    "no rows": lambda a: replace(a, x=leaf(a.x, lambda t: t[:0])),
    "x elsewhere": lambda a: replace(a, x=shifted(a.x)),
    "weights elsewhere": lambda a: a.adapters(shifted, "weight"),
    "lora_A elsewhere": lambda a: a.member(1, lora_A=shifted(a.members[1].lora_A)),
    "lora_B elsewhere": lambda a: a.member(1, lora_B=shifted(a.members[1].lora_B)),
    "weights transposed": lambda a: a.adapters(transposed, "weight"),
    "a weight transposed": lambda a: a.member(0, weight=transposed(a.members[0].weight)),
    "a weight with gaps": lambda a: a.member(1, weight=with_strides(a.members[1].weight, 128, 1)),
    "a weight with no unit stride": lambda a: a.member(1, weight=with_strides(a.members[1].weight, 128, 2)),
    "lora_A transposed": lambda a: a.member(0, lora_A=leaf(a.members[0].lora_A, transposed)),
    "lora_B transposed": lambda a: a.member(1, lora_B=leaf(a.members[1].lora_B, transposed)),
    "another rank": lambda a: a.member(0, lora_A=leaf(a.members[0].lora_A, lambda t: t[:2]),
                                       lora_B=leaf(a.members[0].lora_B, lambda t: t[:, :2].contiguous())),
    "another scaling": lambda a: a.member(1, scaling=-3),
    "float32 adapters": lambda a: a.adapters(lambda t: leaf(t, Tensor.float), "lora_A", "lora_B"),
    "frozen": lambda a: a.each(torch.Tensor.detach),
    "a bias": lambda a: a.member(0, bias=a.members[0].weight[:, 0].contiguous()),
    "biases": lambda a: replace(a, members=tuple(m._replace(bias=m.weight[:, 0].contiguous()) for m in a.members)),
    "another order": lambda a: replace(a, members=(a.members[1], a.members[0], *a.members[2:])),
    "short members": lambda a: replace(a, members=tuple(m._replace(scaling=1.0) for m in a.members)),
    "another activation": lambda a: replace(a, activation={"silu": "gelu_tanh", "gelu_tanh": "silu"}[a.activation])
    if a.activation
    else replace(a, members=a.members[:2] + a.members[:1]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_finds_no_plan_of_another(change: str, layers: Layers, path: LaunchPath) -> None:
    base = step_in_python(layers)
    native_ys(layers)
    changed = CHANGES[change](layers)
    want = step_in_python(changed)
    for _ in range(4):
        assert_same(step(changed), want)
    path.who()
    assert_same(step(layers), base)
    assert path.who() == {NATIVE}


def test_options_that_differ_find_no_plan_of_another(layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    every: list[dict[str, Any]] = [{"dropout_p": 0.3}, {"dropout_p": 0.5}, {"dropout_p": 0.3, "training": False}]
    wants = [step_in_python(layers, **options) for options in every]
    for _ in range(4):
        for options, want in zip(every, wants, strict=True):
            path.who()
            assert_same(step(layers, **options), want)
    assert path.who() == {NATIVE}


def test_all_kinds_beside_each_other(path: LaunchPath) -> None:
    """Also such as have the same shapes: silu's and gelu's, and a group of gate and up."""
    silu, gelu = (KINDS["silu"]((5,)), replace(KINDS["silu"]((5,)), activation="gelu_tanh"))
    calls = [silu, gelu, Layers(silu.x, silu.members[:2]), *(KINDS[kind]((5,)) for kind in KINDS)]
    wants = [step_in_python(call) for call in calls]
    for _ in range(4):
        for call, want in zip(calls, wants, strict=True):
            assert_same(step(call), want)
    path.who()
    for call, want in zip(calls, wants, strict=True):
        assert_same(step(call), want)
    assert path.who() == {NATIVE}


STAYS: dict[str, Callable[[Layers], Layers]] = {
    "mixed layouts of weights": lambda a: a.member(0, weight=transposed(a.members[0].weight)),
    "a bias that requires grad": lambda a: replace(
        a, members=tuple(m._replace(bias=leaf(m.weight[:, 0]).contiguous().requires_grad_()) for m in a.members)
    ),
    "one bias": lambda a: a.member(0, bias=a.members[0].weight[:, 0].contiguous()),
    "frozen adapters": lambda a: a.member(1, lora_A=a.members[1].lora_A.detach(), lora_B=a.members[1].lora_B.detach()),
    "a frozen lora_A": lambda a: a.member(0, lora_A=a.members[0].lora_A.detach()),
    "a frozen lora_B": lambda a: a.member(1, lora_B=a.members[1].lora_B.detach()),
    "a frozen x": lambda a: replace(a, x=a.x.detach()),
    "a scaling that is a tensor": lambda a: a.member(1, scaling=torch.tensor(3.0)),
    "adapters of different dtypes": lambda a: a.member(
        1, **{name: leaf(getattr(a.members[1], name), Tensor.float) for name in ("lora_A", "lora_B")}
    ),
    "a lora_A with strides": lambda a: a.member(0, lora_A=leaf(a.members[0].lora_A, transposed)),
    "columns of x": lambda a: replace(a, x=with_strides(a.x, 1, 8)),
}


def assert_stays(layers: Layers, path: LaunchPath, **options: Any) -> None:
    want = step_in_python(layers, **options)
    for _ in range(5):
        path.who()
        assert_same(step(layers, **options), want)
    assert path.who() == {PYTHON}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_python_s_stays_python_s(name: str, layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    assert_stays(STAYS[name](layers), path, dropout_p=0.3)


@pytest.mark.parametrize("count", [1, 4])
def test_groups_that_no_kernel_takes(count: int, path: LaunchPath) -> None:
    two = KINDS["two"]((5,))
    assert_stays(replace(two, members=(*two.members, *two.members)[:count]), path)


def test_modes_and_hooks(layers: Layers, path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    want = step_in_python(layers)
    native_ys(layers)
    path.who()
    with torch.overrides.BaseTorchFunctionMode():
        layers()
    assert path.who() == {PYTHON}
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        lora_A = torch.autograd.forward_ad.make_dual(
            layers.members[1].lora_A, torch.ones_like(layers.members[1].lora_A)
        )
        layers.member(1, lora_A=lora_A)()
    assert path.who() == {PYTHON}
    with torch.inference_mode():
        layers()
    assert path.who() == {NATIVE}
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", lambda *args: None)
        assert_same(step(layers), want)
        assert path.who() == {TRITON}
    assert_same(step(layers), want)
    assert path.who() == {NATIVE}


def test_zeros_are_asked_for_once_outside_of_a_capture(layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    path.asked_for_zeros.clear()
    step(layers)
    assert path.asked_for_zeros == []
    path.driver.capturing = True
    step(layers)
    path.driver.capturing = False
    step(layers)
    # For each launch that counts: three of a group, three more of a down projection.
    assert len(path.asked_for_zeros) == (6 if layers.activation else 3)


def test_threads(path: LaunchPath) -> None:
    """Calls of all kinds from several threads at once, and their backwards beside them."""
    cases = [KINDS[kind]((rows,)) for kind in KINDS for rows in (1, 5, 63)]
    dys = [[dy_of(y) for y in case()] for case in cases]

    def gradients(index: int) -> list[Tensor | None]:
        layers = cases[index].each(leaf)
        ys = layers()
        torch.autograd.backward(ys, dys[index])
        return [*(y.detach() for y in ys), *(None if t is None else t.grad for t in layers.tensors())]

    with only_python():
        want = [gradients(index) for index in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        order = [(start + turn) % len(cases) for turn in range(20) for start in range(0, len(cases), 3)]
        for index, got in zip(order, pool.map(gradients, order), strict=True):
            assert_same(got, want[index])
    assert NATIVE in path.who()


def test_a_decoder_layer_of_peft_s(path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_llama_learned("cpu", monkeypatch)


WRONG: dict[str, Callable[[Layers], Layers]] = {
    "x's width": lambda a: replace(a, x=a.x[:, :8]),
    "no tensor for x": lambda a: replace(a, x=None),
    "lora_A's width": lambda a: a.member(1, lora_A=a.members[1].lora_A[:, :8]),
    "lora_B's height": lambda a: a.member(0, lora_B=a.members[0].lora_B[:8]),
    "bias's width": lambda a: a.member(1, bias=a.members[1].weight[:8, 0]),
    "dtypes of adapters": lambda a: a.member(0, lora_B=a.members[0].lora_B.float()),
    "a weight that requires grad": lambda a: a.member(1, weight=a.members[1].weight.detach().requires_grad_()),
    "no weight": lambda a: a.member(0, weight=None),
    "scaling's type": lambda a: a.member(1, scaling="2"),
    "a scaling that is a bool": lambda a: a.member(1, scaling=True),
    "a member that is a list": lambda a: replace(a, members=(list(a.members[0]), *a.members[1:])),
    "a member of two": lambda a: replace(a, members=(*a.members[:-1], a.members[-1][:2])),
    "a member of six": lambda a: replace(a, members=((*a.members[0], None), *a.members[1:])),
    "no members": lambda a: replace(a, members=()) if not a.activation else a.member(0, weight=None),
    "the last layer's K": lambda a: a.member(-1 % len(a.members), weight=a.members[-1].weight[:, :8]),
    "an activation": lambda a: replace(a, activation="relu") if a.activation else replace(a, x=a.x.double()),
    "no name of an activation": lambda a: replace(a, activation=5) if a.activation else replace(a, members=5),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "p above 1": {"dropout_p": 1.5},
    "p below 0": {"dropout_p": -0.5, "training": False},
    "p's type": {"dropout_p": "0.3"},
    "a backend": {"backend": "tpu"},
}


@pytest.mark.parametrize("name", [*WRONG, *OPTIONS])
def test_wrong_arguments_are_the_errors_that_they_were(name: str, layers: Layers, path: LaunchPath) -> None:
    native_ys(layers)
    wrong, options = WRONG.get(name, lambda a: a)(layers), OPTIONS.get(name, {})

    def raised() -> tuple[type[BaseException], str]:
        with pytest.raises((TypeError, ValueError)) as caught:
            wrong(**options)
        return type(caught.value), str(caught.value)

    with only_python():
        want = raised()
    assert raised() == want
