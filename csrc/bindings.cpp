// The extension module genopt_ext._C: one register function per subsystem. Its Python side is declared
// in genopt_ext/_C.pyi. The only file that knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/stream.h"
#include "torch_plan.h"

namespace py = pybind11;

namespace genopt {
namespace {

// Throws pybind11's form of a Python error that torch_plan.h found.
py::object step(TorchPlan& plan, const py::object& param_groups, const py::object& state,
                const std::vector<int64_t>& skipped, const std::optional<py::list>& grads, double max_norm,
                double scale, int norm, bool measure, bool guard, bool zero, bool only_measure,
                const std::optional<py::list>& grad_scale, const std::optional<py::list>& found_inf,
                const std::optional<py::list>& group_scales, const std::optional<py::list>& grad_norm,
                const std::optional<py::list>& nonfinite, const std::optional<py::list>& skipped_steps) {
  const auto pointer = [](const std::optional<py::list>& list) { return list ? list->ptr() : nullptr; };
  StepArguments arguments;
  arguments.control = {max_norm, scale, static_cast<Norm>(norm), measure, guard, false, zero, only_measure};
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
  return py::make_tuple(refusal->rows, refusal->groups, refusal->overlaps, refusal->devices,
                        refusal->gradients_overlap);
}

void register_plan(py::module_& m) {
  py::class_<TorchPlan>(m, "Plan")
      .def(py::init<const std::string&, const std::string&>(), py::arg("rule"), py::arg("backend"))
      .def_property_readonly("launches", &TorchPlan::launches)
      .def("step", &step, py::arg("param_groups"), py::arg("state"), py::arg("skipped"), py::kw_only(),
           py::arg("grads") = py::none(), py::arg("max_norm") = kUnset, py::arg("scale") = 1.0, py::arg("norm") = 0,
           py::arg("measure") = false, py::arg("guard") = false, py::arg("zero") = false,
           py::arg("only_measure") = false, py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none(),
           py::arg("group_scales") = py::none(), py::arg("grad_norm") = py::none(), py::arg("nonfinite") = py::none(),
           py::arg("skipped_steps") = py::none());
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

void register_cuda(py::module_& m) {
  m.attr("has_cuda") = kHasCuda;
}

void register_cpu(py::module_& m) {
  m.def("cpu_capability", &cpu::capability);
  m.def("cpu_capabilities", &cpu::capabilities);
  m.def(
      "stream",
      [](const std::vector<std::pair<uintptr_t, bool>>& arrays, int64_t bytes, int threads) {
        py::gil_scoped_release release;
        cpu::stream(arrays, bytes, threads);
      },
      py::arg("arrays"), py::arg("bytes"), py::arg("threads"));
}

}  // namespace
}  // namespace genopt

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native kernels of genopt_ext.";
  genopt::register_plan(m);
  genopt::register_cpu(m);
  genopt::register_cuda(m);
}
