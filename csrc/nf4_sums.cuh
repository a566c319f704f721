// Sums of the warps of a block, and of blocks, in their order: the same bits in every run.
#pragma once

#include "numbers.cuh"

namespace lora_kernels {

// What a warp has of 16 rows and kTokenTiles * 8 tokens, in memory of its own: [fragment, lane, 4].
template <int kTokenTiles>
__device__ inline void store_sums(unsigned char* memory, const float (&acc)[kTokenTiles][4], int lane) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    reinterpret_cast<float4*>(memory)[j * 32 + lane] = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
  }
}

// An element of it.
__device__ inline const float* sum_place(const unsigned char* memory, int row, int token) {
  const int place = (token / 8 * 32 + row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
  return reinterpret_cast<const float*>(memory) + place;
}

// That of `count` warps whose memory is `bytes_apart`, added in their order.
__device__ inline float add_sums(const unsigned char* memory, int count, int bytes_apart, int row, int token) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum += *sum_place(memory + i * bytes_apart, row, token);
  return sum;
}

// Whether this block is the last of `parts` that come with theirs, and then sees those of the others.
__device__ inline bool is_last(int* arrivals, int parts) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Of the whole block, which the barriers tie to this thread.
    __threadfence();
    last = atomicAdd(arrivals, 1) == parts - 1;
    __threadfence();
    // Zero again, for the next launch on the stream or the next replay of the graph.
    if (last) *arrivals = 0;
  }
  __syncthreads();
  return last;
}

// Parts that other multiprocessors wrote, in their order: L1 may not be asked.
__device__ inline float add_parts(const float* first, int parts, int stride) {
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < parts; ++part) sum += __ldcg(first + static_cast<int64_t>(part) * stride);
  return sum;
}

}  // namespace lora_kernels
