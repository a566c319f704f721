// S = scale * mask(X) D for few tokens, where the launch after it needs S late: little is asked of a multiprocessor, so
// that both fit on one. Tiles of 16 columns of S are the rows of the tensor cores' products, tokens their columns; each
// block has a part of K, and the last to be through adds up the parts in their order.
#pragma once

#include "nf4_sums.cuh"
#include "ptx.cuh"

namespace lora_kernels {
namespace nf4_down_tile {

constexpr int kRows = 16, kWarps = 8, kThreads = kWarps * 32;
// Of K, what a warp takes, and a block.
constexpr int kShare = 64, kPart = kWarps * kShare;

// A warp's share of a tile. What it is made of, the launch before may have written after this one began.
template <class T, int kTokenTiles>
__device__ inline void multiply_down(float (&acc)[kTokenTiles][4], const OnePass& p, bool vectors, int64_t r0,
                                     int64_t k0, int lane) {
  const T* x = static_cast<const T*>(p.x.data);
  constexpr int kSteps = kShare / 32;
  constexpr bool kPastL1 = true;
  Eight<T> down[kSteps][2], token[kSteps][kTokenTiles];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t k = k0 + step * 32 + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t r = r0 + lane / 4 + 8 * i;
      const int64_t first = k * p.down.row_stride + r * p.down.column_stride;
      down[step][i] = load_eight_as<T, kPastL1>(p.down.data, p.down.dtype, first, p.down.row_stride,
                                                r < p.R ? p.K - k : 0, vectors);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int64_t m = j * 8 + lane / 4;
      token[step][j] = load_eight<kPastL1>(x + m * p.x.row_stride + k, 1, m < p.M ? p.K - k : 0, true);
    }
  }
  const bool masked = p.mask_x && p.dropout.seed != nullptr;
  const int64_t seed = masked ? *p.dropout.seed : 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t k = k0 + step * 32 + lane % 4 * 8;
    const uint32_t *upper = reinterpret_cast<const uint32_t*>(&down[step][0]),
                   *lower = reinterpret_cast<const uint32_t*>(&down[step][1]);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      if (masked) mask_eight(token[step][j], seed, j * 8 + lane / 4, k, p.dropout.threshold);
      const uint32_t* b = reinterpret_cast<const uint32_t*>(&token[step][j]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {upper[i], lower[i], upper[i + 1], lower[i + 1]};
        multiply(acc[j], a, b + i, T());
      }
    }
  }
}

}  // namespace nf4_down_tile

template <class T, int kTokenTiles>
__global__ void __launch_bounds__(nf4_down_tile::kThreads, 4)
    nf4_down_kernel(const OnePass p, bool vectors, float* workspace, int* counters) {
  using namespace nf4_down_tile;
  constexpr int kSumBytes = kTokenTiles * kRows * 8 * 4, kFloats = kTokenTiles * kRows * 8;
  __shared__ float4 shared[kWarps * kSumBytes / 16];
  unsigned char* sums = reinterpret_cast<unsigned char*>(shared);
  // Whatever was before it has to be through before the next launch begins: that one reads X as well, and does not wait.
  wait_for_launch_before();
  let_next_launch_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = blockIdx.x, parts = gridDim.x;
  const int64_t r0 = static_cast<int64_t>(blockIdx.y) * kRows;
  float acc[kTokenTiles][4] = {};
  multiply_down<T, kTokenTiles>(acc, p, vectors, r0, (static_cast<int64_t>(part) * kWarps + warp) * kShare, lane);
  store_sums<kTokenTiles>(sums + warp * kSumBytes, acc, lane);
  __syncthreads();

  float* partials = workspace + static_cast<int64_t>(blockIdx.y) * parts * kFloats;
  for (int i = threadIdx.x; i < kFloats; i += kThreads) {
    partials[part * kFloats + i] = add_sums(sums, kWarps, kSumBytes, i % kRows, i / kRows);
  }
  if (!is_last(counters + blockIdx.y, parts)) return;
  const float scale = p.scale_tensor == nullptr ? p.scale : *p.scale_tensor;
  for (int i = threadIdx.x; i < kFloats; i += kThreads) {
    const int64_t m = i / kRows, r = r0 + i % kRows;
    if (m < p.M && r < p.R) store_number(p.s, p.dtype, m * p.R + r, scale * add_parts(partials + i, parts, kFloats));
  }
}

}  // namespace lora_kernels
