"""How `bench` measures: turns, medians, the check before the time, ceilings. No GPU and no real clock is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from terminal import on_a_terminal

from lora_kernels import lora_linear
from lora_kernels.cli.bench import providers
from lora_kernels.cli.bench.cases import SCALING, SUITES, Case, Operands
from lora_kernels.cli.bench.check import Exact, check
from lora_kernels.cli.bench.clock import CpuClock, Sample, Step, Times, interleaved
from lora_kernels.cli.bench.layers import Plan, checked, measure_case
from lora_kernels.cli.bench.progress import Progress
from lora_kernels.cli.bench.providers import FLOOR, PROVIDERS, Layer, Missing, Provider, WrongAnswer
from lora_kernels.cli.bench.roofline import Ceilings, Work, measure_ceilings, work_of
from lora_kernels.cli.bench.shapes import MODELS, projection_shapes
from lora_kernels.dropout import keep_mask
from lora_kernels.reference import lora_linear_reference

CASE = Case(17, 48, 40, rank=3, dtype="float32", adapters="float32")
GROUP = replace(CASE, others=(17, 63))
CPU = torch.device("cpu")


class FakeClock:
    """Samples are the numbers 1, 2, 3 ...; `log` tells who took which."""

    regime, launches = "fake", "eager"

    def __init__(self) -> None:
        self.log: list[object] = []
        self._time = 0.0

    def prepare(self, step: Step) -> Sample:
        name = step()

        def take() -> float:
            self._time += 1
            self.log.append(name)
            return self._time

        return take

    def start(self) -> None:
        self.log.append("start")

    def load(self) -> None: ...

    def between(self) -> None:
        self.log.append("between")


def _plan(*names: str) -> Plan:
    return Plan(CPU, names, [CpuClock("cpu")], samples=3)


def test_providers_take_turns() -> None:
    clock = FakeClock()
    times = interleaved({"a": lambda: "a", "b": lambda: "b"}, clock, 3)
    assert clock.log == ["start", *["between", "a", "between", "b"] * 3]
    assert [times[name].median for name in "ab"] == [3.0, 4.0]  # type: ignore[union-attr]


def test_median_and_quartiles() -> None:
    times = Times.of([10.0, 12.0, 11.0, 1000.0, 13.0, 9.0, 14.0])
    assert (times.low, times.median, times.high, times.samples) == (10.0, 12.0, 14.0, 7)
    assert times.spread == pytest.approx(2 / 12)
    assert Times.of([5.0]).spread == 0


def test_what_cannot_be_prepared_does_not_stop_the_others() -> None:
    def broken() -> object:
        raise RuntimeError("cannot be captured\nin a graph")

    times = interleaved({"a": lambda: "a", "broken": broken}, FakeClock(), 2)
    assert times["broken"] == "RuntimeError: cannot be captured"
    assert isinstance(times["a"], Times)


@pytest.mark.parametrize("name", ["frozen", "peft", "eager"])
@pytest.mark.parametrize("M", [1, 17, 5000])
def test_right_answers_pass(name: str, M: int) -> None:
    operands = Operands.make(Case(M, 48, 40, rank=3, dtype="float32", adapters="float32"), CPU)
    provider = PROVIDERS[name]
    errors = check(provider.make(operands, 0.0), operands, Exact.of(operands, provider.lora))
    assert set(errors) == ({"y", "dx", "dA", "dB"} if provider.lora else {"y", "dx"})
    assert all(0 < error < 1e-5 for error in errors.values())


def test_exact_is_the_float64_reference() -> None:
    operands = Operands.make(CASE, CPU)
    leaves = [t.detach().double().requires_grad_() for t in (operands.x, operands.lora_A, operands.lora_B)]
    y = lora_linear_reference(leaves[0], operands.weight.double(), leaves[1], leaves[2], scaling=SCALING)
    expected = (y, *torch.autograd.grad(y, leaves, operands.dy.double()))
    for value, reference in zip(Exact.of(operands, True).values.values(), expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-6)
    frozen = Exact.of(operands, False).values
    torch.testing.assert_close(frozen["y"], (operands.x @ operands.weight.T).detach())


@pytest.mark.parametrize("name", ["frozen", "peft", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_answers_of_a_group_pass(name: str, dtype: str) -> None:
    operands = Operands.make(replace(GROUP, dtype=dtype, adapters=dtype), CPU)
    provider = PROVIDERS[name]
    errors = check(provider.make(operands, 0.0), operands, Exact.of(operands, provider.lora))
    kinds = ("y", "dA", "dB") if provider.lora else ("y",)
    assert set(errors) == {f"{kind}[{index}]" for kind in kinds for index in range(3)} | {"dx"}
    assert all(error > 0 for error in errors.values())


def test_exact_of_a_group_is_the_float64_reference() -> None:
    operands = Operands.make(GROUP, CPU)
    assert [tuple(member.weight.shape) for member in operands.members] == [(40, 48), (17, 48), (63, 48)]
    assert all(member.x is operands.x for member in operands.members)
    exact = Exact.of(operands, True).values
    x = operands.x.detach().double().requires_grad_()
    dx = torch.zeros_like(x)
    for index, member in enumerate(operands.members):
        leaves = [x, *(t.detach().double().requires_grad_() for t in (member.lora_A, member.lora_B))]
        y = lora_linear_reference(leaves[0], member.weight.double(), leaves[1], leaves[2], scaling=SCALING)
        own_dx, *adapters = torch.autograd.grad(y, leaves, member.dy.double())
        dx += own_dx
        for name, expected in zip(("y", "dA", "dB"), (y, *adapters), strict=True):
            torch.testing.assert_close(exact[f"{name}[{index}]"].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact["dx"].double(), dx, rtol=1e-6, atol=1e-6)


def test_a_wrong_member_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(operands: Operands, dropout: float) -> Layer:
        right = PROVIDERS["peft"].make(operands, dropout)

        def forward(x: torch.Tensor) -> list[torch.Tensor]:
            first, second, third = right.forward(x)
            return [first, _Corrupted.apply(second, 1.01), third]

        return Layer(forward, right.adapters)

    monkeypatch.setitem(PROVIDERS, "eager", Provider(make))
    found = [m for m in measure_case(GROUP, _plan(FLOOR, "eager"), {}) if m.provider == "eager"]
    assert [m.times for m in found] == [None, None]
    assert all("wrong answer: dx is off by" in str(m.reason) for m in found)


def test_a_group_that_would_go_member_by_member_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "explain_group", lambda *arguments, **options: SimpleNamespace(reason="it is odd"))
    with pytest.raises(Missing, match="it would go member by member: it is odd"):
        PROVIDERS["eager"].make(Operands.make(GROUP, CPU), 0.0)


class _Corrupted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, t: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return t.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None  # type: ignore[attr-defined]


@pytest.mark.parametrize(("wrong", "factor"), [("y", 1.001), ("dx", 1.001), ("dA", 1.001), ("dB", float("nan"))])
def test_a_wrong_answer_gets_no_time(wrong: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(operands: Operands, dropout: float) -> Layer:
        A, B = operands.lora_A, operands.lora_B

        def forward(x: torch.Tensor) -> list[torch.Tensor]:
            spoiled = {name: _Corrupted.apply(t, factor) if name == wrong else t for name, t in zip(("dx", "dA", "dB"), (x, A, B), strict=True)}  # noqa: E501
            y = lora_linear(spoiled["dx"], operands.weight, spoiled["dA"], spoiled["dB"], scaling=SCALING)
            # A factor on the detached part alone changes the value of y and no gradient.
            return [y + (factor - 1) * y.detach() if wrong == "y" else y]

        return Layer(forward, (A, B))

    monkeypatch.setitem(PROVIDERS, "eager", Provider(make))
    found = {(m.provider, m.part): m for m in measure_case(CASE, _plan(FLOOR, "eager"), {})}
    for part in ("forward", "step"):
        assert found[FLOOR, part].times is not None
        assert found["eager", part].times is None
        assert f"wrong answer: {wrong} is off by" in str(found["eager", part].reason)


def test_a_zero_lora_b_would_be_noticed() -> None:
    operands = Operands.make(CASE, CPU)
    layer = Layer(lambda x: [x @ operands.weight.T + 0 * (x @ operands.lora_A.T @ operands.lora_B.T)], (operands.lora_A, operands.lora_B))  # noqa: E501
    with pytest.raises(WrongAnswer, match="y is off"):
        check(layer, operands, Exact.of(operands, True))


def test_missing_providers_come_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)

    def broken(operands: Operands, dropout: float) -> Layer:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PROVIDERS, "peft-compile", Provider(broken))
    names = tuple(PROVIDERS)
    found = list(measure_case(CASE, _plan(*names), {}))
    assert {(m.provider, m.part) for m in found} == {(name, part) for name in names for part in ("forward", "step")}
    reasons = {m.provider: str(m.reason) for m in found if m.reason is not None}
    assert reasons["peft"] == "peft is not installed"
    assert reasons["bitsandbytes"] == "it is for 4-bit weights"
    assert reasons["peft-compile"] == "RuntimeError: out of memory"
    assert "CPU" in reasons["triton"] or "cpu" in reasons["triton"]
    assert reasons["cuda"]
    assert all((m.times is None) == (m.provider in reasons) for m in found)


def test_with_dropout_the_timed_layer_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def make(operands: Operands, dropout: float) -> Layer:
        asked.append(dropout)
        return PROVIDERS["peft"].make(operands, dropout)

    monkeypatch.setitem(PROVIDERS, "eager", Provider(make))
    dropping = Case(17, 48, 40, rank=3, dropout=0.25, dtype="float32", adapters="float32")
    found = list(measure_case(dropping, _plan("eager"), {}))
    assert asked == [0.0, 0.25]
    assert all(m.times is not None for m in found)


DROPPING = replace(CASE, M=5000, dropout=0.25)


@pytest.mark.parametrize("case", [DROPPING, replace(DROPPING, M=63, others=(17, 63))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_own_layers_are_checked_with_their_masks(case: Case, dtype: str) -> None:
    operands = Operands.make(replace(case, dtype=dtype, adapters=dtype), CPU)
    exact: dict[tuple[bool, float], Exact] = {}
    layer = checked(PROVIDERS["eager"], operands, exact)
    [((lora, p), values)] = exact.items()
    assert (lora, p) == (True, 0.25)
    # What was checked is what is timed: it drops, and at the next call something else.
    assert not torch.equal(layer.forward(operands.x)[0], layer.forward(operands.x)[0])
    check(layer, operands, values)
    with pytest.raises(WrongAnswer):
        check(PROVIDERS["eager"].make(operands, 0.2), operands, values)
    with pytest.raises(WrongAnswer):
        check(layer, operands, Exact.of(operands, True))


@pytest.mark.parametrize("others", [(), (17, 63)])
def test_exact_with_dropout_is_the_float64_reference(others: tuple[int, ...]) -> None:
    operands = Operands.make(replace(DROPPING, others=others), CPU)
    exact = Exact.of(operands, True, 0.25).values
    generator = torch.Generator().manual_seed(0)
    x = operands.x.detach().double().requires_grad_()
    dx = torch.zeros_like(x)
    for index, member in enumerate(operands.members):
        keep = keep_mask(torch.randint(0, 2**62, (1,), generator=generator), 5000, 48, 0.25)
        A, B = (t.detach().double().requires_grad_() for t in (member.lora_A, member.lora_B))
        masked = {"scaling": SCALING, "keep": keep, "dropout_p": 0.25}
        y = lora_linear_reference(x, member.weight.double(), A, B, **masked)  # type: ignore[arg-type]
        own_dx, dA, dB = torch.autograd.grad(y, (x, A, B), member.dy.double())
        dx += own_dx
        for name, expected in (("y", y), ("dA", dA), ("dB", dB)):
            found = exact[f"{name}[{index}]" if others else name]
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(exact["dx"].double(), dx, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("case", [replace(CASE, dropout=0.25), replace(GROUP, dropout=0.25)])
@pytest.mark.parametrize("wrong", ["y", "gradient", "mask"])
def test_what_is_wrong_only_with_dropout_gets_no_time(
    case: Case, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(compute: Any) -> Any:
        def run(x: torch.Tensor, *arguments: Any, dropout_p: float, **options: Any) -> Any:
            if wrong == "mask" and dropout_p:
                torch.rand(1)
            ys = compute(x, *arguments, dropout_p=dropout_p, **options)
            if not dropout_p or wrong == "mask":
                return ys
            first, *rest = [ys] if isinstance(ys, torch.Tensor) else ys
            first = first + 0.01 * first.detach() if wrong == "y" else _Corrupted.apply(first, 1.01)
            return [first, *rest] if rest else first

        return run

    monkeypatch.setattr(providers, "lora_linear", spoiled(providers.lora_linear))
    monkeypatch.setattr(providers, "lora_linear_group", spoiled(providers.lora_linear_group))
    found = {(m.provider, m.part): m for m in measure_case(case, _plan(FLOOR, "peft", "eager"), {})}
    for part in ("forward", "step"):
        assert found["peft", part].times is not None
        assert found["eager", part].times is None
        assert "wrong answer: " in str(found["eager", part].reason)
    # Without dropout nothing is wrong.
    assert all(m.times for m in measure_case(replace(case, dropout=0.0), _plan(FLOOR, "eager"), {}))


def test_progress_within_a_case() -> None:
    told: list[tuple[str, float]] = []
    plan = replace(_plan(FLOOR, "eager"), stage=lambda what, done: told.append((what, done)))
    list(measure_case(CASE, plan, {}))
    assert told == [
        ("checking frozen", 0.0),
        ("checking eager", pytest.approx(1 / 6)),
        *[("cpu, eager, forward", pytest.approx(1 / 3 + taken / 9)) for taken in range(4)],
        *[("cpu, eager, step", pytest.approx(2 / 3 + taken / 9)) for taken in range(4)],
    ]


def test_the_bar_moves_within_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    progress = Progress([CASE, GROUP], "measuring")
    for _ in progress:
        progress.stage("checking eager", 0.0)
        progress.stage("warm, graph, step", 0.5)
    shown = terminal.getvalue()
    assert re.search(r"measuring:  25%.* 0\.5/2 cases .*17x48x40 r3 float32, warm, graph, step", shown)
    assert re.search(r"measuring:  50%.* 1\.0/2 cases .*17x48x40\+17\+63 r3 float32, checking eager", shown)
    assert re.search(r"measuring: 100%.* 2\.0/2 cases ", shown)


def test_nf4_everybody_has_the_same_weight() -> None:
    pytest.importorskip("bitsandbytes")
    case = Case(17, 128, 64, rank=3, dtype="float32", adapters="float32", nf4=True)
    found = list(measure_case(case, _plan(FLOOR, "bitsandbytes", "peft", "eager"), {}))
    assert [m.reason for m in found if m.reason] == []
    assert len(found) == 8


def test_work_is_counted_by_hand() -> None:
    case = Case(8, 16, 32, rank=4)
    frozen = work_of(case, "forward", lora=False, adapter_bytes=2, weight_nf4=False)
    assert frozen == Work(flops=2 * 8 * 16 * 32, bytes=2 * (8 * 16 + 16 * 32 + 8 * 32))
    step = work_of(case, "step", lora=True, adapter_bytes=4, weight_nf4=False)
    assert step.flops == 2 * frozen.flops + 3 * 2 * 8 * 4 * (16 + 32)
    moved = 2 * (3 * 8 * 16 + 2 * 16 * 32 + 2 * 8 * 32) + 3 * 4 * 4 * (16 + 32)
    assert step.bytes == moved
    nf4 = work_of(case, "forward", lora=False, adapter_bytes=2, weight_nf4=True)
    assert frozen.bytes - nf4.bytes == 16 * 32 * (2 - 0.5 - 1 / 64)


def test_the_work_of_a_group_reads_x_once() -> None:
    case = Case(8, 16, 32, rank=4, others=(64, 4))
    frozen = work_of(case, "forward", lora=False, adapter_bytes=2, weight_nf4=False)
    assert frozen == Work(flops=2 * 8 * 16 * 100, bytes=2 * (8 * 16 + 16 * 100 + 8 * 100))
    step = work_of(case, "step", lora=True, adapter_bytes=4, weight_nf4=False)
    assert step.flops == 2 * frozen.flops + 3 * 2 * 8 * 4 * (3 * 16 + 100)
    assert step.bytes == 2 * (3 * 8 * 16 + 2 * 16 * 100 + 2 * 8 * 100) + 3 * 4 * 4 * (3 * 16 + 100)


def test_ceilings() -> None:
    ceilings = Ceilings(bytes_per_second=1e12, flops_per_second=1e14)
    assert ceilings.microseconds(Work(flops=1e9, bytes=1e6)) == pytest.approx(10.0)
    assert ceilings.microseconds(Work(flops=1e6, bytes=1e8)) == pytest.approx(100.0)
    measured = measure_ceilings(CpuClock("cpu"), CPU, torch.float32, 2)
    assert 1e6 < measured.bytes_per_second < 1e14
    assert 1e6 < measured.flops_per_second < 1e15


def _published() -> Iterator[tuple[str, list[tuple[int, int]]]]:
    yield "llama-8b", [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
    yield "llama-70b", [(8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)]
    yield "qwen-7b", [(3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)]
    yield "qwen-32b", [(5120, 5120), (5120, 1024), (5120, 27648), (27648, 5120)]
    yield "mistral-7b", [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
    yield "gemma-9b", [(3584, 4096), (3584, 2048), (4096, 3584), (3584, 14336), (14336, 3584)]


def test_projections_of_the_models() -> None:
    assert {name: projection_shapes(name) for name in MODELS} == dict(_published())


def test_suites_cover_what_they_promise() -> None:
    shapes = {(case.K, case.N) for case in SUITES["shapes"]}
    assert shapes == {kn for _, shapes in _published() for kn in shapes}
    assert {1, 16384} <= {case.M for case in SUITES["m"]}
    assert {case.nf4 for case in SUITES["m"]} == {True, False}
    assert {case.rank for case in SUITES["ranks"]} == {8, 16, 32, 64, 128, 256}
    assert all(case.dropout for case in SUITES["dropout"])
    assert {(case.M, case.K, case.outputs) for case in SUITES["groups"]} == {
        (M, 4096, outputs) for M in (2048, 8192) for outputs in ("4096+1024+1024", "14336+14336")
    }


def test_missing_is_raised_for_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="peft is not installed"):
        PROVIDERS["peft"].make(Operands.make(CASE, CPU), 0.0)
