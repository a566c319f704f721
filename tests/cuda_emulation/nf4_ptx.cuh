// csrc/nf4_ptx.cuh for a CPU, as the PTX manual describes it.
#pragma once

#include "ptx.cuh"

namespace lora_kernels {

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t digits) {
  const uint64_t from = static_cast<uint64_t>(high) << 32 | low;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = digits >> (4 * i) & 15, byte = from >> (digit % 8 * 8) & 0xFF;
    const uint32_t sign = byte >> 7 ? 0xFF : 0;
    bytes |= (digit < 8 ? byte : sign) << (8 * i);
  }
  return bytes;
}

inline float2 load_shared_pair(uint32_t address) {
  float2 pair;
  const uint32_t place = address - kDynamicAddress;
  emulation::require(place % sizeof(pair) == 0 && place < sizeof(dynamic_memory));
  std::memcpy(&pair, dynamic_memory + place, sizeof(pair));
  return pair;
}

template <class T>
inline uint32_t round_pair(float low, float high, T) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

inline void prefetch(const void*) {}

}  // namespace lora_kernels
