// lora_linear without Python: a call like one that Python has made before allocates, launches and makes its autograd
// node here. Every other call is sent back. lora_kernels/native.py is the other side.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/randint.h>
#include <ATen/record_function.h>
#include <torch/csrc/Dtype.h>
#include <torch/version.h>

#include <cmath>

#include "backward.h"

#define TEXT_OF(words) #words
#define TEXT(words) TEXT_OF(words)

namespace {

using namespace lora_kernels::host;

// The arguments of lora_linear, as far as they are covered.
struct Call {
  const Tensor *x = nullptr, *weight = nullptr, *lora_A = nullptr, *lora_B = nullptr, *bias = nullptr;
  double scaling = 1.0, p = 0.0;
  int64_t M = 0, K = 0, N = 0, R = 0;
  at::ScalarType dtype = at::kBFloat16;
  Precision precision = Precision::kNative;
  bool cast_x = false;
  Key key;
};

Plans<ForwardPlan>& forward_plans() {
  static auto* const instance = new Plans<ForwardPlan>;
  return *instance;
}

// Stands for a kind of call that was made once: plans are for what comes again, and not for every length of a batch.
const std::shared_ptr<const ForwardPlan>& made_once() {
  static auto* const instance = new std::shared_ptr<const ForwardPlan>(new ForwardPlan(nullptr, 1.0, nullptr));
  return *instance;
}

// What the backends that plans are for run on: CUDA, but in tests.
c10::DeviceType served = c10::kCUDA;

const Tensor* as_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

bool as_number(PyObject* object, double& number) {
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

bool is_half(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

// Reads x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, the backend's name. False: this is for Python,
// which also says what is wrong with it where something is.
bool read(PyObject* const* arguments, Call& call) {
  if (!PyUnicode_Check(arguments[8])) return false;
  const bool automatic = PyUnicode_CompareWithASCIIString(arguments[8], "auto") == 0;
  if (!automatic && PyUnicode_CompareWithASCIIString(arguments[8], "triton") != 0) return false;
  call.x = as_tensor(arguments[0]), call.weight = as_tensor(arguments[1]);
  call.lora_A = as_tensor(arguments[2]), call.lora_B = as_tensor(arguments[3]);
  if (call.x == nullptr || call.weight == nullptr || call.lora_A == nullptr || call.lora_B == nullptr) return false;
  if (arguments[4] != Py_None && (call.bias = as_tensor(arguments[4])) == nullptr) return false;
  const Tensor &x = *call.x, &weight = *call.weight, &lora_A = *call.lora_A, &lora_B = *call.lora_B;
  const c10::Device device = x.device();
  if (device.type() != served || !dispatch_is_plain() || at::impl::torch_function_mode_enabled()) return false;
  for (const Tensor* tensor : {call.x, call.weight, call.lora_A, call.lora_B, call.bias}) {
    if (tensor != nullptr && !is_plain(*tensor, device)) return false;
  }

  double p = 0.0;
  if (!as_number(arguments[5], call.scaling) || !as_number(arguments[6], p) || !(p >= 0.0 && p <= 1.0)) return false;
  if (arguments[7] != Py_True && arguments[7] != Py_False) return false;
  call.p = arguments[7] == Py_True ? p : 0.0;

  if (x.dim() == 0 || weight.dim() != 2 || lora_A.dim() != 2 || lora_B.dim() != 2) return false;
  call.N = weight.size(0), call.K = weight.size(1), call.R = lora_A.size(0);
  if (call.K == 0 || x.size(-1) != call.K || lora_A.size(1) != call.K || lora_B.size(0) != call.N ||
      lora_B.size(1) != call.R || x.numel() == 0 || (weight.stride(0) != 1 && weight.stride(1) != 1)) {
    return false;
  }
  call.M = x.numel() / call.K;
  const auto stride = row_stride(x, call.M, call.K);
  // Python keeps other tensors as matrices, and what is kept must not depend on who computes.
  if (x.dim() != 2 && !x.is_contiguous()) return false;
  if (!stride || (weight.requires_grad() && c10::GradMode::is_enabled())) return false;

  const bool autocast = at::autocast::is_autocast_enabled(served);
  const at::ScalarType adapters = lora_A.scalar_type(), given = x.scalar_type();
  call.dtype = autocast ? at::autocast::get_autocast_dtype(served) : given;
  call.cast_x = given != call.dtype;
  if (!is_half(call.dtype) || weight.scalar_type() != call.dtype || lora_B.scalar_type() != adapters) return false;
  if (adapters != call.dtype && adapters != at::kFloat) return false;
  if (call.cast_x && (!x.is_contiguous() || !(is_half(given) || given == at::kFloat))) return false;
  call.precision = adapters == call.dtype ? Precision::kNative : autocast ? Precision::kRounded : Precision::kSplit;
  int64_t bias_type = 0, alignment = 0;
  if (call.bias != nullptr) {
    const Tensor& bias = *call.bias;
    const bool fits = bias.dim() == 1 && bias.size(0) == call.N && bias.is_contiguous();
    if (!fits || (bias.scalar_type() != call.dtype && bias.scalar_type() != at::kFloat)) return false;
    bias_type = 1 + static_cast<int64_t>(bias.scalar_type());
    alignment = misaligned(bias);
  }
  alignment = alignment << 4 | (call.cast_x ? 0 : misaligned(x)) | misaligned(weight) << 1 | misaligned(lora_A) << 2 |
              misaligned(lora_B) << 3;

  call.key.add(static_cast<uint8_t>(device.index()) | static_cast<int64_t>(call.dtype) << 8 |
               static_cast<int64_t>(adapters) << 16 | bias_type << 24 | static_cast<int64_t>(call.precision) << 32 |
               alignment << 40 | static_cast<int64_t>(automatic) << 48 | static_cast<int64_t>(call.cast_x) << 49);
  for (const int64_t word : {call.M, call.K, call.N, call.R, *stride}) call.key.add(word);
  for (const Tensor* matrix : {&weight, &lora_A, &lora_B}) call.key.add_strides(*matrix);
  call.key.add(call.p);
  return true;
}

struct Inputs {
  Tensor x, seed;
};

struct Outputs {
  Tensor y, s;
};

Inputs prepare(const Call& call) {
  const pybind11::gil_scoped_release no_gil;
  Inputs in{call.cast_x ? call.x->to(call.dtype) : *call.x, {}};
  if (call.p != 0.0) {
    const c10::OptionalDeviceGuard guard(in.x.device());
    const at::AutoDispatchBelowADInplaceOrView not_recorded;
    // As dropout.py draws it.
    in.seed = at::randint(0, int64_t{1} << 62, {1}, at::TensorOptions().dtype(at::kLong).device(in.x.device()));
  }
  return in;
}

// The node of the graph that y will come from. What takes away what is saved may end the call here, before it computes:
// activation checkpointing does where a recomputation needs no more (lora_kernels/deferred.py).
auto make_node_of(const Call& call, const std::shared_ptr<const ForwardPlan>& plan, double scale, const Needs& needs,
                  const Inputs& in) {
  const auto node = make_node<LoRALinearBackward>();
  static const Tensor nothing;
  const Tensor& bias = call.bias != nullptr ? *call.bias : nothing;
  node->set_next_edges(torch::autograd::collect_next_edges(in.x, *call.lora_A, *call.lora_B, bias));
  node->plan = plan, node->needs = needs, node->precision = call.precision;
  node->dtype = call.dtype, node->adapter_dtype = call.lora_A->scalar_type(), node->device = in.x.device();
  if (call.bias != nullptr) node->bias_dtype = bias.scalar_type();
  node->K = call.K, node->N = call.N, node->R = call.R, node->p = call.p, node->scale = scale;
  const bool needs_t = needs.x || needs.lora_A;
  node->save({needs.lora_A ? in.x : nothing, needs.x ? *call.weight : nothing, needs.x ? *call.lora_A : nothing,
              needs_t ? *call.lora_B : nothing, needs_t ? in.seed : nothing, nothing});
  return node;
}

Outputs run(const Call& call, const ForwardPlan& plan, double scale, const Inputs& in) {
  const pybind11::gil_scoped_release no_gil;
  Outputs out;
  const Tensor& x = in.x;
  const c10::Device device = x.device();
  const c10::OptionalDeviceGuard guard(device);
  const at::AutoDispatchBelowADInplaceOrView not_recorded;
  void* const stream = current_stream(device);
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = call.N;
  out.y = fresh(sizes, x, call.dtype);
  out.s = fresh({call.M, call.R}, x, call.precision == Precision::kSplit ? at::kFloat : call.dtype);
  const Tensor workspace = fresh({plan.launch->workspace_size}, x, at::kFloat);
  Tensor kept;
  const void* const tensors[] = {x.const_data_ptr(),
                                 call.weight->const_data_ptr(),
                                 out.y.mutable_data_ptr(),
                                 call.lora_A->const_data_ptr(),
                                 call.lora_B->const_data_ptr(),
                                 call.bias != nullptr ? call.bias->const_data_ptr() : nullptr,
                                 out.s.mutable_data_ptr(),
                                 workspace.mutable_data_ptr(),
                                 zeros().of(device, stream, plan.launch->counters, kept),
                                 in.seed.defined() ? in.seed.const_data_ptr() : nullptr,
                                 nullptr};
  (*plan.launch)(tensors, static_cast<float>(scale), stream);
  return out;
}

// y; or None for a call that should be learned, and False for any other that is Python's.
PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 9, "linear takes 9 arguments");
  Call call;
  if (!read(arguments, call)) Py_RETURN_FALSE;
  const auto plan = forward_plans().find(call.key);
  if (plan == nullptr) {
    forward_plans().remember(call.key, made_once());
    Py_RETURN_FALSE;
  }
  if (plan == made_once()) Py_RETURN_NONE;
  const double scale = call.scaling * plan->inverse_keep;
  const bool overflows = std::isfinite(scale) && !std::isfinite(static_cast<float>(scale));
  if (plan->launch == nullptr || overflows || has_hooks()) Py_RETURN_FALSE;
  RECORD_FUNCTION("LoRALinearFunction", c10::ArrayRef<const c10::IValue>{});
  const Inputs in = prepare(call);
  Needs needs;
  if (c10::GradMode::is_enabled()) {
    needs = {in.x.requires_grad(), call.lora_A->requires_grad(), call.lora_B->requires_grad(),
             call.bias != nullptr && call.bias->requires_grad()};
  }
  const auto node = needs.any() ? make_node_of(call, plan, scale, needs, in) : nullptr;
  Outputs out = run(call, *plan, scale, in);
  if (node != nullptr) {
    if (needs.lora_B) node->keep(std::move(out.s));
    torch::autograd::set_history(out.y, NodePtr(node));
  }
  return THPVariable_Wrap(std::move(out.y));
  END_HANDLE_TH_ERRORS
}

// Remembers by which launch a call like this one is computed: linear's arguments, the launch or None, 1 / (1 - p), and
// what the backward in Python wants to know.
PyObject* learn(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 12, "learn takes 12 arguments");
  Call call;
  if (read(arguments, call)) {
    auto launch = pybind11::handle(arguments[9]).cast<std::shared_ptr<Launch>>();
    const double inverse_keep = pybind11::handle(arguments[10]).cast<double>();
    forward_plans().remember(call.key, std::make_shared<ForwardPlan>(std::move(launch), inverse_keep, arguments[11]));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL, nullptr},
    {"learn", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(learn)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

template <typename Function>
void set(Function*& function, uint64_t address) {
  function = reinterpret_cast<Function*>(address);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using Map = std::tuple<int, int, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t, int>;
  py::class_<Launch, std::shared_ptr<Launch>>(module, "Launch")
      .def(py::init([](uint64_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared,
                       const Launch::Parameters& parameters, const std::map<int, int64_t>& numbers,
                       const std::vector<Map>& maps, int64_t workspace_size, int64_t counters) {
        std::vector<MapShape> shapes;
        const auto shape_of = [](auto... fields) { return MapShape{fields...}; };
        for (const Map& map : maps) shapes.push_back(std::apply(shape_of, map));
        return std::make_shared<Launch>(function, grid, threads, shared, parameters, numbers, std::move(shapes),
                                        workspace_size, counters);
      }));
  // The addresses of Driver's functions.
  module.def("use_driver", [](uint64_t launch, uint64_t encode_map, uint64_t is_capturing, uint64_t current_stream,
                              const std::string& device_type) {
    set(driver.launch, launch), set(driver.encode_map, encode_map);
    set(driver.is_capturing, is_capturing), set(driver.current_stream, current_stream);
    served = c10::Device(device_type).type();
  });
  module.def("use_python", [](py::object backward, py::object zeros_for, py::object hooked,
                              const std::string& twice) {
    callbacks.backward = backward.release().ptr(), callbacks.zeros_for = zeros_for.release().ptr();
    callbacks.hooked = hooked.release().ptr(), callbacks.twice = twice;
    callbacks.hook_name = PyUnicode_InternFromString("launch_enter_hook");
    callbacks.calls_name = PyUnicode_InternFromString("calls");
  });
  module.def("clear", [] { forward_plans().clear(), backward_plans().clear(), zeros().clear(); });
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("sources") = TEXT(LORA_KERNELS_SOURCES);
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}
