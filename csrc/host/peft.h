// What a fused layer of PEFT's works on, read off its modules without Python: an answer for a layer that is as plain as
// most are, and none for any other. lora_kernels/integrations/peft_layer.py defines it, and says why where it is none.

#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>

#include "call.h"

namespace lora_kernels::host {

// Set once: the classes that a plain layer is made of.
struct Modules {
  PyObject *linear = nullptr, *dict = nullptr, *dropout = nullptr, *identity = nullptr;
};

inline Modules modules;

// A name that lives as long as the process.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// A module's own attributes. Everything below is borrowed from them, and null where there is none.
class Attributes {
 public:
  explicit Attributes(PyObject* module) : own_(checked(PyObject_GenericGetDict(module, nullptr))) {}

  PyObject* operator[](PyObject* name) const { return item(own_.ptr(), name); }

  PyObject* module(PyObject* name) const {
    static PyObject* const kModules = interned("_modules");
    return item((*this)[kModules], name);
  }
  PyObject* parameter(PyObject* name) const {
    static PyObject* const kParameters = interned("_parameters");
    return item((*this)[kParameters], name);
  }
  // An entry of a dictionary among them.
  PyObject* entry(PyObject* name, PyObject* key) const { return item((*this)[name], key); }

  // Whether calling the module may do more than its class's forward.
  bool is_hooked() const {
    static const std::array<PyObject*, 4> kHooks{interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                                 interned("_backward_hooks"), interned("_backward_pre_hooks")};
    static PyObject* const kForward = interned("forward");
    for (PyObject* const name : kHooks) {
      PyObject* const hooks = (*this)[name];
      if (hooks == nullptr || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) return true;
    }
    return (*this)[kForward] != nullptr;
  }

 private:
  // Other kinds of dictionaries may say something else than they hold.
  static PyObject* item(PyObject* dictionary, PyObject* key) {
    if (dictionary == nullptr || !(PyDict_CheckExact(dictionary) || PyODict_CheckExact(dictionary))) return nullptr;
    PyObject* const found = PyDict_GetItemWithError(dictionary, key);
    if (found == nullptr) PyErr_Clear();
    return found;
  }

  pybind11::object own_;
};

inline bool is(const PyObject* object, const PyObject* kind) {
  return object != nullptr && reinterpret_cast<const PyObject*>(Py_TYPE(object)) == kind;
}

inline const Tensor* as_matrix(PyObject* object) {
  const Tensor* const tensor = object == nullptr ? nullptr : as_tensor(object);
  return tensor != nullptr && tensor->dim() == 2 ? tensor : nullptr;
}

// The base layer: W, b and the dtype of x W^T, as peft_layer.py's Base.
struct Base {
  pybind11::object weight, bias;
  at::ScalarType product = at::kFloat;
  bool autocast = false;
};

inline bool is_base_dtype(at::ScalarType type) { return is_half(type) || type == at::kFloat; }

inline bool read_dense(PyObject* object, const Tensor& x, Base& base) {
  static PyObject *const kWeight = interned("weight"), *const kBias = interned("bias");
  if (!is(object, modules.linear)) return false;
  const Attributes own(object);
  if (own.is_hooked()) return false;
  PyObject *const weight_ = own.parameter(kWeight), *const bias_ = own.parameter(kBias);
  const Tensor* const weight = as_matrix(weight_);
  const Tensor* const bias = bias_ == nullptr || bias_ == Py_None ? nullptr : as_tensor(bias_);
  if (weight == nullptr || weight->requires_grad() || weight->device() != x.device()) return false;
  if (bias_ == nullptr || (bias_ != Py_None && (bias == nullptr || bias->dim() != 1))) return false;

  const c10::DeviceType device = x.device().type();
  if (!at::autocast::is_autocast_available(device)) return false;
  base.autocast = at::autocast::is_autocast_enabled(device);
  const at::ScalarType dtype = weight->scalar_type();
  base.product = base.autocast ? at::autocast::get_autocast_dtype(device) : dtype;
  if (!is_base_dtype(dtype) || !is_base_dtype(base.product)) return false;
  if (bias != nullptr && bias->scalar_type() != dtype && !base.autocast) return false;
  if (x.scalar_type() != dtype && !(base.autocast && is_base_dtype(x.scalar_type()))) return false;
  base.weight = pybind11::reinterpret_borrow<pybind11::object>(weight_);
  base.bias = pybind11::reinterpret_borrow<pybind11::object>(bias_);
  return true;
}

// Any other base, as the layer itself reads it.
inline bool read_other(PyObject* layer, PyObject* object, PyObject* x, Base& base) {
  static PyObject* const kReadBase = interned("_read_base");
  const auto found = checked(PyObject_CallMethodObjArgs(layer, kReadBase, object, x, nullptr));
  if (!PyTuple_Check(found.ptr()) || PyTuple_GET_SIZE(found.ptr()) != 4) return false;
  PyObject* const product = PyTuple_GET_ITEM(found.ptr(), 2);
  if (!THPDtype_Check(product)) return false;
  base.weight = pybind11::reinterpret_borrow<pybind11::object>(PyTuple_GET_ITEM(found.ptr(), 0));
  base.bias = pybind11::reinterpret_borrow<pybind11::object>(PyTuple_GET_ITEM(found.ptr(), 1));
  base.product = reinterpret_cast<THPDtype*>(product)->scalar_type;
  base.autocast = PyTuple_GET_ITEM(found.ptr(), 3) == Py_True;
  return true;
}

// The probability of a dropout that is in force; false for anything but a Dropout or an Identity.
inline bool read_dropout(PyObject* module, double& p) {
  static PyObject *const kP = interned("p"), *const kTraining = interned("training");
  p = 0.0;
  if (!is(module, modules.dropout) && !is(module, modules.identity)) return false;
  const Attributes own(module);
  if (own.is_hooked()) return false;
  if (is(module, modules.identity)) return true;
  PyObject *const number = own[kP], *const training = own[kTraining];
  if (training == Py_False) return true;
  return training == Py_True && number != nullptr && as_number(number, p);
}

// The layer's one active adapter: its name, A, B, scaling and p.
struct Adapter {
  pybind11::object name, A, B, scaling;
  double p = 0.0;
  at::ScalarType dtype = at::kFloat;
};

inline bool read_adapter(PyObject* layer, const Attributes& own, const Tensor& x, int64_t most, Adapter& adapter) {
  static PyObject *const kActive = interned("active_adapters"), *const kVariant = interned("lora_variant"),
                  *const kScaling = interned("scaling"), *const kWeight = interned("weight"),
                  *const kBias = interned("bias");
  static const std::array<PyObject*, 3> kParts{interned("lora_A"), interned("lora_B"), interned("lora_dropout")};
  const auto active = checked(PyObject_GetAttr(layer, kActive));
  if (!PyList_CheckExact(active.ptr()) || PyList_GET_SIZE(active.ptr()) != 1) return false;
  adapter.name = pybind11::reinterpret_borrow<pybind11::object>(PyList_GET_ITEM(active.ptr(), 0));
  PyObject *const name = adapter.name.ptr(), *const variants = own[kVariant];
  if (!PyUnicode_CheckExact(name) || variants == nullptr || !PyDict_CheckExact(variants)) return false;
  if (own.entry(kVariant, name) != nullptr) return false;

  std::array<PyObject*, 3> parts{};
  for (size_t i = 0; i < parts.size(); ++i) {
    PyObject* const container = own.module(kParts[i]);
    if (!is(container, modules.dict)) return false;
    parts[i] = Attributes(container).module(name);
  }
  if (!is(parts[0], modules.linear) || !is(parts[1], modules.linear)) return false;
  const Attributes lora_A(parts[0]), lora_B(parts[1]);
  if (lora_A.is_hooked() || lora_B.is_hooked() || !read_dropout(parts[2], adapter.p)) return false;
  PyObject *const A_ = lora_A.parameter(kWeight), *const B_ = lora_B.parameter(kWeight);
  PyObject* const scaling = own.entry(kScaling, name);
  const Tensor *const A = as_matrix(A_), *const B = as_matrix(B_);
  if (A == nullptr || B == nullptr || lora_B.parameter(kBias) != Py_None) return false;
  if (scaling == nullptr || !PyFloat_CheckExact(scaling)) return false;
  if (A->device() != x.device() || B->device() != x.device() || A->size(0) > most) return false;
  if (A->scalar_type() != B->scalar_type()) return false;
  adapter.A = pybind11::reinterpret_borrow<pybind11::object>(A_);
  adapter.B = pybind11::reinterpret_borrow<pybind11::object>(B_);
  adapter.scaling = pybind11::reinterpret_borrow<pybind11::object>(scaling);
  adapter.dtype = A->scalar_type();
  return true;
}

// Whether an adapter's dtype meets that of the product.
inline bool fits(const Adapter& adapter, const Base& base, PyObject* layer) {
  static PyObject* const kCast = interned("cast_input_dtype_enabled");
  if (adapter.dtype == base.product) return true;
  if (adapter.dtype != at::kFloat) return false;
  return base.autocast || checked(PyObject_GetAttr(layer, kCast)).ptr() == Py_True;
}

// operands(layer, x, dense, most): weight, bias, the dtype of x W^T, the adapter's name, A, B, scaling and probability
// of dropout; or None. `dense`: whether the layer is one over an nn.Linear; `most`: the largest rank.
inline PyObject* operands(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject *const kDisabled = interned("disable_adapters"), *const kMerged = interned("merged"),
                  *const kBase = interned("base_layer");
  TORCH_CHECK(count == 4, "a call has a wrong number of arguments");
  PyObject* const layer = arguments[0];
  const Tensor* const x = as_tensor(arguments[1]);
  if (x == nullptr) Py_RETURN_NONE;
  for (PyObject* const name : {kDisabled, kMerged}) {
    if (checked(PyObject_GetAttr(layer, name)).ptr() != Py_False) Py_RETURN_NONE;
  }
  const Attributes own(layer);
  const auto object = pybind11::reinterpret_borrow<pybind11::object>(own.module(kBase));
  if (!object) Py_RETURN_NONE;
  // First: any other base is read by Python, once more if this is no answer.
  Adapter adapter;
  if (!read_adapter(layer, own, *x, PyLong_AsLongLong(arguments[3]), adapter)) Py_RETURN_NONE;
  Base base;
  const bool dense = arguments[2] == Py_True;
  const bool read = dense ? read_dense(object.ptr(), *x, base) : read_other(layer, object.ptr(), arguments[1], base);
  if (!read || !fits(adapter, base, layer)) Py_RETURN_NONE;
  const auto product = pybind11::handle(reinterpret_cast<PyObject*>(torch::getTHPDtype(base.product)));
  return pybind11::make_tuple(base.weight, base.bias, product, adapter.name, adapter.A, adapter.B, adapter.scaling,
                              adapter.p)
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace lora_kernels::host
