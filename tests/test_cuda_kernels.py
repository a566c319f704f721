"""The CUDA backend on a GPU: its accuracy, its masks, its bits, streams and graphs, and NF4."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import HAS_GPU, Case, grid
from graphs import captured
from test_linear import drawn, run  # noqa: F401
from test_linear import test_is_as_exact_as_peft as check_accuracy
from tolerance import assert_as_exact_as_peft, peft_sequence

from lora_kernels import NF4Weight, lora_linear, lora_linear_reference
from lora_kernels.backends import cuda, cuda_build
from lora_kernels.dropout import Dropout

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

if HAS_GPU:
    _capability = torch.cuda.get_device_capability()
    if not cuda_build.is_built(_capability) and cuda_build.missing() is not None:
        pytestmark = [pytestmark, pytest.mark.skip(reason=f"nothing can be compiled: {cuda_build.missing()}")]


@pytest.fixture(params=[False, True], ids=["for this chip", "portable"])
def portable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel for every chip runs, or the one for this one where it fits."""
    monkeypatch.setattr(cuda, "one_pass", partial(cuda.one_pass, portable=request.param))
    return bool(request.param)


@pytest.mark.parametrize("case", grid(HAS_GPU), ids=str)
def test_is_as_exact_as_peft(
    case: Case,
    portable: bool,
    device: torch.device,
    drawn: list[torch.Tensor],  # noqa: F811
) -> None:
    check_accuracy(case, "cuda", device, drawn)


@pytest.mark.parametrize("other", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_has_the_masks_of_the_others(other: str, dtype: torch.dtype, portable: bool, device: torch.device) -> None:
    """What differs from no dropout does so in the same places, and by the same amount."""
    t = Case(300, 520, 264, 16, dtype).tensors(device)

    def step(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(5)
        leaves = [v.detach().requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
        y = lora_linear(leaves[0], torch.zeros_like(t.weight), *leaves[1:], dropout_p=0.5, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, t.dy)]

    ours, theirs = step("cuda"), step(other)
    # Without a base, what is dropped of dx is zero to the bit.
    assert torch.equal(ours[1] == 0, theirs[1] == 0)
    assert 0.4 < float((ours[1] == 0).float().mean()) < 0.6
    for value, want in zip(ours, theirs, strict=True):
        error = (value.double() - want.double()).norm() / want.double().norm()
        assert error < (0.01 if dtype == BF16 else 1e-5)


# Who computes S, forward and backward, in the kernel for Hopper on 132 multiprocessors: the first tiles (T), or, where
# the last wave leaves enough of them idle, clusters (C) or single blocks (B) that have a tile less.
WHOSE_S = [
    (4096, 1024, 2048, 16),  # TT
    (8100, 1000, 4096, 16),  # CT: two shares for each cluster, and fewer rows than the last one has
    (300, 1000, 2000, 8),  # CC: eight parts of K, of two steps and of four; a block without a row
    (777, 1352, 1544, 40),  # CC: parts with an odd number of steps
    (2000, 500, 2000, 64),  # TC: two chunks of the rank, as above
    (129, 40, 512, 1),  # CC: less than a step
    (130, 72, 33000, 16),  # CC
    (100, 1000, 25600, 40),  # BC
    (64, 4096, 14336, 16),  # BC
    (100, 25600, 1000, 16),  # CB
]


@pytest.mark.parametrize("size", WHOSE_S, ids=str)
def test_s_is_right_whoever_computes_it(size: tuple[int, int, int, int], device: torch.device) -> None:
    t = Case(*size, BF16).tensors(device)
    d = t.double()
    exact_s, exact_t = 1.5 * d.x @ d.lora_A.T, 1.5 * d.dy @ d.lora_B
    exact = [d.x @ d.weight.T + exact_s @ d.lora_B.T, exact_s, d.dy @ d.weight + exact_t @ d.lora_A, exact_t]

    def once() -> list[torch.Tensor]:
        y, s = cuda.forward(t.x, t.weight, t.lora_A, t.lora_B, None, 1.5, None, "native", True)
        dx, dt = cuda.backward_input(t.dy, t.weight, t.lora_A, t.lora_B, 1.5, None, "native", True)
        return [y, s, dx, dt]  # type: ignore[list-item]

    first = once()
    for value, want in zip(first, exact, strict=True):
        assert float((value.double() - want).norm() / want.norm()) < 5e-3
    for _ in range(5):
        for value, want in zip(once(), first, strict=True):
            assert torch.equal(value, want)


def test_same_inputs_same_bits(portable: bool, device: torch.device) -> None:
    t = Case(3000, 1024, 520, 40, BF16, dropout=0.2, bias=True).tensors(device)
    mask = Dropout(0.2, torch.tensor([11], device=device))

    def once() -> list[torch.Tensor]:
        y, s = cuda.forward(t.x, t.weight, t.lora_A, t.lora_B, t.bias, 1.5, mask, "native", True)
        dx, dt = cuda.backward_input(t.dy, t.weight, t.lora_A, t.lora_B, 1.5, mask, "native", True)
        dA, dB = cuda.backward_adapters(t.x, t.dy, s, dt, mask, FP32)
        return [y, s, dx, dt, dA, dB]  # type: ignore[list-item]

    first = once()
    for _ in range(10):
        for value, want in zip(once(), first, strict=True):
            assert torch.equal(value, want)


def test_runs_on_the_current_stream(portable: bool, device: torch.device) -> None:
    t = Case(2048, 1024, 1024, 16, BF16).tensors(device)
    arguments = (t.weight, t.lora_A, t.lora_B)
    want = lora_linear(t.x, *arguments, backend="cuda")
    stream, late = torch.cuda.Stream(), torch.zeros_like(t.x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(t.x)
        got = lora_linear(late, *arguments, backend="cuda")
    stream.synchronize()
    assert torch.equal(got, want)


def test_a_captured_graph_replays(portable: bool, device: torch.device) -> None:
    t = Case(384, 512, 512, 16, BF16).tensors(device)

    def step() -> list[torch.Tensor]:
        leaves = [v.detach().requires_grad_() for v in (t.x, t.lora_A, t.lora_B)]
        y = lora_linear(leaves[0], t.weight, *leaves[1:], dropout_p=0.0, backend="cuda")
        return [y.detach(), *torch.autograd.grad(y, leaves, t.dy)]

    graph, results = captured(step)
    for seed in range(3):
        t.x.copy_(torch.randn(t.x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for got, want in zip(results, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 63), (1024, 4096), (500, 2001)], ids=str)
def test_dequantizes_to_the_bit(
    shape: tuple[int, int], block_size: int, double_quant: bool, device: torch.device
) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight = NF4Weight.quantize(dense, block_size, double_quant)
    for dtype in (BF16, FP16, FP32):
        assert torch.equal(cuda.dequantize(weight.to(device), dtype).cpu(), weight.dequantize(dtype))


NF4_SIZES = [
    (1, 4096, 14336, 16),
    (4, 14336, 4096, 16),
    (16, 4096, 4096, 64),
    (7, 2080, 500, 12),
    (48, 4096, 1024, 8),
    (17, 2048, 1000, 100),
    (64, 4096, 4096, 64),
    (5, 63, 17, 3),
    (500, 2000, 500, 16),
]


@pytest.mark.parametrize("adapters", [BF16, FP32], ids=str)
@pytest.mark.parametrize("size", NF4_SIZES, ids=str)
def test_nf4(size: tuple[int, int, int, int], adapters: torch.dtype, device: torch.device) -> None:
    case = Case(*size, BF16, adapters, bias=True)
    t, double = case.tensors(device), case.tensors(device).double()
    weight = NF4Weight.quantize(t.weight)
    base = weight.dequantize(BF16)

    def ours(x, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, scaling=case.scaling, bias=bias, backend="cuda")

    def peft(x, lora_A, lora_B, bias):
        return peft_sequence(x, base, lora_A, lora_B, case.scaling, bias, None, 0.0)

    def exact(x, lora_A, lora_B, bias):
        return lora_linear_reference(x, base.double(), lora_A, lora_B, scaling=case.scaling, bias=bias)

    assert_as_exact_as_peft(run(ours, t), run(peft, t), run(exact, double))


@pytest.mark.parametrize("size", [(1, 4096, 1000), (4, 14336, 512), (16, 4096, 4096), (40, 2048, 1024)], ids=str)
def test_launches_of_few_tokens_overlap_none_but_their_own(size: tuple[int, int, int], device: torch.device) -> None:
    """One replay after the other, x and dy written just before: each has its own S, T and parts of sums."""
    M, K, N = size
    t = Case(M, K, N, 16, BF16).tensors(device)
    weight = NF4Weight.quantize(t.weight)

    def step() -> list[torch.Tensor]:
        y, s = cuda.forward(t.x, weight, t.lora_A, t.lora_B, None, 1.5, None, "native", True)
        dx, dt = cuda.backward_input(t.dy, weight, t.lora_A, t.lora_B, 1.5, None, "native", True)
        return [y, s, dx, dt]  # type: ignore[list-item]

    inputs = [(torch.randn_like(t.x), torch.randn_like(t.dy)) for _ in range(6)]
    graph, results = captured(step)

    def replay(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        t.x.copy_(x)
        t.dy.copy_(dy)
        graph.replay()
        return [value.clone() for value in results]

    want = []
    for x, dy in inputs:
        want.append(replay(x, dy))
        torch.cuda.synchronize()
    base, A, B = weight.dequantize(BF16).double(), t.lora_A.double(), t.lora_B.double()
    for (x, dy), (y, _, dx, _) in zip(inputs, want, strict=True):
        exact_y, exact_dx = x.double() @ (base + 1.5 * B @ A).T, dy.double() @ (base + 1.5 * B @ A)
        assert (y.double() - exact_y).norm() / exact_y.norm() < 5e-3
        assert (dx.double() - exact_dx).norm() / exact_dx.norm() < 5e-3
    for got in [[replay(x, dy) for x, dy in inputs] for _ in range(5)]:
        for values, wanted in zip(got, want, strict=True):
            assert all(torch.equal(value, other) for value, other in zip(values, wanted, strict=True))


@pytest.mark.parametrize("M", [1, 8, 16])
def test_few_tokens_wait_for_the_product_before(M: int, device: torch.device) -> None:
    """Its out is their x, in one graph: S is launched while it ends."""
    t = Case(M, 4096, 4096, 16, BF16).tensors(device)
    weight = NF4Weight.quantize(t.weight)

    def chain(pause: bool) -> list[torch.Tensor]:
        values = [t.x]
        for _ in range(8):
            y, s = cuda.forward(values[-1], weight, t.lora_A, t.lora_B, None, 0.5, None, "native", True)
            values.append(y)
            assert s is not None
            if pause:
                torch.cuda.synchronize()
        return values[1:]

    want = chain(True)
    graph, got = captured(lambda: chain(False))
    for _ in range(5):
        for value in got:
            value.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(value, other) for value, other in zip(got, want, strict=True))


@pytest.mark.parametrize("captures", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("before", ["nothing", "kernel", "copy", "another stream"])
@pytest.mark.parametrize("M", [1, 16])
def test_few_tokens_wait_for_what_writes_x(M: int, before: str, captures: bool, device: torch.device) -> None:
    """Launches that may begin early behind each kind of work, x at the end of what that takes long to write."""
    t = Case(M, 4096, 4096, 16, BF16).tensors(device)
    weight = NF4Weight.quantize(t.weight)
    source = torch.randn(16384, 4096, device=device, dtype=BF16)
    written, side = torch.empty_like(source), torch.cuda.Stream()

    def write() -> None:
        here = torch.cuda.current_stream()
        if before == "kernel":
            torch.mul(source, 2, out=written)
        elif before == "copy":
            written.copy_(source)
        elif before == "another stream":
            side.wait_stream(here)
            with torch.cuda.stream(side):
                torch.mul(source, 2, out=written)
            t.dy.mul_(1)
            here.wait_stream(side)

    def step() -> list[torch.Tensor]:
        y, s = cuda.forward(written[-M:], weight, t.lora_A, t.lora_B, None, 0.5, None, "native", True)
        assert s is not None
        # A kernel and a copy right behind it.
        return [y * 1, s.clone()]

    def both() -> list[torch.Tensor]:
        write()
        return step()

    written.copy_(source)
    write()
    torch.cuda.synchronize()
    want = step()
    torch.cuda.synchronize()
    graph, got = captured(both) if captures else (None, [])
    for _ in range(3):
        written.copy_(source) if before == "nothing" else written.fill_(float("nan"))
        if graph is None:
            got = both()
        else:
            graph.replay()
        assert all(torch.equal(value, other) for value, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_dx_of_few_tokens(M: int, dropout_p: float, device: torch.device) -> None:
    """The bits of the weight, the same bits in every run, its launches overlapping, and no copy of the weight."""
    t = Case(M, 4096, 4096, 16, BF16).tensors(device)
    weight = NF4Weight.quantize(t.weight)
    mask = Dropout(dropout_p, torch.tensor([11], device=device)) if dropout_p else None

    def once() -> list[torch.Tensor]:
        return list(cuda.backward_input(t.dy, weight, t.lora_A, t.lora_B, 1.5, mask, "native", True))  # type: ignore[arg-type]

    first = once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        for value, want in zip(once(), first, strict=True):
            assert torch.equal(value, want)
    assert torch.cuda.max_memory_allocated() - before < t.weight.nbytes

    hot = torch.zeros_like(t.dy)
    rows = torch.arange(M, device=device) * 13 + 5
    hot[torch.arange(M, device=device), rows] = 1
    dx, _ = cuda.backward_input(hot, weight, torch.zeros_like(t.lora_A), t.lora_B, 1.0, None, "native", True)
    assert dx is not None
    assert torch.equal(dx, weight.dequantize(BF16)[rows])
