// The instructions of Hopper that CUDA C++ has no name for: barriers in shared memory, TMA, clusters.
#pragma once

#include <cuda.h>

#include <cstdint>
#ifdef LORA_KERNELS_GIVE_UP_AFTER
#include <cstdio>
#endif

namespace lora_kernels::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Meets `threads` threads of the block; barrier 0 is __syncthreads.
__device__ inline void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---------------------------------------------------------------------------------------------------- mbarriers

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the cluster and to TMA; a meeting of the cluster must follow.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at the barrier of the same place in another block of the cluster, or in this one. What was read before are
// stages, whose readers are done by then (wgmma's wait, or a value in a register), and TMA is what writes them next: no
// order of ordinary memory accesses is asked for. Asking for one at the scope of the cluster costs a fence of the whole
// chip's, about a microsecond, at every step.
__device__ inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
}

// Bounds a wait in builds that look for a deadlock, by LORA_KERNELS_GIVE_UP_AFTER clock cycles: whoever waits longer
// says where, and goes on as if there were nothing to wait for, so that the kernel ends and what was said is seen.
class Patience {
 public:
#ifdef LORA_KERNELS_GIVE_UP_AFTER
  __device__ bool ends(const char* name, int a, int b) {
    // Not in a constructor: nvcc 13.0 hands its body to the host's compiler, which knows no clock64.
    if (start_ == 0) start_ = clock64();
    if (clock64() - start_ < (LORA_KERNELS_GIVE_UP_AFTER)) return false;
    printf("block %d thread %d gave up: %s (%d, %d)\n", blockIdx.x, threadIdx.x, name, a, b);
    return true;
  }

 private:
  long long start_ = 0;
#else
  __device__ static constexpr bool ends(const char*, int, int) { return false; }
#endif
};

// Waits until the phase of that parity has passed.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity, const char* name) {
  Patience patience;
  while (!barrier_passed(barrier, parity)) {
    if (patience.ends(name, static_cast<int>(barrier), static_cast<int>(parity))) break;
  }
}

// ---------------------------------------------------------------------------------------------------- TMA

__device__ inline void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Into the same place of every block in `ranks`, telling each one's barrier.
__device__ inline void tma_load_multicast(uint32_t to, const CUtensorMap& map, uint32_t barrier, int column, int row,
                                          uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What this thread wrote to shared memory with ordinary stores, TMA and the tensor cores may now read.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------- fragments

__device__ inline void load_fragment(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ inline void store_fragment(uint32_t address, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// ---------------------------------------------------------------------------------------------------- counters

__device__ inline int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline int add_acquire_release(int* address, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

// What this thread wrote, and what others wrote before they met it at a barrier, is seen by who acquires the new value.
__device__ inline void add_release(int* address, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline int or_acquire_release(int* address, int bits) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.or.b32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(bits) : "memory");
  return old;
}

}  // namespace lora_kernels::hopper
