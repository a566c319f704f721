// The dropout bits that lora_kernels/dropout.py specifies: Philox4x32 with seven rounds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lora_kernels {

// The eight 16-bit lanes of one call: the mask of eight neighbouring columns of a row.
struct Lanes {
  uint32_t word[4];
};

__host__ __device__ inline uint32_t high_half(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

__host__ __device__ inline Lanes philox(uint64_t seed, uint32_t column_group, uint32_t row) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = column_group, c1 = row, c2 = 0, c3 = 0;
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = high_half(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = high_half(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Whether the even or the odd column of the pair that a word decides stays.
__host__ __device__ inline bool keeps(uint32_t word, int odd, int32_t threshold) {
  return static_cast<int32_t>((word >> (16 * odd)) & 0xFFFFu) >= threshold;
}

}  // namespace lora_kernels
