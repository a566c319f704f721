"""The NF4 format: committed vectors, properties, bitsandbytes' own functions, and state that is damaged."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import NF4Weight, lora_linear
from lora_kernels import nf4_codec as codec
from lora_kernels.nf4_codec import BLOCK_SIZES

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "nf4_test_vectors.json").read_text())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")
PROPERTY = settings(max_examples=100, deadline=None, database=None)


def of_bits(words: list[str], device: torch.device) -> Tensor:
    """The float32 values whose bits the vectors give in hexadecimal."""
    unsigned = torch.tensor([int(word, 16) for word in words], dtype=torch.int64)
    return unsigned.to(torch.int32).view(torch.float32).to(device)


def sha256(t: Tensor) -> str:
    return hashlib.sha256(t.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def vector_weight(device: torch.device) -> Tensor:
    i = torch.arange(8 * 256, dtype=torch.float64)
    w = ((i * 37 + 11) % 101 - 50) / 50 * (1 + (i // 64 * 7) % 13 / 8) * 2.0**-7
    return w.float().to(torch.bfloat16).view(8, 256).to(device)


def same_bits(left: Tensor, right: Tensor) -> bool:
    left_bytes, right_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (left, right))
    return left.dtype == right.dtype and torch.equal(left_bytes, right_bytes)


def test_tables(device: torch.device) -> None:
    assert sha256(codec.nested_map(device)) == VECTORS["code2_sha256_le_f32"]
    assert same_bits(codec.nested_map(device), of_bits(VECTORS["code2_f32"], device))
    table = codec.code_table(device)
    assert same_bits(table, of_bits(VECTORS["nf4_code_f32"], device))
    # On a threshold the lower code is the one, and just above it the higher.
    thresholds = of_bits(VECTORS["nf4_thresholds_f32"], device)
    above = torch.nextafter(thresholds, torch.ones_like(thresholds))
    w = torch.cat((torch.ones(1, device=device), thresholds, above, torch.ones(1, device=device))).view(1, 32)
    decoded = NF4Weight.quantize(w, 32, double_quant=False).dequantize()[0]
    assert torch.equal(decoded[1:16], table[:15])
    assert torch.equal(decoded[16:31], table[1:])


@pytest.mark.parametrize("double_quant", [False, True])
def test_vectors(double_quant: bool, device: torch.device) -> None:
    w = vector_weight(device)
    assert sha256(w) == VECTORS["W_bf16_sha256"]
    expected = VECTORS["double" if double_quant else "plain"]
    weight = NF4Weight.quantize(w, 64, double_quant)
    assert bytes(weight.packed.tolist()).hex() == expected["packed_hex"]
    if double_quant:
        assert weight.nested_absmax is not None
        assert weight.offset is not None
        assert weight.absmax.tolist() == expected["absmax_u8"]
        assert same_bits(weight.nested_absmax, of_bits(expected["nested_absmax_f32"], device))
        assert same_bits(weight.offset, of_bits([expected["nested_offset_f32"]], device))
        assert same_bits(weight.scales(), of_bits(expected["absmax_dequant_f32"], device))
        state = weight.state_dict()["weight.quant_state.bitsandbytes__nf4"]
        assert bytes(state.tolist()).decode() == VECTORS["quant_state_json"]
    else:
        assert same_bits(weight.scales(), of_bits(expected["absmax_f32"], device))
    assert sha256(weight.dequantize()) == expected["dequant_bf16_sha256"]


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Any shape and dtype; normal, with outliers, with blocks of zeros, constant, tiny or huge; any strides."""
    rows, columns = draw(st.integers(1, 90)), draw(st.integers(1, 130))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=generator)
    match draw(st.sampled_from(["normal", "outliers", "zeros", "constant", "tiny", "huge"])):
        case "outliers":
            w[torch.rand(rows, columns, generator=generator) < 0.02] *= 1000.0
        case "zeros":
            w.view(-1)[: draw(st.integers(0, rows * columns))] = 0.0
        case "constant":
            w.fill_(0.37)
        case "tiny":
            w *= torch.finfo(dtype).tiny
        case "huge":
            w *= min(torch.finfo(dtype).max / 8, 1e34)
    w = w.to(dtype)
    match draw(st.sampled_from(["contiguous", "transposed", "strided"])):
        case "transposed":
            w = w.T
        case "strided":
            w = torch.stack((w, torch.full_like(w, torch.nan)), dim=2)[:, :, 0]
    return w


def nearest(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales by definition, in plain loops over blocks."""
    table = codec.code_table(CPU)
    thresholds = (table[:-1] + table[1:]) / 2
    codes, scales = [], []
    for block in w.reshape(-1).float().split(block_size):
        absmax = block.abs().max()
        scaled = block * (1 / absmax.clamp(min=1e-38))
        codes.append((scaled[:, None] > thresholds).sum(1))
        scales.append(absmax)
    return torch.cat(codes), torch.stack(scales)


@PROPERTY
@given(w=weights(), block_size=st.sampled_from(BLOCK_SIZES))
def test_codes_and_values_by_definition(w: Tensor, block_size: int) -> None:
    weight = NF4Weight.quantize(w, block_size, double_quant=False)
    codes, scales = nearest(w, block_size)
    assert same_bits(weight.absmax, scales)
    unpacked = torch.stack((weight.packed >> 4, weight.packed & 15), 1).view(-1)
    assert torch.equal(unpacked[: w.numel()].long(), codes)
    assert bool((unpacked[w.numel() :] == 7).all()), "an odd element is padded with the code of zero"
    for dtype in DTYPES:
        expected = (codec.code_table(CPU)[codes] * scales.repeat_interleave(block_size)[: w.numel()]).to(dtype)
        assert same_bits(weight.dequantize(dtype), expected.view(w.shape))


@PROPERTY
@given(w=weights(), block_size=st.sampled_from(BLOCK_SIZES))
def test_double_quantization(w: Tensor, block_size: int) -> None:
    plain, weight = NF4Weight.quantize(w, block_size, False), NF4Weight.quantize(w, block_size)
    assert weight.nested_absmax is not None
    assert weight.offset is not None
    assert torch.equal(weight.packed, plain.packed)
    assert same_bits(weight.offset, plain.absmax.mean().view(1))
    scales = weight.scales()
    for i, group in enumerate((plain.absmax - weight.offset).split(256)):
        assert same_bits(weight.nested_absmax[i], group.abs().max())
        # No other value of the map is nearer, but for what rounding makes of the comparison, and denormal numbers.
        values = codec.nested_map(CPU).double() * weight.nested_absmax[i].double()
        distance = (group.double()[:, None] - values).abs()
        chosen = distance.gather(1, weight.absmax[i * 256 :][: len(group), None].long())[:, 0]
        assert bool((chosen <= distance.amin(1) + 2.0**-22 * weight.nested_absmax[i] + 1e-38).all())
        product = codec.nested_map(CPU)[weight.absmax[i * 256 :][: len(group)].long()] * weight.nested_absmax[i]
        assert same_bits(scales[i * 256 :][: len(group)], product + weight.offset)


@PROPERTY
@given(w=weights(), block_size=st.sampled_from(BLOCK_SIZES), double_quant=st.booleans())
def test_state_dict_round_trip(w: Tensor, block_size: int, double_quant: bool) -> None:
    weight = NF4Weight.quantize(w, block_size, double_quant)
    state = weight.state_dict("a.weight")
    again = NF4Weight.from_state_dict({"a.bias": torch.zeros(1), **state}, "a.weight")
    assert (again.block_size, again.shape, again.dtype) == (block_size, w.shape, w.dtype)
    for left, right in zip(again.tensors(), weight.tensors(), strict=True):
        assert left.shape == right.shape
        assert same_bits(left, right)


def test_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of many chunks is the weight of one chunk; block borders and rows fall anywhere."""
    w = torch.randn(37, 611, device=device)
    whole = {(s, t): NF4Weight.quantize(v, s) for s in (32, 4096) for t, v in enumerate((w, w.T))}
    decoded = {key: weight.dequantize(torch.bfloat16) for key, weight in whole.items()}
    monkeypatch.setattr(codec, "_CHUNK", 4096)
    for (block_size, t), weight in whole.items():
        again = NF4Weight.quantize(w.T if t else w, block_size)
        for left, right in zip(again.tensors(), weight.tensors(), strict=True):
            assert same_bits(left, right)
        assert same_bits(again.dequantize(torch.bfloat16), decoded[block_size, t])


def test_all_zero(device: torch.device) -> None:
    for double_quant in (False, True):
        weight = NF4Weight.quantize(torch.zeros(3, 50, device=device), 32, double_quant)
        assert torch.equal(weight.dequantize(), torch.zeros(3, 50, device=device))
        assert bool((weight.packed == 0x77).all())


def test_size(device: torch.device) -> None:
    w = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    for block_size, double_quant, bits in ((64, True, 4.127), (64, False, 4.5), (4096, True, 4.002)):
        weight = NF4Weight.quantize(w, block_size, double_quant)
        assert weight.nbytes * 8 / w.numel() == pytest.approx(bits, abs=1e-3)


def test_tables_are_nobodys_inference_tensors(device: torch.device) -> None:
    """Whoever asks first makes the tables, for everybody: one who evaluates must not spoil them for training."""
    for table in (codec.code_table, codec.nested_map, codec._pairs):
        table.cache_clear()
    w = torch.randn(8, 64, device=device)
    with torch.inference_mode():
        NF4Weight.quantize(w).dequantize()
    x = torch.randn(3, 64, device=device, requires_grad=True)
    adapter = torch.zeros(2, 64, device=device), torch.zeros(8, 2, device=device)
    weight = NF4Weight.quantize(w)
    y = lora_linear(x, weight, *adapter, backend="eager")
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1))


def test_the_default_device_makes_no_difference(device: torch.device) -> None:
    for table in (codec.code_table, codec.nested_map, codec._pairs):
        table.cache_clear()
    w = vector_weight(device)
    with torch.device("meta"):
        weight = NF4Weight.quantize(w)
        state = weight.state_dict()
    assert weight.absmax.tolist() == VECTORS["double"]["absmax_u8"]
    assert bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()).decode() == VECTORS["quant_state_json"]


def test_attributes(device: torch.device) -> None:
    weight = NF4Weight.quantize(torch.randn(5, 7, dtype=torch.float16, device=device, requires_grad=True), 32)
    assert (weight.shape, weight.dim(), weight.dtype, weight.device) == ((5, 7), 2, torch.float16, device)
    assert weight.double_quant
    assert not weight.requires_grad
    assert not weight.dequantize().requires_grad
    assert weight.dequantize().dtype == torch.float16
    assert weight.dequantize(torch.float32).dtype == torch.float32
    assert weight.to(device) is weight
    assert weight.to("meta").device.type == "meta"
    assert repr(weight) == (
        f"NF4Weight(shape=[5, 7], block_size=32, double_quant=True, dtype=torch.float16, device='{device}')"
    )
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert other.packed.data_ptr() != weight.packed.data_ptr()
        assert same_bits(other.dequantize(), weight.dequantize())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 700, -1])
def test_what_is_not_finite_is_refused(value: float, position: int, device: torch.device) -> None:
    w = torch.randn(20, 61, device=device)
    w.view(-1)[position] = value
    for double_quant in (False, True):
        with pytest.raises(ValueError, match="w had a NaN or an infinity"):
            NF4Weight.quantize(w, 64, double_quant)


def test_a_mean_that_overflows_is_refused(device: torch.device) -> None:
    w = torch.full((100, 64), 3e38, device=device)
    assert torch.equal(NF4Weight.quantize(w, double_quant=False).dequantize(), w)
    with pytest.raises(ValueError, match="w had values so large that the mean of its scales overflows"):
        NF4Weight.quantize(w)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="w was a list, but must be a tensor"):
        NF4Weight.quantize([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"w was torch\.float64, but must be one of"):
        NF4Weight.quantize(torch.zeros(2, 2, dtype=torch.float64))
    for shape in ((4,), (2, 2, 2), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match="w had shape"):
            NF4Weight.quantize(torch.zeros(shape))
    for block_size in (0, 16, 63, 8192):
        with pytest.raises(ValueError, match=f"block_size was {block_size}, but must be one of 32, 64"):
            NF4Weight.quantize(torch.zeros(2, 2), block_size)


def described(**changes: Any) -> Callable[[Tensor], Tensor]:
    """What replaces fields of the JSON of a state; None removes one."""

    def damage(t: Tensor) -> Tensor:
        fields = json.loads(bytes(t.tolist()))
        fields = {k: v for k, v in (fields | changes).items() if v is not None}
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return damage


def with_nan(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] = torch.nan
    return t


JSON = ".quant_state.bitsandbytes__nf4"
DAMAGE = [
    *((key, lambda t: t[:-1]) for key in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", JSON)),
    *((key, lambda t: t.double()) for key in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")),
    *((key, with_nan) for key in (".quant_map", ".nested_absmax", ".nested_quant_map")),
    (".absmax", lambda t: t.float()),
    (".quant_map", lambda t: t * 2),
    (".nested_quant_map", lambda t: t.flip(0)),
    (JSON, lambda t: t.float()),
    (JSON, lambda t: torch.full_like(t, 255)),
    (JSON, lambda t: torch.tensor(list(b"[]"), dtype=torch.uint8)),
    *(
        (JSON, described(**change))
        for change in (
            {"quant_type": "fp4"},
            {"blocksize": 48},
            {"blocksize": True},
            {"dtype": "float8"},
            {"shape": [600]},
            {"shape": [0, 600]},
            {"shape": None},
            {"nested_blocksize": 128},
            {"nested_dtype": "float16"},
            {"nested_offset": None},
            {"nested_offset": float("nan")},
            {"nested_offset": "0"},
        )
    ),
]


@pytest.mark.parametrize(("key", "damage"), DAMAGE)
def test_damaged_state_is_refused(key: str, damage: Callable[[Tensor], Tensor]) -> None:
    state = NF4Weight.quantize(torch.randn(20, 30)).state_dict("m.weight")
    state[f"m.weight{key}"] = damage(state[f"m.weight{key}"])
    with pytest.raises(ValueError, match=f"'m.weight{key}'".replace(".", r"\.")):
        NF4Weight.from_state_dict(state, "m.weight")


@pytest.mark.parametrize("double_quant", [False, True])
def test_missing_and_unknown_keys_are_named(double_quant: bool) -> None:
    state = NF4Weight.quantize(torch.randn(20, 30), 64, double_quant).state_dict()
    for key in state:
        with pytest.raises(ValueError, match=f"no tensor '{key}'"):
            NF4Weight.from_state_dict({k: t for k, t in state.items() if k != key})
    with pytest.raises(ValueError, match=r"state had 'weight\.SCB'"):
        NF4Weight.from_state_dict(state | {"weight.SCB": torch.zeros(3)})
    if not double_quant:
        with pytest.raises(ValueError, match=r"state had 'weight\.nested_absmax'"):
            NF4Weight.from_state_dict(state | {"weight.nested_absmax": torch.zeros(3)})


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_bytes_in_a_floating_point_tensor(storage: torch.dtype, device: torch.device) -> None:
    weight = NF4Weight.quantize(torch.randn(16, 24, device=device))
    state = weight.state_dict()
    state["weight"] = state["weight"].view(-1).view(storage).view(-1, 1)
    again = NF4Weight.from_state_dict(state)
    assert again.packed.data_ptr() == weight.packed.data_ptr(), "the storage is shared"
    assert same_bits(again.dequantize(), weight.dequantize())


def test_no_two_weights_share_a_map() -> None:
    """What is written into the scales' map of one weight is not what all others of the process are made with."""
    first, second = (NF4Weight.quantize(torch.randn(4, 64)) for _ in range(2))
    assert first.nested_map is not None
    assert second.nested_map is not None
    kept = second.nested_map.clone()
    first.nested_map.zero_()
    assert torch.equal(second.nested_map, kept)
    assert torch.equal(codec.nested_map(torch.device("cpu")), kept)
