// Numbers of the three dtypes, one at a time and in groups of eight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "philox.cuh"
#include "problem.h"

namespace lora_kernels {

using bf16 = __nv_bfloat16;
using half = __half;

// PyTorch builds extensions without CUDA's implicit conversions, so each is written out.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline half from_float<half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// A float32 is its rounding to bfloat16 and this, to 16 bits.
__device__ inline bf16 low_part(float x) { return from_float<bf16>(x - to_float(from_float<bf16>(x))); }

template <class T>
__host__ __device__ constexpr DType dtype_of();
template <>
__host__ __device__ constexpr DType dtype_of<float>() { return DType::kFloat32; }
template <>
__host__ __device__ constexpr DType dtype_of<half>() { return DType::kFloat16; }
template <>
__host__ __device__ constexpr DType dtype_of<bf16>() { return DType::kBFloat16; }

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float load_number(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[index];
    case DType::kFloat16: return to_float(static_cast<const half*>(data)[index]);
    default: return to_float(static_cast<const bf16*>(data)[index]);
  }
}

__device__ inline void store_number(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[index] = value; break;
    case DType::kFloat16: static_cast<half*>(data)[index] = from_float<half>(value); break;
    default: static_cast<bf16*>(data)[index] = from_float<bf16>(value);
  }
}

// Eight neighbours: what one call of Philox masks, and 16 bytes of a 16-bit dtype.
template <class T>
struct alignas(16) Eight {
  T value[8];
};

// `count` of them count, the others are zero. `vectors` promises that a whole group starts on 16 bytes with stride 1.
// kPastL1 is for what may be written while this launch is under way: the other loads may ask a cache that does not know.
template <bool kPastL1 = false, class T>
__device__ inline Eight<T> load_eight(const T* data, int64_t stride, int64_t count, bool vectors) {
  Eight<T> group;
  if (vectors && count >= 8) {
    const uint4* source = reinterpret_cast<const uint4*>(data);
    uint4* target = reinterpret_cast<uint4*>(&group);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(group) / 16); ++i) {
      target[i] = kPastL1 ? __ldcg(source + i) : __ldg(source + i);
    }
    return group;
  }
  const auto load = [&](int i) { return kPastL1 ? __ldcg(data + i * stride) : data[i * stride]; };
#pragma unroll
  for (int i = 0; i < 8; ++i) group.value[i] = i < count ? load(i) : from_float<T>(0.0f);
  return group;
}

// The same from another dtype, rounded to T.
template <class T, bool kPastL1 = false>
__device__ inline Eight<T> load_eight_as(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t count,
                                         bool vectors) {
  if (dtype == dtype_of<T>()) {
    return load_eight<kPastL1>(static_cast<const T*>(data) + offset, stride, count, vectors);
  }
  const Eight<float> wide = load_eight<kPastL1>(static_cast<const float*>(data) + offset, stride, count, vectors);
  Eight<T> group;
#pragma unroll
  for (int i = 0; i < 8; ++i) group.value[i] = from_float<T>(wide.value[i]);
  return group;
}

template <class T>
__device__ inline void mask_eight(Eight<T>& group, int64_t seed, int64_t row, int64_t column, int32_t threshold) {
  const Lanes lanes =
      philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!keeps(lanes.word[i / 2], i % 2, threshold)) group.value[i] = from_float<T>(0.0f);
  }
}

}  // namespace lora_kernels
