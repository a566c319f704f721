// Products of 16 x 8 x 16 on the tensor cores: where their operands lie in shared memory, and what a lane holds.
//
// Fragments are named by the matrix they are of: A [16, 16] (row, depth), B [16, 16] as two halves of 8 columns
// (depth, column), C [16, 8]. A lane of a warp holds of C the rows lane / 4 and lane / 4 + 8, and in each the columns
// 2 * (lane % 4) and the one after it.
#pragma once

#include "ptx.cuh"

namespace lora_kernels {

// A from a tile stored [row, depth] with `stride` elements a row, and from one stored [depth, row].
template <class T>
__device__ inline void load_a(uint32_t (&a)[4], const T* tile, int stride, int row0, int depth0, int lane) {
  load_matrices(a, tile + (row0 + lane % 16) * stride + depth0 + lane / 16 * 8);
}

template <class T>
__device__ inline void load_a_transposed(uint32_t (&a)[4], const T* tile, int stride, int row0, int depth0, int lane) {
  load_matrices_transposed(a, tile + (depth0 + lane / 16 * 8 + lane % 8) * stride + row0 + lane / 8 % 2 * 8);
}

// B, 16 columns of it, from a tile stored [column, depth], and from one stored [depth, column].
template <class T>
__device__ inline void load_b(uint32_t (&b)[4], const T* tile, int stride, int column0, int depth0, int lane) {
  load_matrices(b, tile + (column0 + lane / 16 * 8 + lane % 8) * stride + depth0 + lane / 8 % 2 * 8);
}

template <class T>
__device__ inline void load_b_transposed(uint32_t (&b)[4], const T* tile, int stride, int column0, int depth0,
                                         int lane) {
  load_matrices_transposed(b, tile + (depth0 + lane % 16) * stride + column0 + lane / 16 * 8);
}

// acc += A B straight from memory: of two rows of A, eight apart, and of a column of B the same eight neighbours along
// the depth, of which the four lanes of a row have 32. Their order within a product is free.
template <class T>
__device__ inline void multiply_eights(float (&acc)[4], const Eight<T>& upper, const Eight<T>& lower,
                                       const Eight<T>& column) {
  const uint32_t *first = reinterpret_cast<const uint32_t*>(&upper), *second = reinterpret_cast<const uint32_t*>(&lower);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t a[4] = {first[i], second[i], first[i + 1], second[i + 1]};
    multiply(acc, a, reinterpret_cast<const uint32_t*>(&column) + i, T());
  }
}

// The mask of two neighbouring fragments of C: words[i][j] decides the pair of columns that this lane has in row
// lane / 4 + 8 * j of fragment i. The four lanes of a row call Philox once each, and exchange what they got.
__device__ inline void fragment_words(uint32_t (&words)[2][2], int64_t seed, int64_t row0, int64_t column0, int lane) {
  const int mine = lane % 4;
  const Lanes lanes = philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(column0 / 8 + mine / 2),
                             static_cast<uint32_t>(row0 + lane / 4 + mine % 2 * 8));
  auto pick = [](const uint32_t (&from)[4], int i) {
    const uint32_t low = i & 1 ? from[1] : from[0], high = i & 1 ? from[3] : from[2];
    return i & 2 ? high : low;
  };
  // After step s a lane has the word that its neighbour lane ^ s made for it.
  uint32_t received[4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    received[step] = __shfl_xor_sync(0xFFFFFFFFu, pick(lanes.word, mine ^ step), step);
  }
#pragma unroll
  for (int from = 0; from < 4; ++from) words[from / 2][from % 2] = pick(received, from ^ mine);
}

}  // namespace lora_kernels
