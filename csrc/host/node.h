// What the nodes of the autograd graph have in common: how they keep tensors, and who computes their backward.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../problem.h"
#include "launch.h"
#include "plans.h"
#include "python.h"

namespace lora_kernels::host {

using at::Tensor;
using lora_kernels::Precision;
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

using Launches = std::vector<std::shared_ptr<Launch>>;

// What the shapes and dtypes of a forward decide. No launches: calls like this one are for Python.
struct ForwardPlan {
  ForwardPlan(Launches launches, double inverse_keep, PyObject* constants)
      : launches(std::move(launches)), inverse_keep(inverse_keep), constants(constants) {}
  Launches launches;
  double inverse_keep;
  // For the backward in Python; nothing here reads it.
  Object constants;
};

// The same of a backward.
struct BackwardPlan {
  bool covered;
  Launches launches;
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

inline const void* address(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

// dy or x as a matrix.
struct Rows {
  Tensor tensor;
  int64_t stride = 0;
};

class LoRANode : public Node {
 public:
  std::shared_ptr<const ForwardPlan> plan;
  Precision precision = Precision::kNative;
  at::ScalarType dtype, adapter_dtype;
  c10::Device device{c10::kCPU};
  double p = 0.0;
  // Whether the forward's backend was the automatic choice's: other kernels may compute the backward then.
  bool automatic = false;

  // In an order that each node has for itself. Ends by what a hook throws.
  void save(const variable_list& tensors) {
    saved_.reserve(tensors.size());
    for (const Tensor& tensor : tensors) saved_.emplace_back(tensor, false);
  }
  // An S that is not computed yet when the others are saved: beside them, for hooks take those away
  // (lora_kernels/deferred.py).
  void keep(Tensor s) { kept_ = std::move(s); }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : saved_) saved.reset_data();
    kept_.reset();
    released_ = true;
  }

  variable_list apply(variable_list&& dys) override {
    bool any = false;
    for (const Tensor& dy : dys) any = any || dy.defined();
    if (!any) return variable_list(num_outputs());
    variable_list saved;
    Tensor kept;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
      for (const SavedVariable& variable : saved_) saved.push_back(variable.unpack());
      kept = kept_;
    }
    variable_list results;
    {
      const c10::AutoGradMode off(false);
      // A backward may be in a region of autocast that its forward was not in.
      const c10::impl::ExcludeDispatchKeyGuard outside_autocast(c10::autocast_dispatch_keyset);
      results = compute(dys, saved, kept);
    }
    if (c10::GradMode::is_enabled()) forbid_second_derivative(results, dys, saved);
    return results;
  }

 protected:
  // The gradients, where one dy at least is defined.
  virtual variable_list compute(const variable_list& dys, const variable_list& saved, const Tensor& kept) const = 0;

  at::ScalarType narrow_type() const { return precision == Precision::kSplit ? at::kFloat : dtype; }

  bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType type) const {
    return is_plain(tensor, device) && tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(0) == rows &&
           tensor.size(1) == columns;
  }

  // dy as rows of N, M of them if M is not 0; false where it is none that the launches take.
  bool as_rows(const Tensor& dy, int64_t M, int64_t N, Rows& rows) const {
    if (!is_plain(dy, device) || dy.scalar_type() != dtype) return false;
    const int64_t count = dy.numel() / N;
    if (count == 0 || (M != 0 && count != M)) return false;
    rows.tensor = row_stride(dy, count, N) ? dy : dy.contiguous();
    rows.stride = *row_stride(rows.tensor, count, N);
    return true;
  }

  // `answer`, of which the last says by what launches Python computed: for the next of this key, if there is one.
  variable_list learned(const pybind11::tuple& answer, const Key* key) const {
    variable_list results;
    for (size_t index = 0; index + 1 < answer.size(); ++index) results.push_back(unwrapped(answer[index]));
    if (key != nullptr) {
      const pybind11::object launches = answer[answer.size() - 1];
      auto made = std::make_shared<BackwardPlan>();
      made->covered = !launches.is_none();
      if (made->covered) made->launches = launches.cast<Launches>();
      backward_plans().remember(*key, std::move(made));
    }
    return results;
  }

 private:
  // As autograd.py's `once`: an error where gradients are differentiated, of whatever they come from.
  static void forbid_second_derivative(variable_list& results, const variable_list& dys, const variable_list& saved) {
    variable_list sources = dys;
    sources.insert(sources.end(), saved.begin(), saved.end());
    if (!torch::autograd::any_variable_requires_grad(sources)) return;
    const auto error = make_node<torch::autograd::Error>(callbacks.twice, torch::autograd::collect_next_edges(sources));
    for (Tensor& result : results) {
      if (result.defined()) torch::autograd::set_history(result, NodePtr(error));
    }
  }

  std::mutex mutex_;
  bool released_ = false;
  std::vector<SavedVariable> saved_;
  Tensor kept_;
};

}  // namespace lora_kernels::host
