// out = X W + mask(S U) + bias with S given, 16-bit operands, on the tensor cores of compute capability 8.0 and up.
//
// A block computes a tile of out. Its copies of X and W run kStages steps ahead of the products. S U goes into the same
// accumulators, and the sum is rounded once.
#pragma once

#include "mma.cuh"

namespace lora_kernels {

namespace one_pass_tile {

constexpr int kM = 128, kN = 128, kK = 32;
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kWarpM = 64, kWarpN = 32;  // 2 x 4 warps
// Row tiles that share columns of W in L2.
constexpr int kGroup = 8;
// A pad of 16 bytes a row, so that the eight rows of a matrix lie in different banks.
constexpr int kStrideK = kK + 8, kStrideN = kN + 8;
constexpr int kStageSize = 2 * kM * kStrideK;
// The columns of S that a block multiplies at a time, as 16-bit numbers: each of a float32 S takes three.
constexpr int kBranch = 48, kStrideBranch = kBranch + 8;
constexpr int kSharedBytes = kStages * kStageSize * 2;

static_assert(kK * kStrideN <= kN * kStrideK, "a tile of W fits however it is stored");
static_assert((kM + kN) * kStrideBranch <= kStages * kStageSize, "the tiles of S and U take the place of the stages");
static_assert(kM * kStrideN <= kStages * kStageSize, "and so does the tile of out");

}  // namespace one_pass_tile

// How W is stored: [N, K] or [K, N] with rows that start on 16 bytes, as X has them then; or X and W are anything.
enum class Layout { kNK, kKN, kAny };

namespace one_pass_tile {

template <class T, Layout kLayout>
struct Loader {
  const OnePass& p;
  int64_t row0, column0;

  __device__ void load(T* stage, int64_t k0) const {
    T *x = stage, *w = stage + kM * kStrideK;
    if constexpr (kLayout == Layout::kAny) {
      copy_numbers(x, p.x, row0, k0, p.M, false);
      copy_numbers(w, {p.weight.data, p.weight.column_stride, p.weight.row_stride, p.weight.dtype}, column0, k0, p.N,
                   p.weight.row_stride != 1);
    } else {
      copy_rows<kM, kK, kStrideK>(x, p.x, row0, k0, p.M, p.K);
      if constexpr (kLayout == Layout::kNK) {
        copy_rows<kN, kK, kStrideK>(w, {p.weight.data, p.weight.column_stride, 1, p.weight.dtype}, column0, k0, p.N,
                                    p.K);
      } else {
        copy_rows<kK, kN, kStrideN>(w, p.weight, k0, column0, p.K, p.N);
      }
    }
  }

  // A tile [kRows, kColumns] in pieces of 16 bytes. The matrix has `columns` that are a multiple of 8.
  template <int kRows, int kColumns, int kStride>
  __device__ static void copy_rows(T* tile, const Matrix& from, int64_t row, int64_t column, int64_t rows,
                                   int64_t columns) {
#pragma unroll
    for (int j = 0; j < kRows * kColumns / 8 / kThreads; ++j) {
      const int i = threadIdx.x + j * kThreads, r = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
      const bool inside = row + r < rows && column + c < columns;
      const T* source = static_cast<const T*>(from.data) + (inside ? (row + r) * from.row_stride + column + c : 0);
      copy_async(tile + r * kStride + c, source, inside);
    }
  }

  // A tile [128, kK] of any strides, number by number, neighbours along the rows where they are closer there.
  __device__ void copy_numbers(T* tile, const Matrix& from, int64_t row, int64_t k0, int64_t rows,
                               bool along_rows) const {
#pragma unroll 4
    for (int j = 0; j < kM * kK / kThreads; ++j) {
      const int i = threadIdx.x + j * kThreads;
      const int r = along_rows ? i % kM : i / kK, k = along_rows ? i / kM : i % kK;
      const bool inside = row + r < rows && k0 + k < p.K;
      tile[r * kStrideK + k] = inside ? static_cast<const T*>(from.data)[(row + r) * from.row_stride +
                                                                         (k0 + k) * from.column_stride]
                                      : from_float<T>(0.0f);
    }
  }
};

// A tile [128, kBranch] of S or U^T for `ranks` ranks, a multiple of 16; `from` starts at it, and has `rows` and
// `left` ranks. Where they are split, 16 ranks take 48 columns: S high, low, high beside U high, high, low. What is
// left out is below 2^-16 of the product. kLow is where the low parts go.
template <int kLow, class From, class Part>
__device__ inline void load_branch(Part* tile, const From* from, int64_t stride_row, int64_t stride_rank, int64_t rows,
                                   int64_t left, int ranks, bool split) {
  static_assert(kM == kN, "S and U are cut alike");
  constexpr int kEach = 4;
  const bool along_rank = stride_rank == 1;
#pragma unroll 1
  for (int first = threadIdx.x; first < kM * ranks; first += kThreads * kEach) {
    // Loads first, so that they are under way together.
    From value[kEach];
    Part* target[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int index = first + j * kThreads;
      const int row = along_rank ? index / 16 % kM : index % kM;
      const int rank = along_rank ? index / (16 * kM) * 16 + index % 16 : index / kM;
      value[j] = row < rows && rank < left ? from[row * stride_row + rank * stride_rank] : from_float<From>(0.0f);
      target[j] = tile + row * kStrideBranch + rank;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float number = to_float(value[j]);
      target[j][0] = from_float<Part>(number);
      if (split) target[j][kLow] = from_float<Part>(to_float(low_part(number))), target[j][48 - kLow] = target[j][0];
    }
  }
}

// acc + mask(S U), in the type in which S and U are multiplied.
template <class T, class Part>
__device__ inline void add_branch(float (&acc)[4][4][4], Part* shared, const OnePass& p, int64_t row0, int64_t column0,
                                  int warp_m, int warp_n, bool split) {
  Part *s_tile = shared, *u_tile = shared + kM * kStrideBranch;
  const int lane = threadIdx.x % 32;
  const bool masked = p.dropout.seed != nullptr && !p.mask_x;
  const int64_t seed = masked ? *p.dropout.seed : 0;
  const int step = split ? 16 : kBranch;
  for (int64_t r0 = 0; r0 < p.R; r0 += step) {
    const int left = static_cast<int>(p.R - r0 < step ? p.R - r0 : step), ranks = (left + 15) / 16 * 16;
    const int depth = split ? kBranch : ranks;
    __syncthreads();
    const auto load_s = [&](const auto* s) {
      load_branch<16>(s_tile, s + row0 * p.R + r0, p.R, 1, p.M - row0, p.R - r0, ranks, split);
    };
    const auto load_u = [&](const auto* u) {
      load_branch<32>(u_tile, u + r0 * p.up.row_stride + column0 * p.up.column_stride, p.up.column_stride,
                      p.up.row_stride, p.N - column0, p.R - r0, ranks, split);
    };
    split ? load_s(static_cast<const float*>(p.s)) : load_s(static_cast<const T*>(p.s));
    p.up.dtype == DType::kFloat32 ? load_u(static_cast<const float*>(p.up.data))
                                  : load_u(static_cast<const T*>(p.up.data));
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        float sum[2][4] = {};
#pragma unroll 1
        for (int k = 0; k < depth; k += 16) {
          uint32_t a[4], b[4];
          load_a(a, s_tile, kStrideBranch, warp_m + i * 16, k, lane);
          load_b(b, u_tile, kStrideBranch, warp_n + j * 8, k, lane);
          multiply(sum[0], a, b, Part());
          multiply(sum[1], a, b + 2, Part());
        }
        if (masked) {
          uint32_t words[2][2];
          fragment_words(words, seed, row0 + warp_m + i * 16, column0 + warp_n + j * 8, lane);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (!keeps(words[e / 4][e % 4 / 2], e % 2, p.dropout.threshold)) sum[e / 4][e % 4] = 0.0f;
          }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[i][j + e / 4][e % 4] += sum[e / 4][e % 4];
      }
    }
  }
}

// Rounds the tile, through shared memory, from where it leaves in whole rows.
template <class T>
__device__ inline void store_tile(const float (&acc)[4][4][4], T* shared, const OnePass& p, int64_t row0,
                                  int64_t column0, int warp_m, int warp_n) {
  const int lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = warp_n + j * 8 + lane % 4 * 2;
    float bias[2] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column0 + column + e < p.N) bias[e] = load_number(p.bias, p.bias_dtype, column0 + column + e);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        struct alignas(4) Pair {
          T left, right;
        };
        T* target = shared + (warp_m + i * 16 + lane / 4 + e / 2 * 8) * kStrideN + column;
        *reinterpret_cast<Pair*>(target) = {from_float<T>(acc[i][j][e] + bias[0]),
                                            from_float<T>(acc[i][j][e + 1] + bias[1])};
      }
    }
  }
  __syncthreads();
  T* out = static_cast<T*>(p.out);
  const bool vectors = p.N % 8 == 0;
  for (int i = threadIdx.x; i < kM * kN / 8; i += kThreads) {
    const int64_t m = row0 + i / (kN / 8), n = column0 + i % (kN / 8) * 8;
    if (m >= p.M || n >= p.N) continue;
    const Eight<T> group = *reinterpret_cast<const Eight<T>*>(shared + i / (kN / 8) * kStrideN + i % (kN / 8) * 8);
    if (vectors) {
      *reinterpret_cast<Eight<T>*>(out + m * p.N + n) = group;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (n + e < p.N) out[m * p.N + n + e] = group.value[e];
      }
    }
  }
}

}  // namespace one_pass_tile

template <class T, Layout kLayout>
__global__ void __launch_bounds__(one_pass_tile::kThreads, 2) one_pass_kernel(const OnePass p) {
  using namespace one_pass_tile;
  T* shared = reinterpret_cast<T*>(dynamic_shared());

  const int64_t row_tiles = divide_up(p.M, kM), column_tiles = divide_up(p.N, kN);
  const int64_t group = blockIdx.x / (kGroup * column_tiles), within = blockIdx.x % (kGroup * column_tiles);
  const int64_t group_rows = row_tiles - group * kGroup < kGroup ? row_tiles - group * kGroup : kGroup;
  const int64_t row0 = (group * kGroup + within % group_rows) * kM, column0 = within / group_rows * kN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % 2 * kWarpM, warp_n = warp / 2 * kWarpN;

  const Loader<T, kLayout> loader{p, row0, column0};
  const int steps = static_cast<int>(divide_up(p.K, kK));
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.load(shared + stage * kStageSize, stage * kK);
    commit_copies();
  }
  float acc[4][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    // The stage that all warps have just left.
    const int next = step + kStages - 1;
    if (next < steps) loader.load(shared + next % kStages * kStageSize, static_cast<int64_t>(next) * kK);
    commit_copies();
    const T* x = shared + step % kStages * kStageSize;
    const T* w = x + kM * kStrideK;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_a(a[i], x, kStrideK, warp_m + i * 16, k, lane);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (kLayout == Layout::kKN) {
          load_b_transposed(b[j], w, kStrideN, warp_n + j * 16, k, lane);
        } else {
          load_b(b[j], w, kStrideK, warp_n + j * 16, k, lane);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(acc[i][j], a[i], b[j / 2] + j % 2 * 2, T());
      }
    }
  }
  wait_copies<0>();
  if (p.precision == Precision::kSplit) {
    add_branch<T>(acc, reinterpret_cast<bf16*>(shared), p, row0, column0, warp_m, warp_n, true);
  } else {
    add_branch<T>(acc, shared, p, row0, column0, warp_m, warp_n, false);
  }
  store_tile(acc, shared, p, row0, column0, warp_m, warp_n);
}

}  // namespace lora_kernels
