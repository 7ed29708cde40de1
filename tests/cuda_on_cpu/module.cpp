// The CUDA ops as a Python module that takes CPU tensors, and the device that the emulator makes
// up.
//
// Not PYBIND11_MODULE: that gives a second build of the same name the module of the first.
#include "../../csrc/bindings/ops.cpp"
#include "emulator_state.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_fastddpm_cuda_on_cpu() {
  PYBIND11_ENSURE_INTERNALS_READY
  static pybind11::module_::module_def definition{};
  namespace py = pybind11;
  py::module_ m =
      py::module_::create_extension_module("fastddpm_cuda_on_cpu", nullptr, &definition);
  fastddpm::def_cuda(m);
  m.def("set_device",
        [](int shared_bytes, int processors) { emulator::use_device({shared_bytes, processors}); });
  m.def("refuse_launches", &emulator::refuse_launches);
  m.def("shared_memory_calls", &emulator::shared_memory_calls);
  m.def("leave_error", &emulator::leave_error);
  m.def("last_error", [] { return int(emulator::last_error()); });
  m.def("last_launch", [] {
    return std::make_pair(emulator::last_launch.threads, emulator::last_launch.shared_bytes);
  });
  return m.release().ptr();
}
