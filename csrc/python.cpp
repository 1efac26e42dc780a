// vimpac._C: facts about the build, and what numpy alone can use. No torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

namespace {

py::dict build() {
  py::dict facts;
  facts["revision"] = VIMPAC_BUILD_REVISION;
  facts["compiler"] = VIMPAC_BUILD_COMPILER;
  facts["flags"] = VIMPAC_BUILD_FLAGS;
  facts["cpu_isas"] = VIMPAC_BUILD_CPU_ISAS;
  facts["torch"] = VIMPAC_BUILD_TORCH;
  facts["nvcc"] = VIMPAC_BUILD_NVCC;
  facts["cuda_archs"] = VIMPAC_BUILD_CUDA_ARCHS;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How vimpac's extension was built, and its host functions for numpy.";
  m.def("build", &build,
        "Facts about the build, all strings: revision, compiler, flags, cpu_isas, torch (whose headers), nvcc, cuda_archs; the "
        "last two are empty where no CUDA library was built.");
}
