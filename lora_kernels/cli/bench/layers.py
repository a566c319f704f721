"""Layers, and groups that share x: each provider is checked, then timed beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_kernels.cli.bench.cases import DTYPES, Case, Operands
from lora_kernels.cli.bench.check import Exact, check
from lora_kernels.cli.bench.clock import Clock, Step, Times, first_line, interleaved
from lora_kernels.cli.bench.providers import FLOOR, PROVIDERS, Layer, Missing, Provider, WrongAnswer
from lora_kernels.cli.bench.results import Measurement
from lora_kernels.cli.bench.roofline import Ceilings, work_of
from lora_kernels.selftest import failures

PARTS = ("forward", "step")


@dataclass(frozen=True)
class Plan:
    """How a case is measured. No clocks: its memory alone."""

    device: torch.device
    providers: tuple[str, ...]
    clocks: Sequence[Clock]
    samples: int
    parts: tuple[str, ...] = PARTS


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
    for clock in plan.clocks:
        for part in plan.parts:
            times = interleaved(_steps(layers, operands, part), clock, plan.samples)
            for name, result in times.items():
                yield _measurement(case, name, part, clock, result, peaks[name, part], ceilings, layers[name])
    if not plan.clocks:
        for (name, part), peak in peaks.items():
            yield Measurement(case, name, part, "memory", "eager", peak_bytes=peak)


def ceilings_key(clock: Clock) -> str:
    """Under which name the ceilings of a clock are kept."""
    return f"{clock.regime}, {clock.launches}"


def _layers(operands: Operands, plan: Plan) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that gave the right answer, and why the others take no part.

    The answer is checked without dropout, because every provider draws masks of its own.
    """
    exact: dict[bool, Exact] = {}
    layers, reasons = {}, {}
    for name in plan.providers:
        provider = PROVIDERS[name]
        try:
            layer = provider.make(operands, 0.0)
            if provider.lora not in exact:
                exact[provider.lora] = Exact.of(operands, provider.lora)
            check(layer, operands, exact[provider.lora])
            layers[name] = _with_dropout(provider, operands, layer)
        except (Missing, WrongAnswer) as refusal:
            reasons[name] = str(refusal)
        except failures() as error:
            reasons[name] = first_line(error)
    return layers, reasons


def _with_dropout(provider: Provider, operands: Operands, layer: Layer) -> Layer:
    if not operands.case.dropout:
        return layer
    return provider.make(operands, operands.case.dropout)


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
