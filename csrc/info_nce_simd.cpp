// InfoNCE's work on tiles of scores, in vectors.

#include "info_nce_cpu.h"
#include "simd.h"

namespace vimpac::VIMPAC_ISA {

namespace {

template <class V>
HOST_DEVICE V exponential(V x) {  // of up to 64 in float32, 600 in float64
  return exp2_series(x * static_cast<Element<V>>(1.4426950408889634));
}

template <class T>
void add_to_rows(const T* scores, int64_t stride, int64_t rows, int64_t columns, T* maxima, T* sums) {
  constexpr int LANES = WIDTH<T>;
  using V = Vector<T, LANES>;
  for (int64_t i = 0; i < rows; ++i, scores += stride) {
    V most = load<LANES>(scores);
    for (int64_t j = LANES; j < columns; j += LANES) {
      V x = load<LANES>(scores + j);
      most = most > x ? most : x;
    }
    T before = maxima[i], here = Lanes::max(most), maximum = before > here ? before : here;
    if (maximum == -static_cast<T>(INFINITY)) continue;  // nothing counts yet
    V sum{};
    for (int64_t j = 0; j < columns; j += LANES) sum += exponential(load<LANES>(scores + j) - maximum);
    sums[i] = sums[i] * exponential(Vector<T, 1>{before - maximum})[0] + Lanes::sum(sum);
    maxima[i] = maximum;
  }
}

template <class T, int ROWS, bool STORE>
HOST_DEVICE void visit_rows(T* scores, int64_t stride, int64_t columns, const T* shift_i, const T* g_i, const T* shift_j,
                            const T* g_j, T* row_sums, T* column_sums) {
  constexpr int LANES = WIDTH<T>;
  using V = Vector<T, LANES>;
  V of_rows[ROWS] = {};
  for (int64_t j = 0; j < columns; j += LANES) {
    V shift = load<LANES>(shift_j + j), g = load<LANES>(g_j + j), of_columns{};
    UNROLL
    for (int i = 0; i < ROWS; ++i) {
      V score = load<LANES>(scores + i * stride + j);
      V of_row = g_i[i] * exponential(score - shift_i[i]), of_column = g * exponential(score - shift);
      of_rows[i] += of_row;
      of_columns += of_column;
      if constexpr (STORE) store<LANES>(scores + i * stride + j, of_row + of_column);
    }
    store<LANES>(column_sums + j, load<LANES>(column_sums + j) + of_columns);
  }
  UNROLL
  for (int i = 0; i < ROWS; ++i) row_sums[i] += Lanes::sum(of_rows[i]);
}

template <class T, bool STORE>
HOST_DEVICE void visit(T* scores, int64_t stride, int64_t rows, int64_t columns, const T* shift_i, const T* g_i,
                       const T* shift_j, const T* g_j, T* row_sums, T* column_sums) {
  constexpr int MANY = 4;  // rows together read and write once what belongs to columns
  int64_t i = 0;
  for (; i + MANY <= rows; i += MANY) {
    visit_rows<T, MANY, STORE>(scores + i * stride, stride, columns, shift_i + i, g_i + i, shift_j, g_j, row_sums + i,
                               column_sums);
  }
  for (; i < rows; ++i) {
    visit_rows<T, 1, STORE>(scores + i * stride, stride, columns, shift_i + i, g_i + i, shift_j, g_j, row_sums + i,
                            column_sums);
  }
}

template <class T>
void add_to_both(const T* scores, int64_t stride, int64_t rows, int64_t columns, const T* shift_i, const T* g_i,
                 const T* shift_j, const T* g_j, T* row_sums, T* column_sums) {
  visit<T, false>(const_cast<T*>(scores), stride, rows, columns, shift_i, g_i, shift_j, g_j, row_sums, column_sums);
}

template <class T>
void weigh(T* scores, int64_t stride, int64_t rows, int64_t columns, const T* shift_i, const T* g_i, const T* shift_j,
           const T* g_j, T* row_sums, T* column_sums) {
  visit<T, true>(scores, stride, rows, columns, shift_i, g_i, shift_j, g_j, row_sums, column_sums);
}

template <class T>
T dot(const T* a, const T* b, int64_t d) {
  constexpr int LANES = WIDTH<T>;
  Vector<T, LANES> sum{};
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) sum += load<LANES>(a + k) * load<LANES>(b + k);
  T total = Lanes::sum(sum);
  for (; k < d; ++k) total += a[k] * b[k];
  return total;
}

}  // namespace

const InfoNceKernels<float> info_nce_float = {add_to_rows<float>, add_to_both<float>, weigh<float>, dot<float>};
const InfoNceKernels<double> info_nce_double = {add_to_rows<double>, add_to_both<double>, weigh<double>, dot<double>};

}  // namespace vimpac::VIMPAC_ISA
