// What is asked of Python: the calls that no plan is known for, and memory of zeros that is not at hand.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "launch.h"

namespace lora_kernels::host {

// Set once, before the first call, and never given back: threads may outlive the interpreter's last words.
struct Callbacks {
  // backward(constants, needs, saved..., dy, scale, learn) -> dx, dA, dB, db, launches;
  // group_backward(constants, shared, layers, dys, scales, learn) -> dx, dA and dB of each layer, launches;
  // sync.zeros_for.
  PyObject *backward = nullptr, *group_backward = nullptr, *zeros_for = nullptr;
  // Where Triton keeps the hooks that want to be told of launches; None where it has no such place.
  PyObject *hooked = nullptr, *hook_name = nullptr, *calls_name = nullptr;
  // The class NF4Weight.
  PyObject* nf4_weight = nullptr;
  // What is said of a second derivative.
  std::string twice;
};

inline Callbacks callbacks;

// A reference to an object that may be dropped without the GIL.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) { Py_XINCREF(object_); }
  ~Object() {
    if (object_ == nullptr || !Py_IsInitialized()) return;
    const pybind11::gil_scoped_acquire gil;
    Py_DECREF(object_);
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// The result of a call, or its exception. Needs the GIL.
inline pybind11::object checked(PyObject* result) {
  if (result == nullptr) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline pybind11::object wrapped(const at::Tensor& tensor) {
  if (!tensor.defined()) return pybind11::none();
  return checked(THPVariable_Wrap(tensor));
}

inline at::Tensor unwrapped(const pybind11::handle& object) {
  return object.is_none() ? at::Tensor() : THPVariable_Unpack(object.ptr());
}

// Whether a profiler asked Triton to be told of launches, in the way of launches.py's _has_hooks. Needs the GIL.
inline bool has_hooks() {
  if (callbacks.hooked == Py_None) return false;
  const auto hook = checked(PyObject_GetAttr(callbacks.hooked, callbacks.hook_name));
  if (hook.is_none()) return false;
  if (!PyObject_HasAttr(hook.ptr(), callbacks.calls_name)) return true;
  const auto calls = checked(PyObject_GetAttr(hook.ptr(), callbacks.calls_name));
  return PyObject_IsTrue(calls.ptr()) != 0;
}

// The zeros that kernels count in, as sync.py hands them out. It is asked again in every capture of a graph; outside of
// one its answer holds for the device and the stream.
class Zeros {
 public:
  // `kept` keeps the memory for the caller.
  const void* of(c10::Device device, void* stream, int64_t count, at::Tensor& kept) {
    int capturing = 0;
    const bool known = driver.is_capturing(stream, &capturing) == 0 && capturing == 0;
    const std::pair<c10::DeviceIndex, void*> place(device.index(), stream);
    if (known) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = pieces_.find(place);
      if (found != pieces_.end() && found->second.numel() >= count) {
        kept = found->second;
        return kept.const_data_ptr();
      }
    }
    kept = from_python(device, count);
    if (known) {
      const std::lock_guard<std::mutex> lock(mutex_);
      pieces_[place] = kept;
    }
    return kept.const_data_ptr();
  }
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    pieces_.clear();
  }

 private:
  static at::Tensor from_python(c10::Device device, int64_t count) {
    const pybind11::gil_scoped_acquire gil;
    const auto where = checked(THPDevice_New(device));
    const auto number = checked(PyLong_FromLongLong(count));
    return unwrapped(checked(PyObject_CallFunctionObjArgs(callbacks.zeros_for, where.ptr(), number.ptr(), nullptr)));
  }

  std::mutex mutex_;
  std::map<std::pair<c10::DeviceIndex, void*>, at::Tensor> pieces_;
};

// Never destroyed: the memory of a device may be gone by the end of the process.
inline Zeros& zeros() {
  static auto* const instance = new Zeros;
  return *instance;
}

}  // namespace lora_kernels::host
