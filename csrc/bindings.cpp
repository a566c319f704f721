// From PyTorch's tensors to the structs of problem.h, and nothing else. lora_kernels/backends/cuda.py checks what it
// passes; here nothing is checked again.

#include <torch/extension.h>
#include <torch/version.h>

#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "hopper_one_pass.h"
#include "launches.h"

#define TEXT_OF(words) #words
#define TEXT(words) TEXT_OF(words)

namespace {

using at::Tensor;
using lora_kernels::AdapterGrads;
using lora_kernels::DType;
using lora_kernels::Matrix;
using lora_kernels::Nf4;
using lora_kernels::OnePass;
using lora_kernels::Precision;
using MaybeTensor = std::optional<Tensor>;
// packed, absmax, nested_absmax, nested_map, offset, block_size, rows, columns.
using Nf4Weight = std::tuple<Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, int64_t, int64_t, int64_t>;

// Launches go to the current device; the tensors may be on another.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) {
    lora_kernels::check(cudaGetDevice(&before_), "cudaGetDevice");
    lora_kernels::check(cudaSetDevice(tensor.get_device()), "cudaSetDevice");
  }
  ~OnDeviceOf() { cudaSetDevice(before_); }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

 private:
  int before_ = 0;
};

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, std::string("a tensor was ") + c10::toString(tensor.scalar_type()) + ", which no kernel reads");
  }
}

Matrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor)};
}

const void* pointer(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

lora_kernels::Dropout dropout_of(const MaybeTensor& seed, int64_t threshold) {
  return {seed ? seed->const_data_ptr<int64_t>() : nullptr, static_cast<int32_t>(threshold)};
}

Nf4 nf4_of(const Nf4Weight& weight) {
  const auto& [packed, absmax, nested_absmax, nested_map, offset, block_size, rows, columns] = weight;
  return {packed.const_data_ptr<uint8_t>(),
          absmax.const_data_ptr(),
          static_cast<const float*>(pointer(nested_absmax)),
          static_cast<const float*>(pointer(nested_map)),
          static_cast<const float*>(pointer(offset)),
          rows,
          columns,
          block_size};
}

Tensor floats(const Tensor& like, int64_t count) { return at::empty({count}, like.options().dtype(at::kFloat)); }

cudaStream_t stream_of(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

bool is_hopper() {
  return lora_kernels::attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         lora_kernels::attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

void run_hopper(const OnePass& problem, const Tensor& like, const Tensor& zeros, cudaStream_t stream) {
  const size_t bytes = lora_kernels::hopper_workspace_bytes(problem, lora_kernels::multiprocessors());
  TORCH_CHECK(static_cast<size_t>(zeros.numel()) >= lora_kernels::hopper_counter_count(problem), "too few counters");
  const Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
  lora_kernels::check(
      lora_kernels::hopper_one_pass(problem, workspace.mutable_data_ptr(), zeros.mutable_data_ptr<int>(), stream),
      "hopper_one_pass");
}

// The launches of a call with a packed weight, which overlap, count in the same zeros as those of the next call on a stream:
// no other thread may come between them. csrc/host/ calls without Python's lock. Who counts elsewhere waits for nobody, but
// for what has the same lock by chance.
std::mutex& lock_of(const int* counters) {
  static std::array<std::mutex, 64> locks;
  return locks[reinterpret_cast<uintptr_t>(counters) / 512 % locks.size()];
}

// What is multiplied, but for the weight.
OnePass problem_of(const Tensor& x, const Tensor& down, const Tensor& up, int64_t precision) {
  OnePass problem{};
  problem.M = x.size(0), problem.K = x.size(1), problem.N = up.size(1), problem.R = down.size(1);
  problem.dtype = dtype_of(x);
  problem.precision = static_cast<Precision>(precision);
  problem.x = matrix(x);
  problem.down = matrix(down), problem.up = matrix(up);
  return problem;
}

void nf4_forward_on(const OnePass& problem, const Nf4& weight, float* workspace, int* counters, void* stream) {
  const std::lock_guard<std::mutex> alone(lock_of(counters));
  lora_kernels::nf4_forward(problem, weight, workspace, counters, static_cast<cudaStream_t>(stream));
}

// out and S of problem.h. The weight is [K, N], or an NF4 weight as it is stored: [N, K] forward, [K, N] backward.
// `portable` forgoes the kernel for the chip at hand, for the one that runs everywhere. `zeros` is what kernels count in,
// and leave zero.
std::tuple<Tensor, Tensor> one_pass(const Tensor& x, const MaybeTensor& weight, const std::optional<Nf4Weight>& nf4,
                                    const Tensor& down, const Tensor& up, const MaybeTensor& bias, double scale,
                                    const MaybeTensor& scale_tensor, const MaybeTensor& seed, int64_t threshold,
                                    bool forward, int64_t precision, bool portable, const Tensor& zeros,
                                    int64_t raw_stream) {
  const OnDeviceOf device(x);
  const cudaStream_t stream = stream_of(raw_stream);
  OnePass problem = problem_of(x, down, up, precision);
  const Tensor bias_row = bias ? bias->contiguous() : Tensor();
  if (bias) problem.bias = bias_row.const_data_ptr(), problem.bias_dtype = dtype_of(bias_row);
  problem.scale = static_cast<float>(scale);
  problem.scale_tensor = static_cast<const float*>(pointer(scale_tensor));
  problem.dropout = dropout_of(seed, threshold);
  problem.mask_x = forward;

  const Tensor out = at::empty({problem.M, problem.N}, x.options());
  const auto s_type = problem.precision == Precision::kSplit ? at::kFloat : x.scalar_type();
  const Tensor s = at::empty({problem.M, problem.R}, x.options().dtype(s_type));
  if (problem.M == 0) return {out, s};
  problem.out = out.mutable_data_ptr(), problem.s = s.mutable_data_ptr();

  Tensor dense;
  if (weight) {
    dense = *weight;
  } else {
    const Nf4 packed = nf4_of(*nf4);
    if (forward && lora_kernels::nf4_forward_fits(problem, packed)) {
      TORCH_CHECK(zeros.numel() >= lora_kernels::nf4_forward_counters(problem, packed), "too few counters");
      const Tensor workspace = floats(x, lora_kernels::nf4_forward_workspace(problem, packed));
      nf4_forward_on(problem, packed, workspace.mutable_data_ptr<float>(), zeros.mutable_data_ptr<int>(), stream);
      return {out, s};
    }
    if (!forward && lora_kernels::nf4_backward_fits(problem, packed)) {
      TORCH_CHECK(zeros.numel() >= lora_kernels::nf4_backward_counters(problem), "too few counters");
      const Tensor workspace = floats(x, lora_kernels::nf4_backward_workspace(problem, packed));
      int* const counters = zeros.mutable_data_ptr<int>();
      const std::lock_guard<std::mutex> alone(lock_of(counters));
      lora_kernels::nf4_backward(problem, packed, workspace.mutable_data_ptr<float>(), counters, stream);
      return {out, s};
    }
    const Tensor stored = at::empty({packed.rows, packed.columns}, x.options());
    lora_kernels::dequantize(packed, problem.dtype, stored.mutable_data_ptr(), stream);
    dense = forward ? stored.t() : stored;
  }
  problem.weight = matrix(dense);
  if (!portable && is_hopper() && lora_kernels::hopper_one_pass_fits(problem)) {
    run_hopper(problem, x, zeros, stream);
  } else {
    const Tensor workspace = floats(x, lora_kernels::one_pass_workspace(problem));
    lora_kernels::one_pass(problem, workspace.mutable_data_ptr<float>(), stream);
  }
  return {out, s};
}

// dA where x and t are given, and dB where s is. `zeros` is what the kernel counts in, and leaves zero.
std::tuple<MaybeTensor, MaybeTensor> adapter_grads(const MaybeTensor& x, const Tensor& dy, const MaybeTensor& s,
                                                   const MaybeTensor& t, const MaybeTensor& seed, int64_t threshold,
                                                   bool in_float32, const Tensor& zeros, int64_t raw_stream) {
  const OnDeviceOf device(dy);
  const bool want_a = x && t;
  const Tensor& narrow = want_a ? *t : *s;
  AdapterGrads problem{};
  problem.M = dy.size(0), problem.N = dy.size(1), problem.R = narrow.size(1);
  problem.dtype = dtype_of(dy), problem.narrow_dtype = dtype_of(narrow);
  problem.dy = matrix(dy);
  problem.s = pointer(s);
  const auto options = in_float32 ? dy.options().dtype(at::kFloat) : dy.options();
  MaybeTensor dA, dB;
  if (want_a) {
    problem.K = x->size(1);
    problem.x = matrix(*x);
    problem.t = t->const_data_ptr();
    problem.dropout = dropout_of(seed, threshold);
    dA = at::empty({problem.R, problem.K}, options);
    problem.dA = dA->mutable_data_ptr();
  }
  if (s) {
    dB = at::empty({problem.N, problem.R}, options);
    problem.dB = dB->mutable_data_ptr();
  }
  problem.grad_dtype = dtype_of(want_a ? *dA : *dB);
  if (problem.M == 0) {
    if (dA) dA->zero_();
    if (dB) dB->zero_();
    return {dA, dB};
  }
  TORCH_CHECK(zeros.numel() >= lora_kernels::adapter_grads_counters(problem), "too few counters");
  const Tensor workspace = floats(dy, lora_kernels::adapter_grads_workspace(problem));
  lora_kernels::adapter_grads(problem, workspace.mutable_data_ptr<float>(), zeros.mutable_data_ptr<int>(),
                              stream_of(raw_stream));
  return {dA, dB};
}

// The address of nf4_forward_on, and how many floats it works in and zeros it counts in for operands like these.
std::tuple<uint64_t, int64_t, int64_t> nf4_forward_launch(const Tensor& x, const Nf4Weight& nf4, const Tensor& down,
                                                          const Tensor& up, int64_t precision) {
  const OnDeviceOf device(x);
  const OnePass problem = problem_of(x, down, up, precision);
  const Nf4 packed = nf4_of(nf4);
  constexpr lora_kernels::Nf4Forward forward = &nf4_forward_on;
  return {reinterpret_cast<uint64_t>(forward), lora_kernels::nf4_forward_workspace(problem, packed),
          lora_kernels::nf4_forward_counters(problem, packed)};
}

// Writes the weight to `out` [rows, columns], contiguous.
void dequantize(const Nf4Weight& weight, const Tensor& out, int64_t raw_stream) {
  const OnDeviceOf device(out);
  lora_kernels::dequantize(nf4_of(weight), dtype_of(out), out.mutable_data_ptr(), stream_of(raw_stream));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("one_pass", &one_pass);
  module.def("adapter_grads", &adapter_grads);
  module.def("dequantize", &dequantize);
  module.def("nf4_forward_launch", &nf4_forward_launch);
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("sources") = TEXT(LORA_KERNELS_SOURCES);
}
