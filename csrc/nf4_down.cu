#include "nf4_down.cuh"

#include "launch.cuh"
#include "nf4_down.h"

namespace lora_kernels {
namespace {

using namespace nf4_down_tile;

// Two fragments of tokens.
constexpr int64_t kMostTokens = 16;

bool fits(const OnePass& problem) {
  // What float16 leaves of a float32 it has no exponents for.
  const bool splits = problem.precision == Precision::kSplit && problem.dtype != DType::kBFloat16;
  return problem.dtype != DType::kFloat32 && !splits && problem.M <= kMostTokens &&
         starts_on_16_bytes(problem.x.data, problem.x.row_stride, 2);
}

int64_t parts(const OnePass& problem) { return divide_up(problem.K, int64_t{kPart}); }

template <class T, bool kSplit, int kTokenTiles>
void launch_down(const OnePass& problem, float* workspace, int* counters, cudaStream_t stream) {
  const Matrix& down = problem.down;
  const bool vectors =
      down.row_stride == 1 && starts_on_16_bytes(down.data, down.column_stride, bytes_of(down.dtype));
  const dim3 grid(static_cast<unsigned>(parts(problem)), static_cast<unsigned>(nf4_down_counters(problem)));
  const auto kernel = nf4_down_kernel<T, kSplit, kTokenTiles>;
  leave_room("nf4_down_kernel", kernel);
  launch_overlapping("nf4_down_kernel", kernel, grid, kThreads, 0, stream, problem, vectors, workspace, counters);
}

template <class T, bool kSplit>
void launch_by_tokens(const OnePass& problem, float* workspace, int* counters, cudaStream_t stream) {
  problem.M <= 8 ? launch_down<T, kSplit, 1>(problem, workspace, counters, stream)
                 : launch_down<T, kSplit, 2>(problem, workspace, counters, stream);
}

}  // namespace

int nf4_down_blocks(const OnePass& problem) { return static_cast<int>(parts(problem)) * nf4_down_counters(problem); }

int nf4_down_counters(const OnePass& problem) {
  return fits(problem) ? static_cast<int>(divide_up(problem.R, int64_t{kRows})) : 0;
}

int64_t nf4_down_workspace(const OnePass& problem) {
  return fits(problem) ? nf4_down_blocks(problem) * kRows * kMostTokens : one_pass_workspace(problem);
}

void nf4_down(const OnePass& problem, float* workspace, int* counters, cudaStream_t stream) {
  if (!fits(problem)) return adapter_down(problem, workspace, stream);
  if (problem.precision == Precision::kSplit) {
    launch_by_tokens<bf16, true>(problem, workspace, counters, stream);
  } else if (problem.dtype == DType::kFloat16) {
    launch_by_tokens<half, false>(problem, workspace, counters, stream);
  } else {
    launch_by_tokens<bf16, false>(problem, workspace, counters, stream);
  }
}

}  // namespace lora_kernels
