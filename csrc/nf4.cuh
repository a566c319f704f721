// NF4: 4-bit codes decoded to the bit as lora_kernels/nf4.py specifies, and products with a packed weight.
#pragma once

#include "mma.cuh"

namespace lora_kernels {

__host__ __device__ inline float nf4_value(int code) {
  const float table[16] = {-1.0f,
                           -0.6961928009986877f,
                           -0.5250730514526367f,
                           -0.39491748809814453f,
                           -0.28444138169288635f,
                           -0.18477343022823334f,
                           -0.09105003625154495f,
                           0.0f,
                           0.07958029955625534f,
                           0.16093020141124725f,
                           0.24611230194568634f,
                           0.33791524171829224f,
                           0.44070982933044434f,
                           0.5626170039176941f,
                           0.7229568362236023f,
                           1.0f};
  return table[code];
}

// Scales that share one of their own.
constexpr int kNestedBlock = 256;

__host__ __device__ inline float nf4_scale(const Nf4& weight, int64_t block) {
  if (weight.nested_absmax == nullptr) return static_cast<const float*>(weight.absmax)[block];
  const float value = weight.nested_map[static_cast<const uint8_t*>(weight.absmax)[block]];
  const float nested = weight.nested_absmax[block / kNestedBlock];
#ifdef __CUDA_ARCH__
  // Two roundings: the compiler would make one of a product and a sum.
  return __fadd_rn(__fmul_rn(value, nested), *weight.offset);
#else
  volatile float product = value * nested;
  return product + *weight.offset;
#endif
}

// Block sizes are powers of two.
inline int log2_of(int64_t block_size) {
  int log2 = 0;
  while (int64_t{1} << log2 < block_size) ++log2;
  return log2;
}

// The code of a lane's 32-bit word that comes `index`-th in the weight: low bytes first, in each the high half first.
__host__ __device__ inline int nf4_code(uint32_t word, int index) {
  return word >> (index / 2 * 8 + (1 - index % 2) * 4) & 15;
}

// The table where a warp's lookups meet no conflict: 16 numbers in 16 banks.
__device__ inline void fill_table(float* table) {
  if (threadIdx.x < 16) table[threadIdx.x] = nf4_value(threadIdx.x);
  __syncthreads();
}

constexpr int kDequantizeThreads = 256;
constexpr int kWordsPerThread = 4;

// Four bytes, eight codes, are what a thread decodes at a time: a block of 32 or more codes has one scale for them.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_kernel(const Nf4 weight, int log2_block, T* out) {
  __shared__ float table[16];
  fill_table(table);
  const int64_t elements = weight.rows * weight.columns, words = divide_up(elements, 8), bytes = divide_up(elements, 2);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads * kWordsPerThread + threadIdx.x;
  uint32_t packed[kWordsPerThread];
  float scale[kWordsPerThread];
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int64_t word = first + i * kDequantizeThreads;
    packed[i] = 0;
    if (word >= words) continue;
    scale[i] = nf4_scale(weight, (word * 8) >> log2_block);
    if (kAligned && word * 4 + 4 <= bytes) {
      packed[i] = __ldg(reinterpret_cast<const uint32_t*>(weight.packed) + word);
    } else {
      for (int b = 0; b < 4; ++b) {
        if (word * 4 + b < bytes) packed[i] |= static_cast<uint32_t>(weight.packed[word * 4 + b]) << (8 * b);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int64_t word = first + i * kDequantizeThreads;
    if (word >= words) continue;
    Eight<T> group;
#pragma unroll
    for (int e = 0; e < 8; ++e) group.value[e] = from_float<T>(__fmul_rn(table[nf4_code(packed[i], e)], scale[i]));
    if (word * 8 + 8 <= elements) {
      *reinterpret_cast<Eight<T>*>(out + word * 8) = group;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (word * 8 + e < elements) out[word * 8 + e] = group.value[e];
      }
    }
  }
}

namespace nf4_tile {

constexpr int kWarps = 8, kThreads = kWarps * 32;
// Codes of a row that a lane decodes at a time, all with one scale, and those of a step of a warp.
constexpr int kLaneCodes = 32, kStep = 4 * kLaneCodes;
constexpr int kTokens = 16;

// Two neighbouring codes from `index` on, decoded and rounded as dequantize_kernel does.
template <class T>
__device__ inline uint32_t decode_pair(const uint4& packed, int index, const float* table, float scale) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&packed);
  struct alignas(4) Pair {
    T value[2];
  } pair;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    pair.value[e] = from_float<T>(__fmul_rn(table[nf4_code(words[index / 8], index % 8 + e)], scale));
  }
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// An element of S U. Types are settled outside of the loop, so that its loads are under way together.
template <class S, class U, class T>
__device__ inline float branch_sum(const OnePass& p, int64_t m, int64_t n) {
  const S* s = static_cast<const S*>(p.s) + m * p.R;
  const U* u = static_cast<const U*>(p.up.data) + n * p.up.column_stride;
  float sum = 0.0f;
#pragma unroll 8
  for (int r = 0; r < static_cast<int>(p.R); ++r) {
    sum = fmaf(to_float(s[r]), to_float(from_float<T>(to_float(u[r * p.up.row_stride]))), sum);
  }
  return sum;
}

}  // namespace nf4_tile

// out = X W^T + S U + bias for kTokens tokens a block, straight from the packed weight.
//
// The product is computed as W X^T: W's rows are the rows of the tensor cores' products, kTiles * 16 of them a block,
// and tokens their columns, kTokenTiles * 8. The warps of a block take steps of K in turn. Within a step a lane
// decodes codes that lie side by side, and multiplies them by what belongs to them of X: the order of K in a product
// is free.
template <class T, int kTiles, int kTokenTiles>
__global__ void __launch_bounds__(nf4_tile::kThreads, 2)
    nf4_forward_kernel(const OnePass p, const Nf4 weight, int log2_block) {
  using namespace nf4_tile;
  constexpr int kRows = kTiles * 16, kColumns = kTokenTiles * 8;
  __shared__ float table[16];
  __shared__ float sums[kWarps][kRows][kColumns];
  fill_table(table);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kRows, m0 = static_cast<int64_t>(blockIdx.y) * kTokens;
  const T* x = static_cast<const T*>(p.x.data);

  float acc[kTiles][kTokenTiles][4] = {};
  for (int64_t k = warp * kStep + lane % 4 * kLaneCodes; k - lane % 4 * kLaneCodes < p.K; k += kWarps * kStep) {
    uint4 packed[kTiles][2];
    float scale[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const int64_t n = n0 + i * 8 + lane / 4, first = n * p.K + k;
      const bool inside = n < p.N && k < p.K;
      packed[i / 2][i % 2] = inside ? __ldg(reinterpret_cast<const uint4*>(weight.packed + first / 2)) : uint4{};
      scale[i / 2][i % 2] = inside ? nf4_scale(weight, first >> log2_block) : 0.0f;
    }
#pragma unroll
    for (int c = 0; c < kLaneCodes; c += 8) {
      // Of each token eight numbers: the second operands of two products.
      uint4 tokens[kTokenTiles];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int64_t m = m0 + j * 8 + lane / 4;
        const T* source = x + m * p.x.row_stride + k + c;
        tokens[j] = m < p.M && k < p.K ? __ldg(reinterpret_cast<const uint4*>(source)) : uint4{};
      }
#pragma unroll
      for (int half_step = 0; half_step < 2; ++half_step) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const int index = c + half_step * 4;
          const uint32_t a[4] = {decode_pair<T>(packed[i][0], index, table, scale[i][0]),
                                 decode_pair<T>(packed[i][1], index, table, scale[i][1]),
                                 decode_pair<T>(packed[i][0], index + 2, table, scale[i][0]),
                                 decode_pair<T>(packed[i][1], index + 2, table, scale[i][1])};
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            multiply(acc[i][j], a, reinterpret_cast<const uint32_t*>(&tokens[j]) + half_step * 2, T());
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[warp][i * 16 + lane / 4 + e / 2 * 8][j * 8 + lane % 4 * 2 + e % 2] = acc[i][j][e];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int row = i % kRows, column = i / kRows;
    const int64_t n = n0 + row, m = m0 + column;
    if (n >= p.N || m >= p.M) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[w][row][column];
    if (p.precision == Precision::kSplit) {
      sum += branch_sum<float, float, float>(p, m, n);
    } else if (p.up.dtype == DType::kFloat32) {
      sum += branch_sum<T, float, T>(p, m, n);
    } else {
      sum += branch_sum<T, T, T>(p, m, n);
    }
    if (p.bias != nullptr) sum += load_number(p.bias, p.bias_dtype, n);
    static_cast<T*>(p.out)[m * p.N + n] = from_float<T>(sum);
  }
}

}  // namespace lora_kernels
