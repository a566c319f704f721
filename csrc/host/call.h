// What a call is given, as far as it is covered here, and what it is remembered by.

#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>

#include "weight.h"

namespace lora_kernels::host {

constexpr size_t kMostLayers = 3;

// One layer of a call: the arguments of lora_linear that are its own.
struct Layer {
  Weight weight;
  const Tensor *lora_A = nullptr, *lora_B = nullptr, *bias = nullptr;
  double scaling = 1.0;
  int64_t N = 0, R = 0;
};

inline Tensor bias_of(const Layer& layer) { return layer.bias != nullptr ? *layer.bias : Tensor(); }

enum class Kind : int64_t { kLinear, kGroup, kGatedSilu, kGatedGeluTanh };

// The layers of a group, and behind gate and up the down projection.
struct Call {
  Kind kind = Kind::kLinear;
  const Tensor* x = nullptr;
  std::array<Layer, kMostLayers> layers;
  size_t count = 0;
  double p = 0.0;
  int64_t M = 0, K = 0;
  at::ScalarType dtype = at::kBFloat16, adapters = at::kBFloat16;
  Precision precision = Precision::kNative;
  bool automatic = false, autocast = false, cast_x = false;
  Key key;

  bool is_gated() const { return kind == Kind::kGatedSilu || kind == Kind::kGatedGeluTanh; }
  // Of those that read x.
  size_t sharing() const { return is_gated() ? 2 : count; }
};

// What the backends that plans are for run on: CUDA, but in tests.
inline c10::DeviceType served = c10::kCUDA;

inline const Tensor* as_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

inline bool as_number(PyObject* object, double& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (!PyLong_CheckExact(object)) return false;
  number = PyLong_AsDouble(object);
  if (number != -1.0 || PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

inline bool is_half(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// The readers say false of what is Python's, which also says what is wrong where something is.

// x, dropout_p, training, the backend's name: what the layers of a call have in common.
inline bool read_input(PyObject* x_, PyObject* dropout_p, PyObject* training, PyObject* name, Call& call) {
  if (!PyUnicode_Check(name)) return false;
  call.automatic = PyUnicode_CompareWithASCIIString(name, "auto") == 0;
  if (!call.automatic && PyUnicode_CompareWithASCIIString(name, "triton") != 0) return false;
  if ((call.x = as_tensor(x_)) == nullptr) return false;
  const Tensor& x = *call.x;
  const c10::Device device = x.device();
  if (device.type() != served || !dispatch_is_plain() || at::impl::torch_function_mode_enabled()) return false;
  if (!is_plain(x, device)) return false;
  double p = 0.0;
  if (!as_number(dropout_p, p) || !(p >= 0.0 && p <= 1.0)) return false;
  if (training != Py_True && training != Py_False) return false;
  call.p = training == Py_True ? p : 0.0;

  if (x.dim() == 0 || x.numel() == 0) return false;
  call.K = x.size(-1), call.M = x.numel() / call.K;
  const auto stride = row_stride(x, call.M, call.K);
  // Python keeps other tensors as matrices, and what is kept must not depend on who computes.
  if (!stride || (x.dim() != 2 && !x.is_contiguous())) return false;

  call.autocast = at::autocast::is_autocast_enabled(served);
  const at::ScalarType given = x.scalar_type();
  call.dtype = call.autocast ? at::autocast::get_autocast_dtype(served) : given;
  call.cast_x = given != call.dtype;
  if (!is_half(call.dtype)) return false;
  if (call.cast_x && (!x.is_contiguous() || !(is_half(given) || given == at::kFloat))) return false;
  call.key.add(static_cast<uint8_t>(device.index()) | static_cast<int64_t>(call.dtype) << 8 |
               (call.cast_x ? 0 : misaligned(x)) << 16 | static_cast<int64_t>(call.automatic) << 17 |
               static_cast<int64_t>(call.autocast) << 18 | static_cast<int64_t>(call.cast_x) << 19 |
               static_cast<int64_t>(call.kind) << 24);
  for (const int64_t word : {call.M, call.K, *stride}) call.key.add(word);
  call.key.add(call.p);
  return true;
}

// A tensor or an NF4Weight.
inline bool read_weight(PyObject* object, Weight& weight) {
  if (const Tensor* dense = as_tensor(object)) {
    if (dense->dim() != 2) return false;
    weight.dense = *dense, weight.rows = dense->size(0), weight.columns = dense->size(1);
    return true;
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != callbacks.nf4_weight) return false;
  const auto field = [&](const char* name) { return checked(PyObject_GetAttrString(object, name)); };
  static constexpr const char* kParts[] = {"packed", "absmax", "nested_absmax", "nested_map", "offset"};
  for (size_t i = 0; i < weight.parts.size(); ++i) {
    const auto part = field(kParts[i]);
    if (part.is_none()) continue;
    const Tensor* const tensor = as_tensor(part.ptr());
    if (tensor == nullptr) return false;
    weight.parts[i] = *tensor;
  }
  weight.block_size = pybind11::cast<int64_t>(field("block_size"));
  std::tie(weight.rows, weight.columns) = pybind11::cast<std::pair<int64_t, int64_t>>(field("shape"));
  return true;
}

// A layer that reads K columns.
inline bool read_layer(PyObject* weight_, PyObject* lora_A_, PyObject* lora_B_, PyObject* scaling, PyObject* bias_,
                       int64_t K, Call& call) {
  if (call.count == kMostLayers) return false;
  Layer& layer = call.layers[call.count++];
  layer.lora_A = as_tensor(lora_A_), layer.lora_B = as_tensor(lora_B_);
  if (layer.lora_A == nullptr || layer.lora_B == nullptr || !read_weight(weight_, layer.weight)) return false;
  if (bias_ != nullptr && bias_ != Py_None && (layer.bias = as_tensor(bias_)) == nullptr) return false;
  if (scaling != nullptr && !as_number(scaling, layer.scaling)) return false;
  const Weight& weight = layer.weight;
  const Tensor &lora_A = *layer.lora_A, &lora_B = *layer.lora_B;
  if (!weight.fits(call.x->device(), call.dtype)) return false;
  for (const Tensor* tensor : {layer.lora_A, layer.lora_B, layer.bias}) {
    if (tensor != nullptr && !is_plain(*tensor, call.x->device())) return false;
  }
  if (lora_A.dim() != 2 || lora_B.dim() != 2) return false;
  layer.N = weight.rows, layer.R = lora_A.size(0);
  if (weight.columns != K || lora_A.size(1) != K) return false;
  if (lora_B.size(0) != layer.N || lora_B.size(1) != layer.R) return false;
  if (!weight.is_nf4() && weight.dense.requires_grad() && c10::GradMode::is_enabled()) return false;

  const at::ScalarType adapters = lora_A.scalar_type();
  if (lora_B.scalar_type() != adapters) return false;
  if (adapters != call.dtype && adapters != at::kFloat) return false;
  if (call.count > 1 && adapters != call.adapters) return false;
  call.adapters = adapters;
  call.precision = adapters == call.dtype ? Precision::kNative
                   : call.autocast        ? Precision::kRounded
                                          : Precision::kSplit;
  int64_t bias_type = 0, alignment = misaligned(lora_A) << 1 | misaligned(lora_B) << 2;
  if (layer.bias != nullptr) {
    const Tensor& bias = *layer.bias;
    const bool fits = bias.dim() == 1 && bias.size(0) == layer.N && bias.is_contiguous();
    if (!fits || (bias.scalar_type() != call.dtype && bias.scalar_type() != at::kFloat)) return false;
    bias_type = 1 + static_cast<int64_t>(bias.scalar_type());
    alignment |= misaligned(bias) << 3;
  }
  call.key.add(static_cast<int64_t>(adapters) | bias_type << 8 | alignment << 16);
  call.key.add(layer.N), call.key.add(layer.R);
  weight.describe(call.key);
  for (const Tensor* matrix : {&lora_A, &lora_B}) call.key.add_strides(*matrix);
  return true;
}

// A layer as (weight, lora_A, lora_B, scaling, bias), of which the last two may be left out.
inline bool read_member(PyObject* member, int64_t K, Call& call) {
  if (!PyTuple_Check(member)) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(member);
  if (size < 3 || size > 5) return false;
  const auto item = [&](Py_ssize_t i) { return i < size ? PyTuple_GET_ITEM(member, i) : nullptr; };
  return read_layer(item(0), item(1), item(2), item(3), item(4), K, call);
}

// Whether the layers that read x go as the group kernels take them, and a node of group.h is what autograd would have
// of the call.
inline bool fits_group(const Call& call) {
  const Layer& first = call.layers[0];
  const bool by_rows = first.weight.is_by_rows();
  for (size_t i = 0; i < call.count; ++i) {
    const Layer& layer = call.layers[i];
    if (!layer.lora_A->is_contiguous() || !layer.lora_B->is_contiguous()) return false;
    if (i < call.sharing()) {
      if (!layer.weight.is_nf4() && layer.weight.dense.stride(by_rows ? 1 : 0) != 1) return false;
      if (layer.weight.is_nf4() && !by_rows) return false;
      if ((layer.bias == nullptr) != (first.bias == nullptr)) return false;
      if (layer.bias != nullptr && layer.bias->scalar_type() != first.bias->scalar_type()) return false;
    }
  }
  if (!c10::GradMode::is_enabled()) return true;
  bool none = !call.x->requires_grad(), all = call.x->requires_grad();
  for (size_t i = 0; i < call.count; ++i) {
    const Layer& layer = call.layers[i];
    if (layer.bias != nullptr && layer.bias->requires_grad()) return false;
    const bool needs_A = layer.lora_A->requires_grad(), needs_B = layer.lora_B->requires_grad();
    none = none && !needs_A && !needs_B, all = all && needs_A && needs_B;
  }
  return none || all;
}

// x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, the backend's name.
inline bool read_linear(PyObject* const* arguments, Call& call) {
  return read_input(arguments[0], arguments[6], arguments[7], arguments[8], call) &&
         read_layer(arguments[1], arguments[2], arguments[3], arguments[5], arguments[4], call.K, call);
}

// x, members, dropout_p, training, the backend's name.
inline bool read_group(PyObject* const* arguments, Call& call) {
  call.kind = Kind::kGroup;
  PyObject* const members = arguments[1];
  if (!PyList_Check(members) && !PyTuple_Check(members)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(members);
  if (count < 2 || count > static_cast<Py_ssize_t>(kMostLayers)) return false;
  if (!read_input(arguments[0], arguments[2], arguments[3], arguments[4], call)) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read_member(PySequence_Fast_GET_ITEM(members, i), call.K, call)) return false;
  }
  return fits_group(call);
}

// x, gate, up, down, activation, dropout_p, training, the backend's name.
inline bool read_gated(PyObject* const* arguments, Call& call) {
  if (!PyUnicode_Check(arguments[4])) return false;
  if (PyUnicode_CompareWithASCIIString(arguments[4], "silu") == 0) {
    call.kind = Kind::kGatedSilu;
  } else if (PyUnicode_CompareWithASCIIString(arguments[4], "gelu_tanh") == 0) {
    call.kind = Kind::kGatedGeluTanh;
  } else {
    return false;
  }
  if (!read_input(arguments[0], arguments[5], arguments[6], arguments[7], call)) return false;
  if (!read_member(arguments[1], call.K, call) || !read_member(arguments[2], call.K, call)) return false;
  const int64_t hidden = call.layers[0].N;
  return call.layers[1].N == hidden && read_member(arguments[3], hidden, call) && fits_group(call);
}

}  // namespace lora_kernels::host
