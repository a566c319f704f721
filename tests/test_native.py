"""The launch path in C++: the bits of the Python path for every call, and Python's for every call that is not covered.

Without a GPU, kernels of a driver of our own (fake_driver.py) stand in for Triton's, and CPU tensors for CUDA's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fake_driver import CONTEXT
from launch_path import (
    NATIVE,
    PYTHON,
    TRITON,
    LaunchPath,
    assert_learned,
    assert_same,
    bf16,
    in_python,
    make,
    native_y,
    run,
    shifted,
    with_strides,
)
from test_autograd import KEPT, LEAVES, SUBSETS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import lora_linear, lora_linear_reference, native

pytest_plugins = ("launch_path",)

single = torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [(5, 24, 40, 3), (63, 17, 63, 16), (2, 3, 24, 40, 64), (24, 40, 1)], ids=str)
@pytest.mark.parametrize("adapters", [bf16, single], ids=str)
def test_the_values_and_bits_of_the_python_path(
    adapters: torch.dtype, sizes: tuple[int, ...], dropout: float, path: LaunchPath
) -> None:
    tensors = make(*LEAVES, sizes=sizes)
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].detach().to(adapters).requires_grad_()
    assert_learned(path, tensors, dropout_p=dropout)
    if dropout:
        return
    exact = {k: t.detach().double().requires_grad_(k != "weight") for k, t in tensors.items()}
    y = lora_linear_reference(**exact, scaling=2.0)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(bf16).double()
    wanted = [y.detach(), *torch.autograd.grad(y, [exact[k] for k in LEAVES], dy)]
    for value, reference in zip(run(tensors), wanted, strict=True):
        assert value is not None
        assert float((value.double() - reference).norm() / reference.norm()) < 5e-3


def test_a_row_with_a_stride_of_its_own_is_learned(path: LaunchPath) -> None:
    """A view of a single row may have another stride: both sides must mean the same one."""
    tensors = make(*LEAVES, sizes=(1, 24, 40, 3))
    assert_learned(path, tensors | {"x": with_strides(tensors["x"], 32, 1)})


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_every_subset_of_gradients(needed: tuple[str, ...], path: LaunchPath) -> None:
    tensors = make(*needed)
    want = in_python(tensors, dropout_p=0.3)
    for _ in range(4):
        assert_same(run(tensors, dropout_p=0.3), want)
    path.who()
    run(tensors, dropout_p=0.3)
    # T alone is a library's business, which Python calls.
    assert path.who() <= ({NATIVE} if "lora_A" not in needed or "x" in needed else {NATIVE, PYTHON})


@pytest.mark.parametrize(("needed", "kept"), KEPT.items(), ids=lambda v: "+".join(sorted(v)) or "nothing")
def test_what_is_kept(needed: tuple[str, ...], kept: set[str], path: LaunchPath) -> None:
    tensors = make(*needed, sizes=(2, 5, 24, 40, 3))
    names = {t.data_ptr(): name for name, t in tensors.items()}
    packed: list[list[tuple[str, torch.Size]]] = []

    def pack(t: Tensor) -> Tensor:
        packed[-1].append((names.get(t.data_ptr(), "S"), t.shape))
        return t

    for _ in range(4):
        packed.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_linear(**tensors, backend="triton")
    assert NATIVE in path.who()
    assert {name for name, _ in packed[-1]} == kept - {"S"}
    # In the same order and shapes: what Python kept may be computed again by C++.
    assert packed[0] == packed[-1]


def other_dtype(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: t.detach().half().requires_grad_(t.requires_grad) for k, t in tensors.items()}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fewer rows": lambda t: t | {"x": t["x"].detach()[:3].requires_grad_()},
    "more dimensions": lambda t: t | {"x": t["x"].detach().view(5, 1, 24).requires_grad_()},
    "strided rows": lambda t: t | {"x": with_strides(t["x"], 32, 1)},
    "columns of x": lambda t: t | {"x": with_strides(t["x"], 1, 8)},
    "x elsewhere": lambda t: t | {"x": shifted(t["x"])},
    "weight elsewhere": lambda t: t | {"weight": shifted(t["weight"])},
    "lora_A elsewhere": lambda t: t | {"lora_A": shifted(t["lora_A"])},
    "lora_B elsewhere": lambda t: t | {"lora_B": shifted(t["lora_B"])},
    "bias elsewhere": lambda t: t | {"bias": shifted(t["bias"])},
    "weight transposed": lambda t: t | {"weight": with_strides(t["weight"], 1, 40)},
    "weight with gaps": lambda t: t | {"weight": with_strides(t["weight"], 32, 1)},
    "weight with no unit stride": lambda t: t | {"weight": with_strides(t["weight"], 64, 2)},
    "lora_A transposed": lambda t: t | {"lora_A": with_strides(t["lora_A"], 1, 3)},
    "lora_B transposed": lambda t: t | {"lora_B": with_strides(t["lora_B"], 1, 40)},
    "no bias": lambda t: t | {"bias": None},
    "strided bias": lambda t: t | {"bias": with_strides(t["bias"], 2)},
    "float32 bias": lambda t: t | {"bias": t["bias"].detach().float().requires_grad_()},
    "float32 adapters": lambda t: t | {k: t[k].detach().float().requires_grad_() for k in ("lora_A", "lora_B")},
    "float16": other_dtype,
    "another rank": lambda t: t | {"lora_A": t["lora_A"].detach()[:2], "lora_B": t["lora_B"].detach()[:, :2]},
    "another K": lambda t: t | {k: t[k].detach()[:, :16] for k in ("x", "weight", "lora_A")},
    "another N": lambda t: t | {k: t[k].detach()[:32] for k in ("weight", "lora_B", "bias")},
    "no rows": lambda t: t | {"x": t["x"].detach()[:0].requires_grad_()},
    "dropout": lambda t: t | {"dropout_p": 0.3},
    "another dropout": lambda t: t | {"dropout_p": 0.5},
    "dropout in evaluation": lambda t: t | {"dropout_p": 0.3, "training": False},
    "another scaling": lambda t: t | {"scaling": -3},
    "scaling as a tensor": lambda t: t | {"scaling": torch.tensor(3.0)},
    "frozen x": lambda t: t | {"x": t["x"].detach()},
    "frozen lora_A": lambda t: t | {"lora_A": t["lora_A"].detach()},
    "frozen lora_B": lambda t: t | {"lora_B": t["lora_B"].detach()},
    "another backend": lambda t: t | {"backend": "eager"},
    "float32": lambda t: {k: v.detach().float().requires_grad_(v.requires_grad) for k, v in t.items()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_finds_no_plan_of_another(change: str, path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    base = in_python(tensors)
    for _ in range(4):
        assert_same(run(tensors), base)
    changed = CHANGES[change](tensors)
    if changed.get("backend") == "eager" or changed["x"].dtype == single:
        changed = changed | {"backend": "eager"}
    want = in_python(changed)
    for _ in range(4):
        assert_same(run(changed), want)
    path.who()
    assert_same(run(tensors), base)
    assert path.who() == {NATIVE}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("x_dtype", [bf16, single], ids=str)
@pytest.mark.parametrize("adapters", [bf16, single], ids=str)
def test_autocast(adapters: torch.dtype, x_dtype: torch.dtype, grad: bool, path: LaunchPath) -> None:
    tensors = make("x", "lora_A", "lora_B")
    tensors["x"] = tensors["x"].detach().to(x_dtype).requires_grad_()
    for name in ("lora_A", "lora_B"):
        tensors[name] = tensors[name].detach().to(adapters).requires_grad_()

    def outside() -> None:
        if x_dtype == bf16:
            assert_same(run(tensors), in_python(tensors))

    with torch.set_grad_enabled(grad):
        for _ in range(2):
            outside()
            with torch.autocast("cpu", bf16):
                assert_learned(path, tensors)


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "x had shape": lambda t: {"x": t["x"][:, :8]},
    "lora_A had shape": lambda t: {"lora_A": t["lora_A"][:, :8]},
    "lora_B had shape": lambda t: {"lora_B": t["lora_B"][:8]},
    "bias had shape": lambda t: {"bias": t["bias"][:8]},
    "lora_B was torch.float32": lambda t: {"lora_B": t["lora_B"].float()},
    "weight required grad": lambda t: {"weight": t["weight"].detach().requires_grad_()},
    "weight was None": lambda t: {"weight": None},
    "scaling was a str": lambda t: {"scaling": "2"},
    "scaling was a bool": lambda t: {"scaling": True},
    "dropout_p was 1.5": lambda t: {"dropout_p": 1.5},
    "dropout_p was -0.5": lambda t: {"dropout_p": -0.5, "training": False},
    "backend was 'tpu'": lambda t: {"backend": "tpu"},
    "backend was 5": lambda t: {"backend": 5},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_the_errors_that_they_were(message: str, path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    for _ in range(4):
        run(tensors)
    with pytest.raises((TypeError, ValueError), match=message):
        lora_linear(**({**tensors, "scaling": 2.0, "backend": "triton"} | WRONG[message](tensors)))


class Counting(TorchDispatchMode):
    """Sees every operator."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that wants to be asked."""


def test_what_is_python_s_stays_python_s(path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    native_y(tensors)
    assert NATIVE in path.who()

    def by(call: Callable[[], Any]) -> set[int]:
        call()
        return path.who()

    once = partial(lora_linear, **tensors, scaling=2.0, backend="triton")
    assert by(once) == {NATIVE}
    with Counting() as counting:
        assert by(once) == {PYTHON}
    assert counting.calls > 0
    with torch.overrides.BaseTorchFunctionMode():
        assert by(once) == {PYTHON}
    frozen = {k: t.detach() for k, t in tensors.items()}
    assert by(lambda: lora_linear(**(frozen | {"x": frozen["x"].as_subclass(Subclass)}), backend="triton")) == {PYTHON}
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        x = torch.autograd.forward_ad.make_dual(frozen["x"], torch.ones_like(frozen["x"]))
        assert by(lambda: lora_linear(**(frozen | {"x": x}), backend="triton")) == {PYTHON}
    with torch.inference_mode():
        assert by(lambda: lora_linear(**frozen, scaling=2.0, backend="triton")) == {NATIVE}
    compiled = torch.compile(partial(once), backend="eager", fullgraph=True)
    assert by(compiled) == {PYTHON}
    assert by(once) == {NATIVE}


def test_a_profiler_s_hooks_are_called(path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    tensors = make(*LEAVES)
    want = in_python(tensors)
    for _ in range(4):
        run(tensors)
    path.who()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", lambda *args: None)
        assert_same(run(tensors), want)
        assert path.who() == {TRITON}
    run(tensors)
    assert path.who() == {NATIVE}


def test_threads(path: LaunchPath) -> None:
    """Calls of several shapes from several threads at once, and their backwards beside them."""
    cases = [make(*LEAVES, sizes=(rows, 24, 40, rank)) for rows in (1, 3, 17, 63) for rank in (1, 3, 16)]
    want = [in_python(tensors) for tensors in cases]
    failed: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for turn in range(30):
                index = (first + turn) % len(cases)
                leaves = {k: t.detach().requires_grad_(t.requires_grad) for k, t in cases[index].items()}
                y = lora_linear(**leaves, scaling=2.0, backend="triton")
                y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
                assert_same([y.detach(), *(leaves[name].grad for name in LEAVES)], want[index])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert NATIVE in path.who()


def test_what_comes_once_is_not_learned(path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every batch has another length, learning would cost more than it saves."""
    learned: list[str] = []
    learn = native.learn_linear

    def watched(given: Any, made: Any, *others: Any) -> None:
        if made is not None:
            learned.append("learned")
        learn(given, made, *others)

    monkeypatch.setattr(native, "learn_linear", watched)
    for rows in range(1, 8):
        run(make(*LEAVES, sizes=(rows, 24, 40, 3)))
    assert learned == []
    for _ in range(4):
        run(make(*LEAVES, sizes=(3, 24, 40, 3)))
    assert learned == ["learned"]


def test_zeros_are_asked_for_once_outside_of_a_capture(path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    for _ in range(4):
        run(tensors)
    path.asked_for_zeros.clear()
    for _ in range(4):
        run(tensors)
    assert path.asked_for_zeros == []
    path.driver.capturing = True
    run(tensors)
    assert len(path.asked_for_zeros) == 2
    path.driver.capturing = False
    run(tensors)
    assert len(path.asked_for_zeros) == 2


@pytest.mark.parametrize("function", ["cuLaunchKernel", "cuTensorMapEncodeTiled"])
def test_what_the_driver_refuses_is_an_error(function: str, path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(*LEAVES)
    for _ in range(4):
        run(tensors)
    fails = type(getattr(path.driver, function))(lambda *arguments: 700)
    monkeypatch.setattr(path.driver, function, fails)
    path.extension.use_driver(*path.driver.addresses(), "cpu")
    with pytest.raises(RuntimeError, match=r"the CUDA driver refused .* error 700"):
        run(tensors | {"x": tensors["x"].detach().clone().requires_grad_()})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_thread_that_has_not_called_cuda_yet(dropout: float, path: LaunchPath) -> None:
    """Its first launch, and its first tensor map, find no context, whoever asks for them."""
    tensors = make(*LEAVES)
    want = in_python(tensors, dropout_p=dropout)
    who: set[int] = set()
    copies = []
    for _ in range(5):
        # At addresses that no map is known for.
        copies.append({k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in tensors.items()})
        path.who()
        path.driver.context = 0
        assert_same(run(copies[-1], dropout_p=dropout), want)
        assert path.driver.context == CONTEXT
        who |= path.who()
    assert who == {PYTHON, NATIVE}


def test_anomaly_mode(path: LaunchPath) -> None:
    tensors = make(*LEAVES)
    for _ in range(4):
        run(tensors)
    tensors["x"] = torch.full_like(tensors["x"], float("nan")).requires_grad_()
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match="Error detected in LoRALinearFunctionBackward"),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        run(tensors)
