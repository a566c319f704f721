// dx = dy W + mask(T A) for few tokens, while the packed weight is read and decoded once. In the words of OnePass: X is
// dy, S is T, and U is A.
//
// The product is computed as W^T X^T: columns of W are the rows of the tensor cores' products, tokens their columns.
//
// Decoding. A warp takes 32 rows of W at a step, each of its lanes one, and of them 64 columns at a time, a panel. The
// codes of a lane's run have one scale, so they are decoded by bytes (nf4_bytes.cuh). They go to shared memory as they
// are stored; reading them transposed makes the rows the depth of a product. One decoding serves all tokens.
//
// Places. The order of the rows within a product is free. They lie in a panel so that each lane needs eight neighbours
// of X, which it loads itself.
//
// Blocks. Each has a strip of columns and a group of steps. Its warps meet once, to add up what they have; until then
// nobody waits but the lanes of a warp for each other. A second launch adds the groups in their order, the same bits in
// every run, and with them the branch: the first does not need T, and may run while T is made.
#pragma once

#include "mma.cuh"
#include "nf4_bytes.cuh"
#include "nf4_dx.h"

namespace lora_kernels {
namespace nf4_dx_tile {

constexpr int kRows = 32, kPanel = 64;
// A pad of 16 bytes a row, so that the same 16 bytes of eight rows lie in different banks.
constexpr int kPanelStride = kPanel * 2 + 16, kPanelBytes = kRows * kPanelStride;
// The codes of a copy of 16 bytes.
constexpr int kCopy = 32;
constexpr int kMostThreads = 256;
// Of the second launch: threads of a block, tokens of a thread, and the ranks whose T a block holds at a time.
constexpr int kSumThreads = 128, kSumTokens = 4, kSumRanks = 64;

// Of a launch: a block takes up to kTokenTiles_ * 8 tokens, a warp kColumns_ columns in runs of kRun_, with copies of
// kStages_ steps under way, that in use among them. A multiprocessor's registers shall do for kBlocks_ blocks of most
// threads.
template <int kTokenTiles_, int kColumns_, int kRun_, int kStages_, int kBlocks_>
struct Shape {
  static constexpr int kTokenTiles = kTokenTiles_, kColumns = kColumns_, kRun = kRun_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kPanels = kColumns / kPanel, kRuns = kColumns / kRun, kCopies = kColumns / kCopy;
  static constexpr int kStageBytes = kRows * kColumns / 2, kWarpBytes = kStages * kStageBytes + kPanelBytes;

  // Of a token's sums; the pad puts what a warp stores at a time into different banks.
  __host__ __device__ static constexpr int sum_stride(int column_warps) { return column_warps * kColumns + 4; }
  // The sums take the place of the copies.
  __host__ __device__ static constexpr int bytes(int warps, int column_warps) {
    const int copies = warps * kWarpBytes, sums = warps / column_warps * kTokens * sum_stride(column_warps) * 4;
    return copies > sums ? copies : sums;
  }
};

// The row of a step that lies in row `slot` of a panel.
__device__ inline int row_of(int slot) { return slot / 2 % 4 * 8 + slot / 8 * 2 + slot % 2; }

// Where 16 bytes lie in a step's codes: those that eight lanes read at a time are in different banks.
template <class Shape>
__device__ inline int code_place(int slot, int chunk) {
  return slot * Shape::kColumns / 2 + (chunk ^ slot * Shape::kCopies / 8 % Shape::kCopies) * 16;
}

// A lane's share of the copies of a warp's steps, one step after the other.
template <class Shape>
struct StepCopies {
  static constexpr int kSlots = kRows / Shape::kCopies;
  const uint8_t* source;
  int slot, chunk;
  bool inside;

  __device__ StepCopies(const Nf4& weight, int64_t row, int64_t column, int lane)
      : source(weight.packed + (row * weight.columns + column) / 2 + lane % Shape::kCopies * 16),
        slot(lane / Shape::kCopies),
        chunk(lane % Shape::kCopies),
        inside(column + chunk * kCopy < weight.columns) {}

  // Those of a step that has `left` rows, and `rows` before the next.
  __device__ void next(unsigned char* target, int64_t columns, int left, int rows) {
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      const int place = slot + i * kSlots, row = row_of(place);
      copy_async(target + code_place<Shape>(place, chunk), source + row * columns / 2, inside && row < left);
    }
    source += rows * columns / 2;
  }
};

// The scales of the runs of a lane's row, loaded as they are stored a step ahead of their use.
template <class Shape>
struct StepScales {
  int64_t first;  // counted in elements of the weight
  int columns_left;
  uint32_t bits[Shape::kRuns];
  float nested[Shape::kRuns];

  __device__ StepScales(const Nf4& weight, int64_t row, int64_t column)
      : first(row * weight.columns + column), columns_left(static_cast<int>(weight.columns - column)) {}

  // Those of a row that is `inside`, and `rows` before the next.
  __device__ void load(const Nf4& weight, int log2_block, bool inside, int rows) {
#pragma unroll
    for (int i = 0; i < Shape::kRuns; ++i) {
      bits[i] = 0, nested[i] = 0.0f;
      if (!inside || columns_left <= i * Shape::kRun) continue;
      const auto block = static_cast<uint32_t>((first + i * Shape::kRun) >> log2_block);
      if (weight.nested_absmax == nullptr) {
        bits[i] = __ldg(static_cast<const uint32_t*>(weight.absmax) + block), nested[i] = 1.0f;
      } else {
        bits[i] = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
        nested[i] = __ldg(weight.nested_absmax + block / kNestedBlock);
      }
    }
    first += rows * weight.columns;
  }

  // A scale that is not quantized is itself times one plus `offset`, which is -0 then.
  __device__ float get(int i, bool is_nested, const float* map, float offset) const {
    const float value = is_nested ? map[bits[i]] : __uint_as_float(bits[i]);
    return __fadd_rn(__fmul_rn(value, nested[i]), offset);
  }
};

// Of T, for `ranks` ranks from r0 on and kSumTokens tokens from m0 on; zeros beyond the last of them.
template <class S>
__device__ inline void load_s(float (&target)[kSumRanks][kSumTokens], const OnePass& p, int64_t m0, int64_t r0,
                              int ranks) {
  for (int i = threadIdx.x; i < ranks * kSumTokens; i += kSumThreads) {
    const int64_t m = m0 + i / ranks, r = r0 + i % ranks;
    target[i % ranks][i / ranks] = m < p.M ? to_float(static_cast<const S*>(p.s)[m * p.R + r]) : 0.0f;
  }
}

// sum += S U, where U is rounded to T.
template <class T, class U>
__device__ inline void add_products(float (&sum)[kSumTokens], const float (&s)[kSumRanks][kSumTokens], const U* u,
                                    int64_t stride, int ranks) {
#pragma unroll 8
  for (int r = 0; r < ranks; ++r) {
    const float up = to_float(from_float<T>(to_float(u[r * stride])));
#pragma unroll
    for (int j = 0; j < kSumTokens; ++j) sum[j] = fmaf(s[r][j], up, sum[j]);
  }
}

}  // namespace nf4_dx_tile

// Of each group of steps its part of X W: [group, token, column].
template <class T, class Shape>
__global__ void __launch_bounds__(nf4_dx_tile::kMostThreads, Shape::kBlocks)
    nf4_dx_kernel(const OnePass p, const Nf4 weight, int log2_block, const DxPlan plan, float* parts) {
  using namespace nf4_dx_tile;
  constexpr int kColumns = Shape::kColumns, kTokenTiles = Shape::kTokenTiles, kStages = Shape::kStages;
  __shared__ float map[kNestedBlock];
  unsigned char* memory = dynamic_shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column_warp = warp % plan.column_warps, slice = warp / plan.column_warps;
  const int slices = plan.warps / plan.column_warps;
  const int strip = blockIdx.x % plan.strips, group = blockIdx.x / plan.strips;
  unsigned char* ring = memory + warp * Shape::kWarpBytes;
  unsigned char* panel = ring + kStages * Shape::kStageBytes;

  const int begin = static_cast<int>(static_cast<int64_t>(plan.steps) * group / plan.groups) + slice;
  const int end = static_cast<int>(static_cast<int64_t>(plan.steps) * (group + 1) / plan.groups);
  const int64_t strip_n = static_cast<int64_t>(strip) * plan.column_warps * kColumns;
  const int64_t n0 = strip_n + column_warp * kColumns, k0 = static_cast<int64_t>(begin) * kRows;
  const int mine = n0 < p.N && begin < end ? (end - begin + slices - 1) / slices : 0;

  // From one step of this warp to the next, and the rows that there are from the present one on.
  const int rows = slices * kRows;
  int left = static_cast<int>(p.K - k0);
  StepCopies<Shape> copies(weight, k0, n0, lane);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < mine) copies.next(ring + i * Shape::kStageBytes, weight.columns, left - i * rows, rows);
    commit_copies();
  }
  StepScales<Shape> scales(weight, k0 + row_of(lane), n0);
  if (mine > 0) scales.load(weight, log2_block, row_of(lane) < left, rows);
  const bool nested = weight.nested_absmax != nullptr;
  const float offset = nested ? *weight.offset : -0.0f;
  if (nested) {
    for (int i = threadIdx.x; i < kNestedBlock; i += blockDim.x) map[i] = weight.nested_map[i];
  }
  __syncthreads();

  // Of this lane: its first codes, its weights of a panel, and the row of a matrix that it gives the address of.
  const int code_first = code_place<Shape>(lane, 0);
  unsigned char* weights = panel + lane * kPanelStride;
  const unsigned char* matrix = panel + (lane / 16 * 8 + lane % 8) * kPanelStride + lane / 8 % 2 * 16;
  const T* x = static_cast<const T*>(p.x.data) + k0 + lane % 4 * 8;
  const int row_stride = static_cast<int>(p.x.row_stride), last_token = static_cast<int>(p.M) - 1;
  int stage = 0;
  float acc[kColumns / 16][kTokenTiles][4] = {};
  for (int step = 0; step < mine; ++step, x += rows, left -= rows) {
    uint4 tokens[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      // Beyond the last token, that one: nobody asks for what comes of it.
      const int token = j * 8 + lane / 4 < last_token ? j * 8 + lane / 4 : last_token;
      const T* source = x + static_cast<int64_t>(token) * row_stride;
      tokens[j] = lane % 4 * 8 < left ? __ldg(reinterpret_cast<const uint4*>(source)) : uint4{};
    }
    float scale[Shape::kRuns];
#pragma unroll
    for (int i = 0; i < Shape::kRuns; ++i) scale[i] = scales.get(i, nested, map, offset);
    if (step + 1 < mine) scales.load(weight, log2_block, row_of(lane) < left - rows, rows);
    wait_copies<kStages - 2>();
    // What the lanes copied is here, and what they read of the step before need not stay.
    __syncwarp();
    const unsigned char* codes = ring + stage * Shape::kStageBytes;
    if (step + kStages - 1 < mine) {
      copies.next(ring + (stage == 0 ? kStages - 1 : stage - 1) * Shape::kStageBytes, weight.columns,
                  left - (kStages - 1) * rows, rows);
    }
    commit_copies();
    stage = stage == kStages - 1 ? 0 : stage + 1;

#pragma unroll
    for (int i = 0; i < Shape::kPanels; ++i) {
      ByteTable table;
#pragma unroll
      for (int part = 0; part < kPanel / kCopy; ++part) {
        const int column = i * kPanel + part * kCopy;
        if (column % Shape::kRun == 0) table = make_table<T>(scale[column / Shape::kRun]);
        const uint4 words = *reinterpret_cast<const uint4*>(codes + (code_first ^ column / kCopy * 16));
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          uint32_t pairs[4];
          look_up(pairs, table, reinterpret_cast<const uint32_t*>(&words)[word]);
          *reinterpret_cast<uint4*>(weights + (part * 4 + word) * 16) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int tile = 0; tile < kPanel / 16; ++tile) {
          uint32_t a[4];
          load_matrices_transposed(a, matrix + half * (kPanelBytes / 2) + tile * 32);
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            multiply(acc[i * kPanel / 16 + tile][j], a, reinterpret_cast<const uint32_t*>(&tokens[j]) + half * 2, T());
          }
        }
      }
      // Read by all before the next panel takes its place.
      if (i + 1 < Shape::kPanels) __syncwarp();
    }
  }
  wait_copies<0>();
  __syncthreads();
  let_next_launch_begin();

  const int stride = Shape::sum_stride(plan.column_warps);
  float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < kColumns / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = j * 8 + lane % 4 * 2 + e % 2, column = i * 16 + lane / 4 + e / 2 * 8;
        sums[(slice * Shape::kTokens + token) * stride + column_warp * kColumns + column] = acc[i][j][e];
      }
    }
  }
  __syncthreads();
  const int fours = plan.column_warps * kColumns / 4;
  for (int i = threadIdx.x; i < static_cast<int>(p.M) * fours; i += blockDim.x) {
    const int m = i / fours;
    const int64_t n = strip_n + i % fours * 4;
    if (n >= p.N) continue;
    float4 sum{};
    for (int s = 0; s < slices; ++s) {
      const float4 part = *reinterpret_cast<const float4*>(sums + (s * Shape::kTokens + m) * stride + i % fours * 4);
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    *reinterpret_cast<float4*>(parts + (static_cast<int64_t>(group) * p.M + m) * p.N + n) = sum;
  }
  // So that whoever waits for this launch has waited for T as well.
  wait_for_launch_before();
}

// The groups' parts and the branch added up, for a column and kSumTokens tokens a thread.
template <class T>
__global__ void __launch_bounds__(nf4_dx_tile::kSumThreads) nf4_dx_sum_kernel(const OnePass p, int groups,
                                                                              const float* parts) {
  using namespace nf4_dx_tile;
  alignas(16) __shared__ float s[kSumRanks][kSumTokens];
  wait_for_launch_before();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * kSumTokens;
  const bool inside = n < p.N;
  float branch[kSumTokens] = {};
  for (int64_t r0 = 0; r0 < p.R; r0 += kSumRanks) {
    const int ranks = static_cast<int>(p.R - r0 < kSumRanks ? p.R - r0 : kSumRanks);
    if (r0 > 0) __syncthreads();
    const bool split = p.precision == Precision::kSplit;
    split ? load_s<float>(s, p, m0, r0, ranks) : load_s<T>(s, p, m0, r0, ranks);
    __syncthreads();
    if (!inside) continue;
    const int64_t first = r0 * p.up.row_stride + n * p.up.column_stride;
    if (p.up.dtype != DType::kFloat32) {
      add_products<T>(branch, s, static_cast<const T*>(p.up.data) + first, p.up.row_stride, ranks);
    } else if (split) {
      add_products<float>(branch, s, static_cast<const float*>(p.up.data) + first, p.up.row_stride, ranks);
    } else {
      add_products<T>(branch, s, static_cast<const float*>(p.up.data) + first, p.up.row_stride, ranks);
    }
  }
  if (!inside) return;
  const int tokens = static_cast<int>(p.M - m0 < kSumTokens ? p.M - m0 : kSumTokens);
  float sum[kSumTokens] = {};
#pragma unroll 4
  for (int group = 0; group < groups; ++group) {
    const float* part = parts + (static_cast<int64_t>(group) * p.M + m0) * p.N + n;
#pragma unroll
    for (int j = 0; j < kSumTokens; ++j) {
      if (j < tokens) sum[j] += __ldcg(part + j * p.N);
    }
  }
  const bool masked = p.dropout.seed != nullptr;
  const int64_t seed = masked ? *p.dropout.seed : 0;
#pragma unroll
  for (int j = 0; j < kSumTokens; ++j) {
    if (j >= tokens) break;
    if (masked) {
      const Lanes lanes =
          philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(n / 8), static_cast<uint32_t>(m0 + j));
      const uint32_t low = n & 2 ? lanes.word[1] : lanes.word[0], high = n & 2 ? lanes.word[3] : lanes.word[2];
      if (!keeps(n & 4 ? high : low, n & 1, p.dropout.threshold)) branch[j] = 0.0f;
    }
    static_cast<T*>(p.out)[(m0 + j) * p.N + n] = from_float<T>(sum[j] + branch[j]);
  }
}

}  // namespace lora_kernels
