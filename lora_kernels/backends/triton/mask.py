"""The dropout mask as bits: drawn once for a launch, and read wherever a kernel masks.

    bits[m, w]    int32 [M, 4 ceil(columns / 128)];  element (m, k) stays if bit 16 (k % 2) + k % 32 // 2 of word k // 32 is set

lora_kernels/dropout.py says which elements stay. A mask of bits takes a sixteenth of a bfloat16 x for as long as one
forward or one backward lasts. Drawn where they are needed, they would be drawn twice in a backward, and in an epilogue
keep the products of the next tile from overlapping.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.pieces import anchored
from lora_kernels.dropout import PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def mask_words(columns):
    """The words of a row of the mask: whole loads of 16 bytes."""
    return tl.cdiv(columns, 128) * 4


@triton.jit
def _philox(seed, c0, c1):
    """Philox4x32 of the counters (c0, c1, 0, 0), as lora_kernels/dropout.py has it.

    tl.philox takes two instructions for the halves of a product; one of 64 bits has both.
    """
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0, (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        # They wrap around, which TRITON_DEBUG=1 would take for a mistake.
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["M", "threshold"])
def mask_kernel(seed_ptr, bits_ptr, threshold, M, columns, BELOW_HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of a draw, BLOCK words a program. BELOW_HALF: whether the threshold, of 2^16, is below 2^15."""
    words = mask_words(columns)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows, offs_w = offs // words, offs % words
    seed = tl.load(seed_ptr)
    # Two lanes of 16 bits at once: `reached` has in each lane's sign whether its other bits reach the threshold's. The
    # lane itself does if it has the sign as well, or, where the threshold has none, if either has it. With a threshold
    # of 2^16 no lane does.
    addend = (0x8000 - (threshold & 0x7FFF)).to(tl.uint32)
    addend |= addend << 16
    signs = tl.where(threshold < 0x10000, 0x80008000, 0).to(tl.uint32)
    bits = tl.zeros((BLOCK,), tl.uint32)
    for i in tl.static_range(4):
        lanes = _philox(seed, (4 * offs_w + i).to(tl.uint32), rows.to(tl.uint32))
        for j in tl.static_range(4):
            reached = tl.add(lanes[j] & 0x7FFF7FFF, addend, sanitize_overflow=False)
            keep = lanes[j] | reached if BELOW_HALF else lanes[j] & reached
            bits = (bits >> 1) | (keep & signs)
    tl.store(bits_ptr + offs, bits.to(tl.int32, bitcast=True), rows < M)


@triton.jit
def load_bits(bits_ptr, row0, column0, rows, columns, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The words of a tile [BLOCK_M, BLOCK_C] whose first element is (row0, column0); column0 % 32 == 0."""
    words = mask_words(columns)
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_w = column0 // 32 + tl.arange(0, BLOCK_C // 32)
    inside = (offs_m < rows)[:, None] & (offs_w < words)[None, :]
    return tl.load(bits_ptr + offs_m.to(tl.int64)[:, None] * words + offs_w[None, :], inside, other=0)


@triton.jit
def bit_places():
    """Where in a word the bit of each of its 32 elements is."""
    offs_k = tl.arange(0, 32)
    return 16 * (offs_k % 2) + offs_k // 2


@triton.jit
def kept(bits, places, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements of a tile stay, by its words."""
    return tl.reshape((bits[:, :, None] >> places[None, None, :]) & 1, (BLOCK_M, BLOCK_C)) != 0


@triton.jit
def keep_tile(bits_ptr, row0, column0, rows, columns, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements of a tile stay, as load_bits and kept have it."""
    bits = load_bits(bits_ptr, row0, column0, rows, columns, BLOCK_M, BLOCK_C)
    return kept(bits, bit_places(), BLOCK_M, BLOCK_C)


def _speaks_ptx(_semantic=None):
    """Whether what is compiled is for CUDA: neither Triton's interpreter, which passes nothing, nor ROCm knows PTX."""
    options = getattr(getattr(_semantic, "builder", None), "options", None)
    return tl.constexpr(getattr(options, "backend_name", None) == "cuda")


# What Triton calls while it compiles.
_speaks_ptx.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def _where_negative(signs, x):
    """x where `signs` is negative, and zero elsewhere.

    Triton would unpack the pairs in which registers hold 16 bits, choose twice, and pack them again. Here the signs of both
    become a mask of the register.
    """
    if _speaks_ptx() and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 pair; prmt.b32 pair, $2, $3, 0xffbb; and.b32 $0, $1, pair; }", "=r,r,r,r", [x, signs],
            dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.where(signs < 0, x, 0.0)


@triton.jit
def masked_operand(x, bits_ptr, row0, column0, rows, columns, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
                   TURNED: tl.constexpr = False):  # fmt: skip
    """mask(x) of a tile that is loaded, masked and multiplied, which so does not pass through shared memory twice.

    TURNED: x is [BLOCK_C, BLOCK_M], and was loaded so. Loaded the other way and transposed behind the mask, it would pass
    twice after all, or be kept in registers while it is under way.
    """
    bits = load_bits(bits_ptr, row0, column0, rows, columns, BLOCK_M, BLOCK_C)
    # Each element's bit becomes the sign of its word.
    shifts = anchored(31 - bit_places(), bits_ptr + tl.arange(0, 32), rows < 0)
    if TURNED:
        return _where_negative(tl.reshape(tl.trans(bits)[:, None, :] << shifts[None, :, None], (BLOCK_C, BLOCK_M)), x)
    else:
        return _where_negative(tl.reshape(bits[:, :, None] << shifts[None, None, :], (BLOCK_M, BLOCK_C)), x)
