// out = X W + mask(S U) + bias with S given, all float32, without tensor cores: every product has 24 bits.
#pragma once

#include "numbers.cuh"

namespace lora_kernels {

namespace float_tile {

constexpr int kM = 128, kN = 64, kK = 16;
constexpr int kThreads = 256;
constexpr int kRows = 8, kColumns = 4;  // of a thread

struct Shared {
  // A pad of 16 bytes keeps the columns that a warp writes out of one bank.
  alignas(16) float left[kK][kM + 4];
  alignas(16) float right[kK][kN + 4];
};

__device__ inline int thread_row() { return threadIdx.x / (kN / kColumns) * kRows; }
__device__ inline int thread_column() { return threadIdx.x % (kN / kColumns) * kColumns; }

// A tile [kK, kSize] of `from`, whose element (i, k) is i * stride_i + k * stride_k away.
template <int kSize>
struct Fetch {
  static constexpr int kCount = kSize * kK / kThreads;
  float value[kCount];

  __device__ static int along(int j, bool k_inner) {
    const int index = threadIdx.x + j * kThreads;
    return k_inner ? index / kK : index % kSize;
  }
  __device__ static int depth(int j, bool k_inner) {
    const int index = threadIdx.x + j * kThreads;
    return k_inner ? index % kK : index / kSize;
  }
  __device__ void load(const float* from, int64_t i0, int64_t k0, int64_t size, int64_t total, int64_t stride_i,
                       int64_t stride_k) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = i0 + along(j, stride_k == 1), k = k0 + depth(j, stride_k == 1);
      value[j] = i < size && k < total ? from[i * stride_i + k * stride_k] : 0.0f;
    }
  }
  template <int kStride>
  __device__ void store(float (&to)[kK][kStride], bool k_inner) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[depth(j, k_inner)][along(j, k_inner)] = value[j];
  }
};

// acc += left right, of `total` depth. left [M, total] and right [total, N] have any strides.
__device__ inline void add_product(float (&acc)[kRows][kColumns], Shared& shared, const Matrix& left,
                                   const Matrix& right, int64_t row0, int64_t column0, int64_t M, int64_t N,
                                   int64_t total) {
  const float *a = static_cast<const float*>(left.data), *b = static_cast<const float*>(right.data);
  Fetch<kM> of_left;
  Fetch<kN> of_right;
  of_left.load(a, row0, 0, M, total, left.row_stride, left.column_stride);
  of_right.load(b, column0, 0, N, total, right.column_stride, right.row_stride);
  for (int64_t k0 = 0; k0 < total; k0 += kK) {
    __syncthreads();
    of_left.store(shared.left, left.column_stride == 1);
    of_right.store(shared.right, right.row_stride == 1);
    __syncthreads();
    if (k0 + kK < total) {
      of_left.load(a, row0, k0 + kK, M, total, left.row_stride, left.column_stride);
      of_right.load(b, column0, k0 + kK, N, total, right.column_stride, right.row_stride);
    }
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      float x[kRows], y[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i] = shared.left[k][thread_row() + i];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) y[j] = shared.right[k][thread_column() + j];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
      }
    }
  }
}

}  // namespace float_tile

__global__ void __launch_bounds__(float_tile::kThreads) one_pass_float_kernel(const OnePass p) {
  using namespace float_tile;
  __shared__ Shared shared;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kM, column0 = static_cast<int64_t>(blockIdx.y) * kN;
  float acc[kRows][kColumns] = {};
  add_product(acc, shared, p.x, p.weight, row0, column0, p.M, p.N, p.K);
  float branch[kRows][kColumns] = {};
  add_product(branch, shared, {p.s, p.R, 1, DType::kFloat32}, p.up, row0, column0, p.M, p.N, p.R);
  const bool masked = p.dropout.seed != nullptr && !p.mask_x;
  const int64_t seed = masked ? *p.dropout.seed : 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t m = row0 + thread_row() + i, n0 = column0 + thread_column();
    Lanes lanes{};
    if (masked) {
      lanes = philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(n0 / 8), static_cast<uint32_t>(m));
      // A thread's four columns are the first or the last two words of the eight.
      if (n0 % 8 != 0) lanes.word[0] = lanes.word[2], lanes.word[1] = lanes.word[3];
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (m >= p.M || n0 + j >= p.N) continue;
      float value = acc[i][j];
      if (!masked || keeps(lanes.word[j / 2], j % 2, p.dropout.threshold)) value += branch[i][j];
      if (p.bias != nullptr) value += load_number(p.bias, p.bias_dtype, n0 + j);
      static_cast<float*>(p.out)[m * p.N + n0 + j] = value;
    }
  }
}

}  // namespace lora_kernels
