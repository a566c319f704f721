"""One problem in every configuration: the answer first, then the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_kernels.backends import Precision
from lora_kernels.backends.triton import ahead, backward_launch, launch, launches
from lora_kernels.backends.triton.tiles import GradTiles, OnePassTiles
from lora_kernels.cli.bench.cases import SCALING, Operands
from lora_kernels.cli.bench.check import LIMITS
from lora_kernels.cli.bench.clock import Clock, Step, Times, first_line, interleaved
from lora_kernels.cli.tune.search import Tiles
from lora_kernels.dropout import Dropout
from lora_kernels.selftest import failures

# The share of the checks in a problem's progress.
_CHECKS = 0.8


@dataclass(frozen=True)
class OnePass:
    """out = left weight + S up with S = SCALING * left down: the forward, or the gradient of the input."""

    left: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    forward: bool

    @staticmethod
    def of(operands: Operands) -> tuple[OnePass, OnePass]:
        """The forward and the dx of a layer."""
        x, dy, A, B = (t.detach() for t in (operands.x, operands.dy, operands.lora_A, operands.lora_B))
        return OnePass(x, operands.weight.T, A.T, B.T, True), OnePass(dy, operands.weight, B, A, False)

    def run(self, tiles: OnePassTiles | None) -> tuple[Tensor, Tensor]:
        """One launch; None takes what the package would."""
        return launch.one_pass(
            self.left, self.weight, self.down, self.up, None, SCALING, None, self.forward, "native", tiles=tiles
        )

    def use_tma(self) -> bool:
        """Whether the launcher would ask for a configuration with TMA."""
        out = torch.empty(self.left.shape[0], self.weight.shape[1], dtype=self.left.dtype, device="meta")
        stored = self.weight.T if self.weight.stride(0) == 1 else self.weight
        return all(launches.fits_tma(t) for t in (self.left, stored)) and out.shape[1] * out.element_size() % 16 == 0

    def exact(self) -> tuple[Tensor, Tensor]:
        """out and S in float64, rounded to float32."""
        left = self.left.double()
        s = SCALING * (left @ self.down.double())
        return (left @ self.weight.double() + s @ self.up.double()).float(), s.float()


@dataclass(frozen=True)
class Grads:
    """dA = t^T x and dB = dy^T s, in the dtype of x."""

    x: Tensor
    dy: Tensor
    s: Tensor
    t: Tensor

    @staticmethod
    def of(operands: Operands) -> Grads:
        """Those of a layer, but for the scaling."""
        x, dy = operands.x.detach(), operands.dy
        return Grads(x, dy, x @ operands.lora_A.detach().T, dy @ operands.lora_B.detach())

    def run(self, tiles: GradTiles) -> tuple[Tensor | None, Tensor | None]:
        """One launch."""
        return backward_launch.adapter_grads(self.x, self.dy, self.s, self.t, None, self.x.dtype, tiles=tiles)

    def exact(self) -> tuple[Tensor, Tensor]:
        """dA and dB in float64, rounded to float32."""
        return (self.t.double().T @ self.x.double()).float(), (self.dy.double().T @ self.s.double()).float()


def compile_ahead(runs: Iterable[Callable[[], object]]) -> None:
    """Has the kernels of runs compiled side by side, on a GPU; whoever runs one then waits for that one alone."""
    if not torch.cuda.is_available() or not ahead.compiles_in_threads():
        return
    with ahead.rehearsal():
        for run in runs:
            # What fails is seen again, and reported, where it is checked.
            with suppress(*failures()):
                run()


def measure_one_pass(
    problem: OnePass,
    candidates: Sequence[OnePassTiles],
    clock: Clock,
    samples: int,
    progress: Callable[[float], None],
) -> dict[OnePassTiles, Times | str]:
    """The time of each configuration, or why it has none. `progress` is told from 0 to 1 how much is done."""
    return _measure(problem.run, candidates, problem.exact(), problem.left.dtype, clock, samples, progress)


def measure_grads(
    problem: Grads,
    candidates: Sequence[GradTiles],
    clock: Clock,
    samples: int,
    progress: Callable[[float], None],
) -> dict[GradTiles, Times | str]:
    """The same of the gradients of an adapter."""
    return _measure(problem.run, candidates, problem.exact(), problem.x.dtype, clock, samples, progress)


def _measure(
    run: Callable[[Tiles], tuple[Tensor | None, ...]],
    candidates: Sequence[Tiles],
    exact: tuple[Tensor, ...],
    dtype: torch.dtype,
    clock: Clock,
    samples: int,
    progress: Callable[[float], None],
) -> dict[Tiles, Times | str]:
    result: dict[Tiles, Times | str] = {}
    steps: dict[str, Step] = {}
    names: dict[str, Tiles] = {}
    for done, tiles in enumerate(candidates):
        # Each is compiled before its check, which takes most of the time.
        progress(_CHECKS * done / len(candidates))
        fault = _fault(run, tiles, exact, LIMITS[dtype])
        if fault is None:
            names[str(tiles)] = tiles
            steps[str(tiles)] = partial(run, tiles)
        else:
            result[tiles] = fault
    times = interleaved(steps, clock, samples, lambda taken: progress(_CHECKS + (1 - _CHECKS) * taken))
    return result | {names[name]: value for name, value in times.items()}


def _fault(
    run: Callable[[Tiles], tuple[Tensor | None, ...]], tiles: Tiles, exact: tuple[Tensor, ...], limit: float
) -> str | None:
    """Why a configuration gets no time: it does not compile, does not fit, or computes something else."""
    try:
        got = run(tiles)
    except failures() as error:
        return first_line(error)
    for value, expected in zip(got, exact, strict=True):
        assert value is not None
        distance = float((value.float() - expected).norm() / expected.norm())
        if not distance < limit:
            return f"wrong answer: off by {distance:.1e}"
    return None


def holds(tiles: OnePassTiles | GradTiles, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a configuration also runs where kernels need most: masks, a large rank, float32 adapters.

    A shipped one does, which is tested; a table must not bring one that fails in the middle of somebody's training.
    """
    try:
        _run_demanding(tiles, "native", dtype, device)
        if dtype == torch.bfloat16:
            _run_demanding(tiles, "split", dtype, device)
    except failures():
        return False
    return True


def _run_demanding(
    tiles: OnePassTiles | GradTiles, precision: Precision, dtype: torch.dtype, device: torch.device
) -> None:
    rank = 64
    narrow = torch.float32 if precision == "split" else dtype
    x, weight = (torch.randn(512, 512, device=device).to(dtype) for _ in range(2))
    A, B, S = (torch.randn(size, device=device).to(narrow) for size in ((rank, 512), (512, rank), (512, rank)))
    bias = torch.zeros(512, dtype=dtype, device=device)
    dropout = Dropout.draw(0.1, device)
    if isinstance(tiles, GradTiles):
        backward_launch.adapter_grads(x, x, S, S, dropout, narrow, tiles=tiles)
    else:
        launch.one_pass(x, weight.T, A.T, B.T, bias, 1.0, dropout, True, precision, tiles=tiles)
        launch.one_pass(x, weight, B, A, None, 1.0, dropout, False, precision, tiles=tiles)
