#include "nf4_dx.cuh"

#include <algorithm>
#include <climits>

#include "launch.cuh"
#include "nf4_down.h"

namespace lora_kernels {
namespace {

using namespace nf4_dx_tile;

// Beyond, one pass over the weight that decodes it, and a dense product, take less time.
constexpr int64_t kMostTokens = 64;
// Beside one another in a block. More read X less often and hand over more sums; on an H100 two were best or near it.
constexpr int kColumnWarps = 2;

// Whether runs of 64 codes lie in one row and have one scale; those of 32 do.
bool has_long_runs(const OnePass& problem, const Nf4& weight) {
  return weight.block_size >= kPanel && problem.N % kPanel == 0;
}

// launch(Shape()) with the least shape that takes all tokens, and the longest runs.
template <int kRun, class Launch>
auto with_tokens(const OnePass& problem, Launch launch) {
  if (problem.M <= 8) return launch(Shape<1, 128, kRun, 4, 2>());
  if (problem.M <= 16) return launch(Shape<2, 64, kRun, 4, 2>());
  if (problem.M <= 32) return launch(Shape<4, 64, kRun, 4, 2>());
  return launch(Shape<8, 64, kRun, 4, 1>());
}

template <class Launch>
auto with_shape(const OnePass& problem, const Nf4& weight, Launch launch) {
  return has_long_runs(problem, weight) ? with_tokens<kPanel>(problem, launch) : with_tokens<kCopy>(problem, launch);
}

struct DxChip {
  int multiprocessors, shared, shared_of_block;
};

DxChip dx_chip() {
  return {multiprocessors(), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Beside its dynamic memory a block has a map of scales, and what every block takes.
template <class Shape>
int dx_shared_bytes(int warps, int column_warps) {
  return Shape::bytes(warps, column_warps) + kNestedBlock * 4 + 1024;
}

template <class Shape>
DxPlan dx_plan_with(const OnePass& problem, const DxChip& chip, int warps) {
  DxPlan plan{};
  plan.warps = warps, plan.column_warps = std::min(warps, kColumnWarps);
  plan.strips = static_cast<int>(divide_up(problem.N, plan.column_warps * Shape::kColumns));
  plan.steps = static_cast<int>(divide_up(problem.K, kRows));
  const int at_once = std::min(chip.shared / dx_shared_bytes<Shape>(warps, plan.column_warps),
                               Shape::kBlocks * kMostThreads / 32 / warps) * chip.multiprocessors;
  // Beside a block of nf4_down there may be room for one less.
  const int left = std::max(at_once - nf4_down_blocks(problem), at_once / 2);
  const int most = static_cast<int>(divide_up(plan.steps, warps / plan.column_warps));
  plan.groups = std::clamp(left / plan.strips, 1, most);
  return plan;
}

// With as many warps as there is shared memory for.
template <class Shape>
DxPlan dx_plan_for(const OnePass& problem) {
  const DxChip chip = dx_chip();
  int warps = kMostThreads / 32;
  while (dx_shared_bytes<Shape>(warps, std::min(warps, kColumnWarps)) > chip.shared_of_block) warps /= 2;
  return dx_plan_with<Shape>(problem, chip, warps);
}

int64_t parts_of(const OnePass& problem, const DxPlan& plan) { return plan.groups * problem.M * problem.N; }

template <class T, class Shape>
void launch_dx(const OnePass& problem, const Nf4& weight, const DxPlan& plan, float* parts, cudaStream_t stream) {
  launch_overlapping("nf4_dx_kernel", nf4_dx_kernel<T, Shape>, static_cast<unsigned>(plan.strips * plan.groups),
                     plan.warps * 32, Shape::bytes(plan.warps, plan.column_warps), stream, problem, weight,
                     log2_of(weight.block_size), plan, parts);
  const dim3 grid(static_cast<unsigned>(divide_up(problem.N, kSumThreads)),
                  static_cast<unsigned>(divide_up(problem.M, kSumTokens)));
  launch_overlapping("nf4_dx_sum_kernel", nf4_dx_sum_kernel<T>, grid, kSumThreads, 0, stream, problem, plan.groups,
                     parts);
}

}  // namespace

bool nf4_backward_fits(const OnePass& problem, const Nf4& weight) {
  // Codes are copied, and X is loaded, 16 bytes at a time, from 16 bytes on.
  return problem.dtype != DType::kFloat32 && problem.M <= kMostTokens && problem.N % kCopy == 0 &&
         problem.K % 8 == 0 && starts_on_16_bytes(weight.packed, 0, 1) &&
         starts_on_16_bytes(problem.x.data, problem.x.row_stride, 2) && problem.x.row_stride <= INT_MAX;
}

int64_t nf4_backward_workspace(const OnePass& problem, const Nf4& weight) {
  return with_shape(problem, weight, [&](auto shape) {
    return parts_of(problem, dx_plan_for<decltype(shape)>(problem)) + nf4_down_workspace(problem);
  });
}

int nf4_backward_counters(const OnePass& problem) { return nf4_down_counters(problem); }

void nf4_backward(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream) {
  with_shape(problem, weight, [&](auto shape) {
    using Shape = decltype(shape);
    const DxPlan plan = dx_plan_for<Shape>(problem);
    // The launches overlap, so they share nothing.
    nf4_down(problem, workspace + parts_of(problem, plan), counters, stream);
    if (problem.dtype == DType::kFloat16) {
      launch_dx<half, Shape>(problem, weight, plan, workspace, stream);
    } else {
      launch_dx<bf16, Shape>(problem, weight, plan, workspace, stream);
    }
  });
}

}  // namespace lora_kernels
