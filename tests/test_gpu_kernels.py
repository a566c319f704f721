"""What only a GPU can show: every tile at work, graphs, streams, launches, compilation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import HAS_GPU, Case
from graphs import captured
from torch import Tensor

from lora_kernels import LoRALinear, NF4Weight, lora_linear
from lora_kernels.backends.triton.tiles import candidates, chip_of
from lora_kernels.backends.triton.tuned import one_pass_tiles
from lora_kernels.dropout import Dropout, keep_mask

pytestmark = pytest.mark.gpu

if HAS_GPU:
    from lora_kernels.backends import sync
    from lora_kernels.backends.triton import launch, launches, nf4_launch
    from lora_kernels.backends.triton.mask_launch import bits_of
    from lora_kernels.backends.triton.one_pass import one_pass_kernel


CASE = Case(4096, 1024, 2048, 16, torch.bfloat16)


def forward(case: Case, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    t = case.tensors(torch.device("cuda", 0))
    return launch.one_pass(
        t.x, t.weight.T, t.lora_A.T, t.lora_B.T, t.bias, 2.0, None, True, "native", **options
    )


@pytest.mark.parametrize("case", [CASE, Case(1000, 512, 768, 256, torch.bfloat16, bias=True)], ids=str)
def test_a_tile_that_cannot_wait_computes_the_same_bits(case: Case) -> None:
    expected = forward(case)
    for programs in (1, 7, None):
        got = forward(case, spin_limit=0, programs=programs)
        reference = expected if programs is None else forward(case, programs=programs)
        for value, want in zip(got, reference, strict=True):
            assert torch.equal(value, want)


@pytest.mark.parametrize("rank", [16, 20, 32, 64, 512])
@pytest.mark.parametrize("use_tma", [True, False])
def test_a_masked_branch_is_right_in_all_tiles_at_every_rank(use_tma: bool, rank: int) -> None:
    M, K, N = 300, 768, 1000
    t = Case(M, K, N, rank, torch.bfloat16).tensors(torch.device("cuda", 0))
    dropout = Dropout.draw(0.3, t.dy.device)
    assert dropout is not None
    mask, d = keep_mask(dropout.seed, M, K, 0.3), t.double()
    exact = d.dy @ d.weight + 2.0 * torch.where(mask, (d.dy @ d.lora_B) @ d.lora_A, 0.0)
    for tiles in candidates(chip_of(t.dy.device), 2, use_tma):
        dx, _ = launch.one_pass(t.dy, t.weight, t.lora_B, t.lora_A, None, 2.0, dropout, False, "native", tiles=tiles)
        assert float((dx.double() - exact).norm() / exact.norm()) < 5e-3, tiles


def test_the_counters_are_zero_after_every_launch() -> None:
    for case in (CASE, Case(300, 768, 1000, 512, torch.bfloat16), Case(17, 33, 40, 3, torch.float16)):
        t = case.tensors(torch.device("cuda", 0))
        lora_linear(
            t.x.requires_grad_(), t.weight, t.lora_A.requires_grad_(), t.lora_B.requires_grad_(), backend="triton"
        ).backward(t.dy)
    torch.cuda.synchronize()
    assert all(int(piece.abs().sum()) == 0 for piece in sync._pieces.values())


def layer(dropout: float = 0.0, size: int = 512) -> LoRALinear:
    torch.manual_seed(1)
    module = LoRALinear(size, size, 16, 32, dropout=dropout, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(module.lora_B, std=0.1)
    return module


def step(module: LoRALinear, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients. Nothing of the graph outlives the call: a capture may not meet its streams."""
    y = module(x)
    gradients = torch.autograd.grad(y.float().square().sum(), [x, module.lora_A, module.lora_B])
    return [y.detach(), *gradients]


def test_a_captured_graph_replays() -> None:
    module, x = layer(), torch.randn(384, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graph, results = captured(partial(step, module, x))
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for got, want in zip(results, step(module, x), strict=True):
            assert torch.equal(got, want)


def test_each_replay_draws_a_new_mask() -> None:
    module, x = layer(dropout=0.5), torch.randn(384, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graph, results = captured(partial(step, module, x))
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(results[0].clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_graphs_and_eager_calls_run_side_by_side() -> None:
    """Two graphs that were captured alike, replayed on two streams beside eager calls on a third."""
    modules, inputs = [], []
    for seed in range(3):
        modules.append(layer())
        inputs.append(
            torch.randn(
                2048, 512, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(seed)
            ).requires_grad_()
        )
    expected = [step(module, x) for module, x in zip(modules, inputs, strict=True)]
    graphs = [captured(partial(step, module, x)) for module, x in zip(modules[:2], inputs[:2], strict=True)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _results), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = step(modules[2], inputs[2])
    torch.cuda.synchronize()
    for got, want in zip([graphs[0][1], graphs[1][1], eager], expected, strict=True):
        for value, reference in zip(got, want, strict=True):
            assert torch.equal(value, reference)


def compiled_variants() -> int:
    return len(one_pass_kernel.device_caches[torch.cuda.current_device()][0])


def test_a_new_batch_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the other of the two ways to compute S, and of the two loops, once each."""
    tiles = one_pass_tiles(chip_of(torch.device("cuda", 0)), 2, True, 4096, 2048)
    module, x = layer(size=2048), torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)

    def call(rows: int) -> None:
        left = x[:rows]
        launch.one_pass(left, module.weight.T, module.lora_A.T, module.lora_B.T, None, 2.0, None, True, "native",
                        tiles=tiles)  # fmt: skip

    for own in (0, 3):
        monkeypatch.setattr(launch, "sharers", lambda *sizes, own=own: (1, own))
        monkeypatch.setattr(launch, "_launches", {})
        # More tiles than programs, and fewer.
        call(4096)
        call(1000)
    monkeypatch.undo()
    before = compiled_variants()
    for rows in (1, 2, 15, 16, 17, 128, 333, 1000, 2048, 4095):
        call(rows)
    assert compiled_variants() == before


def test_direct_launches_give_the_bits_of_tritons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(500, 512, 768, 16, torch.bfloat16, dropout=0.1, bias=True)
    forward(case)
    assert any(k is not None for k in launches._direct_kernels.values()), "no kernel can be launched directly here"
    direct = forward(case)
    monkeypatch.setattr(launches, "_has_hooks", lambda: True)
    for value, want in zip(direct, forward(case), strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("kernel", ["mask", "dequantize", "one_pass"])
def test_the_first_call_to_cuda_of_a_thread_may_be_a_launch(kernel: str) -> None:
    """As in autograd's thread, where a layer with dropout or an NF4 weight is the last of a model."""
    seed = torch.tensor([7], device="cuda")
    weight = NF4Weight.quantize(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    # For tensors that no call has described to TMA yet.
    cases = iter([Case(300, 512, 256, 16, torch.bfloat16).tensors(torch.device("cuda", 0)) for _ in range(4)])

    def call() -> Tensor:
        if kernel == "dequantize":
            return nf4_launch.dequantize(weight, torch.bfloat16)
        if kernel == "one_pass":
            t = next(cases)
            return launch.one_pass(t.x, t.weight.T, t.lora_A.T, t.lora_B.T, None, 2.0, None, True, "native")[0]
        bits = bits_of(Dropout(0.3, seed), 64, 512)
        assert bits is not None
        return bits

    want = [call() for _ in range(3)][-1]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(call).result()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_torch_compile(mode: str | None, rows: int) -> None:
    module, x = layer(), torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = step(module, x)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):
        y = compiled(x)
        got = [y.clone(), *torch.autograd.grad(y.float().square().sum(), [x, module.lora_A, module.lora_B])]
        for value, want in zip(got, expected, strict=True):
            torch.testing.assert_close(value, want, rtol=2e-2, atol=2e-2)
