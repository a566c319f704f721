// The operations of this backend: what bindings.cpp calls, and what a program without PyTorch could.
//
// Each enqueues its work on `stream` of the current device and returns; one that cannot be launched throws a
// std::runtime_error that names the kernel. Launches of a call may overlap, so nothing else may be enqueued in between. A
// workspace holds as many floats as the function beside it says, and starts on 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "problem.h"

namespace lora_kernels {

// Both lines of OnePass. M, N, K and R are at least 1.
int64_t one_pass_workspace(const OnePass& problem);
void one_pass(const OnePass& problem, float* workspace, cudaStream_t stream);

// S alone.
void adapter_down(const OnePass& problem, float* workspace, cudaStream_t stream);

// It counts in so many ints, which must be zero and are zero again afterwards.
int adapter_grads_counters(const AdapterGrads& problem);
int64_t adapter_grads_workspace(const AdapterGrads& problem);
void adapter_grads(const AdapterGrads& problem, float* workspace, int* counters, cudaStream_t stream);

// The weight in float32 or rounded to 16 bits: [rows, columns], contiguous.
void dequantize(const Nf4& weight, DType dtype, void* out, cudaStream_t stream);

// Both lines of OnePass, forward, for few tokens: X W^T from the packed weight. Not looked at: the problem's own weight.
// It counts as adapter_grads does.
bool nf4_forward_fits(const OnePass& problem, const Nf4& weight);
int nf4_forward_counters(const OnePass& problem, const Nf4& weight);
int64_t nf4_forward_workspace(const OnePass& problem, const Nf4& weight);
void nf4_forward(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream);

// Both lines of OnePass, backward and without a bias, for few tokens: dy W from the packed weight. It counts likewise.
bool nf4_backward_fits(const OnePass& problem, const Nf4& weight);
int nf4_backward_counters(const OnePass& problem);
int64_t nf4_backward_workspace(const OnePass& problem, const Nf4& weight);
void nf4_backward(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream);

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("lora_kernels: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Of the current device.
inline int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, current_device()), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Whether every row, or whatever lies `stride` elements apart, starts on 16 bytes.
inline bool starts_on_16_bytes(const void* data, int64_t stride, int64_t bytes_each) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes_each % 16 == 0;
}

}  // namespace lora_kernels
