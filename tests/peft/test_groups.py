"""Blocks whose layers run together: the results of stock PEFT and of the ungrouped layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_models import ALL, FAMILIES, Calls, adapted, base, grouped, quantized, train, ungrouped
from peft.tuners import lora
from peft_models import TARGETS, assert_same, batch, gradients, lora_layers, output
from test_operations import OPERATIONS, Place
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import apply_lora_kernels, patch_peft, revert_lora_kernels, use_backend

RUNS = [("cpu", "auto"), *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("eager", "triton"))]


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]}], ids=str
)
def test_same_as_stock(family: str, options: dict[str, Any], device: str, backend: Any, calls: Calls) -> None:
    stock = adapted(family, device, **options)
    fused = copy.deepcopy(stock)
    report = apply_lora_kernels(fused)
    together = 0 if options else 2
    assert sum(block.grouped for block in report.blocks) == 2 + together
    expected = gradients(stock, "llama", device)
    with use_backend(backend):
        assert_same(expected, gradients(fused, "llama", device), 1e-4)
        assert calls.take() == (2, together)
        assert_same(gradients(ungrouped(stock), "llama", device), gradients(fused, "llama", device), 1e-4)


def test_biases_and_lora_bias(device: str, calls: Calls) -> None:
    for bias in ("none", "all"):
        model = base("Llama", attention_bias=True, mlp_bias=True)
        stock = adapted(device=device, model=model, bias=bias, lora_bias=bias == "none")
        assert_same(gradients(stock, "llama", device), gradients(grouped(stock), "llama", device), 1e-4)
        assert calls.take() == (2, 2)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_same_training(family: str, device: str) -> None:
    stock = adapted(family, device)
    expected = train(copy.deepcopy(stock), device)
    assert expected[0] != expected[-1]
    assert train(grouped(stock), device) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_dropout_draws_the_masks_of_ungrouped_layers(family: str, device: str, calls: Calls) -> None:
    stock = adapted(family, device, lora_dropout=0.3)
    expected = train(ungrouped(stock), device)
    assert calls.take() == (0, 0)
    fused = grouped(stock)
    assert train(fused, device) == pytest.approx(expected, rel=1e-4)
    assert calls.take() == (8, 8)
    fused.eval()
    assert torch.equal(output(fused, "llama", device), output(fused, "llama", device))
    revert_lora_kernels(fused)
    assert type(lora_layers(fused)["base_model.model.model.layers.0.mlp.up_proj"]) is lora.Linear


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing(use_reentrant: bool, p: float, device: str, calls: Calls) -> None:
    model = grouped(adapted(device=device, lora_dropout=p))
    model.enable_input_require_grads()
    model.train()
    torch.manual_seed(3)
    plain = gradients(model, "llama", device)
    assert calls.take() == (2, 2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    assert_same(plain, gradients(model, "llama", device), 1e-5)
    assert calls.take() == (4, 4)


def test_generation(device: str, calls: Calls) -> None:
    stock = adapted("Qwen2", device).eval()
    fused = grouped(stock)
    options = {"max_new_tokens": 5, "do_sample": False}
    prompt = batch("llama", device)
    assert torch.equal(stock.generate(prompt, **options), fused.generate(prompt, **options))
    assert min(calls.take()) == 10
    # Nobody can tell whether a tensor of the inference mode was changed: attention runs layer by layer.
    with torch.inference_mode():
        assert_same(output(stock, "llama", device), output(fused, "llama", device), 1e-4)
    assert calls.take()[1] == 2


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_no_less_exact_than_stock(
    family: str, autocast: bool, dtypes: tuple[torch.dtype, torch.dtype], device: str, calls: Calls
) -> None:
    """An MLP, its base and adapters in 16 and 32 bits, against float64."""
    of_base, of_adapters = dtypes if autocast else (torch.bfloat16, dtypes[1])
    stock = adapted(family, device).to(of_base)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(of_adapters)
    x = torch.randn(4, 128, 32, generator=torch.Generator().manual_seed(1)).to(device, of_base)
    results = []
    fused = copy.deepcopy(stock)
    apply_lora_kernels(fused)
    for model, wide in [(stock, True), (stock, False), (fused, False)]:
        model = copy.deepcopy(model).double() if wide else model
        mlp = model.base_model.model.model.layers[0].mlp
        given = (x.double() if wide else x).detach().requires_grad_()
        context = torch.autocast(device, torch.bfloat16) if autocast and not wide else contextlib.nullcontext()
        with context:
            y = mlp(given)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y))
        found = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": given.grad, **found})
    assert calls.take() == (0, 1)
    exact, theirs, ours = results
    assert list(ours) == list(theirs)
    for name, right in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = (
            float((found[name].double() - right).norm() / right.norm())
            for found in (ours, theirs)  # type: ignore[union-attr, operator]
        )
        assert error <= 1.1 * allowed, f"{name}: {error:.1e} off, PEFT {allowed:.1e}"


# The operations of the integration's contract, with every layer of a Llama in a group.
SLOW = {"compiled", "compiled_hotswap", "graph_breaks"}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in SLOW])
def test_operation(name: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "llama", ALL)
    run, tolerance = OPERATIONS[name]
    torch.manual_seed(0)
    stock = run(Place(device, tmp_path / "stock"))
    with patch_peft():
        torch.manual_seed(0)
        together = run(Place(device, tmp_path / "grouped"))
    assert_same(stock, together, tolerance, name)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("part", ["layer", "mlp", "up_proj"])
def test_fsdp2(part: str, calls: Calls) -> None:
    """What is gathered whole runs together; a layer that is gathered by itself has hooks."""
    stock = adapted()
    expected = gradients(stock, "llama", "cpu")
    fused, mesh = grouped(stock), init_device_mesh("cpu", (1,))
    for block in fused.base_model.model.model.layers:
        fully_shard({"layer": block, "mlp": block.mlp, "up_proj": block.mlp.up_proj}[part], mesh=mesh)
    calls.take()
    result = gradients(fused, "llama", "cpu")
    assert calls.take() == (2, 0 if part == "up_proj" else 2)
    assert_same(expected, {name: plain(value) for name, value in result.items()}, 1e-4)


@pytest.mark.usefixtures("process_group")
def test_ddp(calls: Calls) -> None:
    stock = adapted()
    expected, wrapped = gradients(stock, "llama", "cpu"), DistributedDataParallel(grouped(stock))
    result = gradients(wrapped, "llama", "cpu")
    assert calls.take() == (2, 2)
    assert_same(expected, {name.removeprefix("module."): value for name, value in result.items()}, 1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_nf4(autocast: bool, device: str, calls: Calls) -> None:
    compute = torch.bfloat16 if autocast else torch.float32
    model = adapted(device=device, model=quantized(device, compute))
    context = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        stock = gradients(model, "llama", device)
        report = apply_lora_kernels(model)
        assert report.fused == 14
        assert all(block.grouped for block in report.blocks), str(report)
        together = gradients(model, "llama", device)
        assert calls.take() == (2, 2)
        apply_lora_kernels(model, groups=False)
        apart = gradients(model, "llama", device)
    assert together["output"].dtype == apart["output"].dtype == stock["output"].dtype
    if not autocast:
        assert_same(stock, together, 1e-4)
        assert_same(apart, together, 1e-5)
        return
    # What 16 bits leave of a gradient behind two softmaxes is chance, with PEFT as with us: test_nf4.py compares both,
    # layer by layer. But members that run together must not be less exact than one by one.
    exact = gradients(adapted(device=device, model=quantized(device, torch.float32)), "llama", device)
    error, allowed = (
        sum(float((found[name].double() - right).norm() / right.double().norm()) for name, right in exact.items())
        for found in (together, apart)
    )
    assert error <= 1.1 * allowed, f"{error / len(exact):.1e} off, one by one {allowed / len(exact):.1e}"
