// What residual_norm.cpp (torch) and residual_norm_simd.cpp (arithmetic) say to each other; vimpac/ops/residual_norm.py has the
// formulas.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace vimpac::residual_norm {

// One call of the op. X: x's type, Y: y's, A: what is computed in. Null pointers: not given, or not asked for.
struct Call {
  int64_t rows, columns;
  const void *x, *y;                           // X, Y [rows, columns]; forward only
  const void *grad, *grad_sum, *kept;          // X [rows, columns]; backward only
  const void *bias, *weight, *norm_bias;       // A [columns]
  void* statistics;                            // A [2, rows]: means, then 1 / standard deviations; forward writes it
  void *out, *sum;                             // X [rows, columns]; forward
  void *of_x, *of_y;                           // X, Y [rows, columns]; backward
  int64_t exact_rows;                          // the last rows, whose x is in `exact` instead
  const void *exact, *grad_exact;              // A [exact_rows, columns]; forward, backward
  void *out_exact, *of_exact;                  // A [exact_rows, columns]; forward, backward
  void* parts;                                 // A [chunks, 3, columns]: sums over a chunk's rows of the gradients of vectors
  double eps;
  bool from_sum;       // kept is the sum, not the output
  uint32_t threshold;  // an element whose word is below is dropped; 0: no dropout
  double scale;        // of what is kept
  int64_t seed;
  bool streams;  // results go past the caches: they are more than those hold, and every row's address suits

  // Rows whose column sums are added up one after another. It does not depend on the number of threads: bits must not.
  int64_t chunk_rows() const { return rows <= 64 * 64 ? 64 : (rows + 63) / 64; }
  int64_t chunks() const { return (rows + chunk_rows() - 1) / chunk_rows(); }
};

struct RowKernels {
  size_t (*scratch)(const Call&);  // bytes that a thread needs
  void (*forward)(const Call&, int64_t begin, int64_t end, void* scratch);   // rows
  void (*backward)(const Call&, int64_t begin, int64_t end, void* scratch);  // chunks
  void (*add_parts)(const Call&, void* columns);                             // parts → A [3, columns]
};

struct Kernels {
  RowKernels of_float, of_double, of_bfloat16, of_mixed;  // mixed: X float, Y bfloat16
};

VIMPAC_KERNELS(Kernels, residual_norm_kernels)

}  // namespace vimpac::residual_norm
