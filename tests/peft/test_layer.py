"""One fused layer: dropout, several adapters, odd inputs, and everything that must run PEFT's own forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lora_checks as checks
import peft
import pytest
import torch
from lora_checks import IN, OUT, run, some_input, stock_and_fused_layer
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft_models import assert_same
from torch import nn
from torch.nn.utils import parametrizations

from lora_kernels import apply_lora_kernels
from lora_kernels.integrations.peft_layer import why_not_fused


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("adapters", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_against_stock(device: str, base: str, adapters: int, options: dict[str, Any]) -> None:
    checks.check_against_stock(device, adapters, base, **options)


@pytest.mark.parametrize("adapters", [1, 2])
def test_set_scale(device: str, adapters: int) -> None:
    checks.check_set_scale(device, adapters)


def test_output_dtype(device: str) -> None:
    checks.check_output_dtype(device)


def test_scaling_zero_and_tensor(device: str) -> None:
    stock, fused = stock_and_fused_layer(device, adapters=2, lora_bias=True)
    x = some_input(device)
    for first, second in [(0.0, 0.0), (0.0, 1.5), (torch.tensor(0.7, device=device), 1.5)]:
        for layer in (stock, fused):
            layer.scaling.update(default=first, second=second)
        assert_same(run(stock, x), run(fused, x), 1e-5)
        for name in ("default", "second"):
            for layer in (stock, fused):
                layer.set_adapter(name)
            assert_same(run(stock, x), run(fused, x), 1e-5)
        for layer in (stock, fused):
            layer.set_adapter(["default", "second"])


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 0, IN), (2, 3, 5, IN)], ids=str)
def test_shapes(device: str, shape: tuple[int, ...]) -> None:
    stock, fused = stock_and_fused_layer(device)
    x = torch.randn(shape, device=device)
    assert_same(run(stock, x), run(fused, x), 1e-5)


def test_noncontiguous_input(device: str) -> None:
    stock, fused = stock_and_fused_layer(device)
    x = torch.randn(IN, 3, 5, device=device).permute(2, 1, 0)
    assert_same(run(stock, x), run(fused, x), 1e-5)


def test_every_subset_of_requires_grad(device: str) -> None:
    stock, fused = stock_and_fused_layer(device, adapters=2, lora_bias=True)
    x = some_input(device)
    names = [name for name, _ in stock.named_parameters() if name != "base_layer.weight"]
    for flags in itertools.product([False, True], repeat=len(names)):
        for layer in (stock, fused):
            for name, flag in zip(names, flags, strict=True):
                layer.get_parameter(name).requires_grad_(flag)
        assert_same(run(stock, x), run(fused, x), 1e-5, str(flags))


def test_padded_rank(device: str) -> None:
    """The rank is that of the weight: compiled hotswap pads it and leaves `r` alone."""
    stock, fused = stock_and_fused_layer(device)
    for layer in (stock, fused):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        A.weight = nn.Parameter(torch.cat([A.weight, torch.zeros(12, IN, device=device)]).detach())
        B.weight = nn.Parameter(torch.cat([B.weight, torch.zeros(OUT, 12, device=device)], dim=1).detach())
    x = some_input(device)
    assert_same(run(stock, x), run(fused, x), 1e-5)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.97])
def test_dropout_mask(device: str, p: float) -> None:
    checks.check_dropout_mask(device, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_dropout_statistics(device: str, p: float) -> None:
    checks.check_dropout_statistics(device, p)


def test_dropouts_own_training_flag_decides(device: str) -> None:
    stock, fused = stock_and_fused_layer(device, dropouts=[0.5])
    x = some_input(device)
    for layer in (stock, fused):
        layer.lora_dropout["default"].eval()
    assert_same(run(stock, x), run(fused, x), 1e-5)
    fused.eval()
    fused.lora_dropout["default"].train()
    assert not torch.equal(fused(x), fused(x))


def test_dropout_of_a_second_adapter_is_pefts(device: str) -> None:
    """With dropout active only the first adapter is fused; the others draw what they draw in stock PEFT."""
    stock, fused = stock_and_fused_layer(device, adapters=3, dropouts=[0.0, 0.4, 0.0], lora_bias=True)
    x = some_input(device)
    assert_same(run(stock, x, seed=3), run(fused, x, seed=3), 1e-5)


def test_compiled_layer_is_one_operator(device: str) -> None:
    _, fused = stock_and_fused_layer(device, dropouts=[0.2])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(fused, backend=backend, fullgraph=True)(some_input(device))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("lora_kernels" in target for target in targets), targets
    assert not any("linear" in target for target in targets), targets


Spoil = Callable[[lora.Linear], object]
# What is done to a fused layer, and a part of the reason that must be given. It must then do what stock does.
SPOILED: dict[str, tuple[Spoil, str]] = {
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled"),
    "merged": (lambda layer: layer.merge(), "merged"),
    "no active adapter": (lambda layer: layer.set_adapter("other"), "none of the active"),
    "hook on base": (lambda layer: layer.base_layer.register_forward_hook(lambda m, i, o: o * 2), "hooks"),
    "hook on A": (lambda layer: layer.lora_A.default.register_forward_hook(lambda m, i, o: o * 2), "hooks"),
    "pre-hook on B": (
        lambda layer: layer.lora_B.default.register_forward_pre_hook(lambda m, i: i[0] * 2),
        "hooks",
    ),
    "hook on dropout": (
        lambda layer: layer.lora_dropout.default.register_forward_hook(lambda m, i, o: o * 2),
        "hooks",
    ),
    "backward hook": (
        lambda layer: layer.lora_A.default.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
        "hooks",
    ),
    "instance forward": (
        lambda layer: setattr(layer.base_layer, "forward", lambda x: x[..., :OUT] * 2),
        "hooks",
    ),
    "trained base": (lambda layer: layer.base_layer.weight.requires_grad_(), "trained"),
    "parametrized": (
        lambda layer: parametrizations.weight_norm(layer.base_layer),
        "ParametrizedLinear",
    ),
    "float64": (lambda layer: layer.double(), "float64"),
    "replaced A": (
        lambda layer: layer.lora_A.update({"default": nn.Sequential(layer.lora_A.default)}),
        "made of",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_falls_back_to_peft(name: str, device: str) -> None:
    spoil, reason = SPOILED[name]
    stock, fused = stock_and_fused_layer(device)
    for layer in (stock, fused):
        spoil(layer)
    found = why_not_fused(fused)
    assert found is not None
    assert reason in found
    # PEFT cannot run a lora_A without a weight; neither may the fused layer.
    x = some_input(device).to(stock.base_layer.weight.dtype)
    if name == "replaced A":
        with pytest.raises(AttributeError):
            fused(x)
        return
    # Bit for bit: it is the same code.
    assert_same(run(stock, x), run(fused, x), 0.0)


def test_dtypes_that_peft_refuses_are_refused(device: str) -> None:
    for x_dtype, base_dtype in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        stock, fused = stock_and_fused_layer(device)
        x = some_input(device).to(x_dtype)
        for layer in (stock, fused):
            layer.base_layer.to(base_dtype)
            with pytest.raises(RuntimeError, match=r"dtype|type"):
                layer(x)


def test_disabled_casting(device: str) -> None:
    """Without PEFT's cast a float32 adapter cannot meet a bfloat16 x: an error, but not in autocast."""
    stock, fused = stock_and_fused_layer(device)
    x = some_input(device).to(torch.bfloat16)
    for layer in (stock, fused):
        layer.base_layer.to(torch.bfloat16)
        with disable_input_dtype_casting(layer), pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        with disable_input_dtype_casting(layer), torch.autocast(device, dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    with disable_input_dtype_casting(fused):
        assert "casting" in str(why_not_fused(fused))


def test_ranks_beyond_the_kernels_fall_back(device: str) -> None:
    config = peft.LoraConfig(r=600, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(IN, OUT))).to(device)
    report = apply_lora_kernels(model)
    assert report.fused == 0
    assert "600" in str(report)
    model(some_input(device))


def test_extra_arguments_go_to_peft(device: str) -> None:
    stock, fused = stock_and_fused_layer(device)
    x = some_input(device)
    for layer in (stock, fused):
        layer.eval()
    names = ["default", "__base__", "default", "__base__"]
    assert_same(stock(x, adapter_names=names), fused(x, adapter_names=names), 0.0)
    assert_same(stock(x, alora_offsets=None), fused(x, alora_offsets=None), 0.0)
