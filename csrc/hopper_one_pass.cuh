// The one-pass kernel for Hopper: out = X W + mask(S U) + bias and S = scale * mask(X) D from a single reading of X.
//
// A block has three warpgroups. One thread of the first keeps TMA loading a ring of stages; the other two multiply,
// each its 64 rows of a tile of 128, and go through the tiles on their own: they meet nowhere. The producer runs ahead into
// the next tile. S U is one more step of the same ring, with U in the place of W and S in registers. Two blocks of a
// cluster take the same columns, and each loads half of their W for both.
//
// How S gets from those that compute it to the tiles that need it
// ----------------------------------------------------------------
// As in the Triton kernel. A share of S is summed over one part of K (and one chunk of the rank), and written to a
// workspace. Whoever brings the last part of a chunk adds the parts in their fixed order, stores S and raises the flag
// of its 64 rows. Who has finished its main loop looks at the flag before it adds S U. Shares come first, so nobody
// waits long. Whose they are depends on how many tiles there are (plan, in hopper_one_pass.cu):
//
// * Where the last wave leaves enough units without a tile, these compute all shares before their first one
//   (hopper_sharers.cuh). They read X ahead of the others, for whom L2 then has it.
// * Elsewhere the first `shares` column tiles of each row unit have one each, in their main loops, and begin with it
//   where L2 holds X.
//
// Nobody waits for ever either, and no cluster depends on another one ever being given multiprocessors: a warpgroup
// that has looked kLooks times in vain computes every part that has not arrived, by the same products in the same
// order, so the bits are the same whoever does it, and hands it over in the usual way. Then all parts have arrived, and
// it waits for nothing but a warpgroup that adds them up, which is running and waits for nobody. The two blocks of a
// cluster do wait for each other, at every stage, but the hardware only starts them together. Nothing here needs a
// cooperative launch or a ticket.
//
// The last block to finish puts every counter back to zero, for the next launch on the stream or the next replay.
#pragma once

#include "hopper_ring.cuh"
#include "hopper_share.cuh"
#include "hopper_sharers.cuh"

namespace lora_kernels::hopper {

// Starts the products of a stage for X W.
template <class C>
__device__ inline void multiply_w(float (&acc)[C::kBlockN / 2], const Ring<C>& ring, const Group& group, bool first) {
  const uint64_t x = describe(ring.x() + group.index * (kHalfM * 128), 0, 1024, Swizzle::k128);
  const uint64_t w = C::describe_w(ring.w());
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Wgmma<typename C::T, C::kBlockN, C::kByRows>::ss(acc, x + 2 * i, w + C::kWAdvance * i, !first || i > 0);
  }
}

// Steps of X W alone. The products of the last one are still under way at the end; `before` is their stage.
template <class C>
__device__ inline void plain_steps(float (&acc)[C::kBlockN / 2], Ring<C>& ring, Ring<C>& before, const Launch& p,
                                   int begin, int end, const Group& group) {
  for (int step = begin; step < end; ++step) {
    barrier_wait(ring.full(), ring.phase, "full, of X and W");
    wgmma_fence();
    multiply_w(acc, ring, group, step == 0);
    wgmma_commit();
    // The products of the stage before this one are done, those of this one go on.
    wgmma_wait<1>();
    if (step > begin) before.release(p.cluster, group.lane());
    before = ring;
    ring.next();
  }
}

// The steps of a tile that are also steps of its share, and the share's handing over. `before` is the stage of the step
// before them, if there is one.
template <class C>
__device__ inline void share_steps(float (&acc)[C::kBlockN / 2], Ring<C>& ring, Ring<C>& before, const Launch& p,
                                   const Tile& tile, int half, const Group& group) {
  float share[16];
  for (int step = tile.share_begin; step < tile.share_end; ++step) {
    barrier_wait(ring.full(), ring.phase, "full, of a share");
    wgmma_fence();
    multiply_w(acc, ring, group, step == 0);
    // A masked share's fragments are made while the products of X W go on.
    if constexpr (C::kMaskX) wgmma_commit();
    multiply_d<C>(share, ring.x(), ring.d(), p, half * kHalfM, (tile.first_step + step) * kBlockK,
                  step == tile.share_begin, group);
    wgmma_commit();
    if constexpr (C::kMaskX) {
      // The fragments' registers are written again in the next step.
      wgmma_wait<0>();
      keep_in_place(share);
    } else {
      wgmma_wait<1>();
    }
    if (step > 0) before.release(p.cluster, group.lane());
    before = ring;
    ring.next();
  }
  wgmma_wait<0>();
  keep_in_place(share);
  before.release(p.cluster, group.lane());
  keep_in_place(acc);
  publish_share<typename C::T>(p, share, half, tile.chunk, tile.part, group);
}

// The first operand of the products of one step of S U.
__device__ inline void load_s(uint32_t (&s)[4][4], const Launch& p, int half, int rank0, const Group& group) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int rank = rank0 + 16 * i;
    uint4 fragment = make_uint4(0, 0, 0, 0);
    // Other multiprocessors wrote it: L1 may not be asked.
    if (rank < p.problem.R) fragment = __ldcg(fragment_of(p, half, rank / 16) + group.thread);
    s[i][0] = fragment.x;
    s[i][1] = fragment.y;
    s[i][2] = fragment.z;
    s[i][3] = fragment.w;
  }
}

// acc + mask(S U) for one step over the rank, of which the first SIXTEENS times 16 count.
template <class C, int SIXTEENS>
__device__ inline void add_up(float (&acc)[C::kBlockN / 2], const Ring<C>& ring, const uint32_t (&s)[4][4],
                              const Launch& p, int row0, int column0, const Group& group) {
  if constexpr (C::kMaskOut) {
    const uint64_t seed = static_cast<uint64_t>(*p.problem.dropout.seed);
    const int32_t threshold = p.problem.dropout.threshold;
#pragma unroll
    for (int block = 0; block < C::kBlockN / 64; ++block) {
      float part[32];
      const uint64_t u = C::describe_w(ring.w() + block * (64 * 128));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < SIXTEENS; ++i) {
        Wgmma<typename C::T, 64, C::kByRows>::rs(part, s[i], u + C::kWAdvance * i, i > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      keep_in_place(part);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t words[4];
        // Out of the compiler's sight, or it computes all masks of the tile ahead and has no registers left for them.
        int row = row0 + group.row();
        asm volatile("" : "+r"(row)::"memory");
        mask_words(words, seed, row, column0 + block * 64 + pair * 16, group.lane());
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (keeps(words[i / 2], i % 2, threshold)) acc[block * 32 + pair * 8 + i] += part[pair * 8 + i];
        }
      }
      keep_in_place(acc);
    }
  } else {
    const uint64_t u = C::describe_w(ring.w());
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < SIXTEENS; ++i) {
      Wgmma<typename C::T, C::kBlockN, C::kByRows>::rs(acc, s[i], u + C::kWAdvance * i, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_place(acc);
  }
}

// One step of S U from the ring.
template <class C>
__device__ inline void add_step(float (&acc)[C::kBlockN / 2], Ring<C>& ring, uint32_t (&s)[4][4], const Launch& p,
                                int half, int rank0, int column0, const Group& group) {
  barrier_wait(ring.full(), ring.phase, "full, of U");
  keep_in_place(s);
  if (p.problem.R - rank0 <= 16) {
    add_up<C, 1>(acc, ring, s, p, half * kHalfM, column0, group);
  } else {
    add_up<C, kRankStep / 16>(acc, ring, s, p, half * kHalfM, column0, group);
  }
  ring.release(p.cluster, group.lane());
  ring.next();
}

template <class C>
__device__ inline void add_bias(float (&acc)[C::kBlockN / 2], const OnePass& problem, int column0, int lane) {
#pragma unroll
  for (int eight = 0; eight < C::kBlockN / 8; ++eight) {
    const int column = column0 + eight * 8 + lane % 4 * 2;
    if (column >= problem.N) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float bias = load_number(problem.bias, problem.bias_dtype, column + i);
      acc[eight * 4 + i] += bias;
      acc[eight * 4 + 2 + i] += bias;
    }
  }
}

// Adds the bias, rounds, and writes the group's part of the tile: 16 rows of 64 columns at a time, through shared memory
// of the warp's own, so that whole lines are written. Stores of the warp wait for nothing; TMA's would, for the one before
// to have read that memory.
template <class C>
__device__ inline void store_tile(float (&acc)[C::kBlockN / 2], const Launch& p, int row0, int column0,
                                  const Group& group) {
  using T = typename C::T;
  const OnePass& problem = p.problem;
  // Out of the compiler's sight, or it computes all addresses before the first tile and has no registers left for them.
  int lane = group.lane();
  asm volatile("" : "+r"(lane));
  const int warp = group.warp();
  if (problem.bias != nullptr) add_bias<C>(acc, problem, column0, lane);
  const int row = lane % 8 + lane / 8 % 2 * 8;
  const uint32_t staging = group.staging + warp * C::kStagingBytes;
  T* out = static_cast<T*>(problem.out);
#pragma unroll
  for (int block = 0; block < C::kBlockN / 64; ++block) {
    const int column = column0 + block * 64 + lane % 8 * 8;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float* from = acc + block * 32 + pair * 8;
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = pack<T>(from[2 * i], from[2 * i + 1]);
      store_fragment(staging + row * 128 + ((2 * pair + lane / 16) ^ (row % 8)) * 16, fragment);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int within = i * 4 + lane / 8;
      const int64_t m = row0 + warp * 16 + within;
      const uint4 eight = load_shared(staging + within * 128 + ((lane % 8) ^ (within % 8)) * 16);
      if (m < problem.M && column < problem.N) *reinterpret_cast<uint4*>(out + m * problem.N + column) = eight;
    }
    __syncwarp();
  }
}

template <class C>
__device__ inline void multiply(const Launch& p, Ring<C> ring, int unit, int rank, const Group& group) {
  bool all_stored = false;
  const int tiles = p.row_units * p.column_tiles;
  for (int index = first_tile(p, unit); index < tiles; index += p.units) {
    const Tile tile = tile_at(p, index);
    // Zeroed although the first product does not add: else the compiler sees sums carried from tile to tile, and where
    // other instructions change them, as a masked S U does, it puts all products one after the other.
    float acc[C::kBlockN / 2] = {};
    keep_in_place(acc);
    const int half = 2 * (tile.row_unit * p.cluster + rank) + group.index;
    const int row0 = half * kHalfM, column0 = tile.column * C::kBlockN;
    Ring<C> before = ring;
    if (tile.share_end > 0) {
      plain_steps(acc, ring, before, p, 0, tile.share_begin, group);
      share_steps(acc, ring, before, p, tile, half, group);
    }
    // Before the main loop, where S is known to be there: its products then follow those of the last stage at once.
    uint32_t s[4][4];
    if (all_stored) load_s(s, p, half, 0, group);
    plain_steps(acc, ring, before, p, tile.share_end, p.k_steps, group);
    int rank0 = 0;
    if (!C::kMaskOut && all_stored) {
      add_step<C>(acc, ring, s, p, half, rank0, column0, group);
      rank0 += kRankStep;
      if (p.k_steps > tile.share_end) before.release(p.cluster, group.lane());
    } else {
      wgmma_wait<0>();
      keep_in_place(acc);
      if (p.k_steps > tile.share_end) before.release(p.cluster, group.lane());
      if (!all_stored) {
        all_stored = wait_for_s<typename C::T, C::kMaskX>(p, half, group);
        load_s(s, p, half, 0, group);
      }
    }
    for (; rank0 < p.problem.R; rank0 += kRankStep) {
      if (rank0 > 0) load_s(s, p, half, rank0, group);
      add_step<C>(acc, ring, s, p, half, rank0, column0, group);
    }
    store_tile<C>(acc, p, row0, column0, group);
  }
}

// The last block to finish leaves the counters as it found them.
__device__ inline void finish(const Launch& p, int thread) {
  constexpr int kBarrier = 3;  // after the groups' own
  named_barrier(kBarrier, kMultipliers);
  if (thread >= 32) return;
  int before = 0;
  if (thread == 0) before = add_acquire_release(p.counters, 1);
  if (__shfl_sync(0xFFFFFFFFu, before, 0) != static_cast<int>(gridDim.x) - 1) return;
  const int used = 2 + p.halves() * (1 + p.rank_chunks);
  for (int i = thread; i < used; i += 32) p.counters[i] = 0;
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) one_pass_kernel(const __grid_constant__ Launch p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = shared_address(shared);
  const uint32_t base = (unaligned + 1023) / 1024 * 1024;
  const int rank = static_cast<int>(cluster_rank()), unit = static_cast<int>(blockIdx.x) / p.cluster;
  Ring<C> ring{base};
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i, ring.next()) {
      barrier_init(ring.full(), 1);
      barrier_init(ring.empty(), p.cluster * (kMultipliers / 32));
    }
    ring = Ring<C>{base};
    fence_barrier_init();
  }
  __syncwarp();
  cluster_sync();
  // Shuffled, so that the compiler sees warps that do not part.
  const int role = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (role == 0) {
    give_up_registers<40>();
    if (threadIdx.x == 0) {
      prefetch_map(p.x);
      prefetch_map(p.weight);
      prefetch_map(p.down);
      prefetch_map(p.up);
      if constexpr (!C::kMaskX) load_shares(p, ring, unit, rank);
      load_tiles(p, ring, unit, rank);
    }
    __syncwarp();
  } else {
    take_registers<232>();
    const int thread = static_cast<int>(threadIdx.x) - kGroupThreads, index = role - 1;
    const Group group{index, thread % kGroupThreads, base + C::kStagingOffset + index * 4 * C::kStagingBytes,
                      reinterpret_cast<int*>(shared + (base - unaligned) + C::kSlotOffset) + index};
    // A mask on X leaves all shares to the tiles.
    if constexpr (!C::kMaskX) compute_shares(p, ring, unit, rank, group);
    multiply(p, ring, unit, rank, group);
    finish(p, thread);
    __syncwarp();
  }
  // No block may end while another one of its cluster can still write to its shared memory.
  cluster_sync();
#else
  __trap();  // built for another chip as well, on which hopper_one_pass is not called
#endif
}

}  // namespace lora_kernels::hopper
