// out = X W^T + S U + bias for few tokens, while the packed weight streams through the chip once.
//
// The product is computed as W X^T: rows of W are the rows of the tensor cores' products, tokens their columns.
//
// Places. A lane holds of each of two rows a run of 64 codes along K, which have one scale: nf4_pairs.cuh says how they
// are decoded. The order of K within a product is free, so a product takes four neighbours of the run of each of the four
// lanes of a row, and of X what belongs to them. With two fragments of tokens shared memory, which has X and pairs to read,
// is the limit: the upper row's codes are decoded by bytes then, in the integer units, at the same time.
//
// Blocks. A warp has one tile of 16 rows and some slices of K, of which copies are under way for some ahead; X lies in
// shared memory, all that the block needs of it. So nobody waits for anybody from the first slice to the last. Then a
// block adds up its warps, and where K is divided among blocks, the last of them to be through adds up the parts: both in
// their order, which gives the same bits in every run.
//
// S is the launch before. This one does not wait for its end before it needs S, when all of the weight has been read.
#pragma once

#include "nf4_bytes.cuh"
#include "nf4_stream_branch.cuh"
#include "nf4_stream_tile.cuh"
#include "nf4_sums.cuh"

namespace lora_kernels {

template <class T, int kTokenTiles, int kStages>
__global__ void __launch_bounds__(nf4_stream_tile::kMostThreads + nf4_stream_tile::kThreadsBeside)
    nf4_stream_kernel(const OnePass p, const Nf4 weight, int log2_block, const StreamPlan plan, bool branch_vectors,
                      float* workspace, int* counters) {
  using namespace nf4_stream_tile;
  __shared__ float map[kNestedBlock], values[16];
  // Beside them, what is_last has.
  static_assert(sizeof(map) + sizeof(values) + 16 <= Places<kStages>::kOwnBytes, "rings would reach into the table");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = static_cast<int>(p.M);
  const int tile = warp / plan.groups, group = warp % plan.groups;
  const int part = blockIdx.x % plan.parts, place = blockIdx.x / plan.parts;
  const Places<kStages> places(dynamic_shared(), plan);
  unsigned char *x = places.x(), *ring = places.ring(warp);

  const int64_t block_row = static_cast<int64_t>(place) * plan.tiles * kRows, row = block_row + tile * kRows;
  const int64_t k0 = static_cast<int64_t>(part) * plan.slices * kSlice, left = divide_up(p.K - k0, int64_t{kSlice});
  const int slices = left < plan.slices ? static_cast<int>(left) : plan.slices;
  const int turns = row < p.N ? (slices - group + plan.groups - 1) / plan.groups : 0;

  // The weight's first slices are asked for before X, which is soon in L2.
  Scales scales(weight, row, k0 + group * kSlice, plan.groups * kSlice, lane);
  scales.load(weight, log2_block);
  TileCopies copies(weight, row, k0 + group * kSlice, plan.groups * kSlice, lane);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < turns) copies.next(ring + i * kTileBytes);
    commit_copies();
  }
  const int x_places = kTokenTiles == 1 ? tokens : kTokenTiles * 8;
  copy_x<T>(x, p, k0, slices, place % slices, x_places);
  commit_copies();
  const bool nested = weight.nested_absmax != nullptr, up_is_float = p.up.dtype == DType::kFloat32;
  const float offset = nested ? *weight.offset : -0.0f;
  fill_table(values);
  fill_pairs(places.table, values);
  for (int i = threadIdx.x; i < kNestedBlock; i += blockDim.x) map[i] = nested ? weight.nested_map[i] : 0.0f;
  // What the end reads, which comes from memory else when nothing is left to hide it.
  for (int i = threadIdx.x; i < plan.tiles * kRows; i += blockDim.x) {
    const int64_t n = block_row + i;
    if (n < p.N) prefetch(static_cast<const char*>(p.up.data) + n * p.up.column_stride * (up_is_float ? 4 : 2));
  }
  wait_copies<0>();
  __syncthreads();

  // Columns that are no token's repeat the last one's: nobody looks at them.
  int token_of[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) token_of[j] = j * 8 + lane / 4 < tokens ? j * 8 + lane / 4 : tokens - 1;
  float acc[kTokenTiles][4] = {};
  // With one fragment an H100 took as long with bytes as without, or longer.
  constexpr bool kUpperByBytes = kTokenTiles > 1;
  const int tile_first = tile_place(lane / 4, lane % 4 * 2);
  const uint32_t pairs = pairs_of_lane(lane);
  for (int turn = 0, stage = 0; turn < turns; ++turn) {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = scales.get(half, nested, map, offset);
    ByteTable values_of_upper;
    if constexpr (kUpperByBytes) values_of_upper = make_table<T>(scale[0]);
    if (turn + 1 < turns) scales.load(weight, log2_block);
    wait_copies<kStages - 2>();
    // What the lanes copied is here, and what they read of the slice before need not stay.
    __syncwarp();
    const unsigned char* codes = ring + stage * kTileBytes;
    if (turn + kStages - 1 < turns) copies.next(ring + (stage == 0 ? kStages - 1 : stage - 1) * kTileBytes);
    commit_copies();
    stage = stage == kStages - 1 ? 0 : stage + 1;

    const unsigned char* x_slice = x + x_place(group + turn * plan.groups, 0, x_places, 0, lane % 4);
    uint4 words[2][2];
#pragma unroll
    for (int run_half = 0; run_half < 2; ++run_half) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = (tile_first ^ run_half * 16) + half * 8 * kRowBytes;
        words[run_half][half] = *reinterpret_cast<const uint4*>(codes + place);
      }
    }
#pragma unroll
    for (int run_half = 0; run_half < 2; ++run_half) {
      uint4 x_words[4][kTokenTiles];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          x_words[word][j] = *reinterpret_cast<const uint4*>(
              x_slice + x_place(0, run_half * 4 + word, x_places, token_of[j], 0));
        }
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t upper_codes = reinterpret_cast<const uint32_t*>(&words[run_half][0])[word];
        const uint32_t lower_codes = reinterpret_cast<const uint32_t*>(&words[run_half][1])[word];
        uint32_t upper[4], lower[4];
        if constexpr (kUpperByBytes) {
          look_up(upper, values_of_upper, upper_codes);
        } else {
          look_up_pairs<T>(upper, pairs, scale[0], upper_codes);
        }
        look_up_pairs<T>(lower, pairs, scale[1], lower_codes);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const uint32_t* b = reinterpret_cast<const uint32_t*>(&x_words[word][j]);
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const uint32_t a[4] = {upper[e], lower[e], upper[e + 1], lower[e + 1]};
            multiply(acc[j], a, b + e, T());
          }
        }
      }
    }
  }
  if (part == 0 && group == 0) {
    const auto branch = [&](auto s_number, auto u_number) {
      add_branch<T, decltype(s_number), decltype(u_number)>(acc, p, row, branch_vectors, token_of, lane);
    };
    if (p.precision == Precision::kSplit) {
      branch(float(), float());
    } else {
      up_is_float ? branch(T(), float()) : branch(T(), T());
    }
  }
  // What comes next, such as the next layer's S, may take its places; it waits for the end before it reads.
  let_next_launch_begin();
  // A warp's copies are all used, and nobody else reads its ring.
  __syncwarp();
  store_sums<kTokenTiles>(ring, acc, lane);
  __syncthreads();

  // A thread has a row of the block, of which every step-th token.
  const int rows = plan.tiles * kRows, step = plan.groups * 2, mine = threadIdx.x % rows, first = threadIdx.x / rows;
  const int64_t n = block_row + mine;
  const auto sum_of = [&](int token) {
    float sum = 0.0f;
    for (int i = 0; i < plan.groups; ++i) {
      sum += *sum_place(places.ring(mine / kRows * plan.groups + i), mine % kRows, token);
    }
    return sum;
  };
  float* parts = workspace + static_cast<int64_t>(place) * plan.parts * rows * tokens + mine;
  if (plan.parts > 1) {
    for (int token = first; token < tokens; token += step) parts[(part * tokens + token) * rows] = sum_of(token);
    if (!is_last(counters + place, plan.parts)) return;
  }
  if (n >= p.N) return;
  const float bias = p.bias == nullptr ? 0.0f : load_number(p.bias, p.bias_dtype, n);
  // A row has two threads at least, so a thread no more tokens than these. Their parts are added up side by side: one token
  // after the other, each would wait for memory.
  float sums[kTokenTiles * 4] = {};
  const int parts_to_add = plan.parts > 1 ? plan.parts : 0;
#pragma unroll 4
  for (int i = 0; i < parts_to_add; ++i) {
    const float* of_part = parts + static_cast<int64_t>(i) * tokens * rows;
#pragma unroll
    for (int j = 0; j < kTokenTiles * 4; ++j) {
      const int token = first + j * step;
      sums[j] += __ldcg(of_part + (token < tokens ? token : tokens - 1) * rows);
    }
  }
#pragma unroll
  for (int j = 0; j < kTokenTiles * 4; ++j) {
    const int token = first + j * step;
    if (token >= tokens) break;
    const float sum = plan.parts > 1 ? sums[j] : sum_of(token);
    static_cast<T*>(p.out)[token * p.N + n] = from_float<T>(bias + sum);
  }
}

}  // namespace lora_kernels
