"""One LoRA linear against the frozen linear: forward and step, as ratios to the floor of the same run.

    python bench/linear.py                                  # every shape at M = 8192 and 2048, warm, eager launches
    python bench/linear.py --graph --regime cool            # GPU time alone, on a boosting chip
    python bench/linear.py --shapes 8192x4096x4096 --rank 64 --dropout 0.1 --adapters float32
    python bench/linear.py --cpu                            # CPU time of an eager forward plus backward
    python bench/linear.py --memory                         # peak memory of a step beside what it must be

A provider is timed only after its output and gradients were compared with float64; without dropout, for two
providers draw two masks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import cpu_microseconds, interleaved

from lora_kernels import lora_linear, lora_linear_reference

DEFAULT_SHAPES = [
    f"{m}x{k}x{n}"
    for m in (8192, 2048)
    for k, n in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192))
]


@dataclass
class Case:
    """Operands of one layer; B is not zero."""

    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    dropout: float

    @staticmethod
    def make(shape: str, rank: int, dropout: float, adapters: torch.dtype) -> Case:
        M, K, N = map(int, shape.split("x"))
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*size: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, generator=generator, device="cuda") * scale).to(dtype)

        return Case(
            x=randn(M, K).requires_grad_(),
            dy=randn(M, N),
            weight=randn(N, K, scale=K**-0.5),
            lora_A=randn(rank, K, dtype=adapters, scale=K**-0.5).requires_grad_(),
            lora_B=randn(N, rank, dtype=adapters, scale=rank**-0.5).requires_grad_(),
            scaling=2.0,
            dropout=dropout,
        )

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.lora_A, self.lora_B


Forward = Callable[[Case], torch.Tensor]


def frozen(case: Case) -> torch.Tensor:
    return torch.nn.functional.linear(case.x, case.weight)


def ours(backend: str) -> Forward:
    def forward(case: Case) -> torch.Tensor:
        return lora_linear(
            case.x,
            case.weight,
            case.lora_A,
            case.lora_B,
            scaling=case.scaling,
            dropout_p=case.dropout,
            backend=backend,
        )

    return forward


def stock_peft(case: Case) -> Forward:
    """PEFT's own layer around the case's tensors."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    N, K = case.weight.shape
    base = torch.nn.Linear(K, N, bias=False, device="meta")
    base.weight = torch.nn.Parameter(case.weight, requires_grad=False)
    rank = case.lora_A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(case.scaling * rank), lora_dropout=case.dropout)
    try:
        layer = Linear(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha)
    except TypeError:  # before PEFT 0.19 the constructor took the fields one by one
        layer = Linear(base, "default", r=rank, lora_alpha=config.lora_alpha, lora_dropout=case.dropout)
    layer.lora_A["default"].weight = torch.nn.Parameter(case.lora_A.detach())
    layer.lora_B["default"].weight = torch.nn.Parameter(case.lora_B.detach())
    layer.train()
    case.lora_A, case.lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lambda case: layer(case.x)


def step_of(forward: Forward, case: Case, leaves: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(case), leaves, case.dy)


def check(forward: Forward, case: Case) -> None:
    """Compares with float64 on a slice that it computes with the same operands; raises where a value is wrong."""
    M = case.x.shape[0]
    small = copy.copy(case)
    small.x, small.dy = case.x[: min(M, 512)].detach().requires_grad_(), case.dy[: min(M, 512)]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (*small.leaves, case.weight)]
    y64 = lora_linear_reference(exact[0], exact[3], exact[1], exact[2], scaling=case.scaling)
    want = [y64, *torch.autograd.grad(y64, exact[:3], small.dy.double())]
    y = forward(small)
    values = [y, *torch.autograd.grad(y, small.leaves, small.dy)]
    for name, got, ref in zip(("y", "dx", "dA", "dB"), values, want, strict=True):
        error = float(((got.double() - ref).norm() / ref.norm()).detach())
        if not error < 5e-3:
            raise SystemExit(f"wrong answer: {name} is off by {error:.1e}; it gets no time")
    with torch.no_grad():
        full, rows = forward(case), forward(small)
        if not torch.allclose(full[: rows.shape[0]].float(), rows.float(), atol=0.05, rtol=0.05):
            raise SystemExit("wrong answer: the first rows depend on how many follow; it gets no time")


def providers(case: Case, names: list[str]) -> dict[str, tuple[Forward, Case]]:
    def make(name: str, own: Case) -> Forward:
        return stock_peft(own) if name == "peft" else ours(name)

    result: dict[str, tuple[Forward, Case]] = {}
    for name in names:
        plain, own = copy.copy(case), copy.copy(case)
        plain.dropout = 0.0
        check(make(name, plain), plain)
        result[name] = (make(name, own), own)
    return result


def time_case(case: Case, names: list[str], regime: str, graph: bool) -> dict[str, tuple[float, float]]:
    forwards: dict[str, Callable[[], object]] = {"frozen": lambda: frozen(case)}
    steps: dict[str, Callable[[], object]] = {"frozen": step_of(frozen, case, (case.x,))}
    for name, (forward, own) in providers(case, names).items():
        forwards[name] = lambda forward=forward, own=own: forward(own)
        steps[name] = step_of(forward, own, own.leaves)
    first, second = interleaved(forwards, regime, graph), interleaved(steps, regime, graph)
    return {name: (first[name], second[name]) for name in forwards}


def peak_extra(step: Callable[[], object]) -> int:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, metavar="MxKxN")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--adapters", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--providers", nargs="+", default=["peft", "eager", "triton"])
    parser.add_argument("--regime", choices=["warm", "cool"], default="warm")
    parser.add_argument("--graph", action="store_true", help="time the replay of a CUDA graph")
    parser.add_argument("--cpu", action="store_true", help="time the CPU instead of the GPU")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of a step")
    options = parser.parse_args()
    launches = "graph replay" if options.graph else "eager launches"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: forward / step as ratios to frozen")
    print(f"rank {options.rank}, adapters {options.adapters}, dropout {options.dropout}, {options.regime}, {launches}")
    for shape in options.shapes:
        case = Case.make(shape, options.rank, options.dropout, getattr(torch, options.adapters))
        if options.cpu:
            base = cpu_microseconds(step_of(frozen, case, (case.x,)))
            row = f"frozen {base:6.1f} us"
            for name, (forward, own) in providers(case, options.providers).items():
                row += f"   {name} {cpu_microseconds(step_of(forward, own, own.leaves)) / base:.2f}"
        elif options.memory:
            base = peak_extra(step_of(frozen, case, (case.x,)))
            row = f"frozen {base / 2**20:7.1f} MiB"
            for name, (forward, own) in providers(case, options.providers).items():
                extra = peak_extra(step_of(forward, own, own.leaves)) - base
                row += f"   {name} +{extra / 2**20:.1f} MiB"
        else:
            times = time_case(case, options.providers, options.regime, options.graph)
            base_forward, base_step = times.pop("frozen")
            row = f"frozen {base_forward:6.0f} / {base_step:6.0f} us"
            for name, (forward_us, step_us) in times.items():
                row += f"   {name} {forward_us / base_forward:.2f} / {step_us / base_step:.2f}"
        print(f"{shape:>18}  {row}", flush=True)


if __name__ == "__main__":
    main()
