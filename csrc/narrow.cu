#include "narrow.cuh"

#include <algorithm>

#include "launch.cuh"

namespace lora_kernels {
namespace {

// Up to so many tokens S takes one launch; beyond, reading x once for each column would cost more than a second one.
constexpr int64_t kMostFewRows = 32;
// No part is shorter than this: adding up the parts costs a launch, and a pass over them.
constexpr int64_t kLeastDepth = 256;

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

template <bool kDepthInner, int kRank>
void launch_by_dtype(const NarrowPlan& plan, DType dtype, bool in_float, cudaStream_t stream) {
  if (dtype == DType::kFloat32) {
    launch_narrow<FloatMath<float, kDepthInner, kRank>>(plan, stream);
  } else if (dtype == DType::kBFloat16) {
    in_float ? launch_narrow<FloatMath<bf16, kDepthInner, kRank>>(plan, stream)
             : launch_narrow<TensorMath<bf16, kDepthInner, kRank>>(plan, stream);
  } else {
    in_float ? launch_narrow<FloatMath<half, kDepthInner, kRank>>(plan, stream)
             : launch_narrow<TensorMath<half, kDepthInner, kRank>>(plan, stream);
  }
}

template <bool kDepthInner>
void launch_by_rank(const NarrowPlan& plan, DType dtype, bool in_float, cudaStream_t stream) {
  if (rank_step(plan.product[0].rank) == 16) {
    launch_by_dtype<kDepthInner, 16>(plan, dtype, in_float, stream);
  } else {
    launch_by_dtype<kDepthInner, 64>(plan, dtype, in_float, stream);
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
  if (problem.M <= kMostFewRows) {
    switch (problem.dtype) {
      case DType::kFloat32: return launch_few_rows<float>(p, !split, stream);
      case DType::kFloat16: return launch_few_rows<half>(p, !split, stream);
      case DType::kBFloat16: return launch_few_rows<bf16>(p, !split, stream);
    }
  }
  divide(plan);
  p.partials = workspace;
  launch_by_rank<true>(plan, problem.dtype, split, stream);
}

int64_t adapter_grads_workspace(const AdapterGrads& problem) {
  NarrowPlan plan = gradients(problem);
  return divide(plan);
}

void adapter_grads(const AdapterGrads& problem, float* workspace, cudaStream_t stream) {
  NarrowPlan plan = gradients(problem);
  divide(plan);
  NarrowProduct &first = plan.product[0], &second = plan.product[1];
  first.partials = workspace;
  second.partials = workspace + plan.parts * first.width * first.rank;
  launch_by_rank<false>(plan, problem.dtype, problem.narrow_dtype == DType::kFloat32, stream);
}

}  // namespace lora_kernels
