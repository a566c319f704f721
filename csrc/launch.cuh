// A launch that is checked.
#pragma once

#include <map>
#include <utility>

#include "launches.h"

namespace lora_kernels {

// What a thread has told a kernel on a device, and knows of it. To tell or to ask again takes as long as a launch does. What is
// told counts for the process, so every thread has to say the same.
struct KernelFacts {
  bool may_have_all_shared = false, leaves_room = false;
  int ptx_version = 0;
};

template <class Kernel>
KernelFacts& facts_of(Kernel kernel) {
  thread_local std::map<std::pair<const void*, int>, KernelFacts> facts;
  return facts[{reinterpret_cast<const void*>(kernel), current_device()}];
}

// Above 48 KiB only on demand: all that a block can have.
template <class Kernel>
void allow_shared(const char* name, Kernel kernel, size_t bytes) {
  KernelFacts& facts = facts_of(kernel);
  if (bytes <= 48 * 1024 || facts.may_have_all_shared) return;
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, kernel), name);
  const int all = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int>(compiled.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, all), name);
  facts.may_have_all_shared = true;
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
  if (facts_of(kernel).leaves_room) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
  facts_of(kernel).leaves_room = true;
}

// Begins as soon as the launch before lets it (let_next_launch_begin), from compute capability 9.0 on. The kernel calls
// wait_for_launch_before where it needs what that one writes. Compiled for less it does not wait, and may not begin early.
template <class... Parameters, class... Arguments>
void launch_overlapping(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  allow_shared(name, kernel, shared_bytes);
  int& ptx_version = facts_of(kernel).ptx_version;
  if (ptx_version == 0) {
    cudaFuncAttributes compiled{};
    check(cudaFuncGetAttributes(&compiled, kernel), name);
    ptx_version = compiled.ptxVersion;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early, config.numAttrs = ptx_version >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace lora_kernels
