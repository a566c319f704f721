// What the kernels in csrc/ use of CUDA, on a CPU: one block after the other, its threads taking turns on one core.
//
// A thread runs until it meets the others: at __syncthreads, at a shuffle, at an instruction of a whole warp. That
// shows wrong indices, masks and layouts, and not races: those are compute-sanitizer's, on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

void run(dim3 grid, int threads, const std::function<void()>& thread);
void meet_block();
void meet_warp();
int warp();
int lane();
// A number of each lane of each warp, for instructions that look at those of others.
extern uint64_t shown[32][32];

inline void require(bool holds) {
  if (!holds) __builtin_trap();
}
inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace emulation

inline void __syncthreads() { emulation::meet_block(); }
inline void __syncwarp() { emulation::meet_warp(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&emulation::shown[emulation::warp()][emulation::lane()], &value, sizeof(T));
  emulation::meet_warp();
  std::memcpy(&value, &emulation::shown[emulation::warp()][emulation::lane() ^ mask], sizeof(T));
  emulation::meet_warp();
  return value;
}

template <class T>
T __ldg(const T* pointer) {
  emulation::require(reinterpret_cast<uintptr_t>(pointer) % sizeof(T) == 0);
  return *pointer;
}

template <class T>
T __ldcg(const T* pointer) {
  return __ldg(pointer);
}

// One block runs at a time.
inline void __threadfence() {}
inline int atomicAdd(int* number, int added) { return (*number += added) - added; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few multiprocessors, so that small problems are divided as large ones are on a GPU.
  const int values[] = {6, 8, 0, 99 * 1024, 100 * 1024};
  return *value = values[attribute], cudaSuccess;
}
