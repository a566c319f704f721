// csrc/launch.cuh for a CPU.
#pragma once

#include "launches.h"
#include "ptx.cuh"

namespace lora_kernels {

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  emulation::require(shared_bytes <= sizeof(dynamic_memory));
  // A NaN, as a number of any dtype: what is read before it is written is seen.
  std::memset(dynamic_memory, 0xFF, sizeof(dynamic_memory));
  emulation::run(grid, threads, [&] { kernel(arguments...); });
}

template <class Kernel>
void leave_room(const char*, Kernel) {}

template <class... Parameters, class... Arguments>
void launch_overlapping(const char* name, void (*kernel)(Parameters...), const Arguments&... arguments) {
  launch(name, kernel, arguments...);
}

}  // namespace lora_kernels
