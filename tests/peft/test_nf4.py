"""PEFT's LoRA over NF4 bases of bitsandbytes: fused against stock, and whatever happens to the parameters."""

from __future__ import annotations

import contextlib
import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lora_checks
import peft
import pytest
import torch
from lora_checks import output_gradient, run
from peft.tuners import lora
from peft_models import assert_same, randomize_adapters
from torch import Tensor, nn

from lora_kernels import apply_lora_kernels, lora_linear_reference, patch_peft, revert_lora_kernels
from lora_kernels.integrations.peft_contract import check_linear4bit, check_peft
from lora_kernels.integrations.peft_layer import why_not_fused

bnb = pytest.importorskip("bitsandbytes")
peft_nf4 = pytest.importorskip("lora_kernels.integrations.peft_nf4")

# In whole blocks: where a block spans two rows, bitsandbytes' AVX-512 code decodes other numbers than the rest of it.
IN, OUT = 128, 64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def linear4bit(device: str, dtype: torch.dtype = FP32, compute_dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A layer 128 -> 64 of bitsandbytes, quantized from `dtype`."""
    options = {"quant_type": "nf4", "compress_statistics": True} | options
    base = bnb.nn.Linear4bit(IN, OUT, compute_dtype=compute_dtype, **options)
    options["quant_storage"] = options.get("quant_storage", torch.uint8)
    weight = torch.randn(OUT, IN).to(dtype)
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=base, **options)
    base.bias.data.normal_()
    base.bias.requires_grad_(False)
    # Evaluated on some CPUs, bitsandbytes would repack the weight and round its scales.
    base.support_avx512bf16_for_cpu = False
    return base.to(device)


def layers(device: str, adapters: int = 1, base: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """A LoRA layer of stock PEFT over an NF4 base, and its fused twin. Adapter i has rank 4 + 3 i."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(base or linear4bit(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    names = ["default", "second"][:adapters]
    dropouts = options.pop("dropouts", [0.0] * adapters)
    for i, (name, p) in enumerate(zip(names, dropouts, strict=True)):
        config = peft.LoraConfig(r=4 + 3 * i, lora_alpha=6 + i, lora_dropout=p, target_modules=["0"], **options)
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
    model[0].set_adapter(names)
    randomize_adapters(model)
    fused = copy.deepcopy(model)
    report = apply_lora_kernels(fused)
    assert report.fused == len(report) == 1, str(report)
    assert type(model[0]) is lora.Linear4bit
    assert type(fused[0]) is peft_nf4.Linear4bit
    # A copy of a Linear4bit's parameter still names the module that it was copied from.
    fused[0].base_layer.weight.module = fused[0].base_layer
    return model.to(device)[0], fused.to(device)[0]


def some_input(device: str, rows: int = 32) -> Tensor:
    return torch.randn(4, rows // 4, IN, generator=torch.Generator().manual_seed(4)).to(device)


def test_peft_is_known() -> None:
    assert check_linear4bit() is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_peft_is_known_in_a_region_of_autocast(device_type: str) -> None:
    """In one of CUDA's PEFT leaves its casts to autocast, of which the layers that are tried see nothing."""
    enabled = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, True)
    try:
        assert check_linear4bit.__wrapped__() is None
        check_peft.__wrapped__()
        assert torch.is_autocast_enabled(device_type)
    finally:
        torch.set_autocast_enabled(device_type, enabled)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize(
    "base",
    [{}, {"compress_statistics": False}, {"quant_storage": BF16}, {"quant_storage": FP32}],
    ids=str,
)
def test_against_stock(device: str, adapters: int, options: dict[str, Any], base: dict[str, Any]) -> None:
    torch.manual_seed(1)
    stock, fused = layers(device, adapters, linear4bit(device, **base), **options)
    x = some_input(device)
    assert_same(run(stock, x), run(fused, x), 1e-5)


@dataclass(frozen=True)
class Regime:
    """Original dtype of the base, compute_dtype, adapters, autocast, input."""

    name: str
    original: torch.dtype
    compute: torch.dtype | None
    adapters: torch.dtype
    autocast: torch.dtype | None
    x: torch.dtype

    def __str__(self) -> str:
        return self.name

    @property
    def product(self) -> torch.dtype:
        return self.autocast or self.compute or self.x

    def accuracy(self, name: str) -> torch.dtype:
        """The dtype that the gradient `name`, or the output, is rounded to on the way."""
        return FP32 if "lora_" in name and self.autocast is None and self.adapters == FP32 else self.product

    def context(self, device: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)


REGIMES = [
    Regime("autocast", BF16, BF16, FP32, BF16, BF16),
    Regime("autocast, float32 x", BF16, BF16, FP32, BF16, FP32),
    Regime("autocast, compute_dtype left at float32", BF16, FP32, FP32, BF16, BF16),
    Regime("autocast, bf16 adapters", BF16, BF16, BF16, BF16, BF16),
    Regime("float32 adapters", BF16, BF16, FP32, None, BF16),
    Regime("bf16 throughout", BF16, BF16, BF16, None, BF16),
    Regime("compute_dtype unset", BF16, None, FP32, None, BF16),
    Regime("float16", FP16, FP16, FP32, None, FP16),
    Regime("float16 autocast", FP16, FP16, FP32, FP16, FP32),
    Regime("float32", FP32, FP32, FP32, None, FP32),
    Regime("float32 checkpoint in bf16", FP32, BF16, FP32, BF16, BF16),
    # bitsandbytes decodes to bf16 in the backward, and to float32 in the forward.
    Regime("bf16 checkpoint in float32", BF16, FP32, FP32, None, FP32),
    Regime("float16 checkpoint in bf16", FP16, BF16, FP32, BF16, BF16),
]


def regime_layers(device: str, regime: Regime, adapters: int = 1) -> tuple[Any, Any]:
    torch.manual_seed(1)
    pair = layers(device, adapters, linear4bit(device, regime.original, regime.compute))
    for layer in pair:
        for name in layer.lora_A:
            layer.lora_A[name].to(regime.adapters)
            layer.lora_B[name].to(regime.adapters)
    return pair


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
def test_no_less_accurate_than_peft(device: str, regime: Regime, adapters: int) -> None:
    stock, fused = regime_layers(device, regime, adapters)
    x = some_input(device, 256).to(regime.x)
    weight = peft_nf4.NF4Weight.from_bitsandbytes(stock.base_layer.weight).dequantize(regime.product).double()
    exact = _exact(stock, x, weight)
    with regime.context(device):
        theirs, ours = run(stock, x), run(fused, x)
    assert list(ours) == list(theirs)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        accuracy = regime.accuracy(name)
        floor = (32 if accuracy == FP32 else 0.2) * torch.finfo(accuracy).eps
        error, peft_error = (float((got[name].double() - value).norm() / value.norm()) for got in (ours, theirs))
        assert error <= peft_error + floor, f"{name}: {error:.1e} off, PEFT {peft_error:.1e}"


def _exact(layer: Any, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64, over the decoded weight."""
    double = x.double().requires_grad_()
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if "lora_" in name}
    y = torch.nn.functional.linear(double, weight, layer.base_layer.bias.double())
    for name in layer.active_adapters:
        A, B = leaves[f"lora_A.{name}.weight"], leaves[f"lora_B.{name}.weight"]
        y = y + lora_linear_reference(double, torch.zeros_like(weight), A, B, scaling=layer.scaling[name])
    y.backward(output_gradient(y))
    assert double.grad is not None
    return {"y": y.detach(), "x": double.grad, **{k: t.grad for k, t in leaves.items() if t.grad is not None}}


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_runs_fused(device: str, regime: Regime, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = regime_layers(device, regime)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("PEFT's own forward ran")

    monkeypatch.setattr(lora.Linear4bit, "forward", refuse)
    with regime.context(device):
        assert why_not_fused(fused) is None
        assert fused(some_input(device).to(regime.x)).dtype == regime.x


def test_dropout_is_the_equation_with_its_mask(device: str) -> None:
    stock, fused = layers(device, dropouts=[0.4])
    x = some_input(device)
    result = run(fused, x, seed=8)
    torch.manual_seed(8)
    mask = lora_checks.Dropout.draw(0.4, x.device)
    assert mask is not None
    weight = peft_nf4.NF4Weight.from_bitsandbytes(stock.base_layer.weight).dequantize().double()
    expected = lora_linear_reference(
        x.double(),
        weight,
        stock.lora_A["default"].weight.double(),
        stock.lora_B["default"].weight.double(),
        scaling=stock.scaling["default"],
        bias=stock.base_layer.bias.double(),
        keep=mask.keep(32, IN).view(x.shape),
        dropout_p=0.4,
    )
    assert_same({"y": expected.float()}, {"y": result["y"]}, 1e-5)


def test_patching_and_reverting(device: str) -> None:
    model: nn.Module = nn.Sequential(linear4bit(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    with patch_peft():
        model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    assert type(model[0]) is peft_nf4.Linear4bit
    assert repr(model[0]).startswith("lora.Linear4bit(")
    state = set(model.state_dict())
    assert apply_lora_kernels(model).fused == 1
    assert revert_lora_kernels(model) == 1
    assert type(model[0]) is lora.Linear4bit
    assert set(model.state_dict()) == state
    own = {"__module__", "__doc__", "forward", "_read_base"}
    assert set(vars(peft_nf4.Linear4bit)) <= own | set(vars(type("Empty", (lora.Linear4bit,), {})))


Spoil = Callable[[Any], object]
SPOILED: dict[str, tuple[Spoil, str]] = {
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled"),
    "merged": (lambda layer: layer.merge(), "merged"),
    "hook on base": (lambda layer: layer.base_layer.register_forward_hook(lambda m, i, o: o * 2), "hooks"),
    "hook on A": (lambda layer: layer.lora_A.default.register_forward_hook(lambda m, i, o: o * 2), "hooks"),
    "float16 in between": (
        lambda layer: setattr(layer.base_layer, "compute_dtype", FP16),
        "bitsandbytes' compute_dtype torch.float16",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_falls_back_to_peft(name: str, device: str) -> None:
    spoil, reason = SPOILED[name]
    stock, fused = layers(device, base=linear4bit(device, compute_dtype=FP32))
    for layer in (stock, fused):
        spoil(layer)
    x = some_input(device)
    # Which dtype meets compute_dtype is known when the input is.
    found = peft_nf4.operands_of(fused, x)
    assert isinstance(found, str)
    assert reason in found
    # Bit for bit: it is the same code.
    assert_same(run(stock, x), run(fused, x), 0.0)


def test_fp4_is_not_fused(device: str) -> None:
    model: nn.Module = nn.Sequential(linear4bit(device, quant_type="fp4"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    (layer,) = apply_lora_kernels(model)
    assert layer.reason is not None
    assert "quant_type was 'fp4', but must be 'nf4'" in layer.reason
    model(some_input(device))


def test_a_base_that_is_not_quantized_yet_is_named(device: str) -> None:
    base = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4")
    model: nn.Module = nn.Sequential(base)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    (layer,) = apply_lora_kernels(model)
    assert layer.reason is not None
    assert "it was not quantized yet" in layer.reason
    model.to(device)
    assert why_not_fused(model[0]) is None
    assert apply_lora_kernels(model).fused == 1


def test_repacked_for_the_cpu_is_named() -> None:
    stock, fused = layers("cpu", base=linear4bit("cpu", BF16, BF16))
    for layer in (stock, fused):
        base = layer.base_layer
        base.weight.data, base.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            base.weight.data, base.weight.quant_state
        )
    assert "repacked by bitsandbytes" in str(why_not_fused(fused))


def fresh(weight: Any) -> Any:
    """The same parameter with other numbers: what quantizing again leaves."""
    return bnb.nn.Params4bit(
        torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9)).to(weight.device),
        requires_grad=False,
        quant_type="nf4",
    ).to(weight.device)


def _new_parameter(base: Any) -> None:
    base.weight = fresh(base.weight)


def _new_data_and_state(base: Any) -> None:
    new = fresh(base.weight)
    base.weight.data, base.weight.quant_state = new.data, new.quant_state


def _written_in_place(base: Any) -> None:
    new, state = fresh(base.weight), base.weight.quant_state
    base.weight.data.copy_(new.data)
    state.absmax.copy_(new.quant_state.absmax)
    state.offset.copy_(new.quant_state.offset)
    state.state2.absmax.copy_(new.quant_state.state2.absmax)


def _new_scales(base: Any) -> None:
    new = fresh(base.weight).quant_state
    base.weight.quant_state.absmax = new.absmax
    base.weight.quant_state.state2, base.weight.quant_state.offset = new.state2, new.offset


def _class_and_state_lost(base: Any) -> None:
    base.weight = nn.Parameter(base.weight.data.clone(), requires_grad=False)


@pytest.mark.parametrize(
    "change", [_new_parameter, _new_data_and_state, _written_in_place, _new_scales, _class_and_state_lost]
)
def test_a_weight_that_changes_is_read_anew(change: Callable[[Any], None], device: str) -> None:
    stock, fused = layers(device)
    x = some_input(device)
    before = run(fused, x)
    for layer in (stock, fused):
        layer.base_layer.quant_state = layer.base_layer.weight.quant_state
        change(layer.base_layer)
    assert why_not_fused(fused) is None
    after = run(fused, x)
    assert_same(run(stock, x), after, 1e-5)
    assert torch.equal(after["y"], before["y"]) == (change is _class_and_state_lost)


def test_what_is_remembered_dies_with_the_parameter(device: str) -> None:
    gc.collect()
    count = len(peft_nf4._entries)
    _, fused = layers(device)
    fused(some_input(device))
    fused(some_input(device))
    gc.collect()
    assert len(peft_nf4._entries) == count + 1
    fused.base_layer.weight = fresh(fused.base_layer.weight)
    gc.collect()
    assert len(peft_nf4._entries) == count


def test_evaluating_in_inference_mode_before_training(device: str) -> None:
    stock, fused = layers(device)
    x = some_input(device)
    # After patch_peft() nobody has looked at the layer before its first call.
    peft_nf4._entries.clear()
    with torch.inference_mode():
        fused(x)
    assert_same(run(stock, x), run(fused, x), 1e-5)


def test_writing_to_the_weight_before_the_backward_is_an_error(device: str) -> None:
    _, fused = layers(device)
    y = fused(some_input(device).requires_grad_())
    with torch.no_grad():
        fused.base_layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merging_and_unmerging_while_fused(device: str) -> None:
    stock, fused = layers(device)
    x = some_input(device)
    fused(x)
    for layer in (stock, fused):
        layer.merge()
    assert_same({"y": stock(x)}, {"y": fused(x)}, 0.0)
    for layer in (stock, fused):
        layer.unmerge()
    assert_same(run(stock, x), run(fused, x), 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, device: str) -> None:
    _, fused = layers(device, dropouts=[0.3])
    x = some_input(device)
    expected = run(fused, x)
    wrapped = nn.Sequential(fused)
    wrapped.forward = lambda x: torch.utils.checkpoint.checkpoint(  # type: ignore[method-assign]
        fused, x, use_reentrant=use_reentrant
    )
    got = run(wrapped, x)
    assert_same(expected, {k.removeprefix("0."): t for k, t in got.items()}, 0.0)


def test_compiled_layer_is_one_operator(device: str) -> None:
    _, fused = layers(device)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = some_input(device)
    y = torch.compile(fused, backend=backend, fullgraph=True)(x)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("lora_kernels" in target for target in targets), targets
    assert_same({"y": fused(x).detach()}, {"y": y.detach()}, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["PagedAdamW32bit", "PagedAdamW8bit"])
def test_paged_optimizers_train_the_adapters(optimizer: str) -> None:
    """QLoRA's third part: the states of a large adapter live in pages that the driver may move to the host."""
    torch.manual_seed(0)
    base = linear4bit("cuda", BF16, BF16)
    _, fused = layers("cuda", base=base)
    # Of a size from which bitsandbytes pages states, and quantizes them.
    wide = nn.Parameter(torch.zeros(2**17, device="cuda"))
    parameters = [p for name, p in fused.named_parameters() if "lora_" in name]
    before = [p.detach().clone() for p in parameters]
    frozen = fused.base_layer.weight.detach().clone()
    step = getattr(bnb.optim, optimizer)([*parameters, wide], lr=1e-2)
    x = some_input("cuda", 256).to(BF16)
    # The base alone: the adapter is to vanish.
    target = fused.base_layer(x).detach()
    losses = []
    for _ in range(40):
        step.zero_grad()
        with torch.autocast("cuda", BF16):
            loss = (fused(x).float() - target.float()).square().mean() + (wide - 1).square().mean()
        loss.backward()
        step.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(torch.isfinite(p).all() for p in parameters)
    assert torch.equal(fused.base_layer.weight, frozen)
    paged = [t for state in step.state.values() for t in state.values() if getattr(t, "is_paged", False)]
    assert paged, "no state is paged"


IN_A_FRESH_PROCESS = """
import sys, torch, peft, lora_kernels
from bitsandbytes.nn import Linear4bit
from torch import nn

def adapted():
    model = nn.Sequential(Linear4bit(64, 32, quant_type="nf4").to("cpu"))
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))

if sys.argv[1] == "patched":
    lora_kernels.patch_peft()
    model = adapted()
elif sys.argv[1] == "applied":
    model = adapted()
else:
    model = adapted()
    lora_kernels.patch_peft()
if sys.argv[1] != "patched":
    assert lora_kernels.apply_lora_kernels(model).fused == 1
assert type(model.base_model.model[0]).__module__ == "lora_kernels.integrations.peft_nf4"
"""


@pytest.mark.parametrize("how", ["patched", "applied", "patched, then applied"])
def test_the_first_nf4_layer_of_a_process(how: str) -> None:
    """It is what has lora.Linear4bit checked, by a layer that PEFT makes in the middle of making this one."""
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, how]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
