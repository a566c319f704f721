// A launch that is checked.
#pragma once

#include "launches.h"

namespace lora_kernels {

// Above 48 KiB only on demand.
template <class Kernel>
void allow_shared(const char* name, Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  allow_shared(name, kernel, shared_bytes);
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

// For a kernel that a launch_overlapping comes after. How a multiprocessor divides its memory cannot change while a block
// runs, so it is divided as the next launch, which has most of it as shared memory, wants it.
template <class Kernel>
void leave_room(const char* name, Kernel kernel) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
}

// Begins as soon as the launch before lets it (let_next_launch_begin), from compute capability 9.0 on. The kernel calls
// wait_for_launch_before where it needs what that one writes. Compiled for less it does not wait, and may not begin early.
template <class... Parameters, class... Arguments>
void launch_overlapping(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  allow_shared(name, kernel, shared_bytes);
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, kernel), name);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early, config.numAttrs = compiled.ptxVersion >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace lora_kernels
