// Tells Python when a backward pass comes to an optimizer's parameters, before it changes a gradient: see
// genopt_ext/in_backward.py. A hook in Python would take longer than the rest of a small parameter's backward.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <atomic>
#include <memory>
#include <mutex>

namespace genopt {

// Shared by the parameters of one optimizer: enter(pass) is called once for each pass.
struct Entrance {
  explicit Entrance(PyObject* function) : enter(function) {
    Py_INCREF(enter);
  }
  ~Entrance() {
    if (!Py_IsInitialized()) return;
    const pybind11::gil_scoped_acquire gil;
    Py_DECREF(enter);
  }
  Entrance(const Entrance&) = delete;

  PyObject* enter;
  std::atomic<int> last{-1};
};

// Stays with its parameter for good, since another thread may be calling it.
class EntranceHook : public torch::autograd::FunctionPreHook {
 public:
  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
    // On other devices one thread serves all passes. Where there is no gradient, none is accumulated.
    if (!gradients[0].defined() || !gradients[0].is_cpu()) return gradients;
    const int pass = torch::autograd::get_current_graph_task_id();
    std::shared_ptr<Entrance> entrance;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (entrance_ && entrance_->last != pass) entrance = entrance_;
    }
    if (entrance) {
      const pybind11::gil_scoped_acquire gil;
      const THPObjectPtr done(PyObject_CallFunction(entrance->enter, "i", pass));
      if (!done) {
        python_error error;
        error.persist();
        throw error;
      }
      entrance->last = pass;
    }
    return gradients;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
  }

  void set(std::shared_ptr<Entrance> entrance) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entrance_.swap(entrance);  // the old one goes with the argument, after the lock: it may need the GIL
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Entrance> entrance_;
};

// Without an entrance, `p` has none any more.
inline void set_entrance(const at::Tensor& p, const std::shared_ptr<Entrance>& entrance) {
  auto& hooks = torch::autograd::impl::hooks(p);
  for (const auto& hook : hooks) {
    if (auto* ours = dynamic_cast<EntranceHook*>(hook.get())) return ours->set(entrance);
  }
  if (!entrance) return;
  auto hook = std::make_unique<EntranceHook>();
  hook->set(entrance);
  hooks.push_back(std::move(hook));  // add_hook() would want to be the only one
}

}  // namespace genopt
