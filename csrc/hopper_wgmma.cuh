// wgmma: products of a warpgroup, 64 rows by N columns by 16 of K, summed in float32 registers.
#pragma once

#include "numbers.cuh"

namespace lora_kernels::hopper {

enum class Swizzle : uint64_t { k128 = 1, k64 = 2 };

// Describes an operand in shared memory. Where its K is contiguous, `stride` is the bytes between groups of eight rows.
// Where its rows (columns, of B) are, `stride` is the bytes between groups of eight of K, and `leading` those between
// blocks as wide as the swizzle. Bytes added to the address, over 16, may be added to the descriptor.
__device__ inline uint64_t describe(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return (uint64_t{address} & 0x3FFFF) >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

// Before the first product, and wherever other instructions have written registers that a product uses.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `PENDING` groups of products are under way.
template <int PENDING>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what reads or writes the registers of products across this place: it knows nothing of
// waits, and what is written between a fence and its products makes it put them one after the other.
template <int COUNT>
__device__ inline void keep_in_place(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int COUNT>
__device__ inline void keep_in_place(uint32_t (&registers)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < 4 * COUNT; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

// accumulators (+)= A B, where `add` is not 0 (else =). A comes from shared memory (ss) or from registers (rs);
// B_TRANSPOSED: its columns are contiguous, not K.
template <typename T, int N, bool B_TRANSPOSED>
struct Wgmma;

#define LORA_KERNELS_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LORA_KERNELS_F16(d, i) \
  LORA_KERNELS_F4(d, i), LORA_KERNELS_F4(d, i + 4), LORA_KERNELS_F4(d, i + 8), LORA_KERNELS_F4(d, i + 12)
#define LORA_KERNELS_F32(d, i) LORA_KERNELS_F16(d, i), LORA_KERNELS_F16(d, i + 16)
#define LORA_KERNELS_F64(d, i) LORA_KERNELS_F32(d, i), LORA_KERNELS_F32(d, i + 32)
#define LORA_KERNELS_F128(d, i) LORA_KERNELS_F64(d, i), LORA_KERNELS_F64(d, i + 64)

#define LORA_KERNELS_D16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LORA_KERNELS_D32 LORA_KERNELS_D16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LORA_KERNELS_D64 LORA_KERNELS_D32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LORA_KERNELS_D128 LORA_KERNELS_D64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// COUNT accumulators are operands 0 to COUNT - 1; O0 to O6 number what comes after them.
#define LORA_KERNELS_WGMMA(T, NAME, N, COUNT, O0, O1, O2, O3, O4, O5, O6) \
  template <bool B_TRANSPOSED> \
  struct Wgmma<T, N, B_TRANSPOSED> { \
    __device__ static void ss(float (&d)[COUNT], uint64_t a, uint64_t b, int add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O2 ", 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LORA_KERNELS_D##COUNT "}, " \
                   O0 ", " O1 ", p, 1, 1, 0, " O3 ";\n}\n" \
                   : LORA_KERNELS_F##COUNT(d, 0) \
                   : "l"(a), "l"(b), "r"(add), "n"(int(B_TRANSPOSED))); \
    } \
    __device__ static void rs(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, int add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " O5 ", 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LORA_KERNELS_D##COUNT "}, {" \
                   O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", p, 1, 1, " O6 ";\n}\n" \
                   : LORA_KERNELS_F##COUNT(d, 0) \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(B_TRANSPOSED))); \
    } \
  };
#define LORA_KERNELS_WGMMAS(T, NAME) \
  LORA_KERNELS_WGMMA(T, NAME, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22") \
  LORA_KERNELS_WGMMA(T, NAME, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38") \
  LORA_KERNELS_WGMMA(T, NAME, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
  LORA_KERNELS_WGMMA(T, NAME, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

LORA_KERNELS_WGMMAS(bf16, "bf16")
LORA_KERNELS_WGMMAS(half, "f16")

#undef LORA_KERNELS_WGMMAS
#undef LORA_KERNELS_WGMMA
#undef LORA_KERNELS_D128
#undef LORA_KERNELS_D64
#undef LORA_KERNELS_D32
#undef LORA_KERNELS_D16
#undef LORA_KERNELS_F128
#undef LORA_KERNELS_F64
#undef LORA_KERNELS_F32
#undef LORA_KERNELS_F16
#undef LORA_KERNELS_F4

}  // namespace lora_kernels::hopper
