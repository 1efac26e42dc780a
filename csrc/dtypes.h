// Which of a set of CPU kernels runs for a tensor's dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace vimpac {

// kernels.of_float, .of_double or .of_bfloat16; op: the name that an error says.
template <class Kernels>
const auto& of_dtype(const Kernels& kernels, torch::headeronly::ScalarType type, const char* op) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return kernels.of_float;
    case ScalarType::Double:
      return kernels.of_double;
    case ScalarType::BFloat16:
      return kernels.of_bfloat16;
    default:
      STD_TORCH_CHECK(false, op, " takes float32, float64 and bfloat16");
  }
}

}  // namespace vimpac
