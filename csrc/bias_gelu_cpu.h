// What bias_gelu.cpp (torch) and bias_gelu_simd.cpp (arithmetic) say to each other; vimpac/ops/bias_gelu.py has the formulas.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vimpac::bias_gelu {

// One call of the op. T: the tensors' type, A: what is computed in.
struct Call {
  int64_t rows, columns;
  const void *h, *grad;  // T [rows, columns]; grad: backward only
  const void* bias;      // A [columns]
  void* out;             // T [rows, columns], or null: not asked for
  void* of_h;            // T [rows, columns]; backward only
  void* parts;           // A [chunks, columns]: sums of of_h over a chunk's rows
  bool streams;          // results go past the caches: they are more than those hold, and every row's address suits

  // Rows whose column sums are added up one after another. It does not depend on the number of threads: bits must not.
  int64_t chunk_rows() const { return rows <= 16 * 64 ? 16 : (rows + 63) / 64; }
  int64_t chunks() const { return (rows + chunk_rows() - 1) / chunk_rows(); }
};

struct RowKernels {
  void (*forward)(const Call&, int64_t begin, int64_t end);   // rows
  void (*backward)(const Call&, int64_t begin, int64_t end);  // chunks
  void (*add_parts)(const Call&, void* of_bias);              // parts → A [columns]
};

struct Kernels {
  RowKernels of_float, of_double, of_bfloat16;
};

VIMPAC_KERNELS(Kernels, bias_gelu_kernels)

}  // namespace vimpac::bias_gelu
