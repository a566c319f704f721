// NF4 codes decoded two at a time, by a table of all pairs of values that the byte with two codes is the index of.
#pragma once

#include "nf4.cuh"
#include "nf4_ptx.cuh"

namespace lora_kernels {

// [byte, copy]. The lanes of a half of a warp, which are served together, have a copy each, so that no two of them meet in
// a bank whatever they look up. The table lies in shared memory at the address that is its size, so that the byte's place is
// bits of a pair's address, and no sum.
constexpr int kPairCopies = 16, kPairsBytes = 256 * kPairCopies * 8, kPairsAddress = kPairsBytes;

// By all threads of a block; `values` is what fill_table made.
__device__ inline void fill_pairs(unsigned char* table, const float* values) {
  for (int i = threadIdx.x; i < 256 * kPairCopies; i += blockDim.x) {
    const int byte = i / kPairCopies;
    reinterpret_cast<float2*>(table)[i] = make_float2(values[byte / 16], values[byte % 16]);
  }
}

// The address of a lane's copy of the first pair.
__device__ inline uint32_t pairs_of_lane(int lane) { return kPairsAddress + lane % kPairCopies * 8; }

// The eight weights of a word in their order, decoded and rounded as dequantize_kernel does.
template <class T>
__device__ inline void look_up_pairs(uint32_t (&pairs)[4], uint32_t table, float scale, uint32_t word) {
  constexpr int kShift = 7;
  constexpr uint32_t kPlaces = 0xFFu << kShift;
  static_assert(1 << kShift == kPairCopies * 8, "the bytes of a pair's copies");
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t shifted = i == 0 ? word << kShift : word >> (8 * i - kShift);
    const float2 values = load_shared_pair((shifted & kPlaces) | table);
    pairs[i] = round_pair(__fmul_rn(values.x, scale), __fmul_rn(values.y, scale), T());
  }
}

}  // namespace lora_kernels
