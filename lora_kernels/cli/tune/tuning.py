"""A run of tune: cases one after the other, then the choice; Ctrl-C ends either and keeps what is complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import cache, partial
from itertools import chain

import torch
import triton
from tqdm import tqdm

import lora_kernels
from lora_kernels.backends.triton import ahead
from lora_kernels.backends.triton.tiles import (
    GradTiles,
    OnePassTiles,
    candidates,
    chip_of,
    shipped_grad_tiles,
    shipped_tiles,
)
from lora_kernels.backends.triton.tuned import GradEntry, OnePassEntry, TunedTable
from lora_kernels.cli.bench.cases import DTYPES, Case, Operands
from lora_kernels.cli.bench.clock import Clock, Times
from lora_kernels.cli.bench.progress import Progress, Stage, within
from lora_kernels.cli.tune.measure import Grads, OnePass, compile_ahead, holds, measure_grads, measure_one_pass
from lora_kernels.cli.tune.search import choose, grad_candidates, one_pass_candidates
from lora_kernels.cli.waiting import bar


class Tuning:
    """The configurations that were fastest on the cases measured by now, which are all of one dtype."""

    def __init__(self, cases: Sequence[Case], device: torch.device, clock: Clock, samples: int) -> None:
        self.cases, self.device, self.clock, self.samples = cases, device, clock, samples
        self.chip, self.dtype = chip_of(device), DTYPES[cases[0].dtype]
        self.finished = 0
        self.interrupted = False
        self.entries: list[OnePassEntry | GradEntry] = []
        self._by_output: dict[tuple[bool, int, int], list[dict[OnePassTiles, Times | str]]] = {}
        self._grads: list[dict[GradTiles, Times | str]] = []

    def run(self) -> None:
        """Measures and chooses. After Ctrl-C `entries` has what comes of the cases that were finished before."""
        try:
            progress = Progress(self.cases, "measuring")
            for case in progress:
                self._measure(case, progress.stage)
        except KeyboardInterrupt:
            self.interrupted = True
            ahead.forget()
        try:
            # Each choice may compile its configuration for the most demanding call.
            for entry in bar(self._choices(), "choice", "choosing", len(self._by_output) + 1):
                self.entries.append(entry)
        except KeyboardInterrupt:
            self.interrupted = True

    def table(self) -> TunedTable:
        """What was chosen, as the package reads it."""
        versions = f"lora_kernels {lora_kernels.__version__}, triton {triton.__version__}"
        made = f"{datetime.now(timezone.utc).date()}, {versions}"
        return TunedTable(
            self.chip,
            f"{made}, {self.extent}" if self.interrupted else made,
            tuple(entry for entry in self.entries if isinstance(entry, OnePassEntry)),
            tuple(entry for entry in self.entries if isinstance(entry, GradEntry)),
        )

    @property
    def extent(self) -> str:
        """How much of an interrupted run there is."""
        return f"interrupted after {self.finished} of {len(self.cases)} cases, with {len(self.entries)} choices made"

    def _measure(self, case: Case, stage: Stage) -> None:
        """All of a case, or nothing."""
        itemsize = self.dtype.itemsize
        operands = Operands.make(case, self.device)
        layer, grads = OnePass.of(operands), Grads.of(operands)
        uses_tma = [problem.use_tma() and self.chip.has_tma for problem in layer]
        tried = [one_pass_candidates(self.chip, itemsize, use_tma) for use_tma in uses_tma]
        tried_grads = grad_candidates(self.chip, itemsize)
        products = (partial(problem.run, tiles) for problem, some in zip(layer, tried, strict=True) for tiles in some)
        compile_ahead(chain(products, (partial(grads.run, tiles) for tiles in tried_grads)))
        outputs = []
        for index, problem in enumerate(layer):
            part = within(stage, "forward" if problem.forward else "dx", index / 3, 1 / 3)
            measured = measure_one_pass(problem, tried[index], self.clock, self.samples, part)
            outputs.append(((uses_tma[index], case.M, problem.weight.shape[1]), measured))
        part = within(stage, "adapter gradients", 2 / 3, 1 / 3)
        measured_grads = measure_grads(grads, tried_grads, self.clock, self.samples, part)
        for output, measured in outputs:
            self._by_output.setdefault(output, []).append(measured)
        self._grads.append(measured_grads)
        self.finished += 1

    def _choices(self) -> Iterator[OnePassEntry | GradEntry]:
        if not self.finished:
            return
        itemsize = self.dtype.itemsize
        shipped_grads = shipped_grad_tiles(self.chip, itemsize)

        @cache
        def runs_everywhere(tiles: OnePassTiles | GradTiles) -> bool:
            shipped = (*candidates(self.chip, itemsize, True), *candidates(self.chip, itemsize, False), shipped_grads)
            return tiles in shipped or holds(tiles, self.dtype, self.device)

        for (use_tma, M, N), problems in sorted(self._by_output.items()):
            shipped = shipped_tiles(self.chip, itemsize, use_tma, M, N)
            chosen = choose(problems, shipped, runs_everywhere)
            _report(f"outputs {M} x {N}", chosen, shipped, [reason for p in problems for reason in p.values()])
            if chosen is not None:
                yield OnePassEntry(itemsize, use_tma, M, N, chosen[0])
        best = choose(self._grads, shipped_grads, runs_everywhere)
        _report("adapter gradients", best, shipped_grads, [reason for g in self._grads for reason in g.values()])
        if best is not None:
            yield GradEntry(itemsize, best[0])


def _report(title: str, chosen: tuple[object, float] | None, shipped: object, results: list[Times | str]) -> None:
    refused = sum(isinstance(result, str) for result in results)
    tail = f"   ({refused} of {len(results)} measurements without a time)" if refused else ""
    if chosen is None:
        line = f"{title}: no configuration ran, the shipped one stays{tail}"
    else:
        tiles, gain = chosen
        verdict = "the shipped one" if tiles == shipped else f"the shipped one takes {gain:.3f} of its time"
        line = f"{title}: {_short(tiles)}, {verdict}{tail}"
    # Around the progress bar.
    tqdm.write(line)


def _short(tiles: object) -> str:
    return "x".join(str(value) for value in vars(tiles).values() if type(value) is int)
