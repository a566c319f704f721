// What a launch is asked to do: raw pointers and sizes. Nothing here, and no kernel, knows of PyTorch; and nothing here of
// CUDA's headers, which csrc/host/ is compiled without.
#pragma once

#include <cstdint>

namespace lora_kernels {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// How adapters meet a base of another dtype; lora_kernels/backends/__init__.py says what each means.
enum class Precision { kNative, kRounded, kSplit };

// A two-dimensional matrix of any strides, counted in elements.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  DType dtype;
};

// lora_kernels/dropout.py specifies the mask. Element (row, column) stays where its 16-bit lane is at least the
// threshold; a null seed means that nothing is dropped.
struct Dropout {
  const int64_t* seed;
  int32_t threshold;
};

// A 4-bit weight of the layout that lora_kernels/nf4.py specifies: blocks run over the flattened [rows, columns].
struct Nf4 {
  const uint8_t* packed;       // two codes a byte, the lower index in the high nibble
  const void* absmax;          // a block's: float32, or uint8 where it is quantized itself
  const float* nested_absmax;  // null where absmax is float32
  const float* nested_map;     // [256]
  const float* offset;         // one number
  int64_t rows, columns;
  int64_t block_size;
};

// S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
// out = X W + mask(S U) + bias      [M, N]     U "up":   lora_B^T forward, lora_A backward
//
// Forward, X is x, W is weight^T and the mask sits on X. Backward to the input, X is dy, W is weight, S is T and the
// mask sits on S U.
struct OnePass {
  int64_t M, N, K, R;
  DType dtype;  // of X, W and out; S is float32 where the precision is kSplit, else this
  Precision precision;
  Matrix x;       // [M, K], column_stride 1
  Matrix weight;  // [K, N], one of its strides 1
  Matrix down;    // [K, R]
  Matrix up;      // [R, N]
  const void* bias;  // [N] or null
  DType bias_dtype;
  float scale;
  const float* scale_tensor;  // where not null, it is the scale
  Dropout dropout;
  bool mask_x;  // the mask sits on X, not on S U
  void* out;    // [M, N], contiguous
  void* s;      // [M, R], contiguous
};

inline DType s_dtype(const OnePass& problem) {
  return problem.precision == Precision::kSplit ? DType::kFloat32 : problem.dtype;
}

// How csrc/host/ calls launches.h's nf4_forward, whose stream is a type of CUDA's: by address.
using Nf4Forward = void (*)(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, void* stream);

// dA = T^T mask(x) [R, K] where t is given, dB = dy^T S [N, R] where s is given; both contiguous, in grad_dtype.
struct AdapterGrads {
  int64_t M, N, K, R;
  DType dtype;         // of x and dy
  DType narrow_dtype;  // of s and t
  DType grad_dtype;
  Matrix x;   // [M, K], column_stride 1; data null where dA is not wanted
  Matrix dy;  // [M, N], column_stride 1
  const void* s;  // [M, R], contiguous, or null
  const void* t;  // [M, R], contiguous, or null
  Dropout dropout;
  void* dA;
  void* dB;
};

}  // namespace lora_kernels
