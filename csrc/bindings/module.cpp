// Python module fastddpm._C: what the files beside this one define, and what was built.
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "reader.h"

namespace fastddpm {
namespace {

// ---- what was built ----------------------------------------------------------------------------

std::vector<std::string> isas(bool available) {
  const char* names[cpu::MAX_ISAS];
  cpu::isas(available, names);
  std::vector<std::string> list;
  for (const char** name = names; *name; ++name) list.emplace_back(*name);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTDDPM_VERSION;
  info["compiler"] = FASTDDPM_COMPILER;
  info["isas"] = isas(false);
  info["threading"] = cpu::threading();
#if defined(FASTDDPM_CUDA)
  info["cuda"] = FASTDDPM_CUDA;
  info["cuda_architectures"] = FASTDDPM_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

// Refuses what no signature in a module or class takes. pybind11 would, with the repr of each
// argument, and a tensor whose memory was given back does not survive that.
void refuse_the_rest(const py::object& scope, bool methods) {
  for (const auto& name : py::list(scope.attr("__dict__"))) {
    const std::string text = py::str(name);
    const py::object member = scope.attr(text.c_str());
    if (text[0] == '_' ||
        !(PyCFunction_Check(member.ptr()) || PyInstanceMethod_Check(member.ptr())))
      continue;
    const auto refuse = [text](const py::args&, const py::kwargs&) {
      throw py::type_error(text + "(): arguments of another type or number than it takes");
    };
    const py::sibling before(member);
    if (methods)
      scope.attr(text.c_str()) =
          py::cpp_function(refuse, py::name(text.c_str()), py::is_method(scope), before);
    else
      scope.attr(text.c_str()) =
          py::cpp_function(refuse, py::name(text.c_str()), py::scope(scope), before);
  }
}

}  // namespace
}  // namespace fastddpm

using namespace fastddpm;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastddpm's native ops; see csrc/ops.h";

  py::module_ on_cpu = m.def_submodule("cpu");
  def_cpu_ops(on_cpu);
  def_plan(on_cpu);
  on_cpu.def("multiplies_bf16", &cpu::multiplies_bf16,
             "Whether the instruction set in use multiplies bfloat16.");
  on_cpu.def(
      "peak_flops",
      [](int64_t threads, double seconds, const std::string& precision) {
        const int team = thread_count(threads);
        const py::gil_scoped_release release;
        return cpu::peak_flops(team, seconds, precision.c_str());
      },
      py::arg("threads"), py::arg("seconds") = 0.3, py::arg("precision") = "fp32",
      "FLOP/s of multiply-adds from registers, the best of several repeats.");
  py::module_ codec = m.def_submodule("codec");
  def_codec(codec);
#if defined(FASTDDPM_CUDA)
  py::module_ on_cuda = m.def_submodule("cuda");
  def_cuda(on_cuda);
  refuse_the_rest(on_cuda, false);
#endif

  m.def("build_info", &build_info, "Compiler, instruction sets, threading and CUDA of this build.");
  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def(
      "use_isa", [](const std::string& name) { cpu::use_isa(name.c_str()); },
      "Use another instruction set from here on.");
  m.def("isas_available", [] { return isas(true); }, "The instruction sets that this machine has.");
  refuse_the_rest(m, false);
  refuse_the_rest(on_cpu, false);
  refuse_the_rest(on_cpu.attr("Plan"), true);
  refuse_the_rest(codec, false);
  refuse_the_rest(codec.attr("Coder"), true);
}
