"""Layers, and groups that share x: each provider is checked, then timed beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from lora_kernels.cli.bench.cases import DTYPES, Case, Operands
from lora_kernels.cli.bench.check import Exact, check
from lora_kernels.cli.bench.clock import Clock, Step, Times, first_line, interleaved
from lora_kernels.cli.bench.progress import Stage, silent, within
from lora_kernels.cli.bench.providers import FLOOR, PROVIDERS, Layer, Missing, Provider, WrongAnswer
from lora_kernels.cli.bench.results import Measurement
from lora_kernels.cli.bench.roofline import Ceilings, work_of
from lora_kernels.selftest import failures

PARTS = ("forward", "step")


@dataclass(frozen=True)
class Plan:
    """How a case is measured. No clocks: its memory alone. `stage` is told what begins, as a bar is to show it."""

    device: torch.device
    providers: tuple[str, ...]
    clocks: Sequence[Clock]
    samples: int
    parts: tuple[str, ...] = PARTS
    stage: Stage = silent

    @property
    def stages(self) -> int:
        """The checks, and then the samples of each part by each clock, which take about as long each."""
        return 1 + len(self.clocks) * len(self.parts)


def measure_case(case: Case, plan: Plan, ceilings: dict[str, Ceilings]) -> Iterator[Measurement]:
    """Every figure of a case; a provider without one comes with the reason."""
    try:
        operands = Operands.make(case, plan.device)
    except failures() as error:
        yield from _without_figures(case, plan, dict.fromkeys(plan.providers, f"no operands: {first_line(error)}"))
        return
    layers, reasons = _layers(operands, plan)
    peaks = {
        (name, part): _peak_bytes(step, plan.device)
        for part in plan.parts
        for name, step in _steps(layers, operands, part).items()
    }
    yield from _without_figures(case, plan, reasons)
    for index, (clock, part) in enumerate(product(plan.clocks, plan.parts), start=1):
        stage = within(plan.stage, f"{ceilings_key(clock)}, {part}", index / plan.stages, 1 / plan.stages)
        times = interleaved(_steps(layers, operands, part), clock, plan.samples, stage)
        for name, result in times.items():
            yield _measurement(case, name, part, clock, result, peaks[name, part], ceilings, layers[name])
    if not plan.clocks:
        for (name, part), peak in peaks.items():
            yield Measurement(case, name, part, "memory", "eager", peak_bytes=peak)


def ceilings_key(clock: Clock) -> str:
    """Under which name the ceilings of a clock are kept."""
    return f"{clock.regime}, {clock.launches}"


def _layers(operands: Operands, plan: Plan) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that gave the right answer, and why the others take no part."""
    exact: dict[tuple[bool, float], Exact] = {}
    layers, reasons = {}, {}
    for done, name in enumerate(plan.providers):
        plan.stage(f"checking {name}", done / len(plan.providers) / plan.stages)
        try:
            layers[name] = checked(PROVIDERS[name], operands, exact)
        except (Missing, WrongAnswer) as refusal:
            reasons[name] = str(refusal)
        except failures() as error:
            reasons[name] = first_line(error)
    return layers, reasons


def checked(provider: Provider, operands: Operands, exact: dict[tuple[bool, float], Exact]) -> Layer:
    """The layer that is timed. `exact` keeps the answers for the providers that follow.

    Where nobody can know the masks, as with PEFT, the answer is checked without dropout.

    Raises:
        Missing: the provider cannot take part.
        WrongAnswer: its answer is not right.
    """
    dropout = operands.case.dropout
    known = dropout if provider.own_masks else 0.0
    layer = provider.make(operands, known)
    if (provider.lora, known) not in exact:
        exact[provider.lora, known] = Exact.of(operands, provider.lora, known)
    check(layer, operands, exact[provider.lora, known])
    return layer if known == dropout else provider.make(operands, dropout)


def step_of(layer: Layer, operands: Operands, part: str) -> Step:
    """A part of a layer's work, to be called as often as one likes."""
    x, dys, leaves = operands.x, operands.dys, (operands.x, *layer.adapters)
    if part == "forward":
        return lambda: layer.forward(x)
    return lambda: torch.autograd.grad(layer.forward(x), leaves, dys)


def _steps(layers: dict[str, Layer], operands: Operands, part: str) -> dict[str, Step]:
    return {name: step_of(layer, operands, part) for name, layer in layers.items()}


def _peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """What a step allocates at most, beyond what was there; its result counts. On a CPU nobody keeps account."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _without_figures(case: Case, plan: Plan, reasons: dict[str, str]) -> Iterator[Measurement]:
    regimes = [(clock.regime, clock.launches) for clock in plan.clocks] or [("memory", "eager")]
    for regime, launches in regimes:
        for part in plan.parts:
            for name, reason in reasons.items():
                yield Measurement(case, name, part, regime, launches, reason=reason)


def _measurement(
    case: Case,
    name: str,
    part: str,
    clock: Clock,
    result: Times | str,
    peak: int | None,
    ceilings: dict[str, Ceilings],
    layer: Layer,
) -> Measurement:
    adapter_bytes = layer.adapters[0].element_size() if layer.adapters else DTYPES[case.adapters].itemsize
    work = work_of(case, part, PROVIDERS[name].lora, adapter_bytes, case.nf4 and name != FLOOR)
    ceiling = ceilings.get(ceilings_key(clock))
    return Measurement(
        case,
        name,
        part,
        clock.regime,
        clock.launches,
        times=result if isinstance(result, Times) else None,
        reason=result if isinstance(result, str) else None,
        peak_bytes=peak,
        bytes=work.bytes,
        flops=work.flops,
        roofline_us=None if ceiling is None else ceiling.microseconds(work),
    )
