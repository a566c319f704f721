"""NF4 weights in and out of state dicts and bitsandbytes' parameters. Everything read is checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import nf4_codec as codec
from lora_kernels.limits import BASE_DTYPES
from lora_kernels.nf4_codec import BLOCK_SIZES, NESTED_BLOCK_SIZE, Form

# FSDP shards parameters of one dtype together, so the codes may hide in a floating-point tensor.
_STORAGE_DTYPES = (torch.uint8, *BASE_DTYPES)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BASE_DTYPES}
_DESCRIPTION = "quant_state.bitsandbytes__nf4"

# What NF4Weight.of makes a weight of.
Parts = tuple[tuple[Tensor, ...], Form]


def dump(tensors: Sequence[Tensor], form: Form, prefix: str) -> dict[str, Tensor]:
    """See NF4Weight.state_dict."""
    (packed, absmax, *nested), (block_size, shape, dtype) = tensors, form
    description: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    state = {
        prefix: packed.view(-1, 1),
        f"{prefix}.absmax": absmax,
        f"{prefix}.quant_map": codec.code_table(packed.device).clone(),
    }
    if nested:
        nested_absmax, nested_map, offset = nested
        state[f"{prefix}.nested_absmax"] = nested_absmax
        # Layers share one map, and safetensors refuses to save tensors that share memory.
        state[f"{prefix}.nested_quant_map"] = nested_map.clone()
        description["nested_blocksize"] = NESTED_BLOCK_SIZE
        description["nested_dtype"] = "float32"
        # On the meta device there is none yet; `load` refuses a NaN.
        description["nested_offset"] = float("nan") if offset.is_meta else offset.item()
    encoded = list(json.dumps(description).encode())
    state[f"{prefix}.{_DESCRIPTION}"] = torch.tensor(encoded, dtype=torch.uint8, device="cpu")
    return state


def load(state: Mapping[str, Tensor], prefix: str, device: torch.device | str | None) -> Parts:
    """See NF4Weight.from_state_dict."""
    described = f"{prefix}.{_DESCRIPTION}"
    description = _parsed(described, _taken(state, described))
    nested = "nested_blocksize" in description
    block_size, dtype, shape = _checked_description(described, description, nested)
    n = shape.numel()
    blocks = -(-n // block_size)
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    allowed = {f"{prefix}.{name}" for name in names} | {described}
    for key in state:
        if key.startswith(f"{prefix}.") and key not in allowed:
            raise ValueError(f"state had {key!r}, but {described!r} knows of no such tensor")

    packed = _codes(_taken(state, prefix), n, f"state[{prefix!r}]")
    device = packed.device if device is None else torch.device(device)

    def read(name: str, expected: torch.dtype, count: int) -> Tensor:
        key = f"{prefix}.{name}"
        return _checked(_taken(state, key), expected, count, f"state[{key!r}]").to(device)

    absmax = read("absmax", torch.uint8 if nested else torch.float32, blocks)
    quant_map = read("quant_map", torch.float32, 16)
    if not torch.equal(quant_map, codec.code_table(device)):
        raise ValueError(f"state[{prefix + '.quant_map'!r}] had other values than NF4's, but must have its 16")
    if not nested:
        return (packed.to(device), absmax), (block_size, shape, dtype)
    nested_absmax = read("nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK_SIZE))
    nested_map = read("nested_quant_map", torch.float32, 256)
    if not bool((nested_map.diff() > 0).all()) or float(nested_map.abs().amax()) > 1.0:
        raise ValueError(f"state[{prefix + '.nested_quant_map'!r}] must have ascending values from -1 to 1")
    offset = torch.tensor([description["nested_offset"]], dtype=torch.float32, device=device)
    return (packed.to(device), absmax, nested_absmax, nested_map, offset), (block_size, shape, dtype)


def from_bitsandbytes(params: Any, quant_state: Any = None) -> Parts:
    """See NF4Weight.from_bitsandbytes. Reads no values, so it waits for no GPU."""
    state = getattr(params, "quant_state", None) if quant_state is None else quant_state
    if state is None:
        raise ValueError(
            "params had no quant_state: it was not quantized yet (bitsandbytes does that when the layer moves to a "
            "device), or was re-created without it"
        )
    if state.quant_type != "nf4":
        raise ValueError(f"params.quant_state.quant_type was {state.quant_type!r}, but must be 'nf4'")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "params was repacked by bitsandbytes for inference on this CPU, which rounds its scales to bfloat16; "
            "quantize it again, or load it again and call the layer in training mode only"
        )
    if state.shape is None or len(state.shape) != 2:
        raise ValueError(f"params.quant_state.shape was {state.shape}, but must be [N, K]")
    if state.blocksize not in BLOCK_SIZES or state.dtype not in BASE_DTYPES:
        raise ValueError(
            f"params.quant_state had blocksize {state.blocksize} and dtype {state.dtype}, but must have one of "
            f"{BLOCK_SIZES} and of {BASE_DTYPES}"
        )
    shape = torch.Size(state.shape)
    # Not .data, which has a version of its own: autograd could not see that somebody writes to the parameter.
    packed = _codes(params.detach(), shape.numel(), "params")
    blocks = -(-shape.numel() // state.blocksize)
    nested = state.state2 is not None
    name = "params.quant_state"

    def read(field: str, value: Tensor, expected: torch.dtype, count: int) -> Tensor:
        if value.device != packed.device:
            raise ValueError(f"{name}.{field} was on {value.device}, but must be on params' device, {packed.device}")
        return _shaped(value, expected, count, f"{name}.{field}")

    absmax = read("absmax", state.absmax, torch.uint8 if nested else torch.float32, blocks)
    if not nested:
        return (packed, absmax), (state.blocksize, shape, state.dtype)
    if state.state2.blocksize != NESTED_BLOCK_SIZE:
        raise ValueError(f"{name}.state2.blocksize was {state.state2.blocksize}, but must be {NESTED_BLOCK_SIZE}")
    nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
    nested_absmax = read("state2.absmax", state.state2.absmax, torch.float32, nested_blocks)
    nested_map = read("state2.code", state.state2.code, torch.float32, 256)
    offset = read("offset", state.offset, torch.float32, 1)
    return (packed, absmax, nested_absmax, nested_map, offset), (state.blocksize, shape, state.dtype)


def _taken(state: Mapping[str, Tensor], key: str) -> Tensor:
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"state had no tensor {key!r}, but an NF4 weight needs it")
    return value.detach()


def _parsed(key: str, packed: Tensor) -> dict[str, Any]:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"state[{key!r}] was {packed.dtype} {list(packed.shape)}, but must be one-dimensional uint8")
    try:
        description = json.loads(bytes(packed.tolist()).decode())
    except ValueError as error:
        raise ValueError(f"state[{key!r}] must hold JSON in UTF-8: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"state[{key!r}] held a {type(description).__name__}, but must hold an object")
    return description


def _checked_description(key: str, description: dict[str, Any], nested: bool) -> tuple[int, torch.dtype, torch.Size]:
    def require(field: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"state[{key!r}] had {field} = {description.get(field)!r}, but it must be {expected}")

    def is_int(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    require("quant_type", description.get("quant_type") == "nf4", "'nf4'")
    block_size = description.get("blocksize")
    require("blocksize", is_int(block_size) and block_size in BLOCK_SIZES, f"one of {BLOCK_SIZES}")
    dtype, shape = description.get("dtype"), description.get("shape")
    require("dtype", isinstance(dtype, str) and dtype in _DTYPES, f"one of {', '.join(_DTYPES)}")
    matrix = isinstance(shape, list) and len(shape) == 2 and all(is_int(size) and size > 0 for size in shape)
    require("shape", matrix, "[N, K]")
    if nested:
        require("nested_blocksize", description["nested_blocksize"] == NESTED_BLOCK_SIZE, str(NESTED_BLOCK_SIZE))
        require("nested_dtype", description.get("nested_dtype") == "float32", "'float32'")
        offset = description.get("nested_offset")
        number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
        require("nested_offset", number and abs(offset) < float("inf"), "a finite number")  # type: ignore[arg-type]
    assert isinstance(block_size, int) and isinstance(dtype, str) and isinstance(shape, list)
    return block_size, _DTYPES[dtype], torch.Size(shape)


def _codes(stored: Tensor, n: int, name: str) -> Tensor:
    """The bytes of a stored tensor, which it shares."""
    if stored.dtype not in _STORAGE_DTYPES:
        raise ValueError(f"{name} was {stored.dtype}, but must be one of {', '.join(map(str, _STORAGE_DTYPES))}")
    if stored.nbytes != (n + 1) // 2 or not stored.is_contiguous():
        raise ValueError(
            f"{name} had {stored.nbytes} bytes{'' if stored.is_contiguous() else ' apart from each other'}, "
            f"but {n} codes are {(n + 1) // 2} contiguous bytes"
        )
    return stored.reshape(-1).view(torch.uint8)


def _shaped(value: Tensor, expected: torch.dtype, count: int, name: str) -> Tensor:
    if value.dtype != expected or value.numel() != count or not value.is_contiguous():
        raise ValueError(
            f"{name} was {value.dtype} with {value.numel()} values, but must be {expected} with {count}, contiguous"
        )
    return value.detach().reshape(-1)


def _checked(value: Tensor, expected: torch.dtype, count: int, name: str) -> Tensor:
    value = _shaped(value, expected, count, name)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} had a NaN or an infinity, but must be finite")
    return value
