// How a product with a packed NF4 weight is divided among blocks: nf4_stream.cuh says what the words mean.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace lora_kernels {

struct StreamPlan {
  int tiles;   // of W that a block has, kRows rows each
  int groups;  // of a block's warps: each has every groups-th slice of K for all tiles, a warp for one of them
  int parts;   // of K, which are other blocks'
  int slices;  // of a part, kSlice columns each
  int places;  // blocks of a part
};

// Every run of 64 codes must have one scale and start on 16 bytes, and K be a multiple of such runs.
bool nf4_stream_fits(const OnePass& problem, const Nf4& weight);
int64_t nf4_stream_workspace(const OnePass& problem);
int nf4_stream_counters(const OnePass& problem);
// S, and out while S is under way.
void nf4_stream(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream);

}  // namespace lora_kernels
