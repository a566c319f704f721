// Shares of S by the units that have a tile less than the others, both sides of the ring: what is loaded, and what is
// computed from it, stage by stage.
//
// They come before the unit's first tile, in the order of the row units. A stage holds X and D for as many steps of K as
// fit, since they wait for X alone: the more of it is under way, the better. The blocks of a cluster have the same shares
// of different rows, and so the same stages; each loads its own D, and frees a stage for both, as everywhere.
#pragma once

#include "hopper_ring.cuh"
#include "hopper_share.cuh"

namespace lora_kernels::hopper {

// The first share of a unit; the next one is `sharers` further on.
__device__ inline int first_share(const Launch& p, int unit) {
  return unit < p.sharers ? unit : p.row_units * p.shares;
}

template <class C>
__device__ inline void load_shares(const Launch& p, Ring<C>& ring, int unit, int rank) {
  for (int index = first_share(p, unit); index < p.row_units * p.shares; index += p.sharers) {
    const Share share = share_at(p, index);
    const int row0 = (share.row_unit * p.cluster + rank) * kBlockM;
    for (int step = share.begin; step < share.end; step += C::kShareSteps) {
      const int steps = min(C::kShareSteps, share.end - step);
      barrier_wait(ring.empty(), ring.phase ^ 1, "empty, for shares");
      barrier_expect(ring.full(), steps * C::kShareBytes);
      for (int i = 0; i < steps; ++i) {
        const int k0 = (step + i) * kBlockK;
        tma_load(ring.share_x(i), p.x, ring.full(), k0, row0);
        load_d(ring, p.down, ring.share_d(i), k0, share.chunk);
      }
      ring.next();
    }
  }
}

template <class C>
__device__ inline void compute_shares(const Launch& p, Ring<C>& ring, int unit, int rank, const Group& group) {
  for (int index = first_share(p, unit); index < p.row_units * p.shares; index += p.sharers) {
    const Share share = share_at(p, index);
    const int half = 2 * (share.row_unit * p.cluster + rank) + group.index;
    float sum[16];
    for (int step = share.begin; step < share.end; step += C::kShareSteps) {
      const int steps = min(C::kShareSteps, share.end - step);
      barrier_wait(ring.full(), ring.phase, "full, of shares");
#pragma unroll 1
      for (int i = 0; i < steps; ++i) {
        wgmma_fence();
        multiply_d<C>(sum, ring.share_x(i), ring.share_d(i), p, half * kHalfM, (step + i) * kBlockK,
                      step + i == share.begin, group);
        wgmma_commit();
      }
      // Nothing else is there to multiply meanwhile, and the sooner the stage is free, the more is under way.
      wgmma_wait<0>();
      keep_in_place(sum);
      ring.release(p.cluster, group.lane());
      ring.next();
    }
    publish_share<typename C::T>(p, sum, half, share.chunk, share.part, group);
  }
}

}  // namespace lora_kernels::hopper
