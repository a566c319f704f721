// A launch that is checked.
#pragma once

#include "launches.h"

namespace lora_kernels {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  // Above 48 KiB only on demand.
  if (shared_bytes > 48 * 1024) {
    const auto which = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, which, static_cast<int>(shared_bytes)), name);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace lora_kernels
