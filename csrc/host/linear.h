// The launches of one layer, and its node of the autograd graph, as lora_kernels/autograd.py defines it.

#pragma once

#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <optional>

#include "node.h"
#include "stream.h"
#include "wide.h"

namespace lora_kernels::host {

// The bits of the mask [rows, columns] of a seed, as mask_launch.py draws them; nothing where nothing is dropped.
inline Tensor drawn(Launching& launching, const Tensor& seed, int64_t rows, int64_t columns) {
  if (!seed.defined()) return seed;
  const Tensor bits = fresh({rows, (columns + 127) / 128 * 4}, seed, at::kInt);
  const void* const tensors[] = {address(seed), address(bits)};
  launching.next()(tensors, nullptr, launching.stream);
  return bits;
}

// out = left op(W) + mask(S U) + bias and S = scale * mask(left) D, of tensors in the order of launch.py's one_pass.
inline void launch_one_pass(Launching& launching, const Tensor& left, const Tensor& weight, const Tensor& out,
                            const Tensor& down, const Tensor& up, const Tensor& bias, const Tensor& s,
                            const Tensor& mask, double scale) {
  if (launching.is_wide()) {
    launch_each(launching, {{{left, weight, down, up, bias, s, scale}}}, 1, {out});
    return;
  }
  Launch& launch = launching.next();
  const Tensor workspace = fresh({launch.workspace_size}, left, at::kFloat);
  Tensor kept;
  const void* const tensors[] = {address(left), address(weight), address(out), address(down), address(up),
                                 address(bias), address(s), address(workspace),
                                 zeros().of(left.device(), launching.stream, launch.counters, kept), address(mask),
                                 nullptr};
  const float number = static_cast<float>(scale);
  launch(tensors, &number, launching.stream);
}

// y = x W^T + S B^T + b and S = scale * mask(x) A^T of a layer, with W decoded before it or inside of it, or dense.
inline void launch_layer(Launching& launching, const Tensor& x, const Layer& layer, const Tensor& y, const Tensor& s,
                         const Tensor& seed, double p, double scale) {
  const Tensor bias = bias_of(layer);
  if (!launching.decodes()) {
    const Tensor weight = dense_of(layer.weight, launching, x, x.scalar_type());
    const Tensor mask = drawn(launching, seed, s.size(0), layer.lora_A->size(1));
    launch_one_pass(launching, x, weight, y, *layer.lora_A, *layer.lora_B, bias, s, mask, scale);
    return;
  }
  if (launching.streams()) {
    launch_stream(launching, x, layer, y, s, seed, p, scale);
    return;
  }
  const Tensor mask = drawn(launching, seed, s.size(0), layer.lora_A->size(1));
  Launch& launch = launching.next();
  const Tensor workspace = fresh({launch.workspace_size}, x, at::kFloat);
  Tensor kept;
  const Weight::Parts& parts = layer.weight.parts;
  const void* const tensors[] = {address(x), address(parts[0]), address(parts[1]), address(parts[2]), address(parts[3]),
                                 address(parts[4]), address(y), address(*layer.lora_A), address(*layer.lora_B),
                                 address(bias), address(s), address(workspace),
                                 zeros().of(x.device(), launching.stream, launch.counters, kept), address(mask),
                                 nullptr};
  const float number = static_cast<float>(scale);
  launch(tensors, &number, launching.stream);
}

// out = left right by the libraries, as eager.py's _product.
inline void library_product(Tensor out, const Tensor& left, const Tensor& right) {
  const at::ScalarType dtype = out.scalar_type();
  if (left.scalar_type() == dtype) {
    at::mm_out(out, left, right);
  } else if (left.is_cuda()) {
    at::mm_out(out, left, right, dtype);
  } else {
    at::mm_out(out, left.to(dtype), right.to(dtype));
  }
}

// dA = T^T mask(x) and dB = dy^T S, each where it is defined.
inline void launch_adapter_grads(Launching& launching, const Tensor& x, const Tensor& dy, const Tensor& t,
                                 const Tensor& s, const Tensor& dA, const Tensor& dB, const Tensor& mask) {
  if (!launching.is_of_adapters()) {
    if (dA.defined()) library_product(dA, t.t(), x.reshape({-1, dA.size(1)}));
    if (dB.defined()) library_product(dB, dy.reshape({-1, dB.size(0)}).t(), s);
    return;
  }
  Launch& launch = launching.next();
  const Tensor workspace = fresh({launch.workspace_size}, dy, at::kFloat);
  Tensor kept;
  const void* const tensors[] = {address(x), address(dy), address(t), address(s), address(dA), address(dB),
                                 address(workspace), zeros().of(dy.device(), launching.stream, launch.counters, kept),
                                 address(mask)};
  launch(tensors, nullptr, launching.stream);
}

// dx = dy W + mask(T A), dA and dB, each of these where it is defined, and T, all in one launch.
inline void launch_backward(Launching& launching, const Tensor& dy, const Tensor& weight, const Tensor& dx,
                            const Tensor& lora_B, const Tensor& lora_A, const Tensor& t, const Tensor& x,
                            const Tensor& s, const Tensor& dA, const Tensor& dB, const Tensor& mask, double scale) {
  Launch& launch = launching.next();
  const Tensor workspace = fresh({launch.workspace_size}, dy, at::kFloat);
  Tensor kept;
  const void* const tensors[] = {address(dy), address(weight), address(dx), address(lora_B), address(lora_A),
                                 address(t), address(workspace),
                                 zeros().of(dy.device(), launching.stream, launch.counters, kept), address(mask),
                                 nullptr, address(x), address(dy), address(s), address(dA), address(dB)};
  const float number = static_cast<float>(scale);
  launch(tensors, &number, launching.stream);
}

// What is asked for in a backward.
struct Needs {
  bool x = false, lora_A = false, lora_B = false, bias = false;
  bool any() const { return x || lora_A || lora_B || bias; }
  int64_t bits() const { return x | lora_A << 1 | lora_B << 2 | bias << 3; }
};

class LoRALinearBackward : public LoRANode {
 public:
  Needs needs;
  std::optional<at::ScalarType> bias_dtype;
  int64_t K = 0, N = 0, R = 0;
  double scale = 1.0;

  // Undefined where no needed gradient uses them. x is [..., K], as it was given.
  struct Saved {
    Tensor x, lora_A, lora_B, seed, s;
    Weight weight;
  };
  // In the order of autograd.py's Saved.
  void save(const Saved& saved) {
    block_size_ = saved.weight.block_size;
    variable_list tensors{saved.x, saved.weight.dense, saved.lora_A, saved.lora_B, saved.seed};
    tensors.insert(tensors.end(), saved.weight.parts.begin(), saved.weight.parts.end());
    LoRANode::save(tensors);
  }

  std::string name() const override { return "LoRALinearFunctionBackward"; }

 private:
  variable_list compute(const variable_list& dys, const variable_list& tensors, const Tensor& s) const override {
    Saved saved{tensors[0], tensors[2], tensors[3], tensors[4], s, {tensors[1], {}, N, K, block_size_}};
    std::copy(tensors.begin() + 5, tensors.end(), saved.weight.parts.begin());
    Rows dy;
    Key key;
    if (!describe(dys[0], saved, dy, key)) return in_python(dys[0], saved, nullptr);
    const auto known = backward_plans().find(key);
    if (known == nullptr) return in_python(dys[0], saved, &key);
    return known->covered ? run(*known, dy.tensor, saved) : in_python(dys[0], saved, nullptr);
  }

  // Whether the tensors are what this file covers, and what else there is to know of them. Hooks may have brought back
  // other tensors than were saved.
  bool describe(const Tensor& given, const Saved& saved, Rows& dy, Key& key) const {
    // T alone is a library's business.
    if (!dispatch_is_plain() || (needs.lora_A && !needs.x) || !as_rows(given, 0, N, dy)) return false;
    const int64_t M = given.numel() / N;
    int64_t x_stride = 0;
    if (needs.lora_A) {
      if (!is_plain(saved.x, device) || saved.x.scalar_type() != dtype || saved.x.numel() != M * K) return false;
      const auto stride = row_stride(saved.x, M, K);
      if (!stride) return false;
      x_stride = *stride;
    }
    if (needs.x && (!saved.weight.fits(device, dtype) || !is_matrix(saved.lora_A, R, K, adapter_dtype) ||
                    !is_matrix(saved.lora_B, N, R, adapter_dtype))) {
      return false;
    }
    if (needs.lora_B && (!is_matrix(saved.s, M, R, narrow_type()) || !saved.s.is_contiguous())) return false;
    const int64_t alignment = misaligned(dy.tensor) | misaligned(saved.x) << 1 | misaligned(saved.lora_A) << 2 |
                              misaligned(saved.lora_B) << 3 | misaligned(saved.s) << 4;
    key.add(static_cast<uint8_t>(device.index()) | needs.bits() << 8 | static_cast<int64_t>(automatic) << 12 |
            static_cast<int64_t>(dtype) << 16 | static_cast<int64_t>(adapter_dtype) << 24 |
            static_cast<int64_t>(precision) << 32 | alignment << 40 | static_cast<int64_t>(Kind::kLinear) << 56);
    for (const int64_t word : {M, K, N, R, dy.stride, x_stride}) key.add(word);
    key.add(p);
    if (needs.x) {
      saved.weight.describe(key);
      for (const Tensor* matrix : {&saved.lora_A, &saved.lora_B}) key.add_strides(*matrix);
    }
    return true;
  }

  variable_list run(const BackwardPlan& plan, const Tensor& dy, const Saved& saved) const {
    variable_list results(4);
    const c10::OptionalDeviceGuard guard(device);
    Launching launching(plan.launches, current_stream(device));
    const int64_t M = dy.numel() / N;
    const Tensor nothing;
    Tensor weight, t, mask;
    if (needs.x) {
      auto sizes = dy.sizes().vec();
      sizes.back() = K;
      results[0] = fresh(sizes, dy, dtype);
      t = fresh({M, R}, dy, narrow_type());
      weight = dense_of(saved.weight, launching, dy, dtype);
      mask = drawn(launching, saved.seed, M, K);
    }
    if (needs.lora_A) results[1] = fresh({R, K}, dy, adapter_dtype);
    if (needs.lora_B) results[2] = fresh({N, R}, dy, adapter_dtype);
    const bool adapters = needs.lora_A || needs.lora_B;
    if (needs.x && adapters && launching.is_whole()) {
      launch_backward(launching, dy, weight, results[0], saved.lora_B, saved.lora_A, t, saved.x, saved.s, results[1],
                      results[2], mask, scale);
    } else {
      if (needs.x) {
        launch_one_pass(launching, dy, weight, results[0], saved.lora_B, saved.lora_A, nothing, t, mask, scale);
      }
      if (adapters) {
        launch_adapter_grads(launching, saved.x, dy, needs.lora_A ? t : nothing, saved.s, results[1], results[2],
                             needs.lora_A ? mask : nothing);
      }
    }
    if (needs.bias) results[3] = at::sum(dy.reshape({M, N}), {0}, false, bias_dtype);
    return results;
  }

  // The backward of autograd.py, which also tells by what launches it computed, for the next of this key.
  variable_list in_python(const Tensor& dy, const Saved& saved, const Key* key) const {
    const pybind11::gil_scoped_acquire gil;
    const auto arguments = pybind11::make_tuple(
        pybind11::handle(plan->constants.get()), pybind11::make_tuple(needs.x, needs.lora_A, needs.lora_B, needs.bias),
        wrapped(saved.x), wrapped(saved.weight), wrapped(saved.lora_A), wrapped(saved.lora_B), wrapped(saved.s),
        wrapped(saved.seed), wrapped(dy), scale, key != nullptr);
    return learned(checked(PyObject_CallObject(callbacks.backward, arguments.ptr())), key);
  }

  // Of an NF4 weight.
  int64_t block_size_ = 0;
};

}  // namespace lora_kernels::host
