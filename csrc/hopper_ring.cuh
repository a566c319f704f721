// The ring of stages in shared memory, and the thread that keeps it filled.
#pragma once

#include "hopper_launch.cuh"
#include "hopper_ptx.cuh"
#include "hopper_wgmma.cuh"
#include "numbers.cuh"

namespace lora_kernels::hopper {

constexpr int kThreads = 3 * kGroupThreads;
constexpr int kMultipliers = 2 * kGroupThreads;

// W_BY_ROWS: W is stored as [K, N], and D and U likewise; else they are stored transposed. MASKED: the mask sits on S U
// if W_BY_ROWS, which is how the backward comes, else on X.
template <class T_, int BLOCK_N, bool W_BY_ROWS, bool MASKED>
struct Config {
  using T = T_;
  static constexpr int kBlockN = BLOCK_N;
  static constexpr bool kByRows = W_BY_ROWS;
  static constexpr bool kMaskX = MASKED && !W_BY_ROWS;
  static constexpr bool kMaskOut = MASKED && W_BY_ROWS;

  static constexpr int kStages = BLOCK_N == 256 ? 4 : 5;
  static constexpr int kXBytes = kBlockM * kBlockK * 2;
  static constexpr int kWBytes = BLOCK_N * kBlockK * 2;
  static constexpr int kDBytes = kRankChunk * kBlockK * 2;
  static constexpr int kStageBytes = kXBytes + kWBytes + kDBytes;
  // Where a stage holds a share alone, X and D take W's place as well, for so many steps of K.
  static constexpr int kShareBytes = kXBytes + kDBytes;
  static constexpr int kShareSteps = kStageBytes / kShareBytes;
  static constexpr int kStagingBytes = 16 * 64 * 2;  // of a warp: 16 rows by 64 columns of out
  static constexpr int kStagingOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kStagingOffset + 8 * kStagingBytes;
  static constexpr int kSlotOffset = kBarrierOffset + 16 * kStages;
  // The base is not aligned as TMA's swizzle needs it, which costs up to 1024 bytes.
  static constexpr int kSharedBytes = 1024 + kSlotOffset + 2 * static_cast<int>(sizeof(int));

  // What 16 steps of K add to a descriptor of W, U or D, and how those are described.
  static constexpr uint64_t kWAdvance = (W_BY_ROWS ? 16 * 128 : 32) >> 4;
  static constexpr uint64_t kDAdvance = (W_BY_ROWS ? 16 * 64 : 32) >> 4;
  __device__ static uint64_t describe_w(uint32_t address) { return describe(address, 64 * 128, 1024, Swizzle::k128); }
  __device__ static uint64_t describe_d(uint32_t address) {
    return W_BY_ROWS ? describe(address, 0, 8 * 64, Swizzle::k64) : describe(address, 0, 1024, Swizzle::k128);
  }
};

// A place in the ring of stages. Its phase is the parity of the fillings of that stage.
template <class C>
struct Ring {
  uint32_t base;
  int stage = 0;
  uint32_t phase = 0;

  __device__ uint32_t x() const { return base + stage * C::kStageBytes; }
  __device__ uint32_t w() const { return x() + C::kXBytes; }
  __device__ uint32_t d() const { return w() + C::kWBytes; }
  __device__ uint32_t share_x(int step) const { return base + stage * C::kStageBytes + step * C::kShareBytes; }
  __device__ uint32_t share_d(int step) const { return share_x(step) + C::kXBytes; }
  __device__ uint32_t full() const { return base + C::kBarrierOffset + 16 * stage; }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ void next() {
    if (++stage == C::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // To the producers of all blocks that load for this one: this warp has read the stage.
  __device__ void release(int cluster, int lane) const {
    if (lane < cluster) barrier_arrive(empty(), lane);
  }
};

// D for a step of a share.
template <class C>
__device__ inline void load_d(const Ring<C>& ring, const CUtensorMap& map, uint32_t to, int k0, int chunk) {
  const int rank0 = chunk * kRankChunk;
  tma_load(to, map, ring.full(), C::kByRows ? rank0 : k0, C::kByRows ? k0 : rank0);
}

// W's or U's columns for a tile, from row k0 on; a block of a cluster of two loads half of them, for both.
template <class C>
__device__ inline void load_columns(const Ring<C>& ring, const CUtensorMap& map, int k0, int column0, int cluster,
                                    int rank) {
  constexpr int kColumns = C::kByRows ? 64 : C::kBlockN / 2;  // of a box
  constexpr int kBoxes = C::kBlockN / kColumns;
  const int first = cluster == 2 ? rank * (kBoxes / 2) : 0, last = cluster == 2 ? first + kBoxes / 2 : kBoxes;
  for (int box = first; box < last; ++box) {
    const uint32_t to = ring.w() + box * kColumns * 128;
    const int n = column0 + box * kColumns, column = C::kByRows ? n : k0, row = C::kByRows ? k0 : n;
    if (cluster == 2) {
      tma_load_multicast(to, map, ring.full(), column, row, 3);
    } else {
      tma_load(to, map, ring.full(), column, row);
    }
  }
}

// Loads all that a unit's tiles need, in the order in which `multiply` takes it.
template <class C>
__device__ inline void load_tiles(const Launch& p, Ring<C> ring, int unit, int rank) {
  const int tiles = p.row_units * p.column_tiles;
  for (int index = first_tile(p, unit); index < tiles; index += p.units) {
    const Tile tile = tile_at(p, index);
    const int row0 = (tile.row_unit * p.cluster + rank) * kBlockM, column0 = tile.column * C::kBlockN;
    for (int step = 0; step < p.k_steps; ++step) {
      const int ahead = tile.first_step + step;
      const int k0 = (ahead < p.k_steps ? ahead : ahead - p.k_steps) * kBlockK;
      const bool sharing = step >= tile.share_begin && step < tile.share_end;
      barrier_wait(ring.empty(), ring.phase ^ 1, "empty, for X and W");
      barrier_expect(ring.full(), C::kXBytes + C::kWBytes + (sharing ? C::kDBytes : 0));
      tma_load(ring.x(), p.x, ring.full(), k0, row0);
      load_columns(ring, p.weight, k0, column0, p.cluster, rank);
      if (sharing) load_d(ring, p.down, ring.d(), k0, tile.chunk);
      ring.next();
    }
    for (int rank0 = 0; rank0 < p.problem.R; rank0 += kRankStep) {
      barrier_wait(ring.empty(), ring.phase ^ 1, "empty, for U");
      barrier_expect(ring.full(), C::kWBytes);
      load_columns(ring, p.up, rank0, column0, p.cluster, rank);
      ring.next();
    }
  }
}

}  // namespace lora_kernels::hopper
