"""LoRALinear over an NF4 weight: that moving, merging, saving and copying leave it what it was; and LoftQ."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRALinear, NF4Weight, lora_linear_reference
from lora_kernels.loftq import loftq

K, N = 40, 24


def make(device: torch.device, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(K, N, r=4, alpha=8, quantize="nf4", device=device, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, K, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def base_of(layer: LoRALinear) -> NF4Weight:
    assert isinstance(layer.weight, NF4Weight)
    return layer.weight


def expected(layer: LoRALinear, x: Tensor) -> Tensor:
    decoded = base_of(layer).dequantize(x.dtype)
    x, decoded, A, B = (t.detach().double() for t in (x, decoded, layer.lora_A, layer.lora_B))
    bias = None if layer.bias is None else layer.bias.detach().double()
    return lora_linear_reference(x, decoded, A, B, scaling=layer.scaling, bias=bias)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_forward_and_what_is_trained(double_quant: bool, block_size: int, device: torch.device) -> None:
    layer, x = make(device, block_size=block_size, double_quant=double_quant), inputs(device)
    assert (base_of(layer).block_size, base_of(layer).double_quant) == (block_size, double_quant)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_x_decides_what_is_computed_in(device: torch.device) -> None:
    layer = make(device, dtype=torch.float16, adapter_dtype=torch.float32)
    assert base_of(layer).dtype == torch.float16
    layer.bias = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs(device, dtype)
        y = layer(x)
        assert y.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(y.double(), expected(layer, x), rtol=tolerance, atol=tolerance * 3)


def test_from_linear_quantizes_its_weight_and_shares_its_bias(device: torch.device) -> None:
    linear = nn.Linear(K, N, device=device, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, r=3, quantize="nf4", block_size=128, double_quant=False)
    wanted = NF4Weight.quantize(linear.weight, 128, double_quant=False)
    for left, right in zip(base_of(layer).tensors(), wanted.tensors(), strict=True):
        assert torch.equal(left, right)
    assert layer.bias is linear.bias
    assert not layer.bias.requires_grad
    assert layer.lora_A.any()
    assert not layer.lora_B.any()
    x = inputs(device, torch.bfloat16)
    expected = nn.functional.linear(x, wanted.dequantize(), linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)


def test_a_layer_on_the_meta_device_is_filled_by_loading(device: torch.device) -> None:
    layer, x = make(device), inputs(device)
    empty = LoRALinear(K, N, r=4, alpha=8, quantize="nf4", device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert base_of(empty).packed.data_ptr() == base_of(layer).packed.data_ptr()
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_on_the_meta_device_is_filled_through_to_empty(double_quant: bool, device: torch.device) -> None:
    layer, x = make(device, double_quant=double_quant), inputs(device)
    with torch.device("meta"):
        empty = LoRALinear(K, N, r=4, alpha=8, quantize="nf4", double_quant=double_quant)
    assert empty.state_dict().keys() == layer.state_dict().keys()
    with pytest.raises(RuntimeError, match=r"state\['weight'\] cannot be copied to the meta device: pass assign=True"):
        empty.load_state_dict(layer.state_dict())
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        empty.to(device)
    assert base_of(empty.to_empty(device=device)).device == device
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_casting_leaves_the_scales_alone(merged: bool, device: torch.device) -> None:
    layer = make(device)
    before = base_of(layer).tensors()
    if merged:
        layer.merge()
    layer.to(torch.bfloat16).half().float().to(device)
    layer.unmerge()
    for left, right in zip(base_of(layer).tensors(), before, strict=True):
        assert left is right
    assert layer.to("meta").lora_A.is_meta
    assert base_of(layer).device.type == "meta"


def test_merging(device: torch.device) -> None:
    layer, x = make(device), inputs(device)
    y, base = layer(x), base_of(layer)
    layer.merge()
    assert layer.merged
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert layer.weight.dtype == base.dtype
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    merged = layer.weight
    layer.merge()
    assert layer.weight is merged
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is base
    assert torch.equal(layer(x), y)
    with torch.no_grad():
        layer.lora_B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="make the merged weight NaN or infinite"):
        layer.merge(safe=True)
    assert layer.weight is base


@pytest.mark.parametrize("cast_first", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_merged_too_x_decides_what_is_computed_in(cast_first: bool, autocast: bool, device: torch.device) -> None:
    layer, x = make(device), inputs(device, torch.bfloat16)
    if cast_first:
        layer.to(torch.bfloat16)
    wanted = expected(layer, x)
    layer.merge()
    if not cast_first:
        layer.to(torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_round_trip(double_quant: bool, assign: bool, merged: bool, device: torch.device) -> None:
    layer, x = make(device, double_quant=double_quant), inputs(device)
    y, base = layer(x), base_of(layer)
    if merged:
        layer.merge()
    model = nn.Sequential(layer)
    nested = {"nested_absmax", "nested_quant_map"} if double_quant else set()
    names = {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"} | nested
    assert set(model.state_dict()) == {
        "0.weight", "0.bias", "0.lora_A", "0.lora_B", *(f"0.weight.{name}" for name in names)
    }  # fmt: skip
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other = nn.Sequential(LoRALinear(K, N, r=4, alpha=8, quantize="nf4", device=device))
    other[0].merge()
    other.load_state_dict(state, assign=assign)
    assert not other[0].merged
    assert torch.equal(other(x), y)
    assert base_of(other[0]).double_quant == double_quant
    shared = base_of(other[0]).packed.data_ptr() == state["0.weight"].data_ptr()
    assert shared == assign
    assert (layer.weight is base) != merged


def test_loading_what_is_not_there(device: torch.device) -> None:
    layer = make(device)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        layer.load_state_dict({k: t for k, t in state.items() if not k.startswith("weight")})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "scale"'):
        layer.load_state_dict(state | {"scale": torch.zeros(1)})
    base = base_of(layer)
    layer.load_state_dict({"lora_B": torch.zeros(N, 4)}, strict=False)
    assert layer.weight is base
    assert not layer.lora_B.any()


@pytest.mark.parametrize("key", ["weight", "weight.absmax", "weight.nested_absmax", "weight.quant_map"])
def test_damaged_state_is_named_and_nothing_of_the_layer_loaded(key: str, device: torch.device) -> None:
    layer, x = make(device), inputs(device)
    y = layer(x)
    state = make(device, bias=True).state_dict()
    state |= {"lora_A": torch.zeros(4, K), key: state[key][:-1]}
    with pytest.raises(RuntimeError, match=f"'{key}'".replace(".", r"\.")):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("shaped", [True, False])
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "bias"])
def test_a_wrong_entry_beside_the_weight_keeps_all_of_the_layer_out(
    name: str, shaped: bool, device: torch.device
) -> None:
    layer = make(device, bias=True)
    torch.manual_seed(1)
    other = LoRALinear(K, N, r=4, alpha=8, quantize="nf4", bias=True, device=device)
    before, state = {key: value.clone() for key, value in layer.state_dict().items()}, other.state_dict()
    state[name] = state[name][:1] if shaped else 1.0
    with pytest.raises(RuntimeError, match=rf"state\['{name}'\] was \[{'1' if shaped else ''}"):
        layer.load_state_dict(state)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_state_of_another_shape_or_a_dense_one_is_refused(device: torch.device) -> None:
    layer = make(device)
    other = LoRALinear(N, K, r=4, quantize="nf4", device=device).state_dict()
    state = layer.state_dict()
    weights = {k: t for k, t in other.items() if k.startswith("weight")}
    with pytest.raises(RuntimeError, match=rf"state\['weight'\] was \[{K}, {N}\], but must be \[{N}, {K}\]"):
        layer.load_state_dict(state | weights)
    with pytest.raises(RuntimeError, match=r"state had no tensor 'weight\.quant_state.bitsandbytes__nf4'"):
        layer.load_state_dict(LoRALinear(K, N, r=4, device=device).state_dict())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(merged: bool, how: str, device: torch.device) -> None:
    layer, x = make(device, dropout=0.5).eval(), inputs(device)
    unmerged = layer(x)
    if merged:
        layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        saved = io.BytesIO()
        torch.save(layer, saved)
        saved.seek(0)
        other = torch.load(saved, weights_only=False)
    assert other.merged == merged
    assert torch.equal(other(x), layer(x))
    layer.unmerge()
    base_of(layer).packed.zero_()
    other.unmerge()
    assert torch.equal(other(x), unmerged), "a copy shares nothing"


def test_reset_parameters(device: torch.device) -> None:
    layer = make(device, block_size=32, double_quant=False)
    before = base_of(layer)
    layer.reset_parameters()
    assert (base_of(layer).block_size, base_of(layer).double_quant) == (32, False)
    assert not torch.equal(base_of(layer).packed, before.packed)
    assert float(base_of(layer).dequantize().abs().max()) <= K**-0.5
    assert not layer.lora_B.any()


def test_repr(device: torch.device) -> None:
    assert repr(make(device)) == (
        f"LoRALinear(in_features={K}, out_features={N}, r=4, alpha=8, dropout=0.0, bias=True, merged=False, "
        "quantize=nf4)"
    )


def test_bad_arguments(device: torch.device) -> None:
    linear = nn.Linear(K, N, device=device)
    for call in (lambda **o: LoRALinear(K, N, **o), lambda **o: LoRALinear.from_linear(linear, **o)):
        with pytest.raises(ValueError, match="quantize was 'int4', but must be 'nf4' or None"):
            call(quantize="int4")
        with pytest.raises(ValueError, match="block_size was 48, but must be one of"):
            call(quantize="nf4", block_size=48)
    with pytest.raises(ValueError, match="init was 'pissa', but must be 'default' or 'loftq'"):
        LoRALinear.from_linear(linear, init="pissa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init was 'loftq', but quantize was None"):
        LoRALinear.from_linear(linear, init="loftq")
    with pytest.raises(ValueError, match="scaling was 0"):
        LoRALinear.from_linear(linear, quantize="nf4", init="loftq", alpha=0)
    with pytest.raises(ValueError, match="steps was 0, but must be at least 1"):
        LoRALinear.from_linear(linear, quantize="nf4", init="loftq", loftq_steps=0)


def distance(layer: LoRALinear, weight: Tensor) -> float:
    """Of W from what the layer multiplies by, in the Frobenius norm."""
    effective = base_of(layer).dequantize().double() + layer.delta_weight().double()
    return float((effective - weight.double()).norm())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loftq_restores_what_quantization_lost(dtype: torch.dtype, use_rslora: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(192, 128, device=device, dtype=dtype)
    # Weights have a decaying spectrum beside their noise, as trained ones do.
    linear.weight.data += (torch.randn(128, 4, device=device) @ torch.randn(4, 192, device=device) * 0.05).to(dtype)
    options: dict[str, Any] = {"r": 16, "alpha": 3, "use_rslora": use_rslora, "quantize": "nf4"}
    plain = distance(LoRALinear.from_linear(linear, **options), linear.weight)
    once = LoRALinear.from_linear(linear, **options, init="loftq", loftq_steps=1)
    often = LoRALinear.from_linear(linear, **options, init="loftq")
    # One step takes away exactly the largest r singular values of the error.
    error = linear.weight.double() - base_of(once).dequantize().double()
    best = float(torch.linalg.svdvals(error)[16:].norm())
    assert distance(once, linear.weight) == pytest.approx(best, rel=1e-3 if dtype == torch.float32 else 2e-2)
    assert best < 0.85 * plain
    assert distance(often, linear.weight) < distance(once, linear.weight)
    assert often.lora_A.dtype == dtype
    assert base_of(often).dtype == dtype
    assert all(p.requires_grad for p in (often.lora_A, often.lora_B))


def test_loftq_of_a_weight_with_fewer_singular_values_than_r(device: torch.device) -> None:
    linear = nn.Linear(5, 3, device=device)
    layer = LoRALinear.from_linear(linear, r=8, alpha=16, quantize="nf4", init="loftq")
    assert distance(layer, linear.weight) < 1e-5
    assert layer.lora_A[3:].any(), "the rest of the adapter can be trained"
    assert not layer.lora_B[:, 3:].any()


def test_loftq_alone(device: torch.device) -> None:
    w = torch.randn(20, 30, device=device, dtype=torch.float16)
    base, A, B = loftq(w, 4, 0.5, block_size=32, double_quant=False, steps=3)
    assert (A.shape, B.shape, A.dtype) == ((4, 30), (20, 4), torch.float32)
    assert (base.dtype, base.block_size, base.double_quant) == (torch.float16, 32, False)
    plain = NF4Weight.quantize(w, 32, double_quant=False)
    error = (base.dequantize().float() + 0.5 * B @ A - w.float()).norm()
    assert error < (plain.dequantize().float() - w.float()).norm()
