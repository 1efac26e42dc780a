// Axial attention's arithmetic that a GPU and a CPU share: geometry of lines, the softmax with its [CLS] column and the
// gradient of it, and where dropout's bits are. vimpac/ops/axial_attention.py has the formula.
#pragma once

#include <cmath>

#include "host_device.h"
#include "philox.h"

namespace vimpac::axial {

// --- lines -------------------------------------------------------------------------------------------------------------

struct Grid {
  int T, H, W;
  HOST_DEVICE int tokens() const { return T * H * W; }
  HOST_DEVICE int length(int axis) const { return axis == 0 ? T : axis == 1 ? H : W; }  // of a line: axis 0, 1, 2 = T, H, W
  HOST_DEVICE int lines(int axis) const { return tokens() / length(axis); }
};

struct Position {
  int t, h, w;
  HOST_DEVICE int raster(Grid grid) const { return (t * grid.H + h) * grid.W + w; }
};

// The token at `place` on `line` of an axis; lines in the raster order of the other two.
HOST_DEVICE Position position(Grid grid, int axis, int line, int place) {
  if (axis == 0) return {place, line / grid.W, line % grid.W};
  if (axis == 1) return {line / grid.W, place, line % grid.W};
  return {line / grid.H, line % grid.H, place};
}

// --- softmax -----------------------------------------------------------------------------------------------------------

constexpr float LOG2E = 1.4426950408889634f;

// 2^x, for x <= 0 or -infinity. Vectors and devices bring their own.
template <class V>
struct Exp2;

// 1 / x. A device has a faster one.
template <class S>
struct Inverse {
  static HOST_DEVICE S of(S x) { return S(1) / x; }
};

template <class V>
HOST_DEVICE V greater(V a, V b) {
  return a > b ? a : b;
}
#ifdef __CUDACC__
HOST_DEVICE float greater(float a, float b) { return fmaxf(a, b); }  // one instruction instead of two
#endif

// A row of scores on a line's keys is spread over the lanes of something: of a vector register on a CPU, of a quad or a warp of
// threads on a GPU. Each lane holds K of them, `Row` combines lanes (Row::max, Row::sum), and [CLS]'s score is one number S.
//
// In: scores times log2(e), -infinity on what is no key. Out: probabilities, all zero on a row without any key.
template <class Row, int K, class V, class S>
HOST_DEVICE void softmax(V (&scores)[K], S& cls) {
  V most = scores[0];
  UNROLL
  for (int k = 1; k < K; ++k) most = greater(most, scores[k]);
  S top = greater(Row::max(most), cls);
  top = top == -static_cast<S>(INFINITY) ? S(0) : top;
  cls = Exp2<S>::of(cls - top);
  V sum = scores[0] = Exp2<V>::of(scores[0] - top);
  UNROLL
  for (int k = 1; k < K; ++k) sum += scores[k] = Exp2<V>::of(scores[k] - top);
  S total = Row::sum(sum) + cls;
  S inverse = total > S(0) ? Inverse<S>::of(total) : S(0);
  UNROLL
  for (int k = 0; k < K; ++k) scores[k] *= inverse;
  cls *= inverse;
}

// Gradient of the scores q·k from that of the probabilities, p ∘ (dp - Σ p·dp) · scale; it replaces dp.
template <class Row, int K, class V, class S>
HOST_DEVICE void softmax_gradient(const V (&p)[K], S p_cls, V (&dp)[K], S& dp_cls, S scale) {
  V sum = p[0] * dp[0];
  UNROLL
  for (int k = 1; k < K; ++k) sum += p[k] * dp[k];
  S mean = Row::sum(sum) + p_cls * dp_cls;
  UNROLL
  for (int k = 0; k < K; ++k) dp[k] = p[k] * (dp[k] - mean) * scale;
  dp_cls = p_cls * (dp_cls - mean) * scale;
}

// The same where dropout leaves `kept` of the probabilities p: (kept ∘ dp - p Σ kept·dp) · scale.
template <class Row, int K, class V, class S>
HOST_DEVICE void softmax_gradient(const V (&p)[K], S p_cls, const V (&kept)[K], S kept_cls, V (&dp)[K], S& dp_cls, S scale) {
  V sum = dp[0] = kept[0] * dp[0];
  UNROLL
  for (int k = 1; k < K; ++k) sum += dp[k] = kept[k] * dp[k];
  dp_cls *= kept_cls;
  S mean = Row::sum(sum) + dp_cls;
  UNROLL
  for (int k = 0; k < K; ++k) dp[k] = (dp[k] - p[k] * mean) * scale;
  dp_cls = (dp_cls - p_cls * mean) * scale;
}

// --- dropout -----------------------------------------------------------------------------------------------------------

constexpr int DROPOUT_ROUNDS = 7;

struct Dropout {
  uint32_t threshold = 0;  // a probability whose 16 bits are below is dropped; 0: no dropout
  double scale = 1;        // of what is kept

  Dropout() = default;
  HOST_DEVICE explicit Dropout(double p) {
    double words = p * 65536 + 0.5;  // p < 1 is checked in Python; halves round to even there, as here below
    threshold = static_cast<uint32_t>(words);
    if (threshold == words && (threshold & 1)) --threshold;
    if (threshold > 65535) threshold = 65535;
    scale = 65536.0 / (65536 - threshold);
  }
};

// Where the 16 bits of a row's key are: philox4x32-7(row low, row high, call, is_cls), half `half` of word `word`.
struct Bits {
  int call, word, half;
};

HOST_DEVICE Bits dropout_bits(int key, int keys) {
  if (keys <= 8) return {0, key / 2, key % 2};
  return {4 * (key / 32) + key % 8 / 2, key % 32 / 8, key % 2};
}

template <class U>
HOST_DEVICE Words<U> dropout_words(U row_low, U row_high, U call, U is_cls, PhiloxKey seed) {
  return philox<DROPOUT_ROUNDS>(row_low, row_high, call, is_cls, seed);
}

HOST_DEVICE uint32_t half_word(uint32_t word, int half) { return half ? word >> 16 : word & 0xFFFF; }

}  // namespace vimpac::axial
