// lora_linear, lora_linear_group and lora_gated_mlp without Python: a call like one that Python has made before
// allocates, launches and makes its autograd node here. Every other call is sent back. lora_kernels/native.py is the
// other side.

#include <ATen/ops/randint.h>
#include <ATen/record_function.h>
#include <torch/csrc/Dtype.h>
#include <torch/version.h>

#include <cmath>

#include "call.h"
#include "group.h"
#include "linear.h"
#include "peft.h"

#define TEXT_OF(words) #words
#define TEXT(words) TEXT_OF(words)

namespace {

using namespace lora_kernels::host;

using Plan = std::shared_ptr<const ForwardPlan>;
using Scales = std::array<double, kMostLayers>;

Plans<ForwardPlan>& forward_plans() {
  static auto* const instance = new Plans<ForwardPlan>;
  return *instance;
}

// Stands for a kind of call that was made once: plans are for what comes again, and not for every length of a batch.
const Plan& made_once() {
  static auto* const instance = new Plan(new ForwardPlan({}, 1.0, nullptr));
  return *instance;
}

// x in the dtype of the product, and a seed for each layer's mask.
struct Inputs {
  Tensor x;
  OfMembers seeds;
};

Inputs prepare(const Call& call) {
  const pybind11::gil_scoped_release no_gil;
  Inputs in{call.cast_x ? call.x->to(call.dtype) : *call.x, {}};
  if (call.p != 0.0) {
    const c10::OptionalDeviceGuard guard(in.x.device());
    const at::AutoDispatchBelowADInplaceOrView not_recorded;
    const auto options = at::TensorOptions().dtype(at::kLong).device(in.x.device());
    // As dropout.py draws them.
    for (size_t i = 0; i < call.count; ++i) in.seeds[i] = at::randint(0, int64_t{1} << 62, {1}, options);
  }
  return in;
}

template <typename Node>
auto node_of(const Call& call, const Plan& plan, const Tensor& x) {
  const auto node = make_node<Node>();
  node->plan = plan, node->precision = call.precision, node->p = call.p, node->automatic = call.automatic;
  node->dtype = call.dtype, node->adapter_dtype = call.adapters, node->device = x.device();
  return node;
}

// y with the leading dimensions of x.
Tensor fresh_y(const Tensor& x, int64_t N, at::ScalarType type) {
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return fresh(sizes, x, type);
}

Tensor fresh_s(const Call& call, const Layer& layer, const Tensor& x) {
  return fresh({call.M, layer.R}, x, call.precision == Precision::kSplit ? at::kFloat : call.dtype);
}

// What kernels are launched in.
struct Outside {
  const pybind11::gil_scoped_release no_gil;
  const c10::OptionalDeviceGuard guard;
  const at::AutoDispatchBelowADInplaceOrView not_recorded;
  void* const stream;
  explicit Outside(c10::Device device) : guard(device), stream(current_stream(device)) {}
};

// The node of the graph that y will come from. What takes away what is saved may end the call here, before it computes:
// activation checkpointing does where a recomputation needs no more (lora_kernels/deferred.py).
auto linear_node(const Call& call, const Plan& plan, double scale, const Needs& needs, const Inputs& in) {
  const auto node = node_of<LoRALinearBackward>(call, plan, in.x);
  const Layer& layer = call.layers[0];
  const Tensor nothing, bias = bias_of(layer);
  node->set_next_edges(torch::autograd::collect_next_edges(in.x, *layer.lora_A, *layer.lora_B, bias));
  node->needs = needs;
  if (bias.defined()) node->bias_dtype = bias.scalar_type();
  node->K = call.K, node->N = layer.N, node->R = layer.R, node->scale = scale;
  const bool needs_t = needs.x || needs.lora_A;
  node->save({needs.lora_A ? in.x : nothing, needs.x ? *layer.lora_A : nothing, needs_t ? *layer.lora_B : nothing,
              needs_t ? in.seeds[0] : nothing, nothing, needs.x ? layer.weight : Weight()});
  return node;
}

PyObject* linear(const Call& call, const Plan& plan, const Scales& scales) {
  RECORD_FUNCTION("LoRALinearFunction", c10::ArrayRef<const c10::IValue>{});
  const Inputs in = prepare(call);
  const Layer& layer = call.layers[0];
  Needs needs;
  if (c10::GradMode::is_enabled()) {
    needs = {in.x.requires_grad(), layer.lora_A->requires_grad(), layer.lora_B->requires_grad(),
             layer.bias != nullptr && layer.bias->requires_grad()};
  }
  const auto node = needs.any() ? linear_node(call, plan, scales[0], needs, in) : nullptr;
  Tensor y, s;
  {
    const Outside outside(in.x.device());
    y = fresh_y(in.x, layer.N, call.dtype), s = fresh_s(call, layer, in.x);
    Launching launching(plan->launches, outside.stream);
    launch_layer(launching, in.x, layer, y, s, in.seeds[0], call.p, scales[0]);
  }
  if (node != nullptr) {
    if (needs.lora_B) node->keep(std::move(s));
    torch::autograd::set_history(y, NodePtr(node));
  }
  return THPVariable_Wrap(std::move(y));
}

// The first product of a group or a gated MLP: y or g and u, and what is saved of the layers.
struct Shared {
  OfMembers ys, ss;
};

Shared run_group(const Call& call, Launching& launching, const Scales& scales, const Inputs& in, bool leading) {
  Members members;
  members.count = call.sharing(), members.scale = scales;
  Shared out;
  for (size_t i = 0; i < members.count; ++i) {
    const Layer& layer = call.layers[i];
    out.ys[i] = leading ? fresh_y(in.x, layer.N, call.dtype) : fresh({call.M, layer.N}, in.x, call.dtype);
    out.ss[i] = fresh_s(call, layer, in.x);
  }
  if (launching.decodes()) {
    for (size_t i = 0; i < members.count; ++i) {
      launch_layer(launching, in.x, call.layers[i], out.ys[i], out.ss[i], in.seeds[i], call.p, scales[i]);
    }
    return out;
  }
  for (size_t i = 0; i < members.count; ++i) {
    const Layer& layer = call.layers[i];
    members.weight[i] = dense_of(layer.weight, launching, in.x, call.dtype);
    members.lora_A[i] = *layer.lora_A, members.lora_B[i] = *layer.lora_B;
    members.bias[i] = bias_of(layer);
  }
  for (size_t i = 0; i < members.count; ++i) members.mask[i] = drawn(launching, in.seeds[i], call.M, call.K);
  launch_group_forward(launching, in.x, members, out.ys, out.ss);
  return out;
}

// Nothing but in a graph. As linear_node, it may end the call.
auto group_node(const Call& call, const Plan& plan, const Scales& scales, const Inputs& in, const Shared& shared) {
  decltype(make_node<LoRAGroupBackward>()) node = nullptr;
  if (!c10::GradMode::is_enabled() || !in.x.requires_grad()) return node;
  node = node_of<LoRAGroupBackward>(call, plan, in.x);
  node->kind = call.kind, node->K = call.K, node->count = call.count, node->scale = scales;
  variable_list sources{in.x}, saved;
  if (call.is_gated()) saved = {shared.ys[0], shared.ys[1]};
  saved.push_back(in.x);
  for (size_t i = 0; i < call.count; ++i) {
    const Layer& layer = call.layers[i];
    node->N[i] = layer.N, node->R[i] = layer.R, node->block_size[i] = layer.weight.block_size;
    sources.insert(sources.end(), {*layer.lora_A, *layer.lora_B});
    saved.insert(saved.end(), {layer.weight.dense, *layer.lora_A, *layer.lora_B, shared.ss[i], in.seeds[i]});
    saved.insert(saved.end(), layer.weight.parts.begin(), layer.weight.parts.end());
  }
  node->set_next_edges(torch::autograd::collect_next_edges(sources));
  node->save(saved);
  return node;
}

PyObject* group(const Call& call, const Plan& plan, const Scales& scales) {
  RECORD_FUNCTION("LoRAGroupFunction", c10::ArrayRef<const c10::IValue>{});
  const Inputs in = prepare(call);
  Shared shared;
  {
    const Outside outside(in.x.device());
    Launching launching(plan->launches, outside.stream);
    shared = run_group(call, launching, scales, in, /*leading=*/true);
  }
  const auto node = group_node(call, plan, scales, in, shared);
  auto ys = pybind11::list(call.count);
  for (size_t i = 0; i < call.count; ++i) {
    if (node != nullptr) torch::autograd::set_history(shared.ys[i], NodePtr(node));
    ys[i] = wrapped(shared.ys[i]);
  }
  return ys.release().ptr();
}

PyObject* gated(const Call& call, const Plan& plan, const Scales& scales) {
  RECORD_FUNCTION("GatedMLPFunction", c10::ArrayRef<const c10::IValue>{});
  const Inputs in = prepare(call);
  Launching launching(plan->launches, current_stream(in.x.device()));
  Shared shared;
  {
    const Outside outside(in.x.device());
    shared = run_group(call, launching, scales, in, /*leading=*/false);
  }
  const auto node = group_node(call, plan, scales, in, shared);
  const Layer& down = call.layers[2];
  Tensor y, s;
  {
    const Outside outside(in.x.device());
    const Tensor h = fresh(shared.ys[0].sizes(), in.x, call.dtype);
    launch_activation(launching, {&shared.ys[0], &shared.ys[1], &h});
    // The decoded weight lies where g and u lay, if nobody keeps those.
    shared = Shared();
    y = fresh_y(in.x, down.N, call.dtype), s = fresh_s(call, down, in.x);
    launch_layer(launching, h, down, y, s, in.seeds[2], call.p, scales[2]);
  }
  if (node != nullptr) {
    node->keep(std::move(s));
    torch::autograd::set_history(y, NodePtr(node));
  }
  return THPVariable_Wrap(std::move(y));
}

using Read = bool (*)(PyObject* const*, Call&);
using Compute = PyObject* (*)(const Call&, const Plan&, const Scales&);

// What was computed; or None for a call that should be learned, and False for any other that is Python's.
template <Read read, Compute compute, Py_ssize_t arity>
PyObject* call_of(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == arity, "a call has a wrong number of arguments");
  Call call;
  if (!read(arguments, call)) Py_RETURN_FALSE;
  const Plan plan = forward_plans().find(call.key);
  if (plan == nullptr) {
    forward_plans().remember(call.key, made_once());
    Py_RETURN_FALSE;
  }
  if (plan == made_once()) Py_RETURN_NONE;
  if (plan->launches.empty() || has_hooks()) Py_RETURN_FALSE;
  Scales scales{};
  for (size_t i = 0; i < call.count; ++i) {
    scales[i] = call.layers[i].scaling * plan->inverse_keep;
    if (std::isfinite(scales[i]) && !std::isfinite(static_cast<float>(scales[i]))) Py_RETURN_FALSE;
  }
  return compute(call, plan, scales);
  END_HANDLE_TH_ERRORS
}

// Remembers by which launches a call like this one is computed: its arguments, the launches or None, 1 / (1 - p), and
// what the backward in Python wants to know.
template <Read read, Py_ssize_t arity>
PyObject* learn(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == arity + 3, "a call to be learned has a wrong number of arguments");
  Call call;
  if (read(arguments, call)) {
    const pybind11::handle launches(arguments[arity]), inverse_keep(arguments[arity + 1]);
    auto made = launches.is_none() ? Launches() : pybind11::cast<Launches>(launches);
    const double keep = pybind11::cast<double>(inverse_keep);
    forward_plans().remember(call.key, std::make_shared<ForwardPlan>(std::move(made), keep, arguments[arity + 2]));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef functions[] = {method("linear", call_of<read_linear, linear, 9>),
                           method("group", call_of<read_group, group, 5>),
                           method("gated", call_of<read_gated, gated, 8>),
                           method("learn_linear", learn<read_linear, 9>),
                           method("learn_group", learn<read_group, 5>),
                           method("learn_gated", learn<read_gated, 8>),
                           method("operands", operands),
                           {nullptr, nullptr, 0, nullptr}};

template <typename Pointer>
void set(Pointer& function, uint64_t address) {
  function = reinterpret_cast<Pointer>(address);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using Map = std::tuple<int, int, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t, int>;
  py::class_<Launch, std::shared_ptr<Launch>>(module, "Launch")
      .def(py::init([](uint64_t function, uint64_t context, std::array<unsigned, 3> grid, unsigned threads,
                       unsigned shared, const Launch::Parameters& parameters, const std::map<int, int64_t>& numbers,
                       const std::vector<Map>& maps, int64_t workspace_size, int64_t counters, std::string name) {
        std::vector<MapShape> shapes;
        const auto shape_of = [](auto... fields) { return MapShape{fields...}; };
        for (const Map& map : maps) shapes.push_back(std::apply(shape_of, map));
        return std::make_shared<Launch>(function, context, grid, threads, shared, parameters, numbers,
                                        std::move(shapes), workspace_size, counters, std::move(name));
      }));
  // The addresses of Driver's functions.
  module.def("use_driver", [](uint64_t launch, uint64_t encode_map, uint64_t is_capturing, uint64_t set_context,
                              uint64_t current_stream, const std::string& device_type) {
    set(driver.launch, launch), set(driver.encode_map, encode_map);
    set(driver.is_capturing, is_capturing), set(driver.set_context, set_context);
    set(driver.current_stream, current_stream);
    served = c10::Device(device_type).type();
  });
  module.def("use_python", [](py::object backward, py::object group_backward, py::object zeros_for, py::object hooked,
                              py::object nf4_weight, const std::string& twice) {
    callbacks.backward = backward.release().ptr(), callbacks.group_backward = group_backward.release().ptr();
    callbacks.zeros_for = zeros_for.release().ptr(), callbacks.nf4_weight = nf4_weight.release().ptr();
    callbacks.hooked = hooked.release().ptr(), callbacks.twice = twice;
    callbacks.hook_name = PyUnicode_InternFromString("launch_enter_hook");
    callbacks.calls_name = PyUnicode_InternFromString("calls");
  });
  module.def("use_modules", [](py::object linear, py::object dict, py::object dropout, py::object identity) {
    modules.linear = linear.release().ptr(), modules.dict = dict.release().ptr();
    modules.dropout = dropout.release().ptr(), modules.identity = identity.release().ptr();
  });
  module.def("clear", [] { forward_plans().clear(), backward_plans().clear(), zeros().clear(); });
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("sources") = TEXT(LORA_KERNELS_SOURCES);
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}
