// How S gets from those that compute it to all tiles of the row block.
#pragma once

#include "hopper_launch.cuh"
#include "hopper_ptx.cuh"
#include "hopper_wgmma.cuh"
#include "numbers.cuh"

namespace lora_kernels::hopper {

// A warpgroup that multiplies, and the shared memory that is its own.
struct Group {
  int index;         // 0 or 1
  int thread;        // 0 to 127
  uint32_t staging;  // 8 KiB, aligned to 1024
  int* slot;

  __device__ int warp() const { return thread / 32; }
  __device__ int lane() const { return thread % 32; }
  __device__ int row() const { return warp() * 16 + lane() / 4; }  // of a fragment; the other one is 8 below
  __device__ void meet() const { named_barrier(1 + index, kGroupThreads); }

  // What the group's first thread says, for all of them. The shuffle shows the compiler that the threads of a warp
  // agree: it serializes products on a path on which they might not.
  __device__ int tell_all(int value) const {
    if (thread == 0) *slot = value;
    meet();
    const int told = *static_cast<volatile int*>(slot);
    meet();
    return __shfl_sync(0xFFFFFFFFu, told, 0);
  }
};

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// The words of the mask for 16 rows by two groups of eight columns, as fragments lie: [0] and [1] for the pair of
// columns that this lane has of the first group, in its upper and its lower row; [2] and [3] of the second group.
__device__ inline void mask_words(uint32_t (&words)[4], uint64_t seed, int row, int column, int lane) {
  const int within = lane % 4;
  // A call gives the words of four lanes: each makes one of the four calls, then they exchange.
  const Lanes mine = philox(seed, static_cast<uint32_t>(column / 8 + within / 2),
                            static_cast<uint32_t>(row + 8 * (within % 2)));
  const bool odd = within & 1, upper = within & 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = mine.word[i];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? other : words[i];
    words[i + 1] = odd ? words[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? other : words[i];
    words[i + 2] = upper ? words[i + 2] : other;
  }
}

// Zeroes what the mask drops of a fragment of X: 16 rows by 16 columns from `column` on.
__device__ inline void mask_fragment(uint32_t (&fragment)[4], const Dropout& dropout, uint64_t seed, int row,
                                     int column, int lane) {
  uint32_t words[4];
  mask_words(words, seed, row, column, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    fragment[i] &= (keeps(words[i], 0, dropout.threshold) ? 0x0000FFFFu : 0u) |
                   (keeps(words[i], 1, dropout.threshold) ? 0xFFFF0000u : 0u);
  }
}

__device__ inline int* total_count(const Launch& p) { return p.counters + 1; }
__device__ inline int* ready_count(const Launch& p, int half) { return p.counters + 2 + half; }
__device__ inline int* arrived_bits(const Launch& p, int half, int chunk) {
  return p.counters + 2 + p.halves() + half * p.rank_chunks + chunk;
}

__device__ inline float4* partial_of(const Launch& p, int half, int chunk, int part) {
  return p.partials + ((static_cast<int64_t>(half) * p.rank_chunks + chunk) * p.parts + part) * (4 * kGroupThreads);
}

__device__ inline uint4* fragment_of(const Launch& p, int half, int sixteen) {
  return p.fragments + (static_cast<int64_t>(half) * 2 * p.rank_chunks + sixteen) * kGroupThreads;
}

// Adds the parts of a chunk in their order, and stores S twice: as a matrix, and as fragments for S U.
template <class T>
__device__ inline void finish_chunk(const Launch& p, int half, int chunk, const Group& group) {
  float sum[16] = {};
  for (int part = 0; part < p.parts; ++part) {
    const float4* share = partial_of(p, half, chunk, part) + group.thread;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = __ldcg(share + i * kGroupThreads);
      sum[4 * i] += four.x;
      sum[4 * i + 1] += four.y;
      sum[4 * i + 2] += four.z;
      sum[4 * i + 3] += four.w;
    }
  }
  const float scale = p.problem.scale_tensor == nullptr ? p.problem.scale : *p.problem.scale_tensor;
  T* s = static_cast<T*>(p.problem.s);
  const int64_t row0 = static_cast<int64_t>(half) * kHalfM + group.row();
  const int column0 = chunk * kRankChunk + group.lane() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sum[i] *= scale;
    const int64_t row = row0 + i / 2 % 2 * 8;
    const int column = column0 + i / 4 * 8 + i % 2;
    if (row < p.problem.M && column < p.problem.R) s[row * p.problem.R + column] = from_float<T>(sum[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* from = sum + 8 * i;
    const uint4 fragment = make_uint4(pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]),
                                      pack<T>(from[6], from[7]));
    __stcg(fragment_of(p, half, 2 * chunk + i) + group.thread, fragment);
  }
}

// Hands a share over. With the last part of a chunk, that chunk of S is complete and stored. A part may come twice,
// with the same bits: only what makes the parts complete finishes the chunk.
template <class T>
__device__ inline void publish_share(const Launch& p, const float (&share)[16], int half, int chunk, int part,
                                     const Group& group) {
  float4* to = partial_of(p, half, chunk, part) + group.thread;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __stcg(to + i * kGroupThreads, make_float4(share[4 * i], share[4 * i + 1], share[4 * i + 2], share[4 * i + 3]));
  }
  group.meet();
  bool last = false;
  if (group.thread == 0) {
    const int all = (1 << p.parts) - 1;
    const int before = or_acquire_release(arrived_bits(p, half, chunk), 1 << part);
    last = before != all && (before | 1 << part) == all;
  }
  if (group.tell_all(last)) {
    finish_chunk<T>(p, half, chunk, group);
    group.meet();
    if (group.thread == 0) {
      add_release(ready_count(p, half), 1);
      add_release(total_count(p), 1);
    }
  }
}

// Starts the products of a step of a share, whose X and D lie at these places. A masked X goes through registers.
template <class C>
__device__ inline void multiply_d(float (&share)[16], uint32_t x_tile, uint32_t d_tile, const Launch& p, int row0,
                                  int k0, bool first, const Group& group) {
  using Product = Wgmma<typename C::T, kRankChunk, C::kByRows>;
  const uint64_t d = C::describe_d(d_tile);
  if constexpr (C::kMaskX) {
    const uint64_t seed = static_cast<uint64_t>(*p.problem.dropout.seed);
    const int lane = group.lane();
    // The lane's row of the four matrices that ldmatrix loads: above and below, left and right.
    const int row = lane % 8 + lane / 8 % 2 * 8;
    const uint32_t x = x_tile + (group.index * kHalfM + group.warp() * 16 + row) * 128;
    uint32_t fragment[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_fragment(fragment[i], x + ((2 * i + lane / 16) ^ (row % 8)) * 16);
      mask_fragment(fragment[i], p.problem.dropout, seed, row0 + group.row(), k0 + 16 * i, lane);
    }
    keep_in_place(fragment);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) Product::rs(share, fragment[i], d + C::kDAdvance * i, !first || i > 0);
  } else {
    const uint64_t x = describe(x_tile + group.index * (kHalfM * 128), 0, 1024, Swizzle::k128);
#pragma unroll
    for (int i = 0; i < 4; ++i) Product::ss(share, x + 2 * i, d + C::kDAdvance * i, !first || i > 0);
  }
}

// A share, for whoever has waited for it in vain: the same products in the same order, so the same bits.
template <class T, bool MASK_X>
__device__ inline void compute_share(const Launch& p, float (&share)[16], int half, int chunk, int part,
                                     const Group& group) {
  const OnePass& problem = p.problem;
  const Matrix& down = problem.down;
  const T* x = static_cast<const T*>(problem.x.data);
  const int64_t row0 = static_cast<int64_t>(half) * kHalfM + group.row();
  const int first = part * p.steps_per_part, last = min(first + p.steps_per_part, p.k_steps);
  const uint64_t seed = MASK_X ? static_cast<uint64_t>(*problem.dropout.seed) : 0;
  const uint64_t down_tile = describe(group.staging, 0, 1024, Swizzle::k128);
  for (int step = first; step < last; ++step) {
    const int64_t k0 = static_cast<int64_t>(step) * kBlockK;
    for (int i = group.thread; i < kRankChunk * kBlockK; i += kGroupThreads) {
      const int k = i % kBlockK, r = i / kBlockK;
      const int64_t rank = static_cast<int64_t>(chunk) * kRankChunk + r;
      const int64_t place = (k0 + k) * down.row_stride + rank * down.column_stride;
      const bool inside = k0 + k < problem.K && rank < problem.R;
      const T number = from_float<T>(inside ? load_number(down.data, down.dtype, place) : 0.0f);
      uint16_t bits;
      memcpy(&bits, &number, sizeof(bits));
      const uint32_t to = group.staging + r * 128 + (k / 8 ^ r % 8) * 16 + k % 8 * 2;
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(bits) : "memory");
    }
    uint32_t fragment[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t row = row0 + j % 2 * 8, k = k0 + 16 * i + j / 2 * 8 + group.lane() % 4 * 2;
        const bool inside = row < problem.M;
        const T* pair = x + row * problem.x.row_stride + k;
        fragment[i][j] = pack<T>(inside && k < problem.K ? to_float(pair[0]) : 0.0f,
                                 inside && k + 1 < problem.K ? to_float(pair[1]) : 0.0f);
      }
      if constexpr (MASK_X) {
        mask_fragment(fragment[i], problem.dropout, seed, static_cast<int>(row0), static_cast<int>(k0) + 16 * i,
                      group.lane());
      }
    }
    fence_async_proxy();
    group.meet();
    keep_in_place(fragment);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Wgmma<T, kRankChunk, false>::rs(share, fragment[i], down_tile + 2 * i, step > first || i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_place(share);
    group.meet();
  }
}

// Looks that a warpgroup has at a flag before it does the work of those it waits for.
constexpr int kLooks = 300;

// Returns when S of the half row block is stored: whether it then is of all of them.
template <class T, bool MASK_X>
__device__ inline bool wait_for_s(const Launch& p, int half, const Group& group) {
  bool ready = false, all = false;
  if (group.thread == 0) {
    for (int look = 0; look < kLooks && !ready; ++look) ready = load_acquire(ready_count(p, half)) == p.rank_chunks;
    all = load_acquire(total_count(p)) == p.halves() * p.rank_chunks;
  }
  const int told = group.tell_all(ready + 2 * all);
  if (!(told & 1)) {
    for (int chunk = 0; chunk < p.rank_chunks; ++chunk) {
      for (int part = 0; part < p.parts; ++part) {
        const bool missing = group.thread == 0 && !(load_acquire(arrived_bits(p, half, chunk)) >> part & 1);
        if (!group.tell_all(missing)) continue;
        float share[16];
        compute_share<T, MASK_X>(p, share, half, chunk, part, group);
        publish_share<T>(p, share, half, chunk, part, group);
      }
    }
    // All parts have arrived: whoever finishes a chunk is running, and waits for nobody.
    if (group.thread == 0) {
      Patience patience;
      while (load_acquire(ready_count(p, half)) != p.rank_chunks) {
        if (patience.ends("S", half, load_acquire(ready_count(p, half)))) break;
      }
    }
    group.meet();
  }
  return told & 2;
}

}  // namespace lora_kernels::hopper
