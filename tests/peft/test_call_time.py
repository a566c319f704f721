"""What a fused layer sees when it is called: scalings, transforms, dispatch modes, and inputs that it cannot take."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from cases import HAS_GPU
from group_models import adapted, decoder, grouped
from lora_checks import IN, Pair, run, some_input, stock_and_fused_layer
from peft.helpers import rescale_adapter_scale
from peft_models import assert_same, randomize_adapters
from test_group_scope import Attention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_kernels import apply_lora_kernels, dispatch
from lora_kernels.integrations import peft_layer
from lora_kernels.integrations.peft_layer import why_not_fused

# Of a process, so each test starts without any.
pytestmark = pytest.mark.usefixtures("nothing_said")


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "_warned", set())


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The inputs of calls that ran fused."""
    seen: list[Tensor] = []
    forward = peft_layer.fused_forward
    monkeypatch.setattr(peft_layer, "fused_forward", lambda layer, x, *a: (seen.append(x), forward(layer, x, *a))[1])
    return seen


def set_scaling(pair: Pair, scaling: Any) -> None:
    for layer in pair:
        layer.scaling["default"] = scaling


@pytest.mark.parametrize("scaling", [np.float32(0.7), np.float64(0.7), np.int64(3), True, 2], ids=repr)
def test_scaling_is_any_real_number(scaling: Any, device: str, fused_calls: list[Tensor]) -> None:
    pair = stock_and_fused_layer(device, lora_bias=True)
    set_scaling(pair, scaling)
    x = some_input(device)
    assert why_not_fused(pair[1]) is None
    assert_same(*(run(layer, x) for layer in pair), 1e-5)
    assert len(fused_calls) == 1


SCALINGS: dict[str, Callable[[str], Any]] = {
    "trained": lambda device: nn.Parameter(torch.tensor(0.7, device=device)),
    "for each output": lambda device: torch.linspace(0.1, 2.0, 40, device=device),
    "a tensor of a bool": lambda device: torch.tensor(True, device=device),
    "no number": lambda device: np.bool_(True),
}


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_that_only_peft_takes(name: str, adapters: int, device: str, fused_calls: list[Tensor]) -> None:
    pair = stock_and_fused_layer(device, adapters=adapters)
    results = []
    for layer in pair:
        layer.scaling["default"] = scaling = SCALINGS[name](device)
        result = run(layer, some_input(device))
        results.append((result, getattr(scaling, "grad", None)))
    assert "scaling" in str(why_not_fused(pair[1]))
    assert_same(*results, 0.0)
    if name == "trained":
        assert results[1][1] is not None
    assert not fused_calls


@pytest.mark.parametrize("p", [np.float32(0.5), 1, True, 0], ids=repr)
def test_dropout_is_any_real_number(p: Any, device: str, fused_calls: list[Tensor]) -> None:
    _, fused = stock_and_fused_layer(device, dropouts=[0.5])
    x = some_input(device)
    expected = []
    for probability in (float(p), p):
        fused.lora_dropout["default"].p = probability
        expected.append(run(fused, x))
    assert_same(*expected, 0.0)
    assert len(fused_calls) == 2


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters() if "lora_" in name}


def loss_of(layer: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda values, x: torch.func.functional_call(layer, values, (x,)).square().sum()


def by_grad(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.grad(loss_of(layer))(parameters(layer), x)


def by_compiled_grad(layer: nn.Module, x: Tensor) -> Any:
    return torch.compile(torch.func.grad(loss_of(layer)), backend="aot_eager", fullgraph=True)(parameters(layer), x)


def by_vmap(layer: nn.Module, x: Tensor) -> Any:
    """The gradient of each example."""
    return torch.func.vmap(torch.func.grad(loss_of(layer)), in_dims=(None, 0))(parameters(layer), x)


def by_jvp(layer: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(lambda given: layer(given), (x,), (x.cos(),))


def by_hessian(layer: nn.Module, x: Tensor) -> Any:
    values = parameters(layer)
    B = values["lora_B.default.weight"]
    return torch.func.hessian(lambda B: loss_of(layer)(values | {"lora_B.default.weight": B}, x[:1, :1]))(B)


def by_dual_numbers(layer: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos())))
        assert y.tangent is not None
        return y.primal, y.tangent


def by_trace(layer: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(layer, (x,))(x * 2).detach()


TRANSFORMS = [by_grad, by_compiled_grad, by_vmap, by_jvp, by_hessian, by_dual_numbers, by_trace]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_run_pefts_code(transform: Callable[[nn.Module, Tensor], Any], device: str) -> None:
    stock, fused = stock_and_fused_layer(device)
    x = some_input(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lora_kernels could fuse.*")
        assert_same(transform(stock, x), transform(fused, x), 0.0)


def test_a_layer_is_fused_again_after_a_transform(device: str, fused_calls: list[Tensor]) -> None:
    _, fused = stock_and_fused_layer(device)
    by_grad(fused, some_input(device))
    assert not fused_calls
    fused(some_input(device))
    assert len(fused_calls) == 1


def test_blocks_run_pefts_code_in_transforms(device: str) -> None:
    stock = adapted(device=device)
    fused = grouped(stock)
    for name in ("mlp", "self_attn.q_proj"):
        values = [
            torch.func.jvp(model.base_model.model.model.layers[0].get_submodule(name), (x,), (x.cos(),))
            for model in (stock, fused)
            for x in [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(device)]
        ]
        assert_same(*values, 0.0)


def save_all(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


aten = torch.ops.aten
KEPT: dict[str, Any] = {"mm": [aten.mm.default], "addmm": [aten.addmm.default, aten.mul.Tensor], "all": save_all}


def attention_of(p: float) -> nn.Module:
    config = peft.LoraConfig(r=3, lora_dropout=p, target_modules=["q_proj", "k_proj", "v_proj"])
    return peft.inject_adapter_in_model(config, Attention())


def layers_of(p: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    return peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_dropout=p, target_modules=["0", "2"]), model)


def mlp_of(p: float) -> nn.Module:
    mlp: nn.Module = decoder(adapted(lora_dropout=p)).mlp
    return mlp


# Not everything with dropout: of that, PEFT's own changes something in place as well.
@pytest.mark.parametrize(("kept", "p"), [("mm", 0.0), ("mm", 0.3), ("addmm", 0.0), ("addmm", 0.3), ("all", 0.0)])
@pytest.mark.parametrize("made", [layers_of, attention_of, mlp_of], ids=lambda function: function.__name__)
def test_selective_checkpointing(
    made: Callable[[float], nn.Module], p: float, kept: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps some operators' results and hands them out again: nobody may have changed them in place."""
    if (kept, backend, HAS_GPU) == ("all", "triton", False):
        pytest.skip("Triton's interpreter writes a kernel's results with PyTorch's operators, in place")
    # In every thread: on a GPU, what is computed again is computed on one of autograd's.
    monkeypatch.setattr(dispatch, "_requested", SimpleNamespace(name=backend))
    torch.manual_seed(0)
    device = "cuda" if HAS_GPU else "cpu"
    model = made(p).to(device)
    randomize_adapters(model)
    assert apply_lora_kernels(model).not_fused == 0
    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT[kept])
    results = []
    for call in (model, functools.partial(checkpoint, model, use_reentrant=False, context_fn=contexts)):
        model.zero_grad()
        x = torch.randn(5, 32 if made is mlp_of else 8, generator=torch.Generator().manual_seed(1))
        x = x.to(device).requires_grad_()
        torch.manual_seed(3)
        ys = call(x.sin())
        ys = ys if isinstance(ys, list) else [ys]
        sum(y.sin().sum() for y in ys).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append({"x": x.grad, "ys": [y.detach() for y in ys], **grads})
    assert "lora_A" in str(list(results[0]))
    assert_same(*results, 1e-6)


def mismatched(device: str) -> tuple[Pair, Tensor]:
    """bf16 bases and adapters, and an x in float16 under autocast of float16: PEFT takes it, the kernels do not."""
    pair = stock_and_fused_layer(device)
    for layer in pair:
        layer.to(torch.bfloat16)
    return pair, some_input(device).half()


def test_an_input_that_is_not_fused_is_said_once(device: str) -> None:
    (stock, fused), x = mismatched(device)
    assert why_not_fused(fused) is None
    with torch.autocast(device, torch.float16):
        with pytest.warns(UserWarning, match=r"runs PEFT's own code: adapter 'default' is torch.bfloat16.*autocast"):
            result = fused(x)
        assert_same(stock(x), result, 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused(x)


def test_it_is_said_without_a_graph_break(device: str) -> None:
    (stock, fused), x = mismatched(device)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, torch.float16):
        with pytest.warns(UserWarning, match=r"runs PEFT's own code: adapter 'default'"):
            result = compiled(x)
        assert_same(stock(x), result, 0.0)


def test_nf4_without_autocast_is_said(device: str) -> None:
    """What prepare_model_for_kbit_training and a loop without autocast come to: a float32 x, a bf16 base."""
    bnb = pytest.importorskip("bitsandbytes")
    from test_nf4 import layers, linear4bit

    stock, fused = layers(device, base=linear4bit(device, torch.bfloat16, torch.bfloat16))
    assert isinstance(stock.base_layer, bnb.nn.Linear4bit)
    x = torch.randn(3, 128, device=device)
    with pytest.warns(UserWarning, match=r"the input is torch.float32, and bitsandbytes' compute_dtype torch.bfloat16"):
        result = fused(x)
    assert_same(stock(x), result, 0.0)


def on_purpose(pair: Pair, x: Tensor) -> None:
    _, fused = pair
    with rescale_adapter_scale(nn.Sequential(fused), 0.5):
        fused(x)
    fused.eval()
    fused(x, adapter_names=["default"] * x.shape[0])
    fused.enable_adapters(False)
    fused(x)
    fused.enable_adapters(True)
    handle = fused.lora_A["default"].register_forward_hook(lambda *_: None)
    fused(x)
    handle.remove()
    by_grad(fused, x)
    fused.merge()
    fused(x)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_what_is_done_on_purpose_is_not_said(autocast: bool, device: str) -> None:
    pair = stock_and_fused_layer(device)
    with warnings.catch_warnings(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        warnings.simplefilter("error")
        on_purpose(pair, some_input(device, 4, 8))


def test_a_model_that_the_report_calls_stock_says_nothing(device: str) -> None:
    stock, fused = stock_and_fused_layer(device)
    model = nn.Sequential(fused.double())
    assert apply_lora_kernels(model).fused == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, IN, dtype=torch.float64, device=device))
    assert stock.base_layer.weight.dtype == torch.float32
