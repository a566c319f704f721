#include "nf4_stream.cuh"

#include <algorithm>

#include "launch.cuh"

namespace lora_kernels {
namespace {

using namespace nf4_stream_tile;

// The kernel takes any number, in chunks of what a block holds; with more, that of nf4.cuh or a decoded copy is faster.
constexpr int64_t kMostTokens = 16;

// launch(Shape()) with the least shape that takes all tokens.
template <class Launch>
auto with_shape(const OnePass& problem, Launch launch) {
  return problem.M <= 8 ? launch(Shape<1, 2, 4>()) : launch(Shape<2, 2, 1>());
}

// Beside its dynamic memory a block has a map of scales, and what every block takes.
template <class Shape>
int shared_bytes(int warps) {
  return Shape::bytes(warps) + 3072;
}

struct Chip {
  int multiprocessors, shared, shared_of_block;
};

Chip chip() {
  return {multiprocessors(), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// With blocks of so many warps, of which a multiprocessor takes several.
template <class Shape>
int blocks_at_once(const Chip& chip, int warps) {
  return std::min(chip.shared / shared_bytes<Shape>(warps), kMostThreads / 32 / warps) * chip.multiprocessors;
}

template <class Shape>
StreamPlan plan_with(const OnePass& problem, const Chip& chip, int warps) {
  StreamPlan plan{};
  plan.warps = warps;
  plan.groups = static_cast<int>(divide_up(problem.K, warps * kSlice));
  plan.chunks = static_cast<int>(divide_up(problem.M, Shape::kTokens));
  plan.tiles = static_cast<int>(divide_up(problem.N, kRows));
  const int64_t columns = int64_t{plan.groups} * plan.chunks;
  plan.blocks = static_cast<int>(std::clamp<int64_t>(blocks_at_once<Shape>(chip, warps) / columns, 1, plan.tiles));
  return plan;
}

// The number of warps with which the block that has most to do is through first.
template <class Shape>
StreamPlan plan_for(const OnePass& problem) {
  const Chip here = chip();
  StreamPlan best{};
  int64_t least = 0;
  for (int warps = kMostThreads / 32; warps > 0; warps /= 2) {
    if (shared_bytes<Shape>(warps) > here.shared_of_block) continue;
    const StreamPlan plan = plan_with<Shape>(problem, here, warps);
    const int64_t blocks = int64_t{plan.groups} * plan.chunks * plan.blocks;
    const int64_t at_once = blocks_at_once<Shape>(here, warps);
    const int64_t turns = divide_up(blocks, at_once) * divide_up(plan.tiles, plan.blocks);
    // The warps of a multiprocessor share its time; with fewer than 16, some of it is nobody's.
    const int64_t cost = turns * std::max<int64_t>(warps * at_once, 16 * here.multiprocessors);
    if (best.warps == 0 || cost < least) best = plan, least = cost;
  }
  return best;
}

int s_tiles(const OnePass& problem, const StreamPlan& plan) {
  return problem.precision == Precision::kSplit ? 0 : static_cast<int>(divide_up(problem.R, kRows)) * plan.chunks;
}

template <class Shape>
int64_t batches(const StreamPlan& plan) {
  return int64_t{plan.chunks} * plan.blocks * divide_up(plan.tiles, int64_t{plan.blocks} * Shape::kBatch);
}

template <class Shape>
int64_t workspace_of(const OnePass& problem, const StreamPlan& plan) {
  return s_tiles(problem, plan) * divide_up(problem.K, plan.warps * kShare) * Shape::kWarpFloats +
         batches<Shape>(plan) * plan.groups * Shape::kPartFloats;
}

template <class Shape>
int counters_of(const OnePass& problem, const StreamPlan& plan) {
  return kArrivals + s_tiles(problem, plan) + static_cast<int>(batches<Shape>(plan));
}

// Whether neighbours in a column lie side by side, from 16 bytes on.
bool vectors(const Matrix& matrix) {
  return matrix.row_stride == 1 && starts_on_16_bytes(matrix.data, matrix.column_stride, bytes_of(matrix.dtype));
}

template <class T, class Shape>
void launch_stream(const OnePass& problem, const Nf4& weight, const StreamPlan& plan, float* workspace, int* counters,
                   cudaStream_t stream) {
  int log2_block = 0;
  while (int64_t{1} << log2_block < weight.block_size) ++log2_block;
  const int64_t blocks = int64_t{plan.groups} * plan.chunks * plan.blocks;
  launch("nf4_stream_kernel", nf4_stream_kernel<T, Shape>, static_cast<unsigned>(blocks), plan.warps * 32,
         Shape::bytes(plan.warps), stream, problem, weight, log2_block, plan, vectors(problem.down),
         vectors(problem.up), workspace, counters);
}

}  // namespace

bool nf4_stream_fits(const OnePass& problem, const Nf4& weight) {
  return problem.dtype != DType::kFloat32 && problem.M <= kMostTokens && weight.block_size >= kRun &&
         problem.K % kRun == 0 && starts_on_16_bytes(weight.packed, 0, 1) &&
         starts_on_16_bytes(problem.x.data, problem.x.row_stride, 2);
}

int64_t nf4_stream_workspace(const OnePass& problem) {
  return with_shape(problem, [&](auto shape) {
    using Shape = decltype(shape);
    return workspace_of<Shape>(problem, plan_for<Shape>(problem));
  });
}

int nf4_stream_counters(const OnePass& problem) {
  return with_shape(problem, [&](auto shape) {
    using Shape = decltype(shape);
    return counters_of<Shape>(problem, plan_for<Shape>(problem));
  });
}

void nf4_stream(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream) {
  with_shape(problem, [&](auto shape) {
    using Shape = decltype(shape);
    const StreamPlan plan = plan_for<Shape>(problem);
    if (problem.dtype == DType::kFloat16) {
      launch_stream<half, Shape>(problem, weight, plan, workspace, counters, stream);
    } else {
      launch_stream<bf16, Shape>(problem, weight, plan, workspace, counters, stream);
    }
  });
}

}  // namespace lora_kernels
