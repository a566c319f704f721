// dA and dB from 16-bit operands, on the tensor cores: x and dy are read once, across their rows, at the memory's
// speed.
//
//     P[w, r] = sum over d of mask(wide)[d, w] narrow[d, r]
//
// A tile is [kWidth, kRank] of either P. The steps of all tiles stand in one line, which is cut into equal shares, no
// more than there are blocks at a time; a block's copies run kStages - 1 steps ahead, past the end of a tile as well.
// Where several blocks have part of a tile, whoever finishes last adds the parts in their order: the same bits in every
// run, and nobody waits.
#pragma once

#include "mma.cuh"
#include "narrow.cuh"

namespace lora_kernels {

struct GradientPlan {
  NarrowProduct product[2];  // the second may be empty; of neither are scale and partials looked at
  int blocks_of_first;       // tiles of a chunk of the rank
  int chunks;                // of the rank, fastest among the tiles
  int tiles;                 // of both
  int64_t steps;             // of a tile
  int64_t share;             // steps of a block
  int blocks;
  float* partials;  // as many tiles as there are tiles and blocks together
  int* arrivals;    // a zero for each tile, and zero again afterwards
};

namespace gradient_tile {

constexpr int kWidth = 128, kDepth = 64;
constexpr int kThreads = 128;  // 4 warps of 32 columns of x or dy
constexpr int kBlocksAtATime = 2;

// A pad of 16 bytes a row, so that the eight rows of a matrix lie in different banks.
template <class T, int kRank>
struct Stage {
  static constexpr int kWideStride = kWidth + 8, kNarrowStride = kRank + 8;
  alignas(16) T wide[kDepth * kWideStride];
  alignas(16) T narrow[kDepth * kNarrowStride];
};

// Two blocks, with at least 64 KiB of x or dy under way to them, fit into the shared memory of compute capability 8.0.
template <int kRank>
constexpr int kStages = kRank == 16 ? 4 : 3;

template <class T, int kRank>
constexpr int kSharedBytes = kStages<kRank> * static_cast<int>(sizeof(Stage<T, kRank>));

// Products of 16 x 8 that a warp adds up, of which each thread has four numbers.
template <int kRank>
constexpr int kProducts = 2 * kRank / 8;

// The piece of eight columns that comes `i`-th among those of this thread.
template <int kColumns>
struct Piece {
  static constexpr int kCount = kDepth * kColumns / 8 / kThreads;
  static_assert(kCount * kThreads * 8 == kDepth * kColumns, "every thread has as many");
  int row, column;
  __device__ explicit Piece(int i)
      : row((threadIdx.x + i * kThreads) / (kColumns / 8)), column((threadIdx.x + i * kThreads) % (kColumns / 8) * 8) {}
};

// [kDepth, kColumns] of a matrix that goes on for `rows` and `columns` from there; beyond are zeros.
template <int kColumns, class T>
__device__ inline void copy_tile(T* tile, const T* from, int64_t stride, bool vectors, int64_t rows, int64_t columns) {
  constexpr int kCount = Piece<kColumns>::kCount;
  if (vectors && columns % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Piece<kColumns> piece(i);
      copy_async(tile + piece.row * (kColumns + 8) + piece.column, from + piece.row * stride + piece.column,
                 piece.row < rows && piece.column < columns);
    }
  } else {
    // Loads first, so that they are under way together.
    Eight<T> group[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Piece<kColumns> piece(i);
      const int64_t count = piece.row < rows ? columns - piece.column : 0;
      group[i] = load_eight(from + piece.row * stride + piece.column, 1, count, vectors);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Piece<kColumns> piece(i);
      *reinterpret_cast<Eight<T>*>(tile + piece.row * (kColumns + 8) + piece.column) = group[i];
    }
  }
}

// A place in the line of all steps.
struct Place {
  int tile;
  int64_t step;

  __device__ Place(const GradientPlan& plan, int64_t index)
      : tile(static_cast<int>(index / plan.steps)), step(index % plan.steps) {}
  __device__ void advance(const GradientPlan& plan) {
    if (++step == plan.steps) ++tile, step = 0;
  }
  __device__ int block(const GradientPlan& plan) const { return tile / plan.chunks; }
  __device__ bool in_first(const GradientPlan& plan) const { return block(plan) < plan.blocks_of_first; }
  __device__ int64_t column0(const GradientPlan& plan) const {
    return static_cast<int64_t>(in_first(plan) ? block(plan) : block(plan) - plan.blocks_of_first) * kWidth;
  }
  template <int kRank>
  __device__ int64_t rank0(const GradientPlan& plan) const {
    return static_cast<int64_t>(tile % plan.chunks) * kRank;
  }
};

template <class T, int kRank>
__device__ inline void copy_step(Stage<T, kRank>& stage, const GradientPlan& plan, const Place& place) {
  const NarrowProduct& p = plan.product[place.in_first(plan) ? 0 : 1];
  const int64_t d0 = place.step * kDepth, w0 = place.column0(plan), r0 = place.rank0<kRank>(plan);
  copy_tile<kWidth>(stage.wide, static_cast<const T*>(p.wide) + d0 * p.wide_stride + w0, p.wide_stride, p.wide_vectors,
                    p.depth - d0, p.width - w0);
  copy_tile<kRank>(stage.narrow, static_cast<const T*>(p.narrow) + d0 * p.stride_d + r0, p.stride_d, p.narrow_vectors,
                   p.depth - d0, p.rank - r0);
}

// Each thread masks the pieces that it copied itself, which it sees before the others do.
template <class T, int kRank>
__device__ inline void mask_step(Stage<T, kRank>& stage, const GradientPlan& plan, const Place& place, int64_t seed) {
  const int64_t d0 = place.step * kDepth, w0 = place.column0(plan);
#pragma unroll 1
  for (int i = 0; i < Piece<kWidth>::kCount; ++i) {
    const Piece<kWidth> piece(i);
    auto& group = *reinterpret_cast<Eight<T>*>(stage.wide + piece.row * stage.kWideStride + piece.column);
    Eight<T> masked = group;
    mask_eight(masked, seed, d0 + piece.row, w0 + piece.column, plan.product[0].dropout.threshold);
    group = masked;
  }
}

template <class T, int kRank>
__device__ inline void add_step(float (&acc)[kProducts<kRank>][4], const Stage<T, kRank>& stage) {
  const int lane = threadIdx.x % 32, column0 = threadIdx.x / 32 * 32;
#pragma unroll
  for (int d = 0; d < kDepth; d += 16) {
    uint32_t a[2][4];
    load_a_transposed(a[0], stage.wide, stage.kWideStride, column0, d, lane);
    load_a_transposed(a[1], stage.wide, stage.kWideStride, column0 + 16, d, lane);
#pragma unroll
    for (int r = 0; r < kRank; r += 16) {
      uint32_t b[4];
      load_b_transposed(b, stage.narrow, stage.kNarrowStride, r, d, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply(acc[i / 2 * (kRank / 8) + r / 8 + i % 2], a[i / 2], b + i % 2 * 2, T());
    }
  }
}

template <int kRank>
__device__ inline void clear(float (&acc)[kProducts<kRank>][4]) {
#pragma unroll
  for (int i = 0; i < kProducts<kRank>; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
}

// Hands a part of a tile over. True for the last to do so, whose `acc` is the whole sum then.
template <int kRank>
__device__ inline bool add_parts(float (&acc)[kProducts<kRank>][4], const GradientPlan& plan, int tile) {
  const int64_t begin = tile * plan.steps;
  const int first = static_cast<int>(begin / plan.share);
  const int last = static_cast<int>((begin + plan.steps - 1) / plan.share);
  if (first == last) return true;

  // Along the line either the tile or the block changes, so that their sum tells all parts apart.
  float4* parts = reinterpret_cast<float4*>(plan.partials) + threadIdx.x;
  const auto place = [&](int block, int i) {
    return parts + (static_cast<int64_t>(tile + block) * kProducts<kRank> + i) * kThreads;
  };
#pragma unroll
  for (int i = 0; i < kProducts<kRank>; ++i) {
    *place(blockIdx.x, i) = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
  }
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Of the whole block, which the barriers tie to this thread.
    __threadfence();
    is_last = atomicAdd(plan.arrivals + tile, 1) == last - first;
    __threadfence();
    // Zero again, for the next launch on the stream or the next replay of the graph.
    if (is_last) plan.arrivals[tile] = 0;
  }
  __syncthreads();
  if (!is_last) return false;
  clear<kRank>(acc);
#pragma unroll 2
  for (int block = first; block <= last; ++block) {
#pragma unroll
    for (int i = 0; i < kProducts<kRank>; ++i) {
      // Other multiprocessors wrote them: L1 may not be asked.
      const float4 part = __ldcg(place(block, i));
      acc[i][0] += part.x, acc[i][1] += part.y, acc[i][2] += part.z, acc[i][3] += part.w;
    }
  }
  return true;
}

template <int kRank, class Out>
__device__ inline void store_tile(const float (&acc)[kProducts<kRank>][4], const GradientPlan& plan,
                                  const Place& place) {
  const NarrowProduct& p = plan.product[place.in_first(plan) ? 0 : 1];
  const int lane = threadIdx.x % 32;
  const int64_t w0 = place.column0(plan) + threadIdx.x / 32 * 32 + lane / 4;
  const int64_t r0 = place.rank0<kRank>(plan) + lane % 4 * 2;
  Out* out = static_cast<Out*>(p.out) + w0 * p.out_stride_w + r0 * p.out_stride_r;
#pragma unroll
  for (int i = 0; i < kProducts<kRank>; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int w = i / (kRank / 8) * 16 + j / 2 * 8, r = i % (kRank / 8) * 8 + j % 2;
      if (w0 + w >= p.width || r0 + r >= p.rank) continue;
      out[w * p.out_stride_w + r * p.out_stride_r] = from_float<Out>(acc[i][j]);
    }
  }
}

}  // namespace gradient_tile

template <class T, int kRank>
__global__ void __launch_bounds__(gradient_tile::kThreads, gradient_tile::kBlocksAtATime)
    adapter_grads_kernel(const GradientPlan plan) {
  using namespace gradient_tile;
  constexpr int kAhead = kStages<kRank> - 1;
  Stage<T, kRank>* ring = reinterpret_cast<Stage<T, kRank>*>(dynamic_shared());
  const int64_t begin = blockIdx.x * plan.share, left = plan.tiles * plan.steps - begin;
  const int count = static_cast<int>(left < plan.share ? left : plan.share);
  // Only x is masked, and x comes first.
  const bool masked = plan.product[0].dropout.seed != nullptr;
  const int64_t seed = masked ? *plan.product[0].dropout.seed : 0;

  Place here(plan, begin), ahead = here;
  float acc[kProducts<kRank>][4];
  clear<kRank>(acc);
  // The first kAhead rounds only copy.
  for (int i = -kAhead; i < count; ++i) {
    Stage<T, kRank>& stage = ring[(i + kStages<kRank>) % kStages<kRank>];
    if (i >= 0) {
      wait_copies<kAhead - 1>();
      if (masked && here.in_first(plan)) mask_step(stage, plan, here, seed);
      __syncthreads();
    }
    if (i + kAhead < count) {
      // Into the stage that all warps have just left.
      copy_step(ring[(i + kAhead) % kStages<kRank>], plan, ahead);
      ahead.advance(plan);
    }
    commit_copies();
    if (i < 0) continue;
    add_step(acc, stage);
    if (here.step + 1 == plan.steps || i + 1 == count) {
      if (add_parts<kRank>(acc, plan, here.tile)) {
        plan.product[0].out_dtype == DType::kFloat32 ? store_tile<kRank, float>(acc, plan, here)
                                                     : store_tile<kRank, T>(acc, plan, here);
      }
      clear<kRank>(acc);
    }
    here.advance(plan);
  }
}

}  // namespace lora_kernels
