// What nf4_stream.cuh is made of: the copies of tiles and their scales, products for S, and the sums of warps and blocks.
#pragma once

#include "nf4_bytes.cuh"
#include "nf4_stream.h"

namespace lora_kernels {
namespace nf4_stream_tile {

constexpr int kRows = 16, kRun = 64, kSlice = 4 * kRun;
// Of K, what a warp takes of a part of S.
constexpr int kShare = 64;
constexpr int kMostThreads = 512;
// Of a tile, a warp's slice of it.
constexpr int kRowBytes = kSlice / 2, kTileBytes = kRows * kRowBytes;
// What a launch counts in, before a counter for each rank tile of each chunk and each batch of each block: parts of S
// drawn, tiles of S complete, blocks that are through.
constexpr int kDrawn = 0, kComplete = 1, kThrough = 2, kArrivals = 3;

// Of a launch: a block takes up to kTokenTiles_ * 8 tokens, has copies of kStages_ tiles under way, that in use among
// them, and its warps meet after kBatch_ tiles, with the sums of two batches in memory.
template <int kTokenTiles_, int kStages_, int kBatch_>
struct Shape {
  static constexpr int kTokenTiles = kTokenTiles_, kStages = kStages_, kBatch = kBatch_;
  static constexpr int kTokens = kTokenTiles * 8;
  // Numbers of 16 x 8 that a warp has of a batch, and a block when its warps are added up.
  static constexpr int kWarpFloats = kTokenTiles * kRows * 8;
  static constexpr int kPartFloats = kBatch * kWarpFloats;

  __host__ __device__ static constexpr int x_bytes(int warps) { return warps * kTokens * kSlice * 2; }
  __host__ __device__ static constexpr int ring_bytes(int warps) { return warps * kStages * kTileBytes; }
  __host__ __device__ static constexpr int sum_bytes(int warps) { return 2 * warps * kPartFloats * 4; }
  __host__ __device__ static constexpr int bytes(int warps) {
    return x_bytes(warps) + ring_bytes(warps) + sum_bytes(warps);
  }
};

// Where 16 bytes lie in a warp's slice of X, [token, quarter, chunk]: the lanes of a quarter of a row read its eight
// chunks one after the other. Eight lanes at a time read one each: those of two tokens, in different banks. A chunk
// only changes bits that are those of the first chunk otherwise.
constexpr int kTokenBytes = kSlice * 2;
__device__ inline int x_place(int token, int quarter, int chunk) {
  return token * kTokenBytes + quarter * kRun * 2 + (chunk ^ (token % 2 * 4 + quarter)) * 16;
}

// The same of a slice of a tile, whose rows have two chunks for each quarter.
__device__ inline int tile_place(int row, int chunk) { return row * kRowBytes + (chunk ^ row % 2) * 16; }

template <class T, int kTokens>
__device__ inline void copy_x(unsigned char* target, const OnePass& p, int64_t m0, int64_t k0, int lane) {
  const T* x = static_cast<const T*>(p.x.data);
#pragma unroll 4
  for (int token = 0; token < kTokens; ++token) {
    const int64_t m = m0 + token, k = k0 + lane * 8;
    const bool inside = m < p.M && k < p.K;
    copy_async(target + x_place(token, lane / 8, lane % 8), x + (inside ? m * p.x.row_stride + k : 0), inside);
  }
}

// A lane's share of the copies of a warp's tiles, one tile after the other.
struct TileCopies {
  const uint8_t* source;
  int64_t next_rows, next_tile;  // bytes to the rows four further, and to the next tile
  int rows_left, rows_a_tile, place;

  __device__ TileCopies(const Nf4& weight, int64_t row, int64_t column, int rows, int lane)
      : source(weight.packed + ((row + lane / 8) * weight.columns + column) / 2 + lane % 8 * 16),
        next_rows(2 * weight.columns),
        next_tile(rows * weight.columns / 2),
        rows_left(column + lane % 8 * 32 < weight.columns ? static_cast<int>(weight.rows - row - lane / 8) : 0),
        rows_a_tile(rows),
        place(tile_place(lane / 8, lane % 8)) {}

  __device__ void next(unsigned char* target) {
    const uint8_t* from = source;
#pragma unroll
    for (int i = 0; i < kRows; i += 4, from += next_rows) {
      // Rows are an even number apart: they have the same places.
      copy_async(target + place + i * kRowBytes, from, i < rows_left);
    }
    source += next_tile, rows_left -= rows_a_tile;
  }
};

// The scales of a lane's two runs of a tile, loaded as they are stored a tile ahead of their use.
struct Scales {
  int64_t first, next_half, next_tile;  // counted in elements of the weight
  int rows_left, rows_a_tile;
  uint32_t bits[2];
  float nested[2];

  __device__ Scales(const Nf4& weight, int64_t row, int64_t column, int rows, int lane)
      : first((row + lane / 4) * weight.columns + column + lane % 4 * kRun),
        next_half(8 * weight.columns),
        next_tile(rows * weight.columns),
        rows_left(column + lane % 4 * kRun < weight.columns ? static_cast<int>(weight.rows - row - lane / 4) : 0),
        rows_a_tile(rows) {}

  __device__ void load(const Nf4& weight, int log2_block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bits[half] = 0, nested[half] = 0.0f;
      if (half * 8 >= rows_left) continue;
      const auto block = static_cast<uint32_t>((first + half * next_half) >> log2_block);
      if (weight.nested_absmax == nullptr) {
        bits[half] = __ldg(static_cast<const uint32_t*>(weight.absmax) + block), nested[half] = 1.0f;
      } else {
        bits[half] = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
        nested[half] = __ldg(weight.nested_absmax + block / kNestedBlock);
      }
    }
    first += next_tile, rows_left -= rows_a_tile;
  }

  // A scale that is not quantized is itself times one plus `offset`, which is -0 then.
  __device__ float get(int half, bool is_nested, const float* map, float offset) const {
    const float value = is_nested ? map[bits[half]] : __uint_as_float(bits[half]);
    return __fadd_rn(__fmul_rn(value, nested[half]), offset);
  }
};

// A warp's share of a product for 16 columns of S, which are rows here, and the tokens of a chunk.
template <class T, int kTokenTiles>
__device__ inline void multiply_down(float (&acc)[kTokenTiles][4], const OnePass& p, bool vectors, int64_t m0,
                                     int64_t r0, int64_t k0, int lane) {
  const T* x = static_cast<const T*>(p.x.data);
  constexpr int kSteps = kShare / 32;
  Eight<T> down[kSteps][2], token[kSteps][kTokenTiles];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t k = k0 + step * 32 + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t r = r0 + lane / 4 + 8 * i;
      down[step][i] = load_eight_as<T>(p.down.data, p.down.dtype, k * p.down.row_stride + r * p.down.column_stride,
                                       p.down.row_stride, r < p.R ? p.K - k : 0, vectors);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int64_t m = m0 + j * 8 + lane / 4;
      token[step][j] = load_eight(x + m * p.x.row_stride + k, 1, m < p.M ? p.K - k : 0, true);
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
      if (masked) mask_eight(token[step][j], seed, m0 + j * 8 + lane / 4, k, p.dropout.threshold);
      const uint32_t* b = reinterpret_cast<const uint32_t*>(&token[step][j]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {upper[i], lower[i], upper[i + 1], lower[i + 1]};
        multiply(acc[j], a, b + i, T());
      }
    }
  }
}

// What the warps of a block have of some tiles, in shared memory: [tile, warp, fragment, lane, 4].
template <int kTokenTiles>
struct Sums {
  float* data;
  int warps;

  __device__ float4* place(int tile, int warp, int fragment, int lane) const {
    return reinterpret_cast<float4*>(data) + ((tile * warps + warp) * kTokenTiles + fragment) * 32 + lane;
  }

  __device__ void store(int tile, int warp, int lane, const float (&acc)[kTokenTiles][4]) const {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      *place(tile, warp, j, lane) = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
    }
  }

  // Of the first `of` warps, in their order.
  __device__ float add(int tile, int row, int column, int of) const {
    const float* first = reinterpret_cast<const float*>(place(tile, 0, column / 8, row % 8 * 4 + column % 8 / 2));
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < of; ++w) sum += first[w * kTokenTiles * 128 + row / 8 * 2 + column % 2];
    return sum;
  }
};

// Whether this block is the last of `parts` that come with theirs, and then sees those of the others.
__device__ inline bool is_last(int* arrivals, int parts) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Of the whole block, which the barriers tie to this thread.
    __threadfence();
    last = atomicAdd(arrivals, 1) == parts - 1;
    __threadfence();
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

// What the warps have of a part of a tile of S is handed over; the last to come with one stores the tile, and says so.
template <class T, int kTokenTiles>
__device__ inline void finish_part(const OnePass& p, const Sums<kTokenTiles>& sums, int64_t m0, int64_t r0, int part,
                                   int parts, float* partials, int* arrivals, int* complete) {
  constexpr int kFloats = kTokenTiles * 8 * kRows;
  __syncthreads();
  for (int i = threadIdx.x; i < kFloats; i += blockDim.x) {
    partials[static_cast<int64_t>(part) * kFloats + i] = sums.add(0, i % kRows, i / kRows, sums.warps);
  }
  if (!is_last(arrivals, parts)) return;
  const float scale = p.scale_tensor == nullptr ? p.scale : *p.scale_tensor;
  for (int i = threadIdx.x; i < kFloats; i += blockDim.x) {
    const int64_t m = m0 + i / kRows, r = r0 + i % kRows;
    if (m < p.M && r < p.R) store_number(p.s, p.dtype, m * p.R + r, scale * add_parts(partials + i, parts, kFloats));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(complete, 1);
  }
}

// An element of S U, where S was written in this launch, or by the one before.
template <class S, class U, class T>
__device__ inline float branch_element(const OnePass& p, bool vectors, int64_t m, int64_t n) {
  const S* s = static_cast<const S*>(p.s) + m * p.R;
  const bool whole = p.R % 8 == 0;
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t r = 0; r < p.R; r += 8) {
    Eight<S> left;
    if (whole) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(left) / 16); ++i) {
        reinterpret_cast<uint4*>(&left)[i] = __ldcg(reinterpret_cast<const uint4*>(s + r) + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) left.value[i] = r + i < p.R ? __ldcg(s + r + i) : from_float<S>(0.0f);
    }
    const int64_t offset = r * p.up.row_stride + n * p.up.column_stride;
    const Eight<U> right = load_eight(static_cast<const U*>(p.up.data) + offset, p.up.row_stride, p.R - r, vectors);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum = fmaf(to_float(left.value[i]), to_float(from_float<T>(to_float(right.value[i]))), sum);
    }
  }
  return sum;
}

}  // namespace nf4_stream_tile

}  // namespace lora_kernels
