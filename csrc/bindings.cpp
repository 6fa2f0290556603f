// The extension module genopt_ext._C: one register function per subsystem. Its Python side is declared
// in genopt_ext/_C.pyi. The only file that knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

// After pybind11: this declares its namespace without hiding it.
#include <ATen/record_function.h>

#include "torch_hooks.h"
#include "torch_plan.h"
#include "torch_quant.h"

namespace py = pybind11;

namespace genopt {
namespace {

Gradients gradients_of(const std::optional<std::string>& left) {
  if (!left) return Gradients::kKept;
  if (*left == "zeroed") return Gradients::kZeroed;
  if (*left == "unscaled") return Gradients::kUnscaled;
  throw std::invalid_argument("gradients must be 'zeroed', 'unscaled' or None, got '" + *left + "'");
}

// Throws pybind11's form of a Python error that torch_plan.h found.
py::object step(TorchPlan& plan, const py::object& param_groups, const py::object& state,
                const std::vector<int64_t>& skipped, const std::optional<py::list>& grads, double max_norm,
                double scale, int norm, bool measure, bool guard, const std::optional<std::string>& gradients,
                bool only_measure, const std::optional<py::list>& grad_scale, const std::optional<py::list>& found_inf,
                const std::optional<py::list>& group_scales, const std::optional<py::list>& grad_norm,
                const std::optional<py::list>& nonfinite, const std::optional<py::list>& skipped_steps) {
  const auto pointer = [](const std::optional<py::list>& list) { return list ? list->ptr() : nullptr; };
  StepArguments arguments;
  arguments.control = {max_norm, scale, static_cast<Norm>(norm), measure,
                       guard,    false, gradients_of(gradients), only_measure};
  arguments.grads = pointer(grads);
  arguments.tensors = {pointer(grad_scale), pointer(found_inf), pointer(group_scales),
                       pointer(grad_norm),  pointer(nonfinite), pointer(skipped_steps)};
  std::optional<Refusal> refusal;
  try {
    refusal = plan.step(param_groups.ptr(), state.ptr(), skipped, arguments);
  } catch (const PythonError&) {
    throw py::error_already_set();
  }
  if (!refusal) return py::none();
  return py::make_tuple(refusal->rows, refusal->groups, refusal->overlaps, refusal->grad_overlaps, refusal->devices,
                        refusal->gradients_overlap);
}

void register_plan(py::module_& m) {
  py::class_<TorchPlan>(m, "Plan")
      .def(py::init<const std::string&, const std::string&>(), py::arg("rule"), py::arg("backend"))
      .def_property_readonly("launches", &TorchPlan::launches)
      .def("step", &step, py::arg("param_groups"), py::arg("state"), py::arg("skipped"), py::kw_only(),
           py::arg("grads") = py::none(), py::arg("max_norm") = kUnset, py::arg("scale") = 1.0, py::arg("norm") = 0,
           py::arg("measure") = false, py::arg("guard") = false, py::arg("gradients") = py::none(),
           py::arg("only_measure") = false, py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none(),
           py::arg("group_scales") = py::none(), py::arg("grad_norm") = py::none(), py::arg("nonfinite") = py::none(),
           py::arg("skipped_steps") = py::none());
  // Whether a profiler or another observer wants to hear of regions such as an optimizer's step.
  m.def("is_observed", [] { return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value(); });
  m.def("is_watched", &is_watched);
  m.def("rules", [] {
    py::dict rules;
    for (const RuleInfo& info : rule_infos()) {
      py::list options;
      for (const OptionName& option : info.options) options.append(py::make_tuple(option.key, option.item));
      rules[info.name] = py::make_tuple(info.has_step, info.states, options);
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
}

}  // namespace
}  // namespace genopt

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native kernels of genopt_ext.";
  genopt::register_plan(m);
  genopt::register_cpu(m);
  genopt::register_cuda(m);
  genopt::register_hooks(m);
  genopt::register_quant(m);
}
