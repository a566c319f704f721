// What the NF4 kernels need beside ptx.cuh. tests/cuda_emulation has it for a CPU.
#pragma once

#include "ptx.cuh"

namespace lora_kernels {

// Four bytes out of the eight of `low` and `high`: each of the four low hexadecimal digits of `digits` names one by its
// three low bits, and by its fourth asks for the sign of that byte instead, eight times. (__byte_perm would clear the
// fourth first.)
__device__ inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t digits) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(bytes) : "r"(low), "r"(high), "r"(digits));
  return bytes;
}

// Two numbers of shared memory, by its 32-bit address. What lies there does not change between the barriers around it.
__device__ inline float2 load_shared_pair(uint32_t address) {
  float2 pair;
  asm("ld.shared.v2.f32 {%0,%1}, [%2];\n" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

// Two numbers rounded to 16 bits, `low` in the low half.
__device__ inline uint32_t round_pair(float low, float high, bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline uint32_t round_pair(float low, float high, half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What lies there will be read soon.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address)); }

}  // namespace lora_kernels
