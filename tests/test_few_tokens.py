"""NF4 products of a few tokens, the CUDA backend's where the automatic choice is Triton: who takes what, and C++."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HAS_GPU, Case
from cuda_emulator import COMPILER, load
from launch_path import NATIVE, LaunchPath, assert_same, in_python, make, run
from native_calls import KINDS, leaf, step, step_in_python
from torch import Tensor

from lora_kernels import NF4Weight, dispatch, explain, explain_group, lora_linear, lora_linear_group, native
from lora_kernels.backends import Problem, cuda, cuda_build, eager

pytest.importorskip("triton", reason="Triton is not installed")

from lora_kernels.backends import few_tokens
from lora_kernels.backends.triton import BACKEND as TRITON

pytest_plugins = ("launch_path",)

HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
emulates = pytest.mark.skipif(HAS_GPU or COMPILER is None, reason="the CUDA kernels are emulated on the CPU")
# Triton's backend where its reasons are not asked for.
PLAIN = replace(TRITON, refuses=lambda p: None, declines=lambda p: None)
on_hopper = pytest.mark.skipif(not HOPPER, reason="the kernels are chosen on Hopper")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forwards and backwards to the input that the CUDA backend computes, called from Python."""
    made: list[str] = []

    def noting(name: str) -> Any:
        computed = getattr(cuda, name)

        def function(*arguments: Any) -> Any:
            made.append(name)
            return computed(*arguments)

        return function

    for name in ("forward", "backward_input"):
        monkeypatch.setattr(cuda, name, noting(name))
    return made


@pytest.fixture
def streams(path: LaunchPath, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launch path, where Triton's kernels are played and the CUDA backend's emulated."""
    extension = load()
    monkeypatch.setattr(cuda, "_extension", lambda device: extension)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(cuda, "zeros_for", lambda device, count: torch.zeros(count, dtype=torch.int32))

    def choose(problem: Problem, name: str) -> dispatch.Choice:
        return dispatch.Choice(problem, few_tokens.BACKEND if name == "auto" and problem.nf4 else TRITON, {})

    monkeypatch.setattr("lora_kernels.functional.choose", choose)
    return calls


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Problem]:
    """A problem on a Hopper for which the CUDA backend is compiled."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_build, "is_built", lambda capability: True)
    monkeypatch.setattr(cuda_build, "why_stale", lambda: None)
    monkeypatch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, refuses=lambda p: None, declines=lambda p: None))
    monkeypatch.setattr(cuda, "_extension", lambda device: None)
    loaded = {"triton": PLAIN, "eager": eager.BACKEND}
    monkeypatch.setattr(dispatch, "_load", lambda name: (loaded.get(name, cuda.BACKEND), None))
    _forget_choices()
    yield Problem(torch.device("cuda", 0), torch.bfloat16, "native", 128, 64, 8, nf4=True)
    _forget_choices()


def _forget_choices() -> None:
    dispatch.choose.cache_clear()
    few_tokens._is_usable.cache_clear()


def reference(tensors: dict[str, Any], scaling: float = 2.0) -> Tensor:
    x, base = tensors["x"].detach().double(), tensors["weight"].dequantize(torch.bfloat16).double()
    lora_A, lora_B = (tensors[name].detach().double() for name in ("lora_A", "lora_B"))
    return x @ base.T + scaling * (x @ lora_A.T) @ lora_B.T + tensors["bias"].detach().double()


def nf4(weight: Tensor) -> NF4Weight:
    return NF4Weight.quantize(weight.detach().float())


@emulates
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer(adapters: torch.dtype, dropout: float, autocast: bool, streams: list[str]) -> None:
    """The forward is C++ in the end, with the bits of the path through Python."""
    tensors: dict[str, Any] = make("x", "lora_A", "lora_B", sizes=(2, 3, 128, 40, 3))
    tensors |= {name: leaf(tensors[name], lambda t: t.to(adapters)) for name in ("lora_A", "lora_B")}
    tensors["weight"] = nf4(tensors["weight"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = in_python(tensors, dropout_p=dropout, backend="auto")
        if not dropout:
            torch.testing.assert_close(want[0].double(), reference(tensors), rtol=0.02, atol=0.2)
        for _ in range(4):
            streams.clear()
            assert_same(run(tensors, dropout_p=dropout, backend="auto"), want)
    assert streams == ["backward_input"]


@emulates
def test_other_layouts_in_cpp(streams: list[str]) -> None:
    tensors: dict[str, Any] = make(sizes=(7, 192, 63, 17), dtype=torch.float16)
    tensors["weight"] = nf4(tensors["weight"])
    wide = torch.randn(7, 256, generator=torch.Generator().manual_seed(1)).half()
    tensors |= {"x": wide[:, 64:], "lora_A": tensors["lora_A"].T.contiguous().T, "bias": tensors["bias"].float()}
    want = in_python(tensors, backend="auto")
    torch.testing.assert_close(want[0].double(), reference(tensors), rtol=0.02, atol=0.2)
    for _ in range(3):
        run(tensors, backend="auto")
    streams.clear()
    assert_same(run(tensors, backend="auto"), want)
    assert not streams


@emulates
@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind: str, streams: list[str]) -> None:
    hidden = {"hidden": 128} if kind in ("silu", "gelu_tanh") else {}
    layers = KINDS[kind]((2, 3), columns=128, **hidden).adapters(nf4, "weight")
    for dropout in (0.0, 0.3):
        streams.clear()
        want = step_in_python(layers, dropout_p=dropout, backend="auto")
        assert streams.count("forward") == len(layers.members)
        for _ in range(4):
            streams.clear()
            assert_same(step(layers, dropout_p=dropout, backend="auto"), want)
        # Of three layers, two have sizes that the backward's kernel does not take: Triton's compute those.
        assert streams == ["backward_input"] * (1 if kind == "three" else len(layers.members))


@emulates
@pytest.mark.parametrize("index", [0, 1])
def test_a_group_with_a_dense_layer(index: int, streams: list[str]) -> None:
    layers = KINDS["two"]((2, 3), columns=128)
    layers = layers.member(index, weight=nf4(layers.members[index].weight))
    want = step_in_python(layers, backend="auto")
    assert streams == ["forward", "backward_input"]
    for _ in range(4):
        assert_same(step(layers, backend="auto"), want)
    text = str(explain_group(layers.x, layers.members, backend="auto"))
    assert text.count("up to 16 tokens by the CUDA backend's kernels") == 2


@emulates
@pytest.mark.parametrize("kind", ["two", "silu"])
def test_a_groups_backward_is_learned_for_its_backend(kind: str, streams: list[str]) -> None:
    hidden = {"hidden": 96} if kind == "silu" else {}
    layers = KINDS[kind]((5,), columns=96, **hidden).adapters(nf4, "weight")
    for backend in ("triton", "auto", "triton", "auto"):
        for _ in range(4):
            streams.clear()
            step(layers, backend=backend)
        assert streams == ["backward_input"] * (len(layers.members) if backend == "auto" else 0)


@emulates
def test_a_backward_is_learned_for_its_backend(streams: list[str], path: LaunchPath) -> None:
    """Triton decodes a weight of such a K before the product, and all of that is C++."""
    tensors: dict[str, Any] = make("x", "lora_A", "lora_B", sizes=(5, 96, 40, 3))
    tensors["weight"] = nf4(tensors["weight"])
    for backend in ("triton", "auto", "triton", "auto"):
        for _ in range(4):
            streams.clear()
            path.who()
            run(tensors, backend=backend)
        assert streams == ["backward_input"] * (backend == "auto")
        assert NATIVE in path.who()


@emulates
def test_many_tokens_are_tritons(streams: list[str], path: LaunchPath) -> None:
    tensors: dict[str, Any] = make("x", "lora_A", "lora_B", sizes=(17, 128, 40, 3))
    tensors["weight"] = nf4(tensors["weight"])
    want = in_python(tensors, backend="auto")
    for _ in range(3):
        assert_same(run(tensors, backend="auto"), want)
    assert not streams
    assert path.launched()


def test_the_automatic_choice(built: Problem) -> None:
    choice = dispatch.choose(built, "auto")
    assert choice.backend is few_tokens.BACKEND
    assert choice.backend.name == "triton"
    assert choice.refusals["cuda"] == "triton is preferred, but for up to 16 tokens where its kernels take them"
    assert dispatch.choose(built, "triton").backend is PLAIN
    assert dispatch.choose(replace(built, nf4=False), "auto").backend is PLAIN


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (torch.cuda, "get_device_capability", (8, 0)),
        (cuda_build, "is_built", False),
        (cuda_build, "why_stale", "other sources"),
    ],
)
def test_is_not_chosen(place: Any, name: str, value: Any, built: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, name, lambda *_: value)
    assert dispatch.choose(built, "auto").backend is PLAIN


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_is_not_chosen_where_it_cannot_be_loaded(
    error: type[Exception], built: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: torch.device) -> Any:
        raise error("X")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_extension", fails)
        choice = dispatch.choose(built, "auto")
        assert choice.backend is PLAIN
        assert choice.refusals["cuda"] == "triton is preferred, and it cannot be loaded: X"
    # Settled, as what is compiled is.
    assert dispatch.choose(replace(built, rank=9), "auto").backend is PLAIN


@pytest.mark.parametrize(
    ("in_features", "out_features", "chosen"),
    [(64, 63, True), (96, 64, True), (96, 63, False), (40, 64, False)],
    ids=["forward", "backward", "neither", "neither way"],
)
def test_is_chosen_for_what_its_kernels_take(
    in_features: int, out_features: int, chosen: bool, built: Problem
) -> None:
    problem = replace(built, in_features=in_features, out_features=out_features)
    assert (dispatch.choose(problem, "auto").backend is few_tokens.BACKEND) == chosen
    assert dispatch.choose(replace(problem, dtype=torch.float32), "auto").backend is PLAIN


def test_what_is_compiled_later_is_for_later_processes(built: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or layers of a model would differ, by when their shapes were first seen."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda_build, "is_built", lambda capability: False)
        assert dispatch.choose(built, "auto").backend is PLAIN
    assert dispatch.choose(replace(built, rank=9), "auto").backend is PLAIN


@pytest.mark.parametrize(
    ("rows", "block_size", "columns", "reason"),
    [
        (17, 64, 128, "17 rows are more than 16"),
        (16, 32, 128, "blocks of 32 are less than 64"),
        (1, 64, 96, "96 columns are no multiple of 64"),
        (16, 64, 128, None),
    ],
)
def test_what_streams(rows: int, block_size: int, columns: int, reason: str | None) -> None:
    weight = NF4Weight.quantize(torch.randn(8, columns), block_size)
    x = torch.randn(rows, columns).bfloat16()
    assert cuda.cannot_stream(x, weight) == reason
    strided = torch.randn(rows, columns + 1).bfloat16()[:, 1:]
    assert cuda.cannot_stream(strided, weight) == (reason or "the rows of x do not start on 16 bytes")


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    cuda_build.load((9, 0))
    _forget_choices()
    yield
    _forget_choices()


@on_hopper
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_on_a_gpu(rows: int, adapters: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice, single and as a group; again and again, for what C++ learns; and in a CUDA graph."""
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    if native.why_not() is None:
        native._extension().clear()  # type: ignore[union-attr]
    t = Case(rows, 512, 1024, 16, torch.bfloat16, adapters).tensors(torch.device("cuda", 0))
    weight = NF4Weight.quantize(t.weight)
    leaves = [v.requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
    member = (weight, t.lora_A, t.lora_B, 2.0)
    where = "inside of the CUDA backend's product" if rows <= 16 else "inside of the product"
    assert [path.where for path in explain(t.x, *member[:3]).nf4_paths or ()] == [where] * 2
    assert "CUDA backend" in str(explain_group(t.x, [member, member]))

    def single() -> list[Tensor]:
        y = lora_linear(t.x, *member[:3], scaling=2.0)
        return [y, *torch.autograd.grad(y, leaves, t.dy)]

    def grouped() -> list[Tensor]:
        ys = lora_linear_group(t.x, [member, member])
        return [*ys, *torch.autograd.grad(ys, leaves, [t.dy, t.dy])]

    d = t.double()
    exact = [v.requires_grad_() for v in (d.x, d.lora_A, d.lora_B)]
    base = weight.dequantize(torch.bfloat16).double()
    y = d.x @ base.T + 2.0 * (d.x @ d.lora_A.T) @ d.lora_B.T
    want = [y, *torch.autograd.grad(y, exact, d.dy)]
    for compute, expected in ((single, want), (grouped, [y, y, *(2 * g for g in want[1:])])):
        first: list[Tensor] | None = None
        for turn in range(4):
            calls.clear()
            got = compute()
            first = first or got
            for value, exactly, old in zip(got, expected, first, strict=True):
                assert (value.double() - exactly).norm() <= 5e-3 * exactly.norm()
                assert torch.equal(value, old)
            count = 1 if compute is single else 2
            if rows > 16:
                assert not calls
            elif turn == 0:
                assert calls == ["forward"] * count + ["backward_input"] * count
            elif turn == 3 and native.why_not() is None:
                assert calls == ["backward_input"] * count
    with torch.no_grad():
        want_y = lora_linear(t.x, *member[:3], scaling=2.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_linear(t.x, *member[:3], scaling=2.0)
        y.zero_()
        graph.replay()
        assert torch.equal(y, want_y)


@on_hopper
@pytest.mark.usefixtures("compiled")
def test_threads_of_one_stream(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that ask for different shared memory and cut K into different parts, all counting in the same zeros.

    Where the launch path is compiled, without Python's lock.
    """
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    sizes = [(8, 14336, 512), (1, 4096, 1024), (16, 4096, 4096)]
    tensors = [Case(M, K, N, 16, torch.bfloat16).tensors(torch.device("cuda", 0)) for M, K, N in sizes]
    weights = [NF4Weight.quantize(t.weight) for t in tensors]

    def compute(index: int) -> Tensor:
        t = tensors[index]
        with torch.no_grad():
            return lora_linear(t.x, weights[index], t.lora_A, t.lora_B, scaling=2.0)

    def count_wrong(thread: int) -> int:
        others = [(thread + turn) % len(sizes) for turn in range(300)]
        return sum(not torch.equal(compute(other), wants[other]) for other in others)

    for _ in range(3):
        wants = [compute(index) for index in range(len(sizes))]
    calls.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count_wrong, range(4))) == [0] * 4
    assert native.why_not() is not None or not calls
    assert all(torch.equal(compute(index), want) for index, want in enumerate(wants))
