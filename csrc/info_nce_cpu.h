// What info_nce.cpp asks of the vectorised code in info_nce_simd.cpp, which is compiled for several instruction sets.
//
// A tile of scores is a piece of a matrix in rows of `stride` numbers. `columns` is a multiple of COLUMNS: from the last real
// column on scores are -infinity, and what belongs to a column is any finite number. So is a score that does not count.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vimpac {

template <class T>
struct InfoNceKernels {
  static constexpr int COLUMNS = 16;

  // Takes a tile's rows into their running maxima and sums of exp(score - maximum).
  void (*add_to_rows)(const T* scores, int64_t stride, int64_t rows, int64_t columns, T* maxima, T* sums);

  // Adds g_i exp(score - shift_i) to the sums of rows and g_j exp(score - shift_j) to those of columns.
  void (*add_to_both)(const T* scores, int64_t stride, int64_t rows, int64_t columns, const T* shift_i, const T* g_i,
                      const T* shift_j, const T* g_j, T* row_sums, T* column_sums);

  // The same, and each score becomes the weight g_i exp(score - shift_i) + g_j exp(score - shift_j).
  void (*weigh)(T* scores, int64_t stride, int64_t rows, int64_t columns, const T* shift_i, const T* g_i, const T* shift_j,
                const T* g_j, T* row_sums, T* column_sums);

  T (*dot)(const T* a, const T* b, int64_t d);
};

VIMPAC_KERNELS(InfoNceKernels<float>, info_nce_float)
VIMPAC_KERNELS(InfoNceKernels<double>, info_nce_double)

}  // namespace vimpac
