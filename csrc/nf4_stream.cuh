// out = X W^T + S U + bias for few tokens, while the packed weight streams through the chip once.
//
// The product is computed as W X^T: rows of W are the rows of the tensor cores' products, tokens their columns.
//
// Decoding. The codes of a block have one scale, so at most 16 values: a lane that has a run of 64 codes of a row makes
// those first, as the format says, and splits them into bytes. Then a byte of four weights is one instruction, whose
// selector is the codes themselves: 22 instructions for 8 weights.
//
// Places. A lane holds of each of two rows a run along K. The order of K within a product is free, so a product takes
// four neighbours of the run of each of the four lanes of a row, and of X what belongs to them.
//
// Blocks. K is cut into groups, of which each warp of a block has a slice, and keeps its slice of X in shared memory.
// The block then takes one tile of 16 rows after the other, of which copies are under way for some ahead; its warps
// meet only to add up what they have of a batch of tiles. Where there are several groups, the last block to come with a
// batch adds them in their order: the same bits in every run. Nobody stands still for that: a block hands a batch over
// when its warps meet for the next, and looks whether it was the last to when they meet again.
//
// S is computed by the same launch, but for float32 arithmetic, whose S is there already. A block draws parts of it
// until there are none, and only then turns to its tiles: whoever waits for S waits for blocks that are running, and
// wait for nobody. Blocks that have a tile less than others draw first.
#pragma once

#include "nf4_stream_tile.cuh"

namespace lora_kernels {

template <class T, class Shape>
__global__ void __launch_bounds__(nf4_stream_tile::kMostThreads, 1)
    nf4_stream_kernel(const OnePass p, const Nf4 weight, int log2_block, const StreamPlan plan, bool down_vectors,
                      bool up_vectors, float* workspace, int* counters) {
  using namespace nf4_stream_tile;
  constexpr int kTokenTiles = Shape::kTokenTiles, kStages = Shape::kStages, kBatch = Shape::kBatch;
  __shared__ float map[kNestedBlock];
  __shared__ int drawn;
  __shared__ bool last[2];
  unsigned char* memory = dynamic_shared();
  const int warps = plan.warps, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = blockIdx.x % plan.chunks, group = blockIdx.x / plan.chunks % plan.groups;
  const int block = blockIdx.x / plan.chunks / plan.groups;
  unsigned char* x = memory + warp * Shape::kTokens * kSlice * 2;
  unsigned char* ring = memory + Shape::x_bytes(warps) + warp * kStages * kTileBytes;
  unsigned char* behind_rings = memory + Shape::x_bytes(warps) + Shape::ring_bytes(warps);
  const Sums<kTokenTiles> sums{reinterpret_cast<float*>(behind_rings), warps};

  const int64_t m0 = static_cast<int64_t>(chunk) * Shape::kTokens;
  const int columns = static_cast<int>(p.M - m0 < Shape::kTokens ? p.M - m0 : Shape::kTokens);
  const int64_t group_k = static_cast<int64_t>(warps) * kSlice, k0 = group * group_k + warp * kSlice;
  // Of the last group some warps may have nothing.
  const int64_t left = (p.K - group * group_k + kSlice - 1) / kSlice;
  const int working = left < warps ? static_cast<int>(left) : warps;
  const int mine = (plan.tiles - block + plan.blocks - 1) / plan.blocks;
  const auto row_of = [&](int i) { return (static_cast<int64_t>(i) * plan.blocks + block) * kRows; };

  const bool up_is_float = p.up.dtype == DType::kFloat32;
  const int rank_tiles = p.precision == Precision::kSplit ? 0 : static_cast<int>((p.R + kRows - 1) / kRows);
  const int s_tiles = rank_tiles * plan.chunks;
  const int s_parts = static_cast<int>((p.K + warps * kShare - 1) / (warps * kShare));
  // Before all others, if a tile less is to do.
  const bool is_early = static_cast<int64_t>(mine) * plan.blocks < plan.tiles || plan.tiles % plan.blocks == 0;
  if (threadIdx.x == 0 && is_early) drawn = atomicAdd(counters + kDrawn, 1);
  copy_x<T, Shape::kTokens>(x, p, m0, k0, lane);
  commit_copies();
  TileCopies copies(weight, row_of(0), k0, plan.blocks * kRows, lane);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < mine) copies.next(ring + i * kTileBytes);
    commit_copies();
  }
  // What the ends of tiles read, which comes from memory else when nothing is left to hide it.
  for (int i = threadIdx.x; i < mine * kRows; i += blockDim.x) {
    const int64_t n = row_of(i / kRows) + i % kRows;
    if (n < p.N) prefetch(static_cast<const char*>(p.up.data) + n * p.up.column_stride * (up_is_float ? 4 : 2));
  }
  const bool nested = weight.nested_absmax != nullptr;
  const float offset = nested ? *weight.offset : -0.0f;
  if (nested) {
    for (int i = threadIdx.x; i < kNestedBlock; i += blockDim.x) map[i] = weight.nested_map[i];
  }
  Scales scales(weight, row_of(0), k0, plan.blocks * kRows, lane);
  scales.load(weight, log2_block);
  if (threadIdx.x == 0 && !is_early) drawn = atomicAdd(counters + kDrawn, 1);
  __syncthreads();

  for (int item = drawn; item < s_tiles * s_parts;) {
    const int part = item / s_tiles, tile = item % s_tiles;
    const int64_t first_m = static_cast<int64_t>(tile / rank_tiles) * Shape::kTokens;
    const int64_t r0 = static_cast<int64_t>(tile % rank_tiles) * kRows;
    float acc[kTokenTiles][4] = {};
    multiply_down<T, kTokenTiles>(acc, p, down_vectors, first_m, r0,
                                  (static_cast<int64_t>(part) * warps + warp) * kShare, lane);
    sums.store(0, warp, lane, acc);
    finish_part<T>(p, sums, first_m, r0, part, s_parts,
                   workspace + static_cast<int64_t>(tile) * s_parts * Shape::kWarpFloats, counters + kArrivals + tile,
                   counters + kComplete);
    if (threadIdx.x == 0) drawn = atomicAdd(counters + kDrawn, 1);
    __syncthreads();
    item = drawn;
    __syncthreads();
  }

  const volatile int* complete_now = counters + kComplete;
  int complete = 0;
  bool has_s = s_tiles == 0;
  const int most_batches = (plan.tiles + plan.blocks * kBatch - 1) / (plan.blocks * kBatch);
  const int batches = (mine + kBatch - 1) / kBatch, first_area = (chunk * plan.blocks + block) * most_batches;
  const bool divided = plan.groups > 1;
  int* arrivals = counters + kArrivals + s_tiles + first_area;
  float* partials = workspace + static_cast<int64_t>(s_tiles) * s_parts * Shape::kWarpFloats +
                    static_cast<int64_t>(first_area) * plan.groups * Shape::kPartFloats;
  int came_before = 0;
  // Of this lane: its first chunk of X, and of a tile.
  const int x_first = x_place(lane / 4, lane % 4, 0), tile_first = tile_place(lane / 4, lane % 4 * 2);
  int stage = 0;
  // Without computing, two more where others have to be waited for.
  for (int batch = 0; batch < batches + (divided ? 2 : 0); ++batch) {
    const int slots = batch % 2 * kBatch;
    for (int i = batch * kBatch; i < mine && i < (batch + 1) * kBatch; ++i) {
      // Looked at while the tile is computed; as a rule, that is all the waiting.
      if (complete < s_tiles) complete = *complete_now;
      if (warp >= working) continue;
      ByteTable table[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) table[half] = make_table<T>(scales.get(half, nested, map, offset));
      if (i + 1 < mine) scales.load(weight, log2_block);
      wait_copies<kStages - 2>();
      // What the lanes copied is here, and what they read of the tile before need not stay.
      __syncwarp();
      const unsigned char* tile = ring + stage * kTileBytes;
      if (i + kStages - 1 < mine) copies.next(ring + (stage == 0 ? kStages - 1 : stage - 1) * kTileBytes);
      commit_copies();
      stage = stage == kStages - 1 ? 0 : stage + 1;

      float acc[kTokenTiles][4] = {};
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint4 words[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          words[half] = *reinterpret_cast<const uint4*>(tile + (tile_first ^ part * 16) + half * 8 * kRowBytes);
        }
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          uint32_t upper[4], lower[4];
          look_up(upper, table[0], reinterpret_cast<const uint32_t*>(&words[0])[word]);
          look_up(lower, table[1], reinterpret_cast<const uint32_t*>(&words[1])[word]);
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            const int place = (x_first ^ (part * 4 + word) * 16) + j * 8 * kTokenBytes;
            const uint4 token = *reinterpret_cast<const uint4*>(x + place);
            const uint32_t* b = reinterpret_cast<const uint32_t*>(&token);
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
              const uint32_t a[4] = {upper[e], lower[e], upper[e + 1], lower[e + 1]};
              multiply(acc[j], a, b + e, T());
            }
          }
        }
      }
      sums.store(slots + i - batch * kBatch, warp, lane, acc);
    }

    const int done = divided ? batch - 2 : batch;
    if (threadIdx.x == 0 && divided && done >= 0) {
      last[batch % 2] = came_before == plan.groups - 1;
      if (last[batch % 2]) {
        // Zero again, for the next launch on the stream or the next replay of the graph.
        arrivals[done] = 0;
        __threadfence();
      }
    }
    __syncthreads();
    const auto count_of = [&](int b) {
      const int tiles = mine - b * kBatch < kBatch ? mine - b * kBatch : kBatch;
      return tiles * columns * kRows;
    };
    const auto sum_of = [&](int i) {
      return sums.add(slots + i / kRows / columns, i % kRows, i / kRows % columns, working);
    };
    if (divided) {
      if (threadIdx.x == 0 && batch > 0 && batch <= batches) {
        // All of the block have written theirs of the batch before.
        __threadfence();
        came_before = atomicAdd(arrivals + batch - 1, 1);
      }
      if (batch < batches) {
        float* part = partials + (static_cast<int64_t>(batch) * plan.groups + group) * Shape::kPartFloats;
        for (int i = threadIdx.x; i < count_of(batch); i += blockDim.x) part[i] = sum_of(i);
      }
      if (done < 0 || !last[batch % 2]) continue;
    }

    if (!has_s) {
      while (complete < s_tiles) complete = *complete_now;
      __threadfence();
      has_s = true;
    }
    for (int i = threadIdx.x; i < count_of(done); i += blockDim.x) {
      const int64_t n = row_of(done * kBatch + i / kRows / columns) + i % kRows, m = m0 + i / kRows % columns;
      if (n >= p.N) continue;
      float branch;
      if (p.precision == Precision::kSplit) {
        branch = branch_element<float, float, float>(p, up_vectors, m, n);
      } else if (up_is_float) {
        branch = branch_element<T, float, T>(p, up_vectors, m, n);
      } else {
        branch = branch_element<T, T, T>(p, up_vectors, m, n);
      }
      if (p.bias != nullptr) branch += load_number(p.bias, p.bias_dtype, n);
      const float* first = partials + static_cast<int64_t>(done) * plan.groups * Shape::kPartFloats + i;
      const float sum = divided ? add_parts(first, plan.groups, Shape::kPartFloats) : sum_of(i);
      static_cast<T*>(p.out)[m * p.N + n] = from_float<T>(sum + branch);
    }
  }
  // All of the block have seen S: the counts are not needed any more.
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(counters + kThrough, 1) == static_cast<int>(gridDim.x) - 1) {
    // Zero again, for the next launch on the stream or the next replay of the graph.
    counters[kDrawn] = counters[kComplete] = counters[kThrough] = 0;
  }
}

}  // namespace lora_kernels
