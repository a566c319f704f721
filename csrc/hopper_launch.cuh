// What the Hopper kernel is launched with, and which tile comes when.
#pragma once

#include <cuda.h>

#include "problem.h"

namespace lora_kernels::hopper {

constexpr int kBlockM = 128;
constexpr int kBlockK = 64;
constexpr int kHalfM = 64;        // the rows of one of the two warpgroups that multiply
constexpr int kRankChunk = 32;    // the columns of S that a share has
constexpr int kRankStep = 64;     // the ranks of one step of S U
constexpr int kMaxParts = 8;      // that a chunk of S is summed from
constexpr int kGroupRows = 8;     // row units that follow each other, and so share columns of W in L2
constexpr int kGroupThreads = 128;

// A unit is a cluster: one block, or two that take neighbouring row blocks and the same columns.
struct Launch {
  CUtensorMap x, weight, down, up;
  OnePass problem;
  int cluster;
  int units;
  int row_units, column_tiles, k_steps;
  int rank_chunks, parts, steps_per_part;
  int shares;    // of S in a row unit: rank_chunks * parts
  int sharers;   // units that compute all shares before their first tile; if 0, tiles do
  bool x_stays;  // in L2, while all row units' sharing tiles run

  // By half row blocks, what a warpgroup has to do with.
  uint4* fragments;  // [halves, 2 * rank_chunks, 128]: S as the first operand of a product, 16 ranks at a time
  float4* partials;  // [halves, rank_chunks, parts, 4, 128]: shares of S as a product leaves them
  int* counters;     // finished blocks; complete chunks in all; the same [halves]; parts that arrived, as bits

  __host__ __device__ int halves() const { return 2 * cluster * row_units; }
  __device__ int sharing_tiles() const { return sharers > 0 ? 0 : shares; }  // of a row unit
};

// A chunk of the rank, summed over a part of K.
struct Share {
  int row_unit, chunk, part;
  int begin, end;  // the part's steps
};

// The index-th of row_units * shares.
__device__ inline Share share_at(const Launch& p, int index) {
  const int within = index % p.shares, part = within / p.rank_chunks, begin = part * p.steps_per_part;
  return {index / p.shares, within % p.rank_chunks, part, begin, min(begin + p.steps_per_part, p.k_steps)};
}

struct Tile {
  int row_unit, column;
  int first_step;               // of K, from which it goes around
  int share_begin, share_end;  // the steps, counted from there, that are also steps of a share: of this part of this chunk
  int chunk, part;
};

// A unit's first tile; the next one is `units` further on. The first units are the sharers, which compute shares while
// the others have their first tile, and come behind: the tiles of any time follow each other.
__device__ inline int first_tile(const Launch& p, int unit) {
  return unit - p.sharers + (unit < p.sharers ? p.units : 0);
}

// The index-th tile. The sharing ones come first, then the others in groups of rows. A sharing tile starts with its
// share, so that S is known early; but where L2 does not hold X, all tiles of a row unit go through K in step, or each of
// them would read X from memory on its own, all at once.
__device__ inline Tile tile_at(const Launch& p, int index) {
  const int first_column = p.sharing_tiles(), sharing = p.row_units * first_column;
  if (index < sharing) {
    const Share share = share_at(p, index);
    const int first = p.x_stays ? share.begin : 0;
    return {share.row_unit, index % p.shares, first, share.begin - first, share.end - first, share.chunk, share.part};
  }
  const int columns = p.column_tiles - first_column;
  const int group = (index - sharing) / (kGroupRows * columns), within = (index - sharing) % (kGroupRows * columns);
  const int first_row = group * kGroupRows, rows = min(p.row_units - first_row, kGroupRows);
  return {first_row + within % rows, first_column + within / rows, 0, 0, 0, 0, 0};
}

}  // namespace lora_kernels::hopper
