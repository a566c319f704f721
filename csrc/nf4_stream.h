// How a product with a packed NF4 weight is divided among blocks: nf4_stream.cuh says what the words mean.
#pragma once

#include "problem.h"

namespace lora_kernels {

struct StreamPlan {
  int warps;   // of a block
  int groups;  // of K: warps * kSlice columns each
  int chunks;  // of the tokens
  int tiles;   // of the rows of W: kRows each
  int blocks;  // that share the tiles of a group and a chunk
};

// Every run of 64 codes must have one scale and start on 16 bytes, and K be a multiple of such runs.
bool nf4_stream_fits(const OnePass& problem, const Nf4& weight);
int64_t nf4_stream_workspace(const OnePass& problem);
int nf4_stream_counters(const OnePass& problem);
void nf4_stream(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream);

}  // namespace lora_kernels
