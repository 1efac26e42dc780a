// vimpac._C: facts about the build, and what numpy alone can use. No torch.

#include <array>
#include <cstdint>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_mask.h"
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

using Ids = py::array_t<int64_t, py::array::c_style>;

py::tuple sample_blocks(std::array<int, 3> grid, int64_t seed, const Ids& sample_ids, int n_blocks) {
  for (int size : grid) {
    if (size < 1) throw py::value_error("T, H and W must be at least 1, got " + std::to_string(size));
  }
  if (int64_t{grid[0]} * grid[1] > INT32_MAX / grid[2]) throw py::value_error("T·H·W must be below 2^31");
  if (n_blocks < 1) throw py::value_error("n_blocks must be at least 1, got " + std::to_string(n_blocks));
  if (sample_ids.ndim() != 1) {
    throw py::value_error("sample_ids must be [B], got " + std::to_string(sample_ids.ndim()) + " dimensions");
  }
  vimpac::masking::Grid size{{grid[0], grid[1], grid[2]}};
  py::ssize_t B = sample_ids.size(), T = grid[0], H = grid[1], W = grid[2];
  py::array_t<int32_t> lengths({B, py::ssize_t{n_blocks}, py::ssize_t{3}}), starts({B, py::ssize_t{n_blocks}, py::ssize_t{3}});
  py::array_t<bool> mask({B, T, H, W});
  for (py::ssize_t b = 0; b < B; ++b) {
    py::ssize_t at = b * n_blocks * 3;
    vimpac::masking::sample_blocks(size, seed, sample_ids.at(b), n_blocks, lengths.mutable_data() + at,
                                   starts.mutable_data() + at, mask.mutable_data() + b * T * H * W);
  }
  return py::make_tuple(lengths, starts, mask);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How vimpac's extension was built, and its host functions for numpy.";
  m.def("build", &build,
        "Facts about the build, all strings: revision, compiler, flags, cpu_isas, torch (whose headers), nvcc, cuda_archs; the "
        "last two are empty where no CUDA library was built.");
  m.def("sample_blocks", &sample_blocks, py::arg("grid"), py::arg("seed"), py::arg("sample_ids"), py::arg("n_blocks") = 5,
        "The blocks that block_mask draws (Eq. 3, section B.1), without torch.\n\n"
        "grid: (T, H, W). seed: 64-bit int. sample_ids: int64 [B]. Returns lengths and starts of the blocks on T, H and W, "
        "int32 [B, n_blocks, 3] each, and their union, bool [B, T, H, W]. Raises ValueError for sizes below 1.");
}
