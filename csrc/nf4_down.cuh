// S = scale * mask(X) D for few tokens, where the launch after it needs S late: little is asked of a multiprocessor, so
// that both fit on one. Tiles of 16 columns of S are the rows of the tensor cores' products, tokens their columns; each
// block has a part of K, and the last to be through adds up the parts in their order.
#pragma once

#include "mma.cuh"
#include "nf4_sums.cuh"

namespace lora_kernels {
namespace nf4_down_tile {

constexpr int kRows = 16, kWarps = 8, kThreads = kWarps * 32;
// Of K, what a warp takes, and a block.
constexpr int kShare = 64, kPart = kWarps * kShare;

// Eight numbers of a column of D: as T, or split into three whose sum has all bits of a float32.
template <class T, bool kSplit>
struct Down {
  static constexpr int kParts = kSplit ? 3 : 1;
  Eight<T> part[kParts];

  __device__ void load(const OnePass& p, bool vectors, int64_t r, int64_t k) {
    constexpr bool kPastL1 = true;
    const int64_t first = k * p.down.row_stride + r * p.down.column_stride, count = r < p.R ? p.K - k : 0;
    if constexpr (kSplit) {
      const float* data = static_cast<const float*>(p.down.data) + first;
      Eight<float> left = load_eight<kPastL1>(data, p.down.row_stride, count, vectors);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          part[i].value[j] = from_float<T>(left.value[j]);
          left.value[j] -= to_float(part[i].value[j]);
        }
      }
    } else {
      part[0] = load_eight_as<T, kPastL1>(p.down.data, p.down.dtype, first, p.down.row_stride, count, vectors);
    }
  }
};

// A warp's share of a tile. What it is made of, the launch before may have written after this one began.
template <class T, bool kSplit, int kTokenTiles>
__device__ inline void multiply_down(float (&acc)[kTokenTiles][4], const OnePass& p, bool vectors, int64_t r0,
                                     int64_t k0, int lane) {
  const T* x = static_cast<const T*>(p.x.data);
  // So many steps are asked for at a time: of numbers that are split, registers hold those of one.
  constexpr int kSteps = kShare / 32, kAtOnce = kSplit ? 1 : kSteps;
  constexpr bool kPastL1 = true;
  const bool masked = p.mask_x && p.dropout.seed != nullptr;
#pragma unroll
  for (int first = 0; first < kSteps; first += kAtOnce) {
    Down<T, kSplit> down[kAtOnce][2];
    Eight<T> token[kAtOnce][kTokenTiles];
#pragma unroll
    for (int step = 0; step < kAtOnce; ++step) {
      const int64_t k = k0 + (first + step) * 32 + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) down[step][i].load(p, vectors, r0 + lane / 4 + 8 * i, k);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int64_t m = j * 8 + lane / 4;
        token[step][j] = load_eight<kPastL1>(x + m * p.x.row_stride + k, 1, m < p.M ? p.K - k : 0, true);
      }
    }
    const int64_t seed = masked ? *p.dropout.seed : 0;
#pragma unroll
    for (int step = 0; step < kAtOnce; ++step) {
      const int64_t k = k0 + (first + step) * 32 + lane % 4 * 8;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        if (masked) mask_eight(token[step][j], seed, j * 8 + lane / 4, k, p.dropout.threshold);
        // The smallest parts first.
#pragma unroll
        for (int i = Down<T, kSplit>::kParts - 1; i >= 0; --i) {
          multiply_eights(acc[j], down[step][0].part[i], down[step][1].part[i], token[step][j]);
        }
      }
    }
  }
}

}  // namespace nf4_down_tile

template <class T, bool kSplit, int kTokenTiles>
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
  multiply_down<T, kSplit, kTokenTiles>(acc, p, vectors, r0, (static_cast<int64_t>(part) * kWarps + warp) * kShare, lane);
  store_sums<kTokenTiles>(sums + warp * kSumBytes, acc, lane);
  __syncthreads();

  float* partials = workspace + static_cast<int64_t>(blockIdx.y) * parts * kFloats;
  for (int i = threadIdx.x; i < kFloats; i += kThreads) {
    partials[part * kFloats + i] = add_sums(sums, kWarps, kSumBytes, i % kRows, i / kRows);
  }
  if (!is_last(counters + blockIdx.y, parts)) return;
  const float scale = p.scale_tensor == nullptr ? p.scale : *p.scale_tensor;
  const DType dtype = kSplit ? DType::kFloat32 : p.dtype;
  for (int i = threadIdx.x; i < kFloats; i += kThreads) {
    const int64_t m = i / kRows, r = r0 + i % kRows;
    if (m < p.M && r < p.R) store_number(p.s, dtype, m * p.R + r, scale * add_parts(partials + i, parts, kFloats));
  }
}

}  // namespace lora_kernels
