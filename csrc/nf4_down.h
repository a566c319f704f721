// S beside a product with a packed NF4 weight, which is launched after it and overlaps it.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace lora_kernels {

// Where float32 arithmetic or many tokens ask for it, it is adapter_down's, which leaves less room beside itself. The
// blocks are those that a product finds on its multiprocessors.
int nf4_down_blocks(const OnePass& problem);
int nf4_down_counters(const OnePass& problem);
int64_t nf4_down_workspace(const OnePass& problem);
void nf4_down(const OnePass& problem, float* workspace, int* counters, cudaStream_t stream);

}  // namespace lora_kernels
