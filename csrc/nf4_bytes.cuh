// NF4 codes decoded by their bytes. The codes of a block have one scale, so at most 16 values: they are made once, as the
// format says, and split into bytes. Then a byte of four weights is one instruction, whose selector is the codes.
#pragma once

#include "nf4.cuh"
#include "nf4_ptx.cuh"

namespace lora_kernels {

// The 16 values of a block by their bytes, four to a word.
struct ByteTable {
  uint32_t low[4], high[4];
};

template <class T>
__device__ inline ByteTable make_table(float scale) {
  ByteTable table;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto value = [&](int code) { return __fmul_rn(nf4_value(code), scale); };
    const uint32_t first = round_pair(value(4 * i), value(4 * i + 1), T());
    const uint32_t second = round_pair(value(4 * i + 2), value(4 * i + 3), T());
    table.low[i] = permute_bytes(first, second, 0x6420);
    table.high[i] = permute_bytes(first, second, 0x7531);
  }
  return table;
}

// The bytes of the eight weights of a word, in their order: four low ones to a word, and four high ones. In each byte of
// `word`, the high half comes first; so neighbours are exchanged here.
struct Bytes {
  uint32_t low[2], high[2];
};

__device__ inline Bytes look_up_bytes(const ByteTable& table, uint32_t word) {
  const uint32_t digits = word & 0x77777777u;
  Bytes bytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t digit = digits >> (16 * i);
    // A code's uppermost bit, where a digit's third is, chooses among four bytes without a bit and four of all ones.
    // The sign of either is the byte itself.
    const uint32_t is_upper = permute_bytes(0u, ~0u, word >> (16 * i + 1));
    const auto of = [&](const uint32_t (&four)[4]) {
      return (permute_bytes(four[0], four[1], digit) & ~is_upper) | (permute_bytes(four[2], four[3], digit) & is_upper);
    };
    bytes.low[i] = of(table.low), bytes.high[i] = of(table.high);
  }
  return bytes;
}

// The eight weights of a word in their order.
__device__ inline void look_up(uint32_t (&pairs)[4], const ByteTable& table, uint32_t word) {
  const Bytes bytes = look_up_bytes(table, word);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[2 * i] = permute_bytes(bytes.low[i], bytes.high[i], 0x4051);
    pairs[2 * i + 1] = permute_bytes(bytes.low[i], bytes.high[i], 0x6273);
  }
}

}  // namespace lora_kernels
