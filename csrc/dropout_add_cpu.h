// What dropout_add.cpp (torch) and dropout_add_simd.cpp (arithmetic) say to each other; vimpac/ops/dropout_add.py has the formula.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vimpac {

// Elements that 16 counters serve, word after word: a register of counters gives four registers of neighbouring elements.
constexpr int64_t DROPOUT_GROUP = 64;

}  // namespace vimpac

namespace vimpac::dropout_add {

// One call of the op, forward or backward.
struct Call {
  const void* x;  // of out's type; null: backward, where nothing is added
  const void* y;  // or the upstream gradient
  void* out;
  int64_t elements;
  uint32_t threshold;  // an element whose word is below is dropped
  double scale;        // of what is kept
  int64_t seed;
  bool streams;  // results go past the caches: they are more than those hold, and `out` is aligned to 64 bytes
};

struct Kernels {
  using Run = void (*)(const Call&, int64_t begin, int64_t end);  // groups [begin, end)
  Run of_float, of_double, of_bfloat16;
  Run widening, narrowing;  // bfloat16 to float: the sum of a float x and a bfloat16 y; float to bfloat16: the gradient of that y
};

VIMPAC_KERNELS(Kernels, dropout_add_kernels)

}  // namespace vimpac::dropout_add
