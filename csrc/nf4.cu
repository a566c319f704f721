#include "nf4.cuh"

#include <algorithm>

#include "launch.cuh"
#include "nf4_stream.h"

namespace lora_kernels {
namespace {

// Of a weight that does not stream. Beyond, one pass over it that decodes it, and a dense product, take less time.
constexpr int64_t kMostTokens = 3 * nf4_tile::kTokens;

template <class T>
void launch_dequantize(const Nf4& weight, void* out, cudaStream_t stream) {
  const int64_t words = divide_up(weight.rows * weight.columns, 8);
  const auto blocks = static_cast<unsigned>(divide_up(words, kDequantizeThreads * kWordsPerThread));
  const bool aligned = reinterpret_cast<uintptr_t>(weight.packed) % 4 == 0;
  const auto kernel = aligned ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
  launch("dequantize_kernel", kernel, blocks, kDequantizeThreads, 0, stream, weight, log2_of(weight.block_size),
         static_cast<T*>(out));
}

template <class T, int kTiles, int kTokenTiles>
void launch_forward(const OnePass& problem, const Nf4& weight, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(problem.N, kTiles * 16)),
                  static_cast<unsigned>(divide_up(problem.M, nf4_tile::kTokens)));
  launch("nf4_forward_kernel", nf4_forward_kernel<T, kTiles, kTokenTiles>, grid, nf4_tile::kThreads, 0, stream, problem,
         weight, log2_of(weight.block_size));
}

template <class T>
void launch_by_shape(const OnePass& problem, const Nf4& weight, cudaStream_t stream) {
  // More rows a block read x less often, where enough blocks remain.
  const bool tall = problem.N >= 64 * multiprocessors();
  if (problem.M <= 8) {
    tall ? launch_forward<T, 4, 1>(problem, weight, stream) : launch_forward<T, 2, 1>(problem, weight, stream);
  } else {
    tall ? launch_forward<T, 4, 2>(problem, weight, stream) : launch_forward<T, 2, 2>(problem, weight, stream);
  }
}

}  // namespace

void dequantize(const Nf4& weight, DType dtype, void* out, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32: return launch_dequantize<float>(weight, out, stream);
    case DType::kFloat16: return launch_dequantize<half>(weight, out, stream);
    case DType::kBFloat16: return launch_dequantize<bf16>(weight, out, stream);
  }
}

bool nf4_forward_fits(const OnePass& problem, const Nf4& weight) {
  if (nf4_stream_fits(problem, weight)) return true;
  // A lane's codes may not lie in two rows, nor start off 16 bytes.
  return problem.dtype != DType::kFloat32 && problem.M <= kMostTokens && problem.K % nf4_tile::kLaneCodes == 0 &&
         starts_on_16_bytes(weight.packed, 0, 1) && starts_on_16_bytes(problem.x.data, problem.x.row_stride, 2);
}

int nf4_forward_counters(const OnePass& problem, const Nf4& weight) {
  return nf4_stream_fits(problem, weight) ? nf4_stream_counters(problem) : 0;
}

int64_t nf4_forward_workspace(const OnePass& problem, const Nf4& weight) {
  const int64_t streams = nf4_stream_fits(problem, weight) ? nf4_stream_workspace(problem) : 0;
  return std::max(streams, one_pass_workspace(problem));
}

void nf4_forward(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, cudaStream_t stream) {
  if (nf4_stream_fits(problem, weight)) return nf4_stream(problem, weight, workspace, counters, stream);
  adapter_down(problem, workspace, stream);
  if (problem.dtype == DType::kFloat16) {
    launch_by_shape<half>(problem, weight, stream);
  } else {
    launch_by_shape<bf16>(problem, weight, stream);
  }
}

}  // namespace lora_kernels
