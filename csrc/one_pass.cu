#include "one_pass.cuh"

#include "launch.cuh"
#include "one_pass_float.cuh"

namespace lora_kernels {
namespace {

template <class T, Layout kLayout>
void launch_tiles(const OnePass& problem, cudaStream_t stream) {
  using namespace one_pass_tile;
  const int64_t tiles = divide_up(problem.M, kM) * divide_up(problem.N, kN);
  launch("one_pass_kernel", one_pass_kernel<T, kLayout>, static_cast<unsigned>(tiles), kThreads, kSharedBytes, stream,
         problem);
}

template <class T>
void launch_by_layout(const OnePass& problem, cudaStream_t stream) {
  const Matrix &x = problem.x, &w = problem.weight;
  const bool is_nk = w.row_stride == 1, is_kn = w.column_stride == 1;
  const bool x_fits = starts_on_16_bytes(x.data, x.row_stride, 2) && problem.K % 8 == 0;
  // With a stride of 1 in both, the columns that count decide which way is whole groups of eight.
  if (x_fits && is_nk && starts_on_16_bytes(w.data, w.column_stride, 2)) {
    launch_tiles<T, Layout::kNK>(problem, stream);
  } else if (x_fits && is_kn && problem.N % 8 == 0 && starts_on_16_bytes(w.data, w.row_stride, 2)) {
    launch_tiles<T, Layout::kKN>(problem, stream);
  } else {
    launch_tiles<T, Layout::kAny>(problem, stream);
  }
}

void launch_float(const OnePass& problem, cudaStream_t stream) {
  using namespace float_tile;
  // Row tiles may be more than a grid has in its second dimension, column tiles hardly.
  const dim3 grid(static_cast<unsigned>(divide_up(problem.M, kM)), static_cast<unsigned>(divide_up(problem.N, kN)));
  launch("one_pass_float_kernel", one_pass_float_kernel, grid, kThreads, 0, stream, problem);
}

}  // namespace

void one_pass(const OnePass& problem, float* workspace, cudaStream_t stream) {
  adapter_down(problem, workspace, stream);
  switch (problem.dtype) {
    case DType::kFloat32: return launch_float(problem, stream);
    case DType::kFloat16: return launch_by_layout<half>(problem, stream);
    case DType::kBFloat16: return launch_by_layout<bf16>(problem, stream);
  }
}

}  // namespace lora_kernels
