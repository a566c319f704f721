#include "narrow.cuh"

#include <algorithm>
#include <type_traits>

#include "adapter_grads.cuh"
#include "launch.cuh"

namespace lora_kernels {
namespace {

// Up to so many tokens S takes one launch; beyond, reading x once for each column would cost more than a second one.
constexpr int64_t kMostFewRows = 32;
// No part is shorter than this: adding up the parts costs a launch, and a pass over them.
constexpr int64_t kLeastDepth = 256;
// Nor does a block of adapter_grads_kernel take fewer steps.
constexpr int64_t kLeastShare = 2;

int64_t rank_step(int64_t rank) { return rank <= 16 ? 16 : 64; }

int64_t blocks_of(int64_t width) { return divide_up(width, kNarrowWidth); }

// Divides the depth so that every multiprocessor has a few blocks. Returns the floats that the parts take.
int64_t divide(NarrowPlan& plan) {
  const NarrowProduct &first = plan.product[0], &second = plan.product[1];
  const int64_t depth = first.depth;
  const int64_t chunks = divide_up(first.rank, rank_step(first.rank));
  const int64_t blocks = (blocks_of(first.width) + blocks_of(second.width)) * chunks;
  const int64_t wanted = divide_up(4 * multiprocessors(), blocks);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, depth / kLeastDepth));
  // A multiple of every kernel's step.
  plan.depth_per_part = divide_up(divide_up(depth, parts), 64) * 64;
  plan.parts = static_cast<int>(divide_up(depth, plan.depth_per_part));
  plan.blocks_of_first = static_cast<int>(blocks_of(first.width));
  return plan.parts > 1 ? plan.parts * (first.width + second.width) * first.rank : 0;
}

template <class Math>
void launch_narrow(const NarrowPlan& plan, cudaStream_t stream) {
  const NarrowProduct &first = plan.product[0], &second = plan.product[1];
  const int64_t step = rank_step(first.rank), chunks = divide_up(first.rank, step);
  const int64_t blocks = blocks_of(first.width) + blocks_of(second.width);
  const dim3 grid(static_cast<unsigned>(blocks * chunks), static_cast<unsigned>(plan.parts));
  launch("narrow_kernel", narrow_kernel<Math>, grid, kNarrowThreads, 0, stream, plan, static_cast<int>(chunks),
         static_cast<int>(step));
  if (plan.parts > 1) {
    const int64_t elements = (first.width + second.width) * first.rank;
    launch("sum_parts_kernel", sum_parts_kernel, static_cast<unsigned>(divide_up(elements, 256)), 256, 0, stream, plan);
  }
}

template <bool kDepthInner, class T>
void launch_floats(const NarrowPlan& plan, cudaStream_t stream) {
  rank_step(plan.product[0].rank) == 16 ? launch_narrow<FloatMath<T, kDepthInner, 16>>(plan, stream)
                                        : launch_narrow<FloatMath<T, kDepthInner, 64>>(plan, stream);
}

template <class T>
void launch_tensors(const NarrowPlan& plan, cudaStream_t stream) {
  rank_step(plan.product[0].rank) == 16 ? launch_narrow<TensorMath<T, 16>>(plan, stream)
                                        : launch_narrow<TensorMath<T, 64>>(plan, stream);
}

// launch(T()) with the type that a dtype names.
template <class Launch>
void with_type(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kFloat32: return launch(float());
    case DType::kFloat16: return launch(half());
    case DType::kBFloat16: return launch(bf16());
  }
}

bool narrow_vectors(const NarrowProduct& p) {
  // Groups lie along the depth where its stride is 1, else along the rank.
  const bool along_depth = p.stride_d == 1;
  const int64_t other = along_depth ? p.stride_r : p.stride_d;
  return (along_depth || p.stride_r == 1) && starts_on_16_bytes(p.narrow, other, bytes_of(p.narrow_dtype));
}

NarrowProduct down_product(const OnePass& problem) {
  NarrowProduct p{};
  p.width = problem.M, p.depth = problem.K, p.rank = problem.R;
  p.wide = problem.x.data, p.wide_stride = problem.x.row_stride;
  p.wide_vectors = starts_on_16_bytes(p.wide, p.wide_stride, bytes_of(problem.dtype));
  p.narrow = problem.down.data, p.narrow_dtype = problem.down.dtype;
  p.stride_d = problem.down.row_stride, p.stride_r = problem.down.column_stride;
  p.narrow_vectors = narrow_vectors(p);
  if (problem.mask_x) p.dropout = problem.dropout;
  p.scale = problem.scale, p.scale_tensor = problem.scale_tensor;
  p.out = problem.s, p.out_dtype = s_dtype(problem);
  p.out_stride_w = problem.R, p.out_stride_r = 1;
  return p;
}

template <class T>
void launch_few_rows(const NarrowProduct& p, bool round_narrow, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.rank), static_cast<unsigned>(divide_up(p.width, kFewTokens)));
  leave_room("few_rows_kernel", few_rows_kernel<T>);
  launch("few_rows_kernel", few_rows_kernel<T>, grid, kFewThreads, 0, stream, p, round_narrow);
}

NarrowProduct gradient(const AdapterGrads& problem, const Matrix& wide, int64_t width, const void* narrow) {
  NarrowProduct p{};
  p.width = width, p.depth = problem.M, p.rank = problem.R;
  p.wide = wide.data, p.wide_stride = wide.row_stride;
  p.wide_vectors = starts_on_16_bytes(p.wide, p.wide_stride, bytes_of(problem.dtype));
  p.narrow = narrow, p.narrow_dtype = problem.narrow_dtype;
  p.stride_d = problem.R, p.stride_r = 1;
  p.narrow_vectors = narrow_vectors(p);
  p.scale = 1.0f;
  p.out_dtype = problem.grad_dtype;
  return p;
}

// dA, then dB; where only one is wanted, it is the first and the second is empty.
NarrowPlan gradients(const AdapterGrads& problem) {
  NarrowPlan plan{};
  int count = 0;
  if (problem.t != nullptr) {
    NarrowProduct& p = plan.product[count++] = gradient(problem, problem.x, problem.K, problem.t);
    p.dropout = problem.dropout;
    p.out = problem.dA, p.out_stride_w = 1, p.out_stride_r = problem.K;
  }
  if (problem.s != nullptr) {
    NarrowProduct& p = plan.product[count++] = gradient(problem, problem.dy, problem.N, problem.s);
    p.out = problem.dB, p.out_stride_w = problem.R, p.out_stride_r = 1;
  }
  return plan;
}

// float32 operands, and float32 adapters over a 16-bit base.
bool in_float(const AdapterGrads& problem) { return problem.narrow_dtype == DType::kFloat32; }

// The line of steps of dA and dB, cut into shares.
GradientPlan share_out(const NarrowPlan& gradients) {
  using namespace gradient_tile;
  const NarrowProduct &first = gradients.product[0], &second = gradients.product[1];
  GradientPlan plan{};
  plan.product[0] = first, plan.product[1] = second;
  plan.blocks_of_first = static_cast<int>(divide_up(first.width, kWidth));
  plan.chunks = static_cast<int>(divide_up(first.rank, rank_step(first.rank)));
  plan.tiles = (plan.blocks_of_first + static_cast<int>(divide_up(second.width, kWidth))) * plan.chunks;
  plan.steps = divide_up(first.depth, kDepth);
  const int64_t at_a_time = kBlocksAtATime * multiprocessors();
  plan.share = divide_up(plan.tiles * plan.steps, at_a_time);
  // Shares that end where tiles end are fewer parts to add, and blocks of neighbouring columns go down the same rows
  // together. It may take a sixteenth longer.
  const int64_t parts = std::max<int64_t>(1, at_a_time / plan.tiles), even = divide_up(plan.steps, parts);
  if (even * 16 <= plan.share * 17) plan.share = even;
  plan.share = std::max(plan.share, kLeastShare);
  plan.blocks = static_cast<int>(divide_up(plan.tiles * plan.steps, plan.share));
  return plan;
}

template <class T>
void launch_gradients(const GradientPlan& plan, cudaStream_t stream) {
  using namespace gradient_tile;
  const auto blocks = static_cast<unsigned>(plan.blocks);
  const auto start = [&](auto kernel, int shared_bytes) {
    launch("adapter_grads_kernel", kernel, blocks, kThreads, shared_bytes, stream, plan);
  };
  rank_step(plan.product[0].rank) == 16 ? start(adapter_grads_kernel<T, 16>, kSharedBytes<T, 16>)
                                        : start(adapter_grads_kernel<T, 64>, kSharedBytes<T, 64>);
}

}  // namespace

int64_t one_pass_workspace(const OnePass& problem) {
  if (problem.M <= kMostFewRows) return 0;
  NarrowPlan plan{};
  plan.product[0] = down_product(problem);
  return divide(plan);
}

void adapter_down(const OnePass& problem, float* workspace, cudaStream_t stream) {
  NarrowPlan plan{};
  NarrowProduct& p = plan.product[0] = down_product(problem);
  const bool split = problem.precision == Precision::kSplit;
  with_type(problem.dtype, [&](auto number) {
    using T = decltype(number);
    if (problem.M <= kMostFewRows) return launch_few_rows<T>(p, !split, stream);
    divide(plan);
    p.partials = workspace;
    if constexpr (!std::is_same_v<T, float>) {
      if (!split) return launch_tensors<T>(plan, stream);
    }
    launch_floats<true, T>(plan, stream);
  });
}

int adapter_grads_counters(const AdapterGrads& problem) {
  return in_float(problem) ? 0 : share_out(gradients(problem)).tiles;
}

int64_t adapter_grads_workspace(const AdapterGrads& problem) {
  NarrowPlan plan = gradients(problem);
  if (in_float(problem)) return divide(plan);
  const GradientPlan shared = share_out(plan);
  return (shared.tiles + shared.blocks) * gradient_tile::kWidth * rank_step(problem.R);
}

void adapter_grads(const AdapterGrads& problem, float* workspace, int* counters, cudaStream_t stream) {
  NarrowPlan plan = gradients(problem);
  if (in_float(problem)) {
    divide(plan);
    NarrowProduct &first = plan.product[0], &second = plan.product[1];
    first.partials = workspace;
    second.partials = workspace + plan.parts * first.width * first.rank;
    with_type(problem.dtype, [&](auto number) { launch_floats<false, decltype(number)>(plan, stream); });
  } else {
    GradientPlan shared = share_out(plan);
    shared.partials = workspace, shared.arrivals = counters;
    problem.dtype == DType::kBFloat16 ? launch_gradients<bf16>(shared, stream) : launch_gradients<half>(shared, stream);
  }
}

}  // namespace lora_kernels
