// The extension module genopt_ext._C: one register function per subsystem. Its Python side is declared
// in genopt_ext/_C.pyi. The only file that knows pybind11, but for torch/hooks.h, which takes the GIL by it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

// After pybind11: this declares its namespace without hiding it.
#include <ATen/record_function.h>

#include <algorithm>
#include <iterator>

#include "torch/hooks.h"
#include "torch/quant.h"
#include "torch/stepper.h"

namespace py = pybind11;

namespace genopt {
namespace {

Gradients gradients_of(const std::string& left) {
  if (left == "zeroed") return Gradients::kZeroed;
  if (left == "unscaled") return Gradients::kUnscaled;
  throw std::invalid_argument("gradients must be 'zeroed', 'unscaled' or None, got '" + left + "'");
}

// The names that Python has for the kinds in DeviceTensorKind, in its order: each a list with a tensor a device.
constexpr const char* kTensorNames[] = {"grad_scale",    "found_inf", "group_scales", "grad_norm", "nonfinite",
                                        "skipped_steps", "shared",    "row_parts",    "row_sums"};
static_assert(std::size(kTensorNames) == kDeviceTensors);

StepArguments arguments_of(const py::kwargs& given) {
  StepArguments arguments;
  Control& control = arguments.control;
  for (const auto& [key, value] : given) {
    const std::string name = key.cast<std::string>();
    const auto tensors = std::find(std::begin(kTensorNames), std::end(kTensorNames), name);
    if (value.is_none()) continue;
    if (tensors != std::end(kTensorNames)) {
      arguments.tensors[tensors - kTensorNames] = value.cast<py::list>().ptr();
    } else if (name == "grads") {
      arguments.grads = value.ptr();
    } else if (name == "max_norm") {
      control.max_norm = value.cast<double>();
    } else if (name == "scale") {
      control.scale = value.cast<double>();
    } else if (name == "norm") {
      control.norm = static_cast<Norm>(value.cast<int>());
    } else if (name == "measure") {
      control.measure = value.cast<bool>();
    } else if (name == "guard") {
      control.guard = value.cast<bool>();
    } else if (name == "gradients") {
      control.gradients = gradients_of(value.cast<std::string>());
    } else if (name == "only_measure") {
      control.only_measure = value.cast<bool>();
    } else if (name == "only_check") {
      arguments.only_check = value.cast<bool>();
    } else {
      throw py::type_error("step() got an unexpected keyword argument '" + name + "'");
    }
  }
  return arguments;
}

py::tuple problems_of(const Unsupported& row) {
  py::list problems;
  for (const auto& [operand, reason] : row.problems)
    problems.append(py::make_tuple(py::handle(operand), kReasonNames[static_cast<int>(reason)]));
  return problems;
}

// None, or why the step was not taken. Throws pybind11's form of a Python error that the stepper met.
py::object step(Stepper& stepper, const py::object& param_groups, const py::object& state, std::vector<int64_t> skipped,
                const py::kwargs& given) {
  StepArguments arguments = arguments_of(given);
  arguments.skipped = std::move(skipped);
  std::optional<Refusal> refusal;
  try {
    refusal = stepper.step(param_groups.ptr(), state.ptr(), arguments);
  } catch (const PythonError&) {
    throw py::error_already_set();
  }
  if (!refusal) return py::none();
  py::dict rows;
  const Unsupported* last = nullptr;
  py::tuple problems;  // one object for rows in turn that have the same, as at a first step all have
  for (const Unsupported& each : refusal->rows) {
    if (!last || last->problems != each.problems) problems = problems_of(each);
    rows[py::int_(each.row)] = problems;
    last = &each;
  }
  using namespace py::literals;
  return py::dict("rows"_a = rows, "groups"_a = refusal->groups, "overlaps"_a = refusal->overlaps,
                  "grad_overlaps"_a = refusal->grad_overlaps, "devices"_a = refusal->devices,
                  "of_processes"_a = refusal->of_processes, "gradients_overlap"_a = refusal->gradients_overlap);
}

void register_stepper(py::module_& m) {
  py::class_<Stepper>(m, "Stepper")
      .def(py::init<const std::string&, const std::string&>(), py::arg("rule"), py::arg("backend"))
      .def_property_readonly("launches", &Stepper::launches)
      .def("step", &step, py::arg("param_groups"), py::arg("state"), py::arg("skipped"));
  // Whether a profiler or another observer wants to hear of regions such as an optimizer's step.
  m.def("is_observed", [] { return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value(); });
  m.def("is_watched", &is_watched);
  m.def("rules", [] {
    py::dict rules;
    for (const RuleInfo& info : rule_infos()) {
      if (info.is_transfer) continue;
      py::list options;
      for (const OptionName& option : info.options) options.append(py::make_tuple(option.key, option.item));
      rules[info.name] = py::make_tuple(info.has_step, info.states, info.running, options);
    }
    return rules;
  });
}

at::Tensor tensor_of(const py::handle& object) {
  if (object.is_none()) return {};
  if (!THPVariable_Check(object.ptr())) throw py::type_error("genopt_ext: expected a tensor");
  return THPVariable_Unpack(object.ptr());
}

void register_hooks(py::module_& m) {
  m.def(
      "set_entrance",
      [](const std::vector<py::handle>& params, const py::object& enter) {
        const auto entrance = enter.is_none() ? nullptr : std::make_shared<Entrance>(enter.ptr());
        for (const py::handle& p : params) set_entrance(tensor_of(p), entrance);
      },
      py::arg("params"), py::arg("enter"));
}

void register_quant(py::module_& m) {
  using quant::Tensors;
  const auto tensors = [](const py::object& numbers, const py::object& codes, const py::object& scale,
                          const py::object& zero_point, const py::object& seed) {
    return Tensors{tensor_of(numbers), tensor_of(codes), tensor_of(scale), tensor_of(zero_point), tensor_of(seed)};
  };
  m.def(
      "quantize_blocks",
      [tensors](const py::object& x, const py::object& codes, const py::object& scale, const py::object& zero_point,
                const py::object& seed, int bits, int64_t run) {
        const Tensors given = tensors(x, codes, scale, zero_point, seed);
        py::gil_scoped_release release;
        quant::quantize_blocks(given, bits, run);
      },
      py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("zero_point"), py::arg("seed"), py::kw_only(),
      py::arg("bits"), py::arg("run"));
  m.def(
      "find_scales",
      [tensors](const py::object& x, const py::object& scale, const py::object& zero_point, const py::object& ranges,
                int bits, int64_t run) {
        const Tensors given = tensors(x, py::none(), scale, zero_point, py::none());
        const at::Tensor kept = tensor_of(ranges);
        py::gil_scoped_release release;
        quant::find_scales(given, kept, bits, run);
      },
      py::arg("x"), py::arg("scale"), py::arg("zero_point"), py::arg("ranges"), py::kw_only(), py::arg("bits"),
      py::arg("run"));
  m.def(
      "encode",
      [tensors](const py::object& x, const py::object& codes, const py::object& scale, const py::object& zero_point,
                const py::object& seed, int bits, int64_t run) {
        const Tensors given = tensors(x, codes, scale, zero_point, seed);
        py::gil_scoped_release release;
        quant::encode(given, bits, run);
      },
      py::arg("x"), py::arg("codes"), py::arg("scale"), py::arg("zero_point"), py::arg("seed"), py::kw_only(),
      py::arg("bits"), py::arg("run"));
  m.def(
      "decode",
      [tensors](const py::object& codes, const py::object& scale, const py::object& zero_point, const py::object& out,
                int bits, int64_t run) {
        const Tensors given = tensors(out, codes, scale, zero_point, py::none());
        py::gil_scoped_release release;
        quant::decode(given, bits, run);
      },
      py::arg("codes"), py::arg("scale"), py::arg("zero_point"), py::arg("out"), py::kw_only(), py::arg("bits"),
      py::arg("run"));
}

void register_cuda(py::module_& m) {
  m.attr("has_cuda") = kHasCuda;
  // The backend whose kernels serve a tensor, or None.
  m.def(
      "kernels_for",
      [](const py::object& object) -> std::optional<std::string> {
        const at::Tensor& t = tensor_of(object);
        if (!is_in_memory(t)) return std::nullopt;
        return kernel_device(t) == kHost ? "cpu" : "cuda";
      },
      py::arg("t"));
}

void register_cpu(py::module_& m) {
  m.def("cpu_capability", &cpu::capability);
  m.def("cpu_capabilities", &cpu::capabilities);
  m.def("cpu_tuning", &cpu::tuning_in_use);
}

}  // namespace
}  // namespace genopt

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native kernels of genopt_ext.";
  genopt::register_stepper(m);
  genopt::register_cpu(m);
  genopt::register_cuda(m);
  genopt::register_hooks(m);
  genopt::register_quant(m);
}
