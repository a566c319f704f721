// What nf4_stream.cuh is made of: copies of X and of tiles, and their scales.
#pragma once

#include "nf4_pairs.cuh"
#include "nf4_stream.h"

namespace lora_kernels {
namespace nf4_stream_tile {

constexpr int kRows = 16, kRun = 64, kSlice = 4 * kRun;
constexpr int kMostThreads = 512;
// Beside a block there have to be registers for one of nf4_down.cuh, which is under way when this one starts.
constexpr int kThreadsBeside = 128;
// Of a tile, a slice of it.
constexpr int kRowBytes = kSlice / 2, kTileBytes = kRows * kRowBytes;
// Tokens that X has places for. Of two fragments all, so that the places are known when it is compiled.
__host__ __device__ inline int token_places(int64_t tokens) { return static_cast<int>(tokens > 8 ? 16 : tokens); }

// Of a slice of X, the same chunk of all tokens is followed by 16 bytes that nobody reads: a warp's copies, eight chunks of
// a token beside one another, lie in different banks.
constexpr int kChunks = 8;
__host__ __device__ inline int chunk_bytes(int places) { return places * (kSlice / kChunks * 2) + 16; }

// Of the block's part of X.
__host__ __device__ inline int64_t x_bytes(const StreamPlan& plan, int64_t tokens) {
  return int64_t{plan.slices} * kChunks * chunk_bytes(token_places(tokens));
}

// What lies where in a block's dynamic memory. Each warp has a ring for the tiles under way, that in use among them. As many
// rings as have room lie before the table of pairs, whose address is given; the others behind it, and then X.
template <int kStages>
struct Places {
  static constexpr int kRingBytes = kStages * kTileBytes;
  // Before dynamic memory there are a map of scales, little else, and on some chips 1 KB that is the chip's.
  static constexpr int kLeastBefore = kNestedBlock * 4, kOwnBytes = kLeastBefore + 128, kMostBefore = kOwnBytes + 1024;
  static constexpr int kRingsBefore = (kPairsAddress - kMostBefore) / kRingBytes;
  unsigned char *front, *table;
  int rings;

  __device__ Places(unsigned char* memory, const StreamPlan& plan)
      : front(memory), table(memory + kPairsAddress - shared_address(memory)), rings(plan.tiles * plan.groups) {}

  __device__ unsigned char* ring(int warp) const {
    return warp < kRingsBefore ? front + warp * kRingBytes : behind() + (warp - kRingsBefore) * kRingBytes;
  }
  __device__ unsigned char* x() const {
    return behind() + (rings > kRingsBefore ? rings - kRingsBefore : 0) * kRingBytes;
  }

  // Of dynamic memory, at most.
  static int64_t bytes(const StreamPlan& plan, int64_t tokens) {
    const int warps = plan.tiles * plan.groups, rings_behind = warps > kRingsBefore ? warps - kRingsBefore : 0;
    return kPairsAddress - kLeastBefore + kPairsBytes + int64_t{rings_behind} * kRingBytes + x_bytes(plan, tokens);
  }

 private:
  __device__ unsigned char* behind() const { return table + kPairsBytes; }
};

// Where 16 bytes of X lie, [slice, chunk, token, quarter]: the lanes of a warp, four quarters for each of eight tokens,
// read the same chunk of their quarters at a time, side by side.
__device__ inline int x_place(int slice, int chunk, int places, int token, int quarter) {
  return (slice * kChunks + chunk) * chunk_bytes(places) + (token * 4 + quarter) * 16;
}

// All of a block's part of X, zeros behind K. Blocks that start at the same time start with different slices: the same
// 16 bytes for all of them at once would be one bank of L2's business.
template <class T>
__device__ inline void copy_x(unsigned char* memory, const OnePass& p, int64_t k0, int slices, int first_slice,
                              int places) {
  const int pieces = slices * (kSlice / 8), tokens = static_cast<int>(p.M);
  for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
    const int ahead = i + first_slice * (kSlice / 8), piece = ahead < pieces ? ahead : ahead - pieces;
    const int64_t k = k0 + piece * 8;
    const bool inside = k < p.K;
    const T* source = static_cast<const T*>(p.x.data) + (inside ? k : 0);
    unsigned char* target = memory + x_place(piece / 32, piece % kChunks, places, 0, piece / kChunks % 4);
#pragma unroll 4
    for (int token = 0; token < tokens; ++token) {
      copy_async(target, source, inside);
      source += p.x.row_stride, target += x_place(0, 0, places, 1, 0);
    }
  }
}

// Where 16 bytes of a tile's slice lie: a lane reads two chunks of its row, eight lanes at a time one of two rows.
__device__ inline int tile_place(int row, int chunk) { return row * kRowBytes + (chunk ^ row % 2) * 16; }

// A lane's share of the copies of a warp's tile, one of its slices after the other.
struct TileCopies {
  const uint8_t* source;
  int64_t next_rows;  // bytes to the rows four further
  int64_t columns_left;
  int columns_a_turn, rows_left, place;

  __device__ TileCopies(const Nf4& weight, int64_t row, int64_t column, int columns, int lane)
      : source(weight.packed + ((row + lane / 8) * weight.columns + column) / 2 + lane % 8 * 16),
        next_rows(2 * weight.columns),
        columns_left(weight.columns - column - lane % 8 * 32),
        columns_a_turn(columns),
        rows_left(static_cast<int>(weight.rows - row - lane / 8)),
        place(tile_place(lane / 8, lane % 8)) {}

  __device__ void next(unsigned char* target) {
    const uint8_t* from = source;
#pragma unroll
    for (int i = 0; i < kRows; i += 4, from += next_rows) {
      // Rows are an even number apart: they have the same places.
      copy_async(target + place + i * kRowBytes, from, i < rows_left && columns_left > 0);
    }
    source += columns_a_turn / 2, columns_left -= columns_a_turn;
  }
};

// The scales of a lane's two runs, loaded as they are stored a slice ahead of their use.
struct Scales {
  int64_t first, next_half;  // counted in elements of the weight
  int64_t columns_left;
  int columns_a_turn, rows_left;
  uint32_t bits[2];
  float nested[2];

  __device__ Scales(const Nf4& weight, int64_t row, int64_t column, int columns, int lane)
      : first((row + lane / 4) * weight.columns + column + lane % 4 * kRun),
        next_half(8 * weight.columns),
        columns_left(weight.columns - column - lane % 4 * kRun),
        columns_a_turn(columns),
        rows_left(static_cast<int>(weight.rows - row - lane / 4)) {}

  __device__ void load(const Nf4& weight, int log2_block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bits[half] = 0, nested[half] = 0.0f;
      if (half * 8 >= rows_left || columns_left <= 0) continue;
      const auto block = static_cast<uint32_t>((first + half * next_half) >> log2_block);
      if (weight.nested_absmax == nullptr) {
        bits[half] = __ldg(static_cast<const uint32_t*>(weight.absmax) + block), nested[half] = 1.0f;
      } else {
        bits[half] = __ldg(static_cast<const uint8_t*>(weight.absmax) + block);
        nested[half] = __ldg(weight.nested_absmax + block / kNestedBlock);
      }
    }
    first += columns_a_turn, columns_left -= columns_a_turn;
  }

  // A scale that is not quantized is itself times one plus `offset`, which is -0 then.
  __device__ float get(int half, bool is_nested, const float* map, float offset) const {
    const float mapped = map[bits[half] & 0xFF], value = is_nested ? mapped : __uint_as_float(bits[half]);
    return __fadd_rn(__fmul_rn(value, nested[half]), offset);
  }
};

}  // namespace nf4_stream_tile

}  // namespace lora_kernels
