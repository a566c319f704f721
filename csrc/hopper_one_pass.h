// The one-pass product on a chip of compute capability 9.0: products by wgmma, fed by TMA.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "problem.h"

namespace lora_kernels {

// A tile has 128 rows and block_n columns, 128 or 256; blocks work alone or, with cluster 2, in pairs.
struct HopperTiles {
  int block_n;
  int cluster;
};

// Whether the Hopper kernel can take a problem: 16-bit operands that TMA can address, adapters that count in the base's
// dtype, a rank of at most 32 for each 256 columns of the output. The caller sees to it that the chip is a 9.0.
bool hopper_one_pass_fits(const OnePass& problem);

// The tiles with the least predicted time on a chip of so many multiprocessors.
HopperTiles hopper_tiles(const OnePass& problem, int multiprocessors);

// Bytes of workspace, for any tiles; it must be aligned to 256.
size_t hopper_workspace_bytes(const OnePass& problem, int multiprocessors);

// How many counters a launch has, for any tiles. All are zero before it, and zero again after it.
size_t hopper_counter_count(const OnePass& problem);

// Computes out and S as problem.h says. The sizes must be positive, and the problem one that fits.
cudaError_t hopper_one_pass(const OnePass& problem, void* workspace, int* counters, cudaStream_t stream);
cudaError_t hopper_one_pass(const OnePass& problem, HopperTiles tiles, void* workspace, int* counters,
                            cudaStream_t stream);

}  // namespace lora_kernels
