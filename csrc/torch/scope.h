// Calls one function now and another when it goes out of scope.
#pragma once

namespace genopt {

template <class Leave>
class Scope {
 public:
  template <class Enter>
  Scope(Enter enter, Leave leave) : leave_(leave) {
    enter();
  }
  ~Scope() {
    leave_();
  }
  Scope(const Scope&) = delete;

 private:
  Leave leave_;
};

}  // namespace genopt
