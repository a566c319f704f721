// The node of the autograd graph, as lora_kernels/autograd.py defines it: what it keeps and what it computes.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "plans.h"
#include "python.h"

namespace lora_kernels::host {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
// A shared pointer until PyTorch 2.11, an intrusive one later.
using NodePtr = decltype(torch::autograd::Edge::function);

template <typename T, typename... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    // deleteNode takes long graphs apart without recursion.
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

enum class Precision : int64_t { kNative, kRounded, kSplit };

// What the shapes and dtypes of a forward decide. A null launch: calls like this one are for Python.
struct ForwardPlan {
  ForwardPlan(std::shared_ptr<Launch> launch, double inverse_keep, PyObject* constants)
      : launch(std::move(launch)), inverse_keep(inverse_keep), constants(constants) {}
  std::shared_ptr<Launch> launch;
  double inverse_keep;
  // For the backward in Python; nothing here reads it.
  Object constants;
};

// Launches are null where nothing needs them.
struct BackwardPlan {
  bool covered;
  std::shared_ptr<Launch> input, adapters;
};

inline Plans<BackwardPlan>& backward_plans() {
  static auto* const instance = new Plans<BackwardPlan>;
  return *instance;
}

inline void* current_stream(c10::Device device) {
  void* stream = nullptr;
  TORCH_CHECK(driver.current_stream(device.index(), &stream) == 0, "PyTorch has no current stream on " + device.str());
  return stream;
}

// Uninitialized memory, in the deterministic mode filled as PyTorch fills it.
inline Tensor fresh(at::IntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  return at::empty(sizes, at::TensorOptions().dtype(type).device(like.device()));
}

// What is asked for in a backward.
struct Needs {
  bool x = false, lora_A = false, lora_B = false, bias = false;
  bool any() const { return x || lora_A || lora_B || bias; }
  int64_t bits() const { return x | lora_A << 1 | lora_B << 2 | bias << 3; }
};

// Undefined where no needed gradient uses them. x is [..., K], as it was given. S is kept beside the others, which hooks
// may take away: it is not computed yet when they are saved (lora_kernels/deferred.py).
struct Saved {
  Tensor x, weight, lora_A, lora_B, seed, s;
};

class LoRALinearBackward : public Node {
 public:
  std::shared_ptr<const ForwardPlan> plan;
  Needs needs;
  Precision precision = Precision::kNative;
  at::ScalarType dtype, adapter_dtype;
  std::optional<at::ScalarType> bias_dtype;
  c10::Device device{c10::kCPU};
  int64_t K = 0, N = 0, R = 0;
  double p = 0.0, scale = 1.0;

  // In the order of autograd.py's Saved. Ends by what a hook throws.
  void save(const Saved& tensors) {
    x_ = SavedVariable(tensors.x, false);
    weight_ = SavedVariable(tensors.weight, false);
    lora_A_ = SavedVariable(tensors.lora_A, false);
    lora_B_ = SavedVariable(tensors.lora_B, false);
    seed_ = SavedVariable(tensors.seed, false);
  }
  void keep(Tensor s) { s_ = std::move(s); }

  std::string name() const override { return "LoRALinearFunctionBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&x_, &weight_, &lora_A_, &lora_B_, &seed_}) saved->reset_data();
    s_.reset();
    released_ = true;
  }

  variable_list apply(variable_list&& gradients) override {
    const Tensor& dy = gradients[0];
    if (!dy.defined()) return variable_list(4);
    const Saved saved = unpack();
    variable_list results;
    {
      const c10::AutoGradMode off(false);
      // A backward may be in a region of autocast that its forward was not in.
      const c10::impl::ExcludeDispatchKeyGuard outside_autocast(c10::autocast_dispatch_keyset);
      results = compute(dy, saved);
    }
    if (c10::GradMode::is_enabled()) forbid_second_derivative(results, dy, saved);
    return results;
  }

 private:
  Saved unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    return {x_.unpack(), weight_.unpack(), lora_A_.unpack(), lora_B_.unpack(), seed_.unpack(), s_};
  }

  // As autograd.py's `once`: an error where gradients are differentiated, of whatever they come from.
  static void forbid_second_derivative(variable_list& results, const Tensor& dy, const Saved& saved) {
    auto edges = torch::autograd::collect_next_edges(dy, saved.x, saved.lora_A, saved.lora_B);
    if (!torch::autograd::any_variable_requires_grad({dy, saved.x, saved.lora_A, saved.lora_B})) return;
    const auto error = make_node<torch::autograd::Error>(callbacks.twice, std::move(edges));
    for (Tensor& result : results) {
      if (result.defined()) torch::autograd::set_history(result, NodePtr(error));
    }
  }

  // dy as a matrix, and the strides between the rows of dy and x.
  struct Rows {
    Tensor dy;
    int64_t M, dy_stride, x_stride;
  };

  variable_list compute(const Tensor& dy, const Saved& saved) {
    Rows rows;
    Key key;
    if (!describe(dy, saved, rows, key)) return in_python(dy, saved, nullptr);
    const auto known = backward_plans().find(key);
    if (known == nullptr) return in_python(dy, saved, &key);
    return known->covered ? run(*known, rows, saved) : in_python(dy, saved, nullptr);
  }

  // Whether the tensors are what this file covers, and what else there is to know of them. Hooks may have brought back
  // other tensors than were saved.
  bool describe(const Tensor& dy, const Saved& saved, Rows& rows, Key& key) const {
    if (!dispatch_is_plain() || !is_plain(dy, device) || dy.scalar_type() != dtype) return false;
    rows.M = dy.numel() / N;
    // T alone is a library's business.
    if (rows.M == 0 || (needs.lora_A && !needs.x)) return false;
    rows.dy = row_stride(dy, rows.M, N) ? dy : dy.contiguous();
    rows.dy_stride = *row_stride(rows.dy, rows.M, N);
    rows.x_stride = 0;
    if (needs.lora_A) {
      if (!is_plain(saved.x, device) || saved.x.scalar_type() != dtype || saved.x.numel() != rows.M * K) return false;
      const auto stride = row_stride(saved.x, rows.M, K);
      if (!stride) return false;
      rows.x_stride = *stride;
    }
    const auto is_matrix = [&](const Tensor& t, int64_t first, int64_t second, at::ScalarType type) {
      return is_plain(t, device) && t.scalar_type() == type && t.dim() == 2 && t.size(0) == first && t.size(1) == second;
    };
    if (needs.x && (!is_matrix(saved.weight, N, K, dtype) || !is_matrix(saved.lora_A, R, K, adapter_dtype) ||
                    !is_matrix(saved.lora_B, N, R, adapter_dtype))) {
      return false;
    }
    if (needs.x && saved.weight.stride(0) != 1 && saved.weight.stride(1) != 1) return false;
    if (needs.lora_B && (!is_matrix(saved.s, rows.M, R, narrow_type()) || !saved.s.is_contiguous())) return false;
    const int64_t alignment = misaligned(rows.dy) | misaligned(saved.x) << 1 | misaligned(saved.weight) << 2 |
                              misaligned(saved.lora_A) << 3 | misaligned(saved.lora_B) << 4 | misaligned(saved.s) << 5;
    key.add(static_cast<uint8_t>(device.index()) | needs.bits() << 8 | static_cast<int64_t>(dtype) << 16 |
            static_cast<int64_t>(adapter_dtype) << 24 | static_cast<int64_t>(precision) << 32 | alignment << 40);
    for (const int64_t word : {rows.M, K, N, R, rows.dy_stride, rows.x_stride}) key.add(word);
    key.add(p);
    if (needs.x) {
      for (const Tensor* matrix : {&saved.weight, &saved.lora_A, &saved.lora_B}) key.add_strides(*matrix);
    }
    return true;
  }

  at::ScalarType narrow_type() const { return precision == Precision::kSplit ? at::kFloat : dtype; }

  variable_list run(const BackwardPlan& plan, const Rows& rows, const Saved& saved) const {
    variable_list results(4);
    const c10::OptionalDeviceGuard guard(device);
    void* const stream = current_stream(device);
    const Tensor& dy = rows.dy;
    const void* const seed = saved.seed.defined() ? saved.seed.const_data_ptr() : nullptr;
    Tensor t, kept;
    if (needs.x) {
      auto sizes = dy.sizes().vec();
      sizes.back() = K;
      results[0] = fresh(sizes, dy, dtype);
      t = fresh({rows.M, R}, dy, narrow_type());
      const Tensor workspace = fresh({plan.input->workspace_size}, dy, at::kFloat);
      const void* const tensors[] = {dy.const_data_ptr(),
                                     saved.weight.const_data_ptr(),
                                     results[0].mutable_data_ptr(),
                                     saved.lora_B.const_data_ptr(),
                                     saved.lora_A.const_data_ptr(),
                                     nullptr,
                                     t.mutable_data_ptr(),
                                     workspace.mutable_data_ptr(),
                                     zeros().of(device, stream, plan.input->counters, kept),
                                     seed,
                                     nullptr};
      (*plan.input)(tensors, static_cast<float>(scale), stream);
    }
    if (needs.lora_A || needs.lora_B) {
      if (needs.lora_A) results[1] = fresh({R, K}, dy, adapter_dtype);
      if (needs.lora_B) results[2] = fresh({N, R}, dy, adapter_dtype);
      const Tensor workspace = fresh({plan.adapters->workspace_size}, dy, at::kFloat);
      const auto address = [](const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
      const void* const tensors[] = {address(saved.x),
                                     dy.const_data_ptr(),
                                     needs.lora_A ? t.const_data_ptr() : nullptr,
                                     address(saved.s),
                                     address(results[1]),
                                     address(results[2]),
                                     workspace.mutable_data_ptr(),
                                     zeros().of(device, stream, plan.adapters->counters, kept),
                                     needs.lora_A ? seed : nullptr};
      (*plan.adapters)(tensors, 0.0f, stream);
    }
    if (needs.bias) results[3] = at::sum(dy.reshape({rows.M, N}), {0}, false, bias_dtype);
    return results;
  }

  // The backward of autograd.py, which also tells by what launches it computed, for the next of this key.
  variable_list in_python(const Tensor& dy, const Saved& saved, const Key* key) const {
    const pybind11::gil_scoped_acquire gil;
    const auto arguments = pybind11::make_tuple(
        pybind11::handle(plan->constants.get()), pybind11::make_tuple(needs.x, needs.lora_A, needs.lora_B, needs.bias),
        wrapped(saved.x), wrapped(saved.weight), wrapped(saved.lora_A), wrapped(saved.lora_B), wrapped(saved.s),
        wrapped(saved.seed), wrapped(dy), scale, key != nullptr);
    const pybind11::tuple answer = checked(PyObject_CallObject(callbacks.backward, arguments.ptr()));
    variable_list results;
    for (size_t index = 0; index < 4; ++index) results.push_back(unwrapped(answer[index]));
    if (key != nullptr) {
      BackwardPlan learned{!answer[4].is_none(), nullptr, nullptr};
      if (learned.covered) {
        std::tie(learned.input, learned.adapters) =
            answer[4].cast<std::pair<std::shared_ptr<Launch>, std::shared_ptr<Launch>>>();
      }
      backward_plans().remember(*key, std::make_shared<BackwardPlan>(std::move(learned)));
    }
    return results;
  }

  std::mutex mutex_;
  bool released_ = false;
  SavedVariable x_, weight_, lora_A_, lora_B_, seed_;
  Tensor s_;
};

}  // namespace lora_kernels::host
