"""The launch path in C++ on a GPU: the bits of the Python path, graphs, streams, threads and new batch sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, backends_of, grid
from graphs import captured
from launch_path import assert_same, bf16, only_python
from native_calls import (
    Layers,
    assert_llama_learned,
    checkpointed_step,
    dy_of,
    gated,
    group,
    leaf,
    native_ys,
    step,
    step_in_python,
)
from test_autograd import LEAVES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, NF4Weight, lora_linear, native
from lora_kernels.backends import native_build

pytest_plugins = ("launch_path",)
pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launch path as users get it, over Triton's own kernels."""
    monkeypatch.setattr(native, "enabled", True)
    for name in ("linear", "group", "gated"):
        monkeypatch.setattr(native, name, None)
    monkeypatch.setattr(native, "_device_type", "cuda")
    monkeypatch.setattr(native_build, "load", lambda: extension)
    native._extension.cache_clear()
    extension.clear()
    assert native.why_not() is None
    yield
    native._extension.cache_clear()
    extension.clear()


def device_step(tensors: dict[str, Any], dy: Tensor, **options: Any) -> list[Tensor | None]:
    leaves = {k: None if t is None else t.detach().requires_grad_(k != "weight") for k, t in tensors.items()}
    torch.manual_seed(5)
    y = lora_linear(**leaves, scaling=2.0, backend="triton", **options)
    y.backward(dy)
    return [y.detach(), *(None if leaves[name] is None else leaves[name].grad for name in LEAVES)]


def is_native(y: Tensor) -> bool:
    return not hasattr(y.grad_fn, "backend")


GPU_CASES = [c for c in grid(True) if c.dtype in (bf16, torch.float16) and c.M > 0 and "triton" in backends_of(c, True)]


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_same_bits_on_a_gpu(case: Case, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    t = case.tensors(torch.device("cuda", 0))
    tensors = {k: v for k, v in vars(t).items() if k != "dy"}
    with monkeypatch.context() as patch:
        patch.setattr(native, "enabled", False)
        want = device_step(tensors, t.dy, dropout_p=case.dropout)
    for _ in range(5):
        assert_same(device_step(tensors, t.dy, dropout_p=case.dropout), want)
    x = t.x.detach().requires_grad_()
    y = lora_linear(x, t.weight, t.lora_A, t.lora_B, bias=t.bias, dropout_p=case.dropout, backend="triton")
    assert is_native(y)


def gpu_layer(dropout: float = 0.0) -> tuple[LoRALinear, Tensor]:
    torch.manual_seed(1)
    layer = LoRALinear(512, 512, 16, 32, dropout=dropout, device="cuda", dtype=bf16)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer, torch.randn(3, 128, 512, device="cuda", dtype=bf16, requires_grad=True)


def gpu_step(layer: LoRALinear, x: Tensor) -> list[Tensor]:
    y = layer(x)
    gradients = torch.autograd.grad(y.float().square().sum(), [x, layer.lora_A, layer.lora_B])
    return [y.detach(), *gradients]


def warm(layer: LoRALinear, x: Tensor) -> None:
    for _ in range(4):
        gpu_step(layer, x)
    assert is_native(layer(x))


def test_a_captured_graph_replays(on_gpu: None) -> None:
    layer, x = gpu_layer()
    warm(layer, x)
    graph, results = captured(partial(gpu_step, layer, x))
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for got, want in zip(results, gpu_step(layer, x), strict=True):
            assert torch.equal(got, want)


def test_each_replay_draws_a_new_mask(on_gpu: None) -> None:
    layer, x = gpu_layer(dropout=0.5)
    warm(layer, x)
    graph, results = captured(partial(gpu_step, layer, x))
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(results[0].clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_side_streams_and_graphs_side_by_side(on_gpu: None) -> None:
    layers = [gpu_layer() for _ in range(3)]
    for layer, x in layers:
        warm(layer, x)
    expected = [gpu_step(*layers[i]) for i in range(3)]
    graphs = [captured(partial(gpu_step, *pair)) for pair in layers[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _results), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = gpu_step(*layers[2])
    torch.cuda.synchronize()
    for got, want in zip([graphs[0][1], graphs[1][1], eager], expected, strict=True):
        for value, reference in zip(got, want, strict=True):
            assert torch.equal(value, reference)


def test_a_new_batch_size_is_learned_without_compiling(on_gpu: None) -> None:
    from lora_kernels.backends.triton.few_rows import few_rows_kernel
    from lora_kernels.backends.triton.one_pass import one_pass_kernel

    def compiled() -> list[int]:
        kernels, index = (one_pass_kernel, few_rows_kernel), torch.cuda.current_device()
        return [len(kernel.device_caches[index][0]) for kernel in kernels]

    layer, _ = gpu_layer()
    x = torch.randn(4096, 512, device="cuda", dtype=bf16)
    # Between them they have every tile that the others get.
    for rows in (4096, 2048, 1024, 512, 257, 256, 65, 64, 32, 1):
        warm(layer, x[:rows].detach().requires_grad_())
    before = compiled()
    for rows in (15, 16, 17, 128, 333, 1000, 4095):
        left = x[:rows].detach().requires_grad_()
        first = gpu_step(layer, left)
        warm(layer, left)
        for got, want in zip(gpu_step(layer, left), first, strict=True):
            assert torch.equal(got, want)
    assert compiled() == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_on_a_gpu(reentrant: bool, on_gpu: None) -> None:
    layer, x = gpu_layer(dropout=0.3)
    results = []
    for turn in range(6):
        torch.manual_seed(3)
        y = layer(x) if turn == 0 else checkpoint(layer, x, use_reentrant=reentrant)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad])
        x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    for result in results[1:]:
        assert_same(result, results[0])


GROUPS: dict[str, Callable[..., Layers]] = {
    "three": lambda **options: group((2, 150), (1024, 16), (256, 16), (256, 40), columns=1024, **options),
    "odd": lambda **options: group((63,), (17, 3), (63, 17), columns=63, **options),
    "silu": lambda **options: gated((2, 150), "silu", hidden=1024, columns=512, **options),
    "gelu_tanh": lambda **options: gated((63,), "gelu_tanh", hidden=63, columns=500, **options),
}
# Of the layers, the dtype of the adapters, and dropout.
VARIANTS: list[tuple[dict[str, Any], torch.dtype, float]] = [
    ({}, bf16, 0.0),
    ({"dtype": torch.float16, "bias": True}, torch.float16, 0.0),
    ({}, bf16, 0.3),
    ({}, torch.float32, 0.3),
]


@pytest.mark.parametrize(("options", "adapters", "dropout"), VARIANTS, ids=str)
@pytest.mark.parametrize("kind", GROUPS)
def test_the_same_bits_of_a_group(
    kind: str, options: dict[str, Any], adapters: torch.dtype, dropout: float, on_gpu: None
) -> None:
    layers = GROUPS[kind](**options).on("cuda")
    layers = layers.adapters(lambda t: leaf(t, lambda t: t.to(adapters)), "lora_A", "lora_B")
    want = step_in_python(layers, dropout_p=dropout)
    for _ in range(4):
        assert_same(step(layers, dropout_p=dropout), want)
    native_ys(layers, dropout_p=dropout)


@pytest.mark.parametrize("kind", ["three", "silu"])
def test_the_same_bits_of_nf4_weights(kind: str, on_gpu: None) -> None:
    layers = GROUPS[kind]().on("cuda").adapters(NF4Weight.quantize, "weight")  # type: ignore[arg-type]
    want = step_in_python(layers, dropout_p=0.3)
    for _ in range(4):
        assert_same(step(layers, dropout_p=0.3), want)
    native_ys(layers, dropout_p=0.3)
    # At few rows they are decoded inside of products; their backward is Python's.
    few = replace(layers, x=leaf(layers.x, lambda t: t.reshape(-1, t.shape[-1])[:5]))
    want = step_in_python(few, dropout_p=0.3)
    for _ in range(4):
        assert_same(step(few, dropout_p=0.3), want)
    native_ys(few, dropout_p=0.3)


@pytest.mark.parametrize("kind", ["three", "silu"])
def test_a_captured_group_replays(kind: str, on_gpu: None) -> None:
    layers = GROUPS[kind]().on("cuda")
    dys = [dy_of(y) for y in native_ys(layers)]

    def gradients() -> list[Tensor]:
        ys = layers()
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, layers.leaves(), dys)]

    graph, results = captured(gradients)
    for seed in range(3):
        with torch.no_grad():
            layers.x.copy_(torch.randn(layers.x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_same(results, gradients())


@pytest.mark.parametrize("kind", ["three", "silu"])
def test_each_replay_of_a_group_draws_new_masks(kind: str, on_gpu: None) -> None:
    layers = GROUPS[kind]().on("cuda")
    native_ys(layers, dropout_p=0.5)
    graph, ys = captured(partial(layers, dropout_p=0.5))
    outputs = []
    for _ in range(2):
        graph.replay()
        outputs.append([y.detach().clone() for y in ys])
    assert not any(torch.equal(*pair) for pair in zip(*outputs, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["three", "silu"])
def test_checkpointed_groups_on_a_gpu(kind: str, reentrant: bool, on_gpu: None) -> None:
    layers = GROUPS[kind]().on("cuda")
    want = step_in_python(layers, dropout_p=0.3)
    for _ in range(6):
        assert_same(checkpointed_step(layers, reentrant), want)


def test_a_decoder_layer_of_peft_s_on_a_gpu(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_llama_learned("cuda", monkeypatch)


def test_threads_on_a_gpu(on_gpu: None) -> None:
    pairs = [gpu_layer() for _ in range(4)]
    want = [gpu_step(*pair) for pair in pairs]
    failed: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    got = gpu_step(*pairs[index])
                torch.cuda.current_stream().synchronize()
            assert_same(list(got), list(want[index]))
        except BaseException as error:
            failed.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


@pytest.mark.parametrize("adapters", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("layers", [((256, 128), (256, 72)), ((512, 256), (64, 40), (64, 8))], ids=len)
def test_large_ranks_of_a_group(layers: tuple[tuple[int, int], ...], adapters: torch.dtype, on_gpu: None) -> None:
    """The libraries' products among them, which give float32 where adapters are."""
    call = group((600,), *layers, columns=512, bias=True).on("cuda")
    call = call.adapters(lambda t: leaf(t, lambda t: t.to(adapters)), "lora_A", "lora_B")
    with torch.autocast("cuda", bf16, enabled=adapters == torch.float32):
        want = step_in_python(call)
        for _ in range(4):
            assert_same(step(call), want)


@pytest.mark.parametrize("adapters", [bf16, torch.float32], ids=str)
def test_a_large_rank(adapters: torch.dtype, on_gpu: None) -> None:
    t = Case(600, 512, 256, 128, bf16, adapter_dtype=adapters, bias=True).tensors(torch.device("cuda", 0))
    tensors = {name: getattr(t, name) for name in ("x", "weight", *LEAVES[1:])}
    with torch.autocast("cuda", bf16, enabled=adapters == torch.float32):
        with only_python():
            want = device_step(tensors, t.dy)
        for _ in range(4):
            assert_same(device_step(tensors, t.dy), want)
