// The CUDA ops as a Python module that takes CPU tensors, and the device that the emulator makes
// up.
#include "../../csrc/bindings.cpp"
#include "emulator_state.h"

PYBIND11_MODULE(fastddpm_cuda_on_cpu, m) {
  def_cuda(m);
  m.def("set_device",
        [](int shared_bytes, int processors) { emulator::device = {shared_bytes, processors}; });
}
