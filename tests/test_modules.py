"""LoRALinear: its parameters, and that merging, saving, copying and wrapping leave it what it was."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRALinear, lora_linear_reference
from lora_kernels.limits import MAX_RANK


def make(device: torch.device, **options: object) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(12, 20, r=4, alpha=8, device=device, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def expected(layer: LoRALinear, x: Tensor, weight: Tensor | None = None) -> Tensor:
    double = [t.detach().double() for t in (x, layer.weight if weight is None else weight, layer.lora_A, layer.lora_B)]
    bias = None if layer.bias is None else layer.bias.detach().double()
    return lora_linear_reference(*double, scaling=layer.scaling, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_what_is_trained(bias: bool, device: torch.device) -> None:
    layer, x = make(device, bias=bias), inputs(device)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert (layer.bias is not None) == bias


def test_it_starts_as_the_frozen_layer(device: torch.device) -> None:
    layer, x = LoRALinear(12, 20, device=device), inputs(device)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.lora_A.any()
    assert not layer.delta_weight().any()
    nn.init.ones_(layer.lora_B)
    layer.reset_parameters()
    assert not layer.lora_B.any()


def test_scaling(device: torch.device) -> None:
    assert LoRALinear(4, 4, r=16, alpha=32, device=device).scaling == 2.0
    assert LoRALinear(4, 4, r=16, alpha=32, use_rslora=True, device=device).scaling == 8.0
    layer, x = make(device), inputs(device)
    before = layer(x)
    layer.scaling = 0.0
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype | None, device: torch.device) -> None:
    layer = make(device, dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype  # type: ignore[union-attr]
    assert layer.lora_A.dtype == layer.lora_B.dtype == (adapter_dtype or dtype)
    y = layer(inputs(device, dtype))
    y.float().sum().backward()
    assert y.dtype == dtype
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == (adapter_dtype or dtype)


BAD = [
    ({"r": 0}, ValueError, "r was 0, but must be from 1 to 512"),
    ({"r": MAX_RANK + 1}, ValueError, "r was 513, but must be from 1 to 512"),
    ({"r": 4.0}, TypeError, "r was a float, but must be an int"),
    ({"r": True}, TypeError, "r was a bool, but must be an int"),
    ({"alpha": "8"}, TypeError, "alpha was a str, but must be an int or a float"),
    ({"alpha": float("nan")}, ValueError, "alpha was nan, but must be finite"),
    ({"in_features": -1}, ValueError, "in_features was -1, but must be at least 0"),
    ({"out_features": 4.0}, TypeError, "out_features was a float, but must be an int"),
    ({"out_features": True}, TypeError, "out_features was a bool, but must be an int"),
    ({"dropout": None}, TypeError, "dropout was a NoneType, but must be an int or a float"),
    ({"dropout": 1.5}, ValueError, "dropout was 1.5, but must be from 0 to 1"),
    ({"dtype": torch.float64}, TypeError, "dtype was torch.float64, but must be one of torch.bfloat16"),
    ({"dtype": torch.uint8}, TypeError, "dtype was torch.uint8, but must be one of torch.bfloat16"),
    (
        {"adapter_dtype": torch.float16},
        TypeError,
        "adapter_dtype was torch.float16, but must be torch.float32",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda v: str(v))
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        LoRALinear(**({"in_features": 12, "out_features": 20} | options))  # type: ignore[arg-type]
    assert caught.type is error


def test_from_linear_shares_the_base(device: torch.device) -> None:
    linear = nn.Linear(12, 20, device=device).eval()
    layer = LoRALinear.from_linear(linear, r=4, alpha=8, dropout=0.5, use_rslora=True)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    assert (layer.r, layer.scaling, layer.dropout, layer.training) == (4, 4.0, 0.5, False)
    assert layer.lora_A.device == linear.weight.device
    assert layer.lora_A.requires_grad
    x = inputs(device)
    torch.testing.assert_close(layer(x), linear(x))
    assert LoRALinear.from_linear(nn.Linear(3, 3, bias=False)).bias is None
    half = LoRALinear.from_linear(nn.Linear(3, 3, dtype=torch.bfloat16), adapter_dtype=torch.float32)
    assert (half.weight.dtype, half.lora_A.dtype) == (torch.bfloat16, torch.float32)


class Packed(nn.Linear):
    """Stored as bitsandbytes' Linear4bit is: two numbers to a byte, in a column."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)


class Sharded(nn.Parameter):
    """A weight of another class, as quantizers and tensor parallelism use."""


def test_from_linear_refuses_what_is_not_a_dense_layer() -> None:
    with pytest.raises(TypeError, match=r"linear was a Conv1d, but must be a torch\.nn\.Linear"):
        LoRALinear.from_linear(nn.Conv1d(3, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear.weight was a Parameter \[24, 1\] of torch.uint8"):
        LoRALinear.from_linear(Packed())
    with pytest.raises(TypeError, match=r"linear\.weight was a Parameter .* of torch\.float64"):
        LoRALinear.from_linear(nn.Linear(3, 3, dtype=torch.float64))
    other = nn.Linear(3, 3)
    other.weight = Sharded(other.weight.detach())
    with pytest.raises(TypeError, match=r"linear\.weight was a Sharded"):
        LoRALinear.from_linear(other)
    biased = nn.Linear(3, 4)
    biased.bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"linear\.bias was \[7\] of torch\.float32, but must be \[4\]"):
        LoRALinear.from_linear(biased)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"linear\.weight was a Tensor"):
        LoRALinear.from_linear(normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype: torch.dtype, device: torch.device) -> None:
    layer, x = make(device, dtype=dtype), inputs(device, dtype)
    before, y = layer.weight.detach().clone(), layer(x).detach()
    delta = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    torch.testing.assert_close(layer.delta_weight().double(), delta, rtol=1e-5, atol=1e-5)
    assert layer.delta_weight().dtype == torch.float32
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.weight, (before.float() + layer.delta_weight()).to(dtype))
    merged = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, merged), "merging twice is merging once"
    torch.testing.assert_close(layer(x), y, rtol=0.02, atol=0.02 if dtype == torch.float32 else 0.2)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, before), "unmerging gives the bits back"
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("change", ["merge", "unmerge"])
def test_merging_between_forward_and_backward_is_an_error(change: str, device: torch.device) -> None:
    layer, x = make(device), inputs(device).requires_grad_()
    y = layer(x)
    layer.merge()
    if change == "unmerge":
        layer.unmerge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_float32_bias_stays_with_a_merged_layer(device: torch.device) -> None:
    linear = nn.Linear(24, 16, device=device).to(torch.bfloat16)
    linear.bias = nn.Parameter(torch.randn(16, device=device))
    layer = LoRALinear.from_linear(linear, r=3)
    x = torch.randn(5, 24, device=device, dtype=torch.bfloat16)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=2e-2, atol=2e-2)


def test_merging_is_exact_under_autocast(device: torch.device) -> None:
    layer = make(device)
    delta = layer.delta_weight()
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer.delta_weight(), delta)


def test_a_safe_merge(device: torch.device) -> None:
    layer = make(device)
    with torch.no_grad():
        layer.lora_B[0, 0] = float("inf")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="lora_A, lora_B had values that make the merged weight NaN or infinite"):
        layer.merge(safe=True)
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    layer.merge()
    assert layer.merged
    assert make(device).merge(safe=True) is None


def test_moving_a_merged_layer(device: torch.device) -> None:
    layer = make(device)
    before = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16).unmerge()
    assert torch.equal(layer.weight, before.to(torch.bfloat16))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool, device: torch.device) -> None:
    layer, other = make(device), LoRALinear(12, 20, r=4, alpha=8, device=device)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    other.load_state_dict({k: t.clone() for k, t in layer.state_dict().items()}, assign=assign)
    x = inputs(device)
    assert torch.equal(other(x), layer(x))


def test_a_merged_layer_saves_its_state_in_training(device: torch.device) -> None:
    layer, x = make(device), inputs(device)
    y, before = layer(x), {k: t.clone() for k, t in layer.state_dict().items()}
    layer.merge()
    model = nn.Sequential(layer)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    for name, t in before.items():
        assert torch.equal(state[f"0.{name}"], t)
    assert layer.merged, "saving changes nothing"
    other = nn.Sequential(LoRALinear(12, 20, r=4, alpha=8, device=device))
    other.load_state_dict(state)
    assert torch.equal(other(x), y), "the adapter is applied once"


def test_loading_into_a_merged_layer_unmerges_it(device: torch.device) -> None:
    layer, x = make(device), inputs(device)
    y, state = layer(x), {k: t.clone() for k, t in layer.state_dict().items()}
    other = make(device)
    with torch.no_grad():
        other.lora_A.mul_(3.0)
        other.weight.add_(1.0)
    other.merge()
    other.load_state_dict(state)
    assert not other.merged
    assert torch.equal(other(x), y)
    other.merge()
    other.load_state_dict({"lora_B": torch.zeros_like(layer.lora_B)}, strict=False)
    assert not other.merged
    assert torch.equal(other.weight, layer.weight), "an adapter alone leaves the frozen weight behind"


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(merged: bool, how: str, device: torch.device, tmp_path: Path) -> None:
    layer, x = make(device, dropout=0.5).eval(), inputs(device)
    before = layer.weight.detach().clone()
    if merged:
        layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        torch.save(layer, tmp_path / "layer.pt")
        other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert other.merged == merged
    assert torch.equal(other(x), layer(x))
    layer.unmerge()
    with torch.no_grad():
        layer.weight.zero_()
    other.unmerge()
    assert torch.equal(other.weight, before), "a copy shares nothing"
    assert (other.r, other.alpha, other.dropout, other.training) == (4, 8, 0.5, False)


def test_repr(device: torch.device) -> None:
    assert repr(make(device)) == (
        "LoRALinear(in_features=12, out_features=20, r=4, alpha=8, dropout=0.0, bias=True, merged=False)"
    )


def test_distributed_data_parallel(device: torch.device, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        layer, x = make(device), inputs(device)
        layer(x).square().sum().backward()
        plain = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        layer.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(layer)
        parallel(x).square().sum().backward()
        got = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        # First of the two: a process group that dies with what it is wrapped in does so with Python's lock in hand,
        # waiting for a thread of its own that may be waiting for that lock.
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    assert set(plain) == {"lora_A", "lora_B"}
    torch.testing.assert_close(got, plain)
