// The launches of layers that read the same x, and the node of the autograd graph that a group or a gated MLP is:
// lora_kernels/autograd_group.py and autograd_gated.py define what it computes.

#pragma once

#include <ATen/ops/cat.h>

#include <vector>

#include "linear.h"

namespace lora_kernels::host {

// A tensor of each member, in the order of the members.
using OfMembers = std::array<Tensor, kMostLayers>;

// What a member brings to a launch.
struct Members {
  size_t count = 0;
  OfMembers weight, lora_A, lora_B, bias, mask;
  std::array<double, kMostLayers> scale{};

  std::array<float, kMostLayers> floats() const {
    std::array<float, kMostLayers> numbers{};
    for (size_t i = 0; i < count; ++i) numbers[i] = static_cast<float>(scale[i]);
    return numbers;
  }
};

// The arguments of a group kernel in their order: as many of each kind as there may be members.
class Arguments {
 public:
  void add(const Tensor& tensor) { add(address(tensor)); }
  void add(const void* pointer) { pointers_[size_++] = pointer; }
  void add(const OfMembers& tensors) {
    for (const Tensor& tensor : tensors) add(tensor);
  }
  void add_pairs(const OfMembers& first, const OfMembers& second) {
    for (size_t i = 0; i < kMostLayers; ++i) add(first[i]), add(second[i]);
  }
  const void* const* data() const { return pointers_.data(); }

 private:
  std::array<const void*, 32> pointers_{};
  size_t size_ = 0;
};

// Behind the arguments of a group kernel come memory that it works in and zeros that it counts in.
inline void launch_group(Launching& launching, const Tensor& like, Arguments& arguments, const float* scales) {
  Launch& launch = launching.next();
  const Tensor workspace = fresh({launch.workspace_size}, like, at::kFloat);
  Tensor kept;
  arguments.add(workspace);
  arguments.add(zeros().of(like.device(), launching.stream, launch.counters, kept));
  launch(arguments.data(), scales, launching.stream);
}

// y_i = x W_i^T + S_i B_i^T + b_i and S_i = scale_i * mask_i(x) A_i^T: group_launch.py's forward.
inline void launch_group_forward(Launching& launching, const Tensor& x, const Members& members, const OfMembers& ys,
                                 const OfMembers& ss) {
  if (launching.is_wide()) {
    WideLayers layers;
    for (size_t i = 0; i < members.count; ++i) {
      layers[i] = {x, members.weight[i], members.lora_A[i], members.lora_B[i], members.bias[i], ss[i], members.scale[i]};
    }
    launch_each(launching, layers, members.count, ys);
    return;
  }
  Arguments arguments;
  arguments.add(x);
  arguments.add_pairs(members.weight, ys);
  for (const OfMembers* of : {&members.lora_A, &members.lora_B, &members.bias, &ss, &members.mask}) arguments.add(*of);
  // No scale is a tensor.
  arguments.add(OfMembers());
  launch_group(launching, x, arguments, members.floats().data());
}

// dx = sum of dy_i W_i + mask_i(T_i A_i) and T_i = scale_i * dy_i B_i: its backward_input.
inline void launch_group_input(Launching& launching, const Tensor& dx, const OfMembers& dys, const Members& members,
                               const OfMembers& ts) {
  if (launching.is_wide()) {
    WideLayers layers;
    for (size_t i = 0; i < members.count; ++i) {
      layers[i] = {dys[i], members.weight[i], members.lora_B[i], members.lora_A[i], {}, ts[i], members.scale[i]};
    }
    launch_summed(launching, layers, members.count, dx);
    return;
  }
  Arguments arguments;
  arguments.add(dx);
  arguments.add_pairs(dys, members.weight);
  for (const OfMembers* of : {&members.lora_B, &members.lora_A, &ts, &members.mask}) arguments.add(*of);
  arguments.add(OfMembers());
  launch_group(launching, dx, arguments, members.floats().data());
}

// dA_i = T_i^T x and dB_i = dy_i^T S_i by the libraries: eager.py's group_backward_adapters.
inline void library_grads(const Tensor& x, const OfMembers& dys, const OfMembers& ts, const OfMembers& ss,
                          const OfMembers& dAs, const OfMembers& dBs) {
  std::vector<Tensor> given;
  int64_t ranks = 0, first = 0;
  for (size_t i = 0; i < kMostLayers && dAs[i].defined(); ++i) {
    library_product(dBs[i], dys[i].reshape({-1, dBs[i].size(0)}).t(), ss[i]);
    given.push_back(ts[i]);
    ranks += ts[i].size(1);
  }
  const int64_t K = dAs[0].size(1);
  const Tensor joint = at::empty({ranks, K}, dAs[0].options());
  library_product(joint, at::cat(given, 1).t(), x.reshape({-1, K}));
  for (size_t i = 0; i < given.size(); ++i) {
    dAs[i].copy_(joint.narrow(0, first, dAs[i].size(0)));
    first += dAs[i].size(0);
  }
}

// dA_i = T_i^T mask_i(x) and dB_i = dy_i^T S_i: its backward_adapters.
inline void launch_group_grads(Launching& launching, const Tensor& x, const OfMembers& dys, const OfMembers& ts,
                               const OfMembers& ss, const OfMembers& dAs, const OfMembers& dBs,
                               const OfMembers& masks) {
  if (!launching.is_of_adapters()) {
    library_grads(x, dys, ts, ss, dAs, dBs);
    return;
  }
  Arguments arguments;
  arguments.add(x);
  for (const OfMembers* of : {&dys, &ts, &ss, &dAs, &dBs, &masks}) arguments.add(*of);
  launch_group(launching, x, arguments, nullptr);
}

// gated.py's kernels: h = act(g) u; and dg, which takes the place of dh, with du and h.
inline void launch_activation(Launching& launching, std::initializer_list<const Tensor*> tensors) {
  Arguments arguments;
  for (const Tensor* tensor : tensors) arguments.add(*tensor);
  launching.next()(arguments.data(), nullptr, launching.stream);
}

// Of a group, or of a gated MLP, whose down projection comes behind gate and up. Everything is asked for: dx, and each
// layer's dA and dB.
class LoRAGroupBackward : public LoRANode {
 public:
  Kind kind = Kind::kGroup;
  int64_t K = 0;
  size_t count = 0;
  // Of the layers. The block sizes are those of NF4 weights.
  std::array<int64_t, kMostLayers> N{}, R{}, block_size{};
  std::array<double, kMostLayers> scale{};

  // Where what is saved lies, in the order of autograd_group.py and autograd_gated.py: a forward in Python may be
  // recomputed here. Of a gated MLP g and u; x; and what a layer has.
  enum Of : size_t { kWeight, kA, kB, kS, kSeed, kParts, kOfLayer = kParts + 5 };
  size_t place_of_x() const { return is_gated() ? 2 : 0; }
  size_t place(size_t layer, Of which) const { return place_of_x() + 1 + layer * kOfLayer + which; }

  std::string name() const override { return is_gated() ? "GatedMLPFunctionBackward" : "LoRAGroupFunctionBackward"; }

 private:
  bool is_gated() const { return kind != Kind::kGroup; }
  size_t sharing() const { return is_gated() ? 2 : count; }

  variable_list compute(const variable_list& dys, const variable_list& saved, const Tensor& kept) const override {
    variable_list all = saved;
    // The down projection's S.
    if (is_gated()) all[place(2, kS)] = kept;
    std::array<Rows, kMostLayers> rows;
    Key key;
    if (!describe(dys, all, rows, key)) return in_python(dys, all, nullptr);
    const auto known = backward_plans().find(key);
    if (known == nullptr) return in_python(dys, all, &key);
    return known->covered ? run(*known, rows, all) : in_python(dys, all, nullptr);
  }

  // As LoRALinearBackward's.
  bool describe(const variable_list& dys, const variable_list& saved, std::array<Rows, kMostLayers>& rows,
                Key& key) const {
    const Tensor& x = saved[place_of_x()];
    if (!dispatch_is_plain() || !is_plain(x, device) || x.scalar_type() != dtype || x.numel() == 0) return false;
    const int64_t M = x.numel() / K;
    const auto x_stride = row_stride(x, M, K);
    if (!x_stride) return false;
    key.add(static_cast<uint8_t>(device.index()) | static_cast<int64_t>(count) << 8 |
            static_cast<int64_t>(automatic) << 12 | static_cast<int64_t>(dtype) << 16 |
            static_cast<int64_t>(adapter_dtype) << 24 | static_cast<int64_t>(precision) << 32 | misaligned(x) << 40 |
            static_cast<int64_t>(kind) << 56);
    for (const int64_t word : {M, K, *x_stride}) key.add(word);
    key.add(p);
    for (size_t i = 0; i < dys.size(); ++i) {
      if (!dys[i].defined() || !as_rows(dys[i], M, is_gated() ? N[2] : N[i], rows[i])) return false;
      key.add(rows[i].stride << 1 | misaligned(rows[i].tensor));
    }
    for (size_t i = 0; i < count; ++i) {
      const Tensor &lora_A = saved[place(i, kA)], &lora_B = saved[place(i, kB)], &s = saved[place(i, kS)];
      const int64_t columns = i < sharing() ? K : N[0];
      const Weight weight = weight_of(i, saved);
      if (!weight.fits(device, dtype) || !is_matrix(lora_A, R[i], columns, adapter_dtype) ||
          !is_matrix(lora_B, N[i], R[i], adapter_dtype) || !is_matrix(s, M, R[i], narrow_type()) ||
          !lora_A.is_contiguous() || !lora_B.is_contiguous() || !s.is_contiguous()) {
        return false;
      }
      if (i < sharing() && weight.is_by_rows() != weight_of(0, saved).is_by_rows()) return false;
      key.add(N[i] << 3 | misaligned(lora_A) | misaligned(lora_B) << 1 | misaligned(s) << 2);
      key.add(R[i]);
      weight.describe(key);
    }
    if (is_gated()) {
      for (size_t i = 0; i < 2; ++i) {
        const Tensor& hidden = saved[i];
        if (!is_matrix(hidden, M, N[0], dtype) || !hidden.is_contiguous() || misaligned(hidden)) return false;
      }
    }
    return true;
  }

  variable_list run(const BackwardPlan& plan, const std::array<Rows, kMostLayers>& rows,
                    const variable_list& saved) const {
    const c10::OptionalDeviceGuard guard(device);
    Launching launching(plan.launches, current_stream(device));
    const Tensor& x = saved[place_of_x()];
    const int64_t M = x.numel() / K;
    variable_list results(1 + 2 * count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t columns = i < sharing() ? K : N[0];
      results[1 + 2 * i] = fresh({R[i], columns}, x, adapter_dtype);
      results[2 + 2 * i] = fresh({N[i], R[i]}, x, adapter_dtype);
    }
    Members members;
    members.count = sharing();
    OfMembers dys, ts, ss, dAs, dBs;
    for (size_t i = 0; i < members.count; ++i) {
      members.lora_A[i] = saved[place(i, kA)], members.lora_B[i] = saved[place(i, kB)];
      members.scale[i] = scale[i];
      dys[i] = rows[i].tensor, ss[i] = saved[place(i, kS)];
      dAs[i] = results[1 + 2 * i], dBs[i] = results[2 + 2 * i];
      ts[i] = fresh({M, R[i]}, x, narrow_type());
    }
    if (is_gated()) {
      std::tie(dys[0], dys[1]) = through_down(launching, rows[0].tensor, saved, results[5], results[6]);
    }
    for (size_t i = 0; i < members.count; ++i) members.weight[i] = dense_of(weight_of(i, saved), launching, x, dtype);
    for (size_t i = 0; i < members.count; ++i) members.mask[i] = drawn(launching, saved[place(i, kSeed)], M, K);
    results[0] = fresh(x.sizes(), x, dtype);
    launch_group_input(launching, results[0], dys, members, ts);
    launch_group_grads(launching, x, dys, ts, ss, dAs, dBs, members.mask);
    return results;
  }

  // dg and du, behind the down projection's dA and dB.
  std::pair<Tensor, Tensor> through_down(Launching& launching, const Tensor& dy, const variable_list& saved,
                                         const Tensor& dA, const Tensor& dB) const {
    const Tensor &g = saved[0], &u = saved[1], &seed = saved[place(2, kSeed)];
    const Tensor nothing;
    Tensor mask;
    const Tensor dh = fresh(g.sizes(), g, dtype), t = fresh({g.size(0), R[2]}, g, narrow_type());
    {
      const Tensor weight = dense_of(weight_of(2, saved), launching, g, dtype);
      mask = drawn(launching, seed, g.size(0), g.size(1));
      launch_one_pass(launching, dy, weight, dh, saved[place(2, kB)], saved[place(2, kA)], nothing, t, mask, scale[2]);
    }
    const Tensor du = fresh(g.sizes(), g, dtype), h = fresh(g.sizes(), g, dtype);
    launch_activation(launching, {&dh, &g, &u, &du, &h});
    launch_adapter_grads(launching, h, dy, t, saved[place(2, kS)], dA, dB, mask);
    return {dh, du};
  }

  Weight weight_of(size_t i, const variable_list& saved) const {
    Weight weight{saved[place(i, kWeight)], {}, N[i], i < sharing() ? K : N[0], block_size[i]};
    std::copy_n(saved.begin() + place(i, kParts), weight.parts.size(), weight.parts.begin());
    return weight;
  }

  // The backward of autograd_group.py or autograd_gated.py, as LoRALinearBackward's.
  variable_list in_python(const variable_list& dys, const variable_list& saved, const Key* key) const {
    const pybind11::gil_scoped_acquire gil;
    pybind11::list shared, layers, gradients, scales;
    for (size_t i = 0; i <= place_of_x(); ++i) shared.append(wrapped(saved[i]));
    for (size_t i = 0; i < count; ++i) {
      layers.append(pybind11::make_tuple(wrapped(weight_of(i, saved)), wrapped(saved[place(i, kA)]),
                                         wrapped(saved[place(i, kB)]), wrapped(saved[place(i, kS)]),
                                         wrapped(saved[place(i, kSeed)])));
      scales.append(scale[i]);
    }
    for (const Tensor& dy : dys) gradients.append(wrapped(dy));
    const auto arguments = pybind11::make_tuple(pybind11::handle(plan->constants.get()), shared, layers, gradients,
                                                scales, key != nullptr);
    return learned(checked(PyObject_CallObject(callbacks.group_backward, arguments.ptr())), key);
  }
};

}  // namespace lora_kernels::host
