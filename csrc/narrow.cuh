// The skinny products: one side is as narrow as the rank, and the other is read once, at the memory's speed.
//
//     P[w, r] = scale * sum over d of mask(wide)[w, d] narrow[d, r]
//
// S and T: wide is x or dy, stored [width, depth]. dA and dB: wide is x^T or dy^T, stored [depth, width], and narrow
// is T or S; those of 16 bits have adapter_grads.cuh. The depth is divided into parts, which are added in their order:
// the same bits in every run.
#pragma once

#include "mma.cuh"

namespace lora_kernels {

struct NarrowProduct {
  int64_t width, depth, rank;
  const void* wide;
  int64_t wide_stride;  // between rows as stored; columns have stride 1
  bool wide_vectors;    // rows start on 16 bytes
  const void* narrow;
  DType narrow_dtype;
  int64_t stride_d, stride_r;
  bool narrow_vectors;  // so do the neighbours along whichever of its strides is 1
  Dropout dropout;
  float scale;
  const float* scale_tensor;
  void* out;
  DType out_dtype;
  int64_t out_stride_w, out_stride_r;
  float* partials;  // [parts, width, rank]
};

// One or two products in one launch: blocks of `width` from blocks_of_first on belong to the second.
struct NarrowPlan {
  NarrowProduct product[2];
  int blocks_of_first;
  int parts;
  int64_t depth_per_part;
};

constexpr int kNarrowWidth = 64;     // of a block
constexpr int kNarrowThreads = 128;  // 4 warps

__device__ inline void store_narrow(const NarrowProduct& p, int64_t w, int64_t r, float sum) {
  const float scale = p.scale_tensor == nullptr ? p.scale : *p.scale_tensor;
  store_number(p.out, p.out_dtype, w * p.out_stride_w + r * p.out_stride_r, sum * scale);
}

__device__ inline void finish_narrow(const NarrowProduct& p, int parts, int part, int64_t w, int64_t r, float sum) {
  if (w >= p.width || r >= p.rank) return;
  if (parts == 1) {
    store_narrow(p, w, r, sum);
  } else {
    p.partials[(part * p.width + w) * p.rank + r] = sum;
  }
}

// A block's share of the wide matrix for one step over the depth, held in registers: loaded while the step before is
// computed, masked, then written to shared memory by whoever knows the layout there.
template <class T, bool kDepthInner, int kDepth>
struct WideTile {
  static constexpr int kColumns = kDepthInner ? kDepth : kNarrowWidth;
  static constexpr int kGroups = kNarrowWidth * kDepth / 8 / kNarrowThreads;
  Eight<T> group[kGroups];

  __device__ static int row(int i) { return (threadIdx.x + i * kNarrowThreads) / (kColumns / 8); }
  __device__ static int column(int i) { return (threadIdx.x + i * kNarrowThreads) % (kColumns / 8) * 8; }

  __device__ void load(const NarrowProduct& p, int64_t w0, int64_t d0, int64_t depth_end) {
    const int64_t row0 = kDepthInner ? w0 : d0, column0 = kDepthInner ? d0 : w0;
    const int64_t rows = kDepthInner ? p.width : depth_end, columns = kDepthInner ? depth_end : p.width;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int64_t r = row0 + row(i), c = column0 + column(i);
      group[i] = load_eight(static_cast<const T*>(p.wide) + r * p.wide_stride + c, 1, r < rows ? columns - c : 0,
                            p.wide_vectors);
    }
  }

  __device__ void mask(int64_t seed, int32_t threshold, int64_t w0, int64_t d0) {
    const int64_t row0 = kDepthInner ? w0 : d0, column0 = kDepthInner ? d0 : w0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) mask_eight(group[i], seed, row0 + row(i), column0 + column(i), threshold);
  }
};

// The same of the narrow matrix, in groups along whichever of its dimensions has stride 1.
template <class T, int kDepth, int kRank>
struct NarrowTile {
  static constexpr int kAll = kDepth * kRank / 8;
  static constexpr int kGroups = (kAll + kNarrowThreads - 1) / kNarrowThreads;
  Eight<T> group[kGroups];

  __device__ static bool mine(int i) { return threadIdx.x + i * kNarrowThreads < kAll; }
  __device__ static int depth(int i, bool along_depth) {
    const int index = threadIdx.x + i * kNarrowThreads;
    return along_depth ? index % (kDepth / 8) * 8 : index / (kRank / 8);
  }
  __device__ static int rank(int i, bool along_depth) {
    const int index = threadIdx.x + i * kNarrowThreads;
    return along_depth ? index / (kDepth / 8) : index % (kRank / 8) * 8;
  }

  __device__ void load(const NarrowProduct& p, bool along_depth, int64_t d0, int64_t depth_end, int64_t r0) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (!mine(i)) break;
      const int64_t d = d0 + depth(i, along_depth), r = r0 + rank(i, along_depth);
      const int64_t count = along_depth ? (r < p.rank ? depth_end - d : 0) : (d < depth_end ? p.rank - r : 0);
      group[i] = load_eight_as<T>(p.narrow, p.narrow_dtype, d * p.stride_d + r * p.stride_r,
                                  along_depth ? p.stride_d : p.stride_r, count, p.narrow_vectors);
    }
  }
};

// 16-bit operands of S and T, on the tensor cores: 4 warps of 16 rows of the block each.
template <class T, int kRank>
struct TensorMath {
  static constexpr int kDepth = 64;
  using Wide = WideTile<T, true, kDepth>;
  using Narrow = NarrowTile<T, kDepth, kRank>;
  // A pad of 16 bytes a row, so that the eight rows of a matrix lie in different banks.
  static constexpr int kWideStride = kDepth + 8;
  static constexpr int kNarrowSize = kRank * (kDepth + 8) > kDepth * (kRank + 8) ? kRank * (kDepth + 8)
                                                                                 : kDepth * (kRank + 8);
  struct Shared {
    alignas(16) T wide[kNarrowWidth * kWideStride];
    alignas(16) T narrow[kNarrowSize];
  };
  float acc[kRank / 8][4] = {};

  __device__ static void store(Shared& shared, const Wide& wide, const Narrow& narrow, bool along_depth) {
#pragma unroll
    for (int i = 0; i < Wide::kGroups; ++i) {
      *reinterpret_cast<Eight<T>*>(shared.wide + Wide::row(i) * kWideStride + Wide::column(i)) = wide.group[i];
    }
#pragma unroll
    for (int i = 0; i < Narrow::kGroups; ++i) {
      if (!Narrow::mine(i)) break;
      const int d = Narrow::depth(i, along_depth), r = Narrow::rank(i, along_depth);
      const int place = along_depth ? r * (kDepth + 8) + d : d * (kRank + 8) + r;
      *reinterpret_cast<Eight<T>*>(shared.narrow + place) = narrow.group[i];
    }
  }

  __device__ void add(const Shared& shared, bool along_depth) {
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) {
      uint32_t a[4];
      load_a(a, shared.wide, kWideStride, row0, d, lane);
#pragma unroll
      for (int r = 0; r < kRank; r += 16) {
        uint32_t b[4];
        if (along_depth) {
          load_b(b, shared.narrow, kDepth + 8, r, d, lane);
        } else {
          load_b_transposed(b, shared.narrow, kRank + 8, r, d, lane);
        }
        multiply(acc[r / 8], a, b, T());
        multiply(acc[r / 8 + 1], a, b + 2, T());
      }
    }
  }

  __device__ void finish(const NarrowProduct& p, int parts, int part, int64_t w0, int64_t r0) const {
    const int lane = threadIdx.x % 32;
    const int64_t w = w0 + threadIdx.x / 32 * 16 + lane / 4, r = r0 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRank / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) finish_narrow(p, parts, part, w + j / 2 * 8, r + i * 8 + j % 2, acc[i][j]);
    }
  }
};

// float32 arithmetic: for a float32 base, and for float32 adapters over a 16-bit one, whose branch keeps 24 bits.
template <class T, bool kDepthInner, int kRank>
struct FloatMath {
  static constexpr int kDepth = 32;
  using Wide = WideTile<T, kDepthInner, kDepth>;
  using Narrow = NarrowTile<float, kDepth, kRank>;
  // What a thread computes, [kRows, kColumns].
  static constexpr int kRows = kRank == 16 ? 4 : 8, kColumns = kRank == 16 ? 2 : 4;
  struct Shared {
    alignas(16) float wide[kDepth][kNarrowWidth];
    alignas(16) float narrow[kDepth][kRank];
  };
  float acc[kRows][kColumns] = {};

  // Rows are turned by 8 for every 8 of depth, so that groups along the depth are written to different banks.
  __device__ static int turned(int w, int d) { return (w + d / 8 * 8) % kNarrowWidth; }
  __device__ static int row0() { return threadIdx.x % (kNarrowWidth / kRows) * kRows; }
  __device__ static int column0() { return threadIdx.x / (kNarrowWidth / kRows) * kColumns; }

  __device__ static void store(Shared& shared, const Wide& wide, const Narrow& narrow, bool along_depth) {
#pragma unroll
    for (int i = 0; i < Wide::kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int d = kDepthInner ? Wide::column(i) + j : Wide::row(i);
        const int w = kDepthInner ? Wide::row(i) : Wide::column(i) + j;
        shared.wide[d][turned(w, d)] = to_float(wide.group[i].value[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < Narrow::kGroups; ++i) {
      if (!Narrow::mine(i)) break;
      const int d = Narrow::depth(i, along_depth), r = Narrow::rank(i, along_depth);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        shared.narrow[along_depth ? d + j : d][along_depth ? r : r + j] = narrow.group[i].value[j];
      }
    }
  }

  __device__ void add(const Shared& shared, bool) {
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      float left[kRows], right[kColumns];
      const float* source = shared.wide[d] + turned(row0(), d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) left[i] = source[i];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) right[j] = shared.narrow[d][column0() + j];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) acc[i][j] = fmaf(left[i], right[j], acc[i][j]);
      }
    }
  }

  __device__ void finish(const NarrowProduct& p, int parts, int part, int64_t w0, int64_t r0) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        finish_narrow(p, parts, part, w0 + row0() + i, r0 + column0() + j, acc[i][j]);
      }
    }
  }
};

// The grid: chunks of the rank fastest, so that those who read the same wide block run together; blocks of width;
// parts.
template <class Math>
__global__ void __launch_bounds__(kNarrowThreads) narrow_kernel(NarrowPlan plan, int rank_chunks, int rank_step) {
  __shared__ typename Math::Shared shared[2];
  const int chunk = blockIdx.x % rank_chunks, block = blockIdx.x / rank_chunks, part = blockIdx.y;
  const bool is_first = block < plan.blocks_of_first;
  const NarrowProduct& p = plan.product[is_first ? 0 : 1];
  const int64_t w0 = static_cast<int64_t>(is_first ? block : block - plan.blocks_of_first) * kNarrowWidth;
  const int64_t r0 = static_cast<int64_t>(chunk) * rank_step;
  const int64_t depth_begin = part * plan.depth_per_part;
  const int64_t depth_end =
      depth_begin + plan.depth_per_part < p.depth ? depth_begin + plan.depth_per_part : p.depth;
  const bool along_depth = p.stride_d == 1;
  const bool masked = p.dropout.seed != nullptr;
  const int64_t seed = masked ? *p.dropout.seed : 0;

  Math math;
  typename Math::Wide wide;
  typename Math::Narrow narrow;
  if (depth_begin < depth_end) {
    wide.load(p, w0, depth_begin, depth_end);
    narrow.load(p, along_depth, depth_begin, depth_end, r0);
  }
  int stage = 0;
  for (int64_t d0 = depth_begin; d0 < depth_end; d0 += Math::kDepth, stage ^= 1) {
    if (masked) wide.mask(seed, p.dropout.threshold, w0, d0);
    Math::store(shared[stage], wide, narrow, along_depth);
    __syncthreads();
    if (d0 + Math::kDepth < depth_end) {
      wide.load(p, w0, d0 + Math::kDepth, depth_end);
      narrow.load(p, along_depth, d0 + Math::kDepth, depth_end, r0);
    }
    // Whoever writes this stage again has passed the next barrier, and so has everybody's reading of it.
    math.add(shared[stage], along_depth);
  }
  math.finish(p, plan.parts, part, w0, r0);
}

// Adds the parts of each element in their order.
__global__ void sum_parts_kernel(NarrowPlan plan) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t of_first = plan.product[0].width * plan.product[0].rank;
  const NarrowProduct& p = plan.product[index < of_first ? 0 : 1];
  if (index >= of_first) index -= of_first;
  const int64_t size = p.width * p.rank;
  if (index >= size) return;
  float sum = 0.0f;
  for (int part = 0; part < plan.parts; ++part) sum += p.partials[part * size + index];
  store_narrow(p, index / p.rank, index % p.rank, sum);
}

constexpr int kFewTokens = 8;  // of a block of few_rows_kernel
constexpr int kFewThreads = 512;

// S for a few tokens, in one launch: a block takes one column of it, [kFewTokens] long, and divides the depth among its
// threads. x is read once for each column, from L2.
template <class T>
__global__ void __launch_bounds__(kFewThreads) few_rows_kernel(NarrowProduct p, bool round_narrow) {
  __shared__ float sums[kFewThreads / 32][kFewTokens];
  let_next_launch_begin();
  const int64_t r = blockIdx.x, w0 = static_cast<int64_t>(blockIdx.y) * kFewTokens;
  const bool masked = p.dropout.seed != nullptr;
  const int64_t seed = masked ? *p.dropout.seed : 0;
  const bool vectors = p.narrow_vectors && p.stride_d == 1;
  const auto narrow_of = [&](int64_t d, int64_t count) {
    const int64_t offset = d * p.stride_d + r * p.stride_r;
    if (!round_narrow && p.narrow_dtype == DType::kFloat32) {
      return load_eight(static_cast<const float*>(p.narrow) + offset, p.stride_d, count, vectors);
    }
    const Eight<T> rounded = load_eight_as<T>(p.narrow, p.narrow_dtype, offset, p.stride_d, count, vectors);
    Eight<float> narrow;
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow.value[i] = to_float(rounded.value[i]);
    return narrow;
  };
  float acc[kFewTokens] = {};
  for (int64_t d = threadIdx.x * 8; d < p.depth; d += kFewThreads * 8) {
    const Eight<float> narrow = narrow_of(d, p.depth - d);
#pragma unroll
    for (int token = 0; token < kFewTokens; ++token) {
      const int64_t w = w0 + token;
      // The same for all threads.
      if (w >= p.width) break;
      Eight<T> wide = load_eight(static_cast<const T*>(p.wide) + w * p.wide_stride + d, 1, p.depth - d, p.wide_vectors);
      if (masked) mask_eight(wide, seed, w, d, p.dropout.threshold);
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[token] = fmaf(to_float(wide.value[i]), narrow.value[i], acc[token]);
    }
  }
#pragma unroll
  for (int token = 0; token < kFewTokens; ++token) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) acc[token] += __shfl_xor_sync(0xFFFFFFFFu, acc[token], step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][token] = acc[token];
  }
  __syncthreads();
  if (threadIdx.x < kFewTokens && w0 + threadIdx.x < p.width) {
    float sum = 0.0f;
    for (int warp = 0; warp < kFewThreads / 32; ++warp) sum += sums[warp][threadIdx.x];
    store_narrow(p, w0 + threadIdx.x, r, sum);
  }
}

}  // namespace lora_kernels
