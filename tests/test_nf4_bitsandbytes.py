"""The NF4 format against bitsandbytes' own functions and layers, on whatever device the tests run."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import NF4Weight

bnb = pytest.importorskip("bitsandbytes")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (3, 17), (17, 64), (63, 500), (256, 1024), (500, 2000)]


def params4bit(w: Tensor, block_size: int, double_quant: bool, storage: torch.dtype = torch.uint8) -> Any:
    params = bnb.nn.Params4bit(
        w.clone(), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    )
    return params._quantize(w.device)


def dequantized(params: Any) -> Tensor:
    """bitsandbytes' values. Its AVX-512 kernel starts a block with each row, which the format does not: ask for one."""
    state, shape = params.quant_state, params.quant_state.shape
    state.shape = torch.Size((1, shape.numel()))
    try:
        return bnb.functional.dequantize_4bit(params.data, state).view(shape)
    finally:
        state.shape = shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_codes_and_values(
    shape: tuple[int, int], block_size: int, double_quant: bool, dtype: torch.dtype, device: torch.device
) -> None:
    w = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    params = params4bit(w, block_size, double_quant)
    theirs, ours = NF4Weight.from_bitsandbytes(params), NF4Weight.quantize(w, block_size, double_quant)
    assert theirs.packed.data_ptr() == params.data_ptr()
    assert theirs.absmax.data_ptr() == params.quant_state.absmax.data_ptr()
    assert torch.equal(theirs.dequantize(), dequantized(params))
    if dtype == torch.float32 and device.type == "cuda":
        # Its reciprocal is approximate: next to a threshold another code is possible.
        assert float((ours.packed != theirs.packed).float().mean()) < 1e-5
    else:
        assert torch.equal(ours.packed, theirs.packed)
    if not double_quant:
        assert torch.equal(ours.absmax, theirs.absmax)
    else:
        assert torch.equal(ours.offset, theirs.offset)  # type: ignore[arg-type]
        assert torch.equal(ours.nested_map, theirs.nested_map)  # type: ignore[arg-type]
        assert torch.equal(ours.nested_absmax, theirs.nested_absmax)  # type: ignore[arg-type]
        # Its CPU code looks scales up in a table of 65,536 bins, so it may miss the nearest value by a bin.
        exact = NF4Weight.quantize(w, block_size, double_quant=False).absmax
        bins = ours.nested_absmax.repeat_interleave(256)[: exact.numel()] * 2.0**-15  # type: ignore[union-attr]
        excess = (theirs.scales() - exact).abs() - (ours.scales() - exact).abs()
        assert bool((excess.abs() <= bins + 2.0**-23 * exact).all())
        assert int((excess != 0).sum()) <= 2 + 0.01 * exact.numel()


def linear4bit(w: Tensor, double_quant: bool, storage: torch.dtype = torch.uint8) -> Any:
    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], compute_dtype=w.dtype, compress_statistics=double_quant, quant_type="nf4",
        quant_storage=storage,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        w.clone(), compress_statistics=double_quant, quant_type="nf4", quant_storage=storage, module=layer
    )
    return layer.to(w.device)


@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_from_bitsandbytes(double_quant: bool, storage: torch.dtype, device: torch.device) -> None:
    w = torch.randn(48, 160, device=device, dtype=torch.bfloat16)
    layer = linear4bit(w, double_quant, storage)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    weight = NF4Weight.from_state_dict(torch.load(saved, weights_only=True), device=device)
    assert torch.equal(weight.dequantize(), dequantized(layer.weight))
    assert torch.equal(NF4Weight.from_bitsandbytes(layer.weight).dequantize(), weight.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_to_bitsandbytes(double_quant: bool, device: torch.device) -> None:
    weight = NF4Weight.quantize(torch.randn(33, 160, device=device, dtype=torch.float16), 128, double_quant)
    state = weight.state_dict()
    data = state.pop("weight")
    params = bnb.nn.Params4bit.from_prequantized(data, dict(state), device=device)
    assert torch.equal(dequantized(params), weight.dequantize())
    written = params.quant_state.as_dict(packed=True)
    state = weight.state_dict()
    assert {f"weight.{key}" for key in written} | {"weight"} == set(state)
    for key, value in written.items():
        assert torch.equal(value.cpu(), state[f"weight.{key}"].cpu()), key


def test_what_is_no_quantized_nf4_is_refused(device: torch.device) -> None:
    w = torch.randn(32, 64, device=device)
    with pytest.raises(ValueError, match="had no quant_state"):
        NF4Weight.from_bitsandbytes(bnb.nn.Params4bit(w))
    with pytest.raises(ValueError, match="had no quant_state"):
        NF4Weight.from_bitsandbytes(torch.nn.Parameter(w))
    fp4 = bnb.nn.Params4bit(w, quant_type="fp4")._quantize(w.device)
    with pytest.raises(ValueError, match="quant_type was 'fp4', but must be 'nf4'"):
        NF4Weight.from_bitsandbytes(fp4)
    part = params4bit(w, 64, True)
    part.data = part.data[:8]
    with pytest.raises(ValueError, match="params had 8 bytes, but 2048 codes are 1024"):
        NF4Weight.from_bitsandbytes(part)
    elsewhere = params4bit(w, 64, True)
    elsewhere.quant_state.absmax = elsewhere.quant_state.absmax.to("meta")
    with pytest.raises(ValueError, match=r"quant_state\.absmax was on meta, but must be on params' device"):
        NF4Weight.from_bitsandbytes(elsewhere)


def test_repacked_for_the_cpu_is_refused() -> None:
    params = params4bit(torch.randn(32, 64), 64, True)
    data, state = bnb.functional._convert_weight_packed_for_cpu(params.data, params.quant_state)
    params.data, params.quant_state = data, state
    with pytest.raises(ValueError, match="repacked by bitsandbytes for inference on this CPU"):
        NF4Weight.from_bitsandbytes(params)
