// S U on the tensor cores: one more step of a warp's loop over K, with rows of U in the place of rows of W.
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace lora_kernels {
namespace nf4_stream_tile {

// Ranks that a product takes, eight for each of the four lanes of a row.
constexpr int kRanks = 32;

// Eight numbers as the products have them: rounded to Part and, where they are split, what that leaves.
template <class Part, bool kSplit>
struct Factor {
  Eight<Part> high, low;

  template <class From>
  __device__ explicit Factor(const Eight<From>& from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      high.value[i] = from_float<Part>(to_float(from.value[i]));
      if constexpr (kSplit) low.value[i] = low_part(to_float(from.value[i]));
    }
  }
};

// For the 16 columns of out from `row` on, and the tokens token_of. The first ranks of U are asked for before S is waited
// for. float32 on both sides is split into two numbers of bf16, of whose products that of both low ones is left out.
// `vectors` promises that rows of S and columns of U are whole groups of eight that start on 16 bytes.
template <class T, class S, class U, int kTokenTiles>
__device__ inline void add_branch(float (&acc)[kTokenTiles][4], const OnePass& p, int64_t row, bool vectors,
                                  const int (&token_of)[kTokenTiles], int lane) {
  // S is written by the launch before, which is under way when this one begins.
  constexpr bool kSplit = std::is_same_v<S, float>, kPastL1 = true;
  using Part = std::conditional_t<kSplit, bf16, T>;
  const int64_t n = row + lane / 4;
  const U* columns[2] = {static_cast<const U*>(p.up.data) + n * p.up.column_stride, nullptr};
  columns[1] = columns[0] + 8 * p.up.column_stride;
  Eight<U> next[2];
  const auto load_next = [&](int64_t r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next[i] = load_eight(columns[i] + r * p.up.row_stride, p.up.row_stride, n + 8 * i < p.N ? p.R - r : 0, vectors);
    }
  };
  load_next(lane % 4 * 8);
  wait_for_launch_before();
  for (int64_t r = lane % 4 * 8; r - lane % 4 * 8 < p.R; r += kRanks) {
    const Factor<Part, kSplit> upper(next[0]), lower(next[1]);
    load_next(r + kRanks);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const S* s = static_cast<const S*>(p.s) + token_of[j] * p.R + r;
      const Factor<Part, kSplit> token(load_eight<kPastL1>(s, 1, p.R - r, vectors));
      if constexpr (kSplit) {
        multiply_eights(acc[j], upper.low, lower.low, token.high);
        multiply_eights(acc[j], upper.high, lower.high, token.low);
      }
      multiply_eights(acc[j], upper.high, lower.high, token.high);
    }
  }
}

}  // namespace nf4_stream_tile
}  // namespace lora_kernels
