#include "nf4_stream.cuh"

#include <algorithm>
#include <array>
#include <map>

#include "launch.cuh"
#include "nf4_down.h"

namespace lora_kernels {
namespace {

using namespace nf4_stream_tile;

// Two fragments of tokens. With more, the kernel of nf4.cuh or a decoded copy is faster.
constexpr int64_t kMostTokens = 16;
constexpr int kStages = 2;

// Beside its dynamic memory a block has what lies before it, and beside itself room for one of nf4_down_kernel.
int64_t shared_bytes(const OnePass& problem, const StreamPlan& plan) {
  constexpr int kDownBytes = 8320 + 1024;
  return Places<kStages>::bytes(plan, problem.M) + Places<kStages>::kOwnBytes + kDownBytes;
}

StreamPlan divide(const OnePass& problem, int tiles, int groups, int parts) {
  StreamPlan plan{};
  plan.tiles = tiles, plan.groups = groups;
  const int64_t slices = divide_up(problem.K, int64_t{kSlice});
  plan.slices = static_cast<int>(divide_up(slices, int64_t{parts}));
  // Of the last part something has to be left.
  plan.parts = static_cast<int>(divide_up(slices, int64_t{plan.slices}));
  plan.places = static_cast<int>(divide_up(problem.N, int64_t{tiles} * kRows));
  return plan;
}

// The division with which the multiprocessor that has most to do is through first. What things cost is counted in slices
// of a tile that a multiprocessor does one after the other, as an H100 showed it.
StreamPlan best_plan(const OnePass& problem, int chip, int shared_of_block) {
  // More than eight parts only where X of fewer has no room: what parts cost sees to that.
  constexpr int kMostWarps = kMostThreads / 32, kMostParts = 32;
  // Starting a block; with less than so many warps, some of a multiprocessor's time is nobody's.
  constexpr int64_t kBlockCost = 20, kBusyWarps = 9;
  // A slice of X costs as much as one of a tile for so many tokens, and that again for any number of them.
  constexpr int64_t kTokens = 8;
  StreamPlan best{};
  int64_t least = 0;
  for (int parts = 1; parts <= kMostParts; ++parts) {
    for (int tiles = 1; tiles <= kMostWarps; ++tiles) {
      for (int groups = 1; tiles * groups <= kMostWarps; ++groups) {
        const StreamPlan plan = divide(problem, tiles, groups, parts);
        if (shared_bytes(problem, plan) > shared_of_block || plan.parts != parts || groups > plan.slices) continue;
        const int64_t waves = divide_up(int64_t{plan.places} * parts, chip);
        const int64_t turns = divide_up(plan.slices, groups) * std::max<int64_t>(tiles * groups, kBusyWarps);
        const int64_t parts_cost = parts > 1 ? 12 + 2 * parts : 0;
        const int64_t x_cost = plan.slices * (problem.M + kTokens) / kTokens;
        const int64_t cost = waves * (turns + x_cost + kBlockCost) + parts_cost;
        if (best.tiles == 0 || cost < least) best = plan, least = cost;
      }
    }
  }
  return best;
}

// The same, which is asked for several times a call. The layers of a model have a handful of shapes.
StreamPlan plan_for(const OnePass& problem) {
  constexpr size_t kMostKnown = 1024;
  thread_local std::map<std::array<int64_t, 5>, StreamPlan> known;
  const int chip = multiprocessors(), shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const std::array<int64_t, 5> key{problem.M, problem.N, problem.K, chip, shared};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= kMostKnown) known.clear();
  return known[key] = best_plan(problem, chip, shared);
}

// Whether rows of S and columns of U are whole groups of eight that start on 16 bytes.
bool branch_vectors(const OnePass& problem) {
  const Matrix& up = problem.up;
  return problem.R % 8 == 0 && up.row_stride == 1 &&
         starts_on_16_bytes(up.data, up.column_stride, bytes_of(up.dtype));
}

int64_t part_floats(const OnePass& problem, const StreamPlan& plan) {
  return plan.parts > 1 ? int64_t{plan.places} * plan.parts * plan.tiles * kRows * problem.M : 0;
}

int part_counters(const StreamPlan& plan) { return plan.parts > 1 ? plan.places : 0; }

template <class T, int kTokenTiles>
void launch_stream(const OnePass& problem, const Nf4& weight, const StreamPlan& plan, float* workspace, int* counters,
                   cudaStream_t stream) {
  launch_overlapping("nf4_stream_kernel", nf4_stream_kernel<T, kTokenTiles, kStages>,
                     static_cast<unsigned>(plan.places * plan.parts), plan.tiles * plan.groups * 32,
                     Places<kStages>::bytes(plan, problem.M), stream, problem, weight,
                     log2_of(weight.block_size), plan, branch_vectors(problem), workspace, counters);
}

}  // namespace

bool nf4_stream_fits(const OnePass& problem, const Nf4& weight) {
  return problem.dtype != DType::kFloat32 && problem.M <= kMostTokens && weight.block_size >= kRun &&
         problem.K % kRun == 0 && starts_on_16_bytes(weight.packed, 0, 1) &&
         starts_on_16_bytes(problem.x.data, problem.x.row_stride, 2) && plan_for(problem).tiles != 0;
}

int64_t nf4_stream_workspace(const OnePass& problem) {
  return part_floats(problem, plan_for(problem)) + nf4_down_workspace(problem);
}

int nf4_stream_counters(const OnePass& problem) {
  return part_counters(plan_for(problem)) + nf4_down_counters(problem);
}

void nf4_stream(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream) {
  const StreamPlan plan = plan_for(problem);
  // The launches overlap, so they share nothing.
  nf4_down(problem, workspace + part_floats(problem, plan), counters + part_counters(plan), stream);
  const auto start = [&](auto number) {
    using T = decltype(number);
    problem.M <= 8 ? launch_stream<T, 1>(problem, weight, plan, workspace, counters, stream)
                   : launch_stream<T, 2>(problem, weight, plan, workspace, counters, stream);
  };
  problem.dtype == DType::kFloat16 ? start(half()) : start(bf16());
}

}  // namespace lora_kernels
