// A layer of few tokens whose packed weight the CUDA backend's kernel streams (csrc/nf4_stream.cuh), by the address of what
// its extension launches.

#pragma once

#include <cmath>

#include "../problem.h"
#include "call.h"

namespace lora_kernels::host {

inline DType number_of(at::ScalarType type) {
  return type == at::kFloat ? DType::kFloat32 : type == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
}

inline Matrix transposed(const Tensor& matrix) {
  return {address(matrix), matrix.stride(1), matrix.stride(0), number_of(matrix.scalar_type())};
}

inline Nf4 packed_of(const Weight& weight) {
  const auto& [packed, absmax, nested_absmax, nested_map, offset] = weight.parts;
  const auto floats = [](const Tensor& tensor) { return static_cast<const float*>(address(tensor)); };
  return {static_cast<const uint8_t*>(address(packed)),
          address(absmax),
          floats(nested_absmax),
          floats(nested_map),
          floats(offset),
          weight.rows,
          weight.columns,
          weight.block_size};
}

// y = x W^T + S B^T + b and S = scale * mask(x) A^T. A mask is a function of its seed, as dropout.py has it.
inline void launch_stream(Launching& launching, const Tensor& x, const Layer& layer, const Tensor& y, const Tensor& s,
                          const Tensor& seed, double p, double scale) {
  Launch& launch = launching.next();
  OnePass problem{};
  problem.M = s.size(0), problem.K = layer.weight.columns, problem.N = layer.N, problem.R = layer.R;
  problem.dtype = number_of(x.scalar_type());
  problem.precision = s.scalar_type() == at::kFloat                ? Precision::kSplit
                      : layer.lora_A->scalar_type() == at::kFloat ? Precision::kRounded
                                                                  : Precision::kNative;
  problem.x = {address(x), x.dim() == 2 ? x.stride(0) : problem.K, 1, problem.dtype};
  problem.down = transposed(*layer.lora_A), problem.up = transposed(*layer.lora_B);
  if (layer.bias != nullptr) {
    problem.bias = address(*layer.bias), problem.bias_dtype = number_of(layer.bias->scalar_type());
  }
  problem.scale = static_cast<float>(scale);
  problem.dropout = {static_cast<const int64_t*>(address(seed)), static_cast<int32_t>(std::nearbyint(p * 65536))};
  problem.mask_x = true;
  problem.out = const_cast<void*>(address(y)), problem.s = const_cast<void*>(address(s));
  const Tensor workspace = fresh({launch.workspace_size}, x, at::kFloat);
  Tensor kept;
  const void* const counters = zeros().of(x.device(), launching.stream, launch.counters, kept);
  const auto forward = reinterpret_cast<Nf4Forward>(launch.function());
  forward(problem, packed_of(layer.weight), static_cast<float*>(const_cast<void*>(address(workspace))),
          static_cast<int*>(const_cast<void*>(counters)), launching.stream);
}

}  // namespace lora_kernels::host
