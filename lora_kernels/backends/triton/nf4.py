"""Decoding of NF4: from codes and scales to a tile of weights, and a whole weight in one launch.

    w = round(code_table[code] * absmax)        absmax = round(round(nested_map[q] * nested_absmax) + offset)

Each operation is rounded on its own: kernels that decode are compiled with enable_fp_fusion=False, for a product and
a sum that became one operation would give other bits.

How a code becomes a value
--------------------------
The 16 values sit in the lanes of a warp, twice over, and a shuffle fetches one: its five bits of lane number are the
code and a bit that does not matter, so that a shift is all that comes before it. Decoding takes a shift, a shuffle,
a product and half a conversion for each weight; tables in memory or chains of selects take several times as much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.nf4_codec import NESTED_BLOCK_SIZE as _NESTED_BLOCK_SIZE
from lora_kernels.nf4_codec import code_table

_VALUES = tl.constexpr(tuple(code_table(torch.device("cpu")).tolist()))
NESTED_BLOCK_SIZE = tl.constexpr(_NESTED_BLOCK_SIZE)


@triton.jit
def _select_values(codes):
    values = tl.where(codes == 0, _VALUES[0], _VALUES[15])
    for code in tl.static_range(1, 15):
        values = tl.where(codes == code, _VALUES[code], values)
    return values


@triton.jit
def lane_table(anything, SHUFFLE: tl.constexpr):
    """What decode_codes looks values up in: a number that is another one in every lane. `anything` is a scalar."""
    if SHUFFLE:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [anything], dtype=tl.int32, is_pure=True, pack=1
        )
        return _select_values(lane & 15)
    else:
        return 0.0


@triton.jit
def decode_codes(codes, table, SHUFFLE: tl.constexpr):
    """The values of the low four bits of each element; what is above them does not matter."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [table, codes],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _select_values(codes & 15)


@triton.jit
def code_shifts():
    """By how much each of the eight codes of a word is shifted: the high nibble of a byte is the even element."""
    return (tl.arange(0, 8) ^ 1) * 4


@triton.jit
def load_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset, blocks, mask):
    """absmax of the blocks with these numbers, 0 where masked."""
    if nested_map_ptr is None:
        return tl.load(absmax_ptr + blocks, mask, other=0.0)
    else:
        codes = tl.load(absmax_ptr + blocks, mask, other=0)
        nested = tl.load(nested_absmax_ptr + blocks // NESTED_BLOCK_SIZE, mask, other=0.0)
        return tl.load(nested_map_ptr + codes) * nested + offset


@triton.jit
def _load_words(packed_ptr, offs_word, packed_bytes):
    """Words of eight codes each; `packed_ptr` points to int32, or to bytes that end or start within a word."""
    if packed_ptr.dtype.element_ty == tl.int32:
        return tl.load(packed_ptr + offs_word, offs_word < packed_bytes // 4, other=0)
    else:
        words = tl.zeros_like(offs_word).to(tl.int32)
        for i in tl.static_range(4):
            offs_byte = offs_word * 4 + i
            byte = tl.load(packed_ptr + offs_byte, offs_byte < packed_bytes, other=0)
            words |= byte.to(tl.int32) << (8 * i)
        return words


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, out_ptr, elements, packed_bytes,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Writes the flattened weight, BLOCK elements a program. BLOCK is a multiple of BLOCK_SIZE or divides it."""
    SCALES: tl.constexpr = BLOCK // BLOCK_SIZE if BLOCK > BLOCK_SIZE else 1
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * BLOCK
    table = lane_table(pid, SHUFFLE)
    offset = 0.0
    if offset_ptr is not None:
        offset = tl.load(offset_ptr)

    words = _load_words(packed_ptr, start // 8 + tl.arange(0, BLOCK // 8), packed_bytes)
    blocks = start // BLOCK_SIZE + tl.arange(0, SCALES)
    mask = blocks * BLOCK_SIZE < elements
    scales = load_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset, blocks, mask)
    codes = tl.reshape(words[:, None] >> code_shifts()[None, :], (SCALES, BLOCK // SCALES))
    weights = tl.reshape(decode_codes(codes, table, SHUFFLE) * scales[:, None], (BLOCK,))
    offs = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, weights.to(out_ptr.dtype.element_ty), offs < elements)
