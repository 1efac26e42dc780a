// Axial attention with a shared [CLS] on tensor cores, forward and backward, for half-precision lines of 1 to 32 tokens.
// vimpac/ops/axial_attention.py has the formula, tiles.h the form in which rows are loaded and multiplied.
//
// A block is one warp. It takes one head of one clip and a share of the lines of the head's axis, and walks over them one tile
// of 16·M rows at a time. A tile holds one line or, of lines of up to 7 tokens, as many as fit in 16 rows (at most 4), kept
// apart by a mask. Neighbouring warps take neighbouring heads, whose bytes are neighbours in memory.
//
// [CLS] costs no row of a tile. As a key it is a column of its own, by a product with 8 columns that are all [CLS]. As a query
// it is an extra row for each line of the tile; the tile's [CLS] rows have the layout of token rows and share their softmax,
// dropout and mask. What it adds to outputs and gradients is one more step, 8 deep, of their products. Sums over lines
// ([CLS]'s output, its gradients) collect in registers. Each warp writes its part of them, and a second kernel adds the parts
// in a fixed order, without atomics: the same inputs give the same bits, and a clip's bits do not depend on the batch.
//
// At PAD, keys and values count as zeros, and so do queries that are not finite: 0 · NaN would reach other tokens. Tiles without
// PAD skip that. Backward recomputes the probabilities.

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// KERNELS_ONLY leaves the ops out, for tools that compile a few kernels.
#if defined(__CUDACC__) && !defined(KERNELS_ONLY)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>
#endif

#include "axial_attention_warp.h"

namespace vimpac::axial {
namespace {

constexpr int TILES = 16;         // of a warp: few, so that warps are many; [CLS]'s parts still cost under 1 % of the bytes
constexpr int LONGEST_LINE = 32;  // tokens
constexpr int ADDERS = 128;       // threads of a block that adds parts

// --- forward -----------------------------------------------------------------------------------------------------------

// The steps of a tile. References and numbers only: an array in here would keep all of it out of registers until loops are
// unrolled, which costs registers in the end.
template <class Half, int D, int M>
class Forward {
 public:
  static constexpr int K = 4 * M;
  struct Weights {  // probabilities after dropout, as operands
    Operand tokens[M][M];                 // [16 queries][16 keys]
    uint32_t on_cls[M][2], of_cls[M][2];  // of tokens on [CLS]; [CLS]'s rows
  };

  DEVICE void attend(const Tile<M>& at) {
    Rows<D> k[2 * M], q[2];
    Pairs<D> v[M];
    UNROLL
    for (int i = 0; i < 2 * M; ++i) k[i] = load_rows<D>(head_.k, at.row[i].source);
    load_queries(q, at, 0);
    if (M == 1) load_values(v, at);  // all at once; registers do not allow it for two halves
    dropping_.start(at.name);        // while the loads are under way
    Weights weights;
    attend_from_cls(weights, k, at);
    UNROLL
    for (int m = 0; m < M; ++m) {
      if (m > 0) load_queries(q, at, m);
      attend_from_tokens(weights, q, k, at, m);
    }
    if (M > 1) load_values(v, at);
    if (at.pads()) {
      UNROLL
      for (int n = 0; n < M; ++n) keep(v[n], at.keys, 16 * n);
    }
    UNROLL
    for (int n = 0; n < M; ++n) add_sums<Half, D>(sums_, v[n], weights.of_cls[n]);
    store_outputs(weights, v, at);
  }

  DEVICE void load_queries(Rows<D> (&q)[2], const Tile<M>& at, int m) const {
    UNROLL
    for (int half = 0; half < 2; ++half) q[half] = load_rows<D>(head_.q, at.row[2 * m + half].source);
  }

  DEVICE void load_values(Pairs<D> (&v)[M], const Tile<M>& at) const {
    UNROLL
    for (int m = 0; m < M; ++m) {
      int offset[4];
      sources(offset, at.mine, 16 * m);
      v[m] = load_pairs<D>(head_.v, offset);
    }
  }

  DEVICE void attend_from_cls(Weights& weights, const Rows<D> (&k)[2 * M], const Tile<M>& at) {
    Row<K> cls;
    multiply_cls<Half, D>(cls, cls_q_, k);
    cls.cls = itself_;
    cls.mask(lines_.of_cls(at), call_.score_scale, context_ && at.has_line);
    softmax<Quad>(cls.key, cls.cls);
    dropping_.drop(cls, 2 * M);
    from_itself_ += cls.cls;
    UNROLL
    for (int n = 0; n < M; ++n) weights_of<Half>(weights.of_cls[n], cls, n, 1);
  }

  DEVICE void attend_from_tokens(Weights& weights, Rows<D> (&q)[2], const Rows<D> (&k)[2 * M], const Tile<M>& at, int m) const {
    if (at.pads()) {
      UNROLL
      for (int half = 0; half < 2; ++half) drop_broken<Half>(q[half], at, 2 * m + half);
    }
    Row<K> row[2];
    multiply<Half, D>(row, q[0], q[1], k, cls_k_);
    UNROLL
    for (int half = 0; half < 2; ++half) {
      int i = 2 * m + half;
      row[half].mask(lines_.of_row(at, i), call_.score_scale, context_ && at.exists(i));
      softmax<Quad>(row[half].key, row[half].cls);
      dropping_.drop(row[half], i);
      weights.on_cls[m][half] = first_column<Half>(row[half].cls * keep_scale_);
    }
    UNROLL
    for (int n = 0; n < M; ++n) weights.tokens[m][n] = operand_of<Half>(row, n, keep_scale_);
  }

  DEVICE void store_outputs(const Weights& weights, const Pairs<D> (&v)[M], const Tile<M>& at) const {
    UNROLL
    for (int m = 0; m < M; ++m) {
      float y[D / 8][4] = {};
      UNROLL
      for (int n = 0; n < M; ++n) add_product<Half, D>(y, weights.tokens[m][n], v[n]);
      add_product<Half, D>(y, weights.on_cls[m], cls_v_);
      UNROLL
      for (int half = 0; half < 2; ++half) {
        int offset = at.row[2 * m + half].index * call_.row_pieces;
        if (at.exists(2 * m + half)) store_row<Half, D>(out_ + int64_t{offset} * BYTES, y, half);
      }
    }
  }

  const Call& call_;
  const float keep_scale_;
  const bool context_;
  const Head& head_;
  Dropping<M>& dropping_;
  const Lines<M>& lines_;
  const Rows<D>&cls_q_, &cls_k_;
  const Same<D>& cls_v_;
  const float itself_;        // [CLS]'s score on itself
  char* const out_;           // of the clip's first token
  float (&sums_)[D / 16][4];  // of [CLS]'s output, a column for each line of the tile
  float& from_itself_;
};

template <class Half, int D, int M>
DEVICE void forward_lines(const Call& call, const Work& work) {
  Head head = Head::of<D>(call, work);
  head.settle();
  Dropping<M> dropping(call, work);
  const Rows<D> cls_q = load_rows<D>(head.cls_q), cls_k = load_rows<D>(head.cls_k);
  const Same<D> cls_v = load_same<D>(head.cls_v, call.cls_in_context);
  const float itself = dot<Half, D>(cls_q, cls_k);
  const Lines<M> lines(work);
  char* out = call.out + int64_t{work.clip} * call.grid.tokens() * call.row_pieces * BYTES + work.head * (D * 2);
  float sums[D / 16][4] = {}, from_itself = 0;
  Forward<Half, D, M> forward{call,  call.dropout_scale, call.cls_in_context, head, dropping, lines,      cls_q,
                              cls_k, cls_v,              itself,              out,  sums,     from_itself};
  Walk walk(call, work);
  for (int tile = work.split; tile < work.tiles; tile += call.splits, walk.next()) forward.attend(Tile<M>(call, work, walk));
  const float inverse = call.dropout_scale / work.lines;
  store_part<Half, D>(call.parts + int64_t{blockIdx.x} * D, sums, Columns(0, 8), inverse, sum_of_quads(from_itself) * inverse, cls_v);
}

// Warps of a multiprocessor that registers leave room for without spills.
template <int D, int M>
constexpr int FORWARD_WARPS = M == 1 ? (D == 32 ? 16 : 12) : (D == 32 ? 12 : 8);
template <int D, int M>
constexpr int BACKWARD_WARPS = M == 1 ? (D == 32 ? 16 : 12) : 8;

template <class Half, int D, int M>
__global__ void __launch_bounds__(warp::LANES, FORWARD_WARPS<D, M>) forward_kernel(const Call call) {
  const Work work(call, blockIdx.x);
  if (M == 1 || work.length <= 16) return forward_lines<Half, D, 1>(call, work);
  forward_lines<Half, D, M>(call, work);
}

// --- backward ----------------------------------------------------------------------------------------------------------

// Columns of sums. [CLS]'s gradients: of q one for each line of a tile, of k and of v. Those of tokens, added up: of q by their
// lines' keys, of v by their lines' queries.
constexpr int DQ = 0, DK = MOST_PACKED, ALL_DQ = DK + 1, DV = DK + 2, ALL_DV = DK + 3;
// Totals over rows, one in each lane of a quad, since registers are short. Gradients of scores on [CLS]'s key: of [CLS], of
// tokens. [CLS]'s probabilities: of itself, of tokens.
constexpr int DS_ITSELF = 0, DS_OF_TOKENS = 1, FROM_ITSELF = 2, FROM_TOKENS = 3;
constexpr int FORWARD_KINDS = 1, BACKWARD_KINDS = 5;  // of parts

// First all probabilities and gradients of scores of a tile, kept as packed operands, then the gradients of values, keys and
// queries, whose Pairs are loaded again and come from the L1 cache. Each of these also adds to one of [CLS]'s gradients.
//
// Registers are short: [CLS]'s vectors are loaded anew for every tile, and not even their addresses are kept (opaque). Two
// 16-row halves leave none for the tokens' addresses either.
template <class Half, int D, int M>
class Backward {
 public:
  static constexpr int K = 4 * M;
  struct Weights {  // probabilities after dropout and gradients of scores, as operands
    Operand probs[M][M], ds[M][M];           // [16 queries][16 keys]
    uint32_t probs_on_cls[M], ds_on_cls[M];  // of rows g and g + 8
    uint32_t cls_probs[M][2], cls_ds[M][2];  // [CLS]'s rows
  };

  DEVICE void differentiate(const Tile<M>& at) {
    Rows<D> k[2 * M], v[2 * M], q[2], g[2];
    UNROLL
    for (int i = 0; i < 2 * M; ++i) k[i] = load_rows<D>(base(head_.k), at.row[i].source);
    load_queries(q, at, 0);
    if (M == 1) {  // all at once
      load_values(v, at);
      load_gradients(g, at, 0);
    }
    dropping_.start(at.name);
    Row<K> cls, row[M][2];
    probabilities(cls, row, q, k, at);
    if (M > 1) load_values(v, at);
    Weights weights;
    gradients_of_scores(weights, cls, row, v, g, at);
    gradient_of_values(weights, at);
    const uint32_t broken = at.pads() ? broken_queries<Half, D>(base(head_.q), at) : 0;
    gradient_of_keys(weights, at, broken);
    gradient_of_queries(weights, at, broken);
  }

  static DEVICE const char* base(const char* address) { return M == 1 ? address : warp::opaque(address); }

  DEVICE void load_queries(Rows<D> (&q)[2], const Tile<M>& at, int m) const {
    UNROLL
    for (int half = 0; half < 2; ++half) q[half] = load_rows<D>(base(head_.q), at.row[2 * m + half].source);
  }

  DEVICE void load_gradients(Rows<D> (&g)[2], const Tile<M>& at, int m) const {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      g[half] = load_rows<D>(base(head_.grad), at.row[2 * m + half].index * call_.row_pieces);
    }
  }

  DEVICE void load_values(Rows<D> (&v)[2 * M], const Tile<M>& at) const {
    UNROLL
    for (int i = 0; i < 2 * M; ++i) v[i] = load_rows<D>(base(head_.v), at.row[i].source);
  }

  // Before dropout: of [CLS]'s rows and of the tokens'.
  DEVICE void probabilities(Row<K>& cls, Row<K> (&row)[M][2], Rows<D> (&q)[2], const Rows<D> (&k)[2 * M],
                            const Tile<M>& at) const {
    multiply_cls<Half, D>(cls, load_rows<D>(warp::opaque(head_.cls_q)), k);
    cls.cls = itself_;
    cls.mask(lines_.of_cls(at), call_.score_scale, context_ && at.has_line);
    softmax<Quad>(cls.key, cls.cls);
    UNROLL
    for (int m = 0; m < M; ++m) {
      if (m > 0) load_queries(q, at, m);
      if (at.pads()) {
        UNROLL
        for (int half = 0; half < 2; ++half) drop_broken<Half>(q[half], at, 2 * m + half);
      }
      multiply<Half, D>(row[m], q[0], q[1], k, load_rows<D>(warp::opaque(head_.cls_k)));
      UNROLL
      for (int half = 0; half < 2; ++half) {
        row[m][half].mask(lines_.of_row(at, 2 * m + half), call_.score_scale, context_ && at.exists(2 * m + half));
        softmax<Quad>(row[m][half].key, row[m][half].cls);
      }
    }
  }

  // dP and dS, and all operands packed. Dropout is a factor on both sides: of the probabilities and of their gradients.
  DEVICE void gradients_of_scores(Weights& weights, const Row<K>& cls, Row<K> (&row)[M][2], Rows<D> (&v)[2 * M],
                                  Rows<D> (&g)[2], const Tile<M>& at) {
    if (at.pads()) {
      UNROLL
      for (int i = 0; i < 2 * M; ++i) keep(v[i], at.keys >> (8 * i + row_of_quad()) & 1);
    }
    gradients_of_cls_scores(weights, cls, v);
    UNROLL
    for (int m = 0; m < M; ++m) {
      Row<K> dp[2];
      if (M > 1) load_gradients(g, at, m);
      multiply<Half, D>(dp, g[0], g[1], v, load_rows<D>(warp::opaque(head_.cls_v)));
      UNROLL
      for (int half = 0; half < 2; ++half) {
        dp[half].cls = context_ ? dp[half].cls : 0;  // whatever [CLS]'s value is
        Row<K> kept = row[m][half];
        dropping_.drop(kept, 2 * m + half);
        const Row<K>& p = row[m][half];
        softmax_gradient<Quad>(p.key, p.cls, kept.key, kept.cls, dp[half].key, dp[half].cls, call_.gradient_scale);
        row[m][half] = kept;
      }
      UNROLL
      for (int n = 0; n < M; ++n) {
        weights.probs[m][n] = operand_of<Half>(row[m], n, keep_scale_);
        weights.ds[m][n] = operand_of<Half>(dp, n, 1);
      }
      weights.probs_on_cls[m] = pack<Half>(row[m][0].cls, row[m][1].cls);
      weights.ds_on_cls[m] = pack<Half>(dp[0].cls, dp[1].cls);
    }
  }

  DEVICE void gradients_of_cls_scores(Weights& weights, const Row<K>& cls, const Rows<D> (&v)[2 * M]) {
    Row<K> dp;
    multiply_cls<Half, D>(dp, load_rows<D>(warp::opaque(head_.cls_grad)), v);
    dp.cls = dp_itself_;
    Row<K> kept = cls;
    dropping_.drop(kept, 2 * M);
    softmax_gradient<Quad>(cls.key, cls.cls, kept.key, kept.cls, dp.key, dp.cls, call_.gradient_scale);
    add_total(DS_ITSELF, dp.cls);
    add_total(FROM_ITSELF, kept.cls);
    UNROLL
    for (int n = 0; n < M; ++n) {
      weights_of<Half>(weights.cls_probs[n], kept, n, inverse_ * keep_scale_);
      weights_of<Half>(weights.cls_ds[n], dp, n, 1);
    }
  }

  // dV: transposed probabilities by gradients.
  DEVICE void gradient_of_values(const Weights& weights, const Tile<M>& at) {
    Pairs<D> g[M];
    UNROLL
    for (int m = 0; m < M; ++m) {
      int offset[4];
      indices(offset, at.mine, 16 * m, call_.row_pieces);
      g[m] = load_pairs<D>(base(head_.grad), offset);
      uint32_t to_values[2] = {};
      to_column(to_values, weights.probs_on_cls[m], DV);
      to_column(to_values, add_keys(weights, m), ALL_DV);
      add_sums<Half, D>(sums_, g[m], to_values);
    }
    float from_tokens = 0;
    UNROLL
    for (int n = 0; n < M; ++n) {
      UNROLL
      for (int i = 0; i < 2; ++i) from_tokens += sum_of_pair(weights.cls_probs[n][i]);
    }
    add_total(FROM_TOKENS, Quad::sum(from_tokens));
    Same<D> cls_grad = load_same<D>(warp::opaque(head_.cls_grad));
    UNROLL
    for (int n = 0; n < M; ++n) {
      float y[D / 8][4] = {};
      UNROLL
      for (int m = 0; m < M; ++m) add_product<Half, D>(y, transpose(weights.probs[m][n]), g[m]);
      add_product<Half, D>(y, {warp::transpose(weights.cls_probs[n][0]), warp::transpose(weights.cls_probs[n][1])}, cls_grad);
      store(y, at, n, 2);
    }
  }

  // dK: transposed gradients of scores by queries.
  DEVICE void gradient_of_keys(const Weights& weights, const Tile<M>& at, uint32_t broken) {
    Pairs<D> q[M];
    UNROLL
    for (int m = 0; m < M; ++m) {
      int offset[4];
      sources(offset, at.mine, 16 * m);
      q[m] = load_pairs<D>(base(head_.q), offset);
      if (broken) keep(q[m], at.rows & ~broken, 16 * m);  // a row without a token reads another's, which may be a broken one
      uint32_t to_keys[2] = {};
      to_column(to_keys, weights.ds_on_cls[m], DK);
      add_sums<Half, D>(sums_, q[m], to_keys);
    }
    Same<D> cls_q = load_same<D>(warp::opaque(head_.cls_q));
    UNROLL
    for (int n = 0; n < M; ++n) {
      float y[D / 8][4] = {};
      add_product<Half, D>(y, {warp::transpose(weights.cls_ds[n][0]), warp::transpose(weights.cls_ds[n][1])}, cls_q);
      UNROLL
      for (int i = 0; i < D / 2; ++i) y[i / 4][i % 4] *= inverse_;  // here, as it may make weights too small for float16
      UNROLL
      for (int m = 0; m < M; ++m) add_product<Half, D>(y, transpose(weights.ds[m][n]), q[m]);
      store(y, at, n, 1);
    }
  }

  // dQ: gradients of scores by keys.
  DEVICE void gradient_of_queries(Weights& weights, const Tile<M>& at, uint32_t broken) {
    UNROLL
    for (int m = 0; m < M; ++m) {
      add_total(DS_OF_TOKENS, keeps(broken, m, 0) ? warp::low_float<Half>(weights.ds_on_cls[m]) : 0);
      add_total(DS_OF_TOKENS, keeps(broken, m, 1) ? warp::low_float<Half>(weights.ds_on_cls[m] >> 16) : 0);
    }
    UNROLL
    for (int n = 0; n < M; ++n) add_queries(weights, n, broken);
    Pairs<D> k[M];
    UNROLL
    for (int n = 0; n < M; ++n) {
      int offset[4];
      sources(offset, at.mine, 16 * n);
      k[n] = load_pairs<D>(base(head_.k), offset);
      if (at.pads()) keep(k[n], at.keys, 16 * n);
      add_sums<Half, D>(sums_, k[n], weights.cls_ds[n]);
    }
    Same<D> cls_k = load_same<D>(warp::opaque(head_.cls_k), context_);
    UNROLL
    for (int m = 0; m < M; ++m) {
      float y[D / 8][4] = {};
      UNROLL
      for (int n = 0; n < M; ++n) add_product<Half, D>(y, weights.ds[m][n], k[n]);
      const bool first = lane_of_quad() == 0;  // a column of 8, as first_column
      const uint32_t on_cls = weights.ds_on_cls[m];
      add_product<Half, D>(y, {first ? on_cls & 0xFFFF : 0, first ? on_cls >> 16 : 0}, cls_k);
      if (broken) {
        UNROLL
        for (int i = 0; i < D / 2; ++i) {
          y[i / 4][i % 4] = broken >> (16 * m + i % 4 / 2 * 8 + row_of_quad()) & 1 ? 0 : y[i / 4][i % 4];
        }
      }
      store(y, at, m, 0);
    }
  }

  DEVICE void add_total(int which, float x) { totals_ += lane_of_quad() == which ? x : 0; }

  static DEVICE float sum_of_pair(uint32_t pair) { return warp::low_float<Half>(pair) + warp::low_float<Half>(pair >> 16); }

  static DEVICE bool keeps(uint32_t broken, int m, int half) { return !(broken >> (16 * m + 8 * half + row_of_quad()) & 1); }

  // Gradients of scores on keys 16n … 16n + 15, added up over the queries: one more row beside those of [CLS].
  static DEVICE void add_queries(Weights& weights, int n, uint32_t broken) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      float low = 0, high = 0;
      UNROLL
      for (int m = 0; m < M; ++m) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = weights.ds[m][n].w[2 * i + half];
          low += keeps(broken, m, half) ? warp::low_float<Half>(pair) : 0;
          high += keeps(broken, m, half) ? warp::low_float<Half>(pair >> 16) : 0;
        }
      }
      const uint32_t all = pack<Half>(sum_of_quads(low), sum_of_quads(high));
      weights.cls_ds[n][i] = row_of_quad() == ALL_DQ ? all : weights.cls_ds[n][i];
    }
  }

  // Probabilities of rows g and g + 8, added up over their lines' keys.
  static DEVICE uint32_t add_keys(const Weights& weights, int m) {
    float row[2] = {};
    UNROLL
    for (int half = 0; half < 2; ++half) {
      UNROLL
      for (int n = 0; n < M; ++n) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
          row[half] += sum_of_pair(weights.probs[m][n].w[2 * i + half]);
        }
      }
    }
    return pack<Half>(Quad::sum(row[0]), Quad::sum(row[1]));
  }

  DEVICE void store(const float (&y)[D / 8][4], const Tile<M>& at, int m, int kind) const {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      int offset = (3 * at.row[2 * m + half].index + kind) * call_.row_pieces;
      if (at.exists(2 * m + half)) store_row<Half, D>(out_ + int64_t{offset} * BYTES, y, half);
    }
  }

  const Call& call_;
  const float keep_scale_;
  const bool context_;
  const Head& head_;
  Dropping<M>& dropping_;
  const Lines<M>& lines_;
  const float inverse_;             // 1 / lines of the clip
  const float itself_, dp_itself_;  // [CLS]'s score on itself, the gradient of that probability
  char* const out_;                 // of the clip's first token
  float (&sums_)[D / 16][4];        // of [CLS]'s gradients
  float& totals_;
};

// A warp's part of [CLS]'s three gradients, and of the sums over tokens of those of queries and values.
template <class Half, int D>
DEVICE void collected_gradients(const Call& call, const Head& head, const float (&sums)[D / 16][4], float inverse,
                                float totals) {
  float* part = call.parts + int64_t{blockIdx.x} * (BACKWARD_KINDS * D);
  totals = sum_of_quads(totals);
  float ds = shfl(totals, DS_ITSELF) * inverse, prob = shfl(totals, FROM_ITSELF) * inverse * call.dropout_scale;
  float all_ds = shfl(totals, DS_OF_TOKENS), all_probs = shfl(totals, FROM_TOKENS);
  store_part<Half, D>(part, sums, Columns(DQ, MOST_PACKED), inverse, ds, load_same<D>(head.cls_k, call.cls_in_context));
  store_part<Half, D>(part + D, sums, Columns(DK, 1), 1, ds, load_same<D>(head.cls_q));
  store_part<Half, D>(part + 2 * D, sums, Columns(DV, 1), call.dropout_scale, prob, load_same<D>(head.cls_grad));
  store_part<Half, D>(part + 3 * D, sums, Columns(ALL_DQ, 1), 1, all_ds, load_same<D>(head.cls_k, call.cls_in_context));
  store_part<Half, D>(part + 4 * D, sums, Columns(ALL_DV, 1), 1, all_probs, load_same<D>(head.cls_grad));
}

template <class Half, int D, int M>
DEVICE void backward_lines(const Call& call, const Work& work) {
  Head head = Head::of<D>(call, work);
  if (M == 1) head.settle();
  Dropping<M> dropping(call, work);
  const float inverse = 1.0f / work.lines;
  const bool context = call.cls_in_context;
  const Lines<M> lines(work);
  const float itself = dot<Half, D>(load_rows<D>(head.cls_q), load_rows<D>(head.cls_k));
  const float dp_itself = context ? dot<Half, D>(load_rows<D>(head.cls_grad), load_rows<D>(head.cls_v)) : 0;
  char* out = call.out + int64_t{work.clip} * call.grid.tokens() * (3 * call.row_pieces) * BYTES + work.head * (D * 2);
  float sums[D / 16][4] = {}, totals = 0;
  Backward<Half, D, M> backward{call,    call.dropout_scale, context,   head, dropping, lines,
                                inverse, itself,             dp_itself, out,  sums,     totals};
  Walk walk(call, work);
  for (int tile = work.split; tile < work.tiles; tile += call.splits, walk.next()) {
    backward.differentiate(Tile<M>(call, work, walk));
  }
  collected_gradients<Half, D>(call, head, sums, inverse, totals);
}

template <class Half, int D, int M>
__global__ void __launch_bounds__(warp::LANES, BACKWARD_WARPS<D, M>) backward_kernel(const Call call) {
  const Work work(call, blockIdx.x);
  if (M == 1 || work.length <= 16) return backward_lines<Half, D, 1>(call, work);
  backward_lines<Half, D, M>(call, work);
}

// --- parts ---------------------------------------------------------------------------------------------------------------

// [CLS]'s rows of out, [B, 1 or 3, N, D], from the warps' parts [B, splits, N, kinds, D]; a thread adds two neighbours. Backward
// also adds up the gradients of a clip's rows, [B, 3, N, D]. Those of keys are 0: adding to all keys changes no softmax.
template <class Half>
__global__ void __launch_bounds__(ADDERS) add_parts(const Call call, int kinds, int width) {
  const int written = kinds == FORWARD_KINDS ? 1 : 3;
  uint32_t i = blockIdx.x * ADDERS + threadIdx.x;
  int d = i % (width / 2) * 2, head = i / (width / 2) % call.heads, kind = i / (width / 2) / call.heads % written;
  int64_t clip = i / (width / 2) / call.heads / written;
  if (clip >= call.clips) return;
  const float* part = call.parts + (clip * call.splits * call.heads + head) * kinds * width + d;
  float low = 0, high = 0, all_low = 0, all_high = 0;
  for (int split = 0; split < call.splits; ++split, part += int64_t{call.heads} * kinds * width) {
    low += warp::load_one(part + kind * width);
    high += warp::load_one(part + kind * width + 1);
    if (written == 1 || kind == 1) continue;
    all_low += warp::load_one(part + (kind == 0 ? 3 : 4) * width);
    all_high += warp::load_one(part + (kind == 0 ? 3 : 4) * width + 1);
  }
  int64_t row = (call.tokens() + clip) * written + kind;
  warp::store<1>(call.out + ((row * call.heads + head) * width + d) * 2, {{pack<Half>(low, high)}});
  if (written == 1) return;
  float* sum = call.clip_sums + ((clip * 3 + kind) * call.heads + head) * width + d;
  warp::store_one(sum, kind == 1 ? 0 : low + all_low);
  warp::store_one(sum + 1, kind == 1 ? 0 : high + all_high);
}

// sums [columns] of the clips' [B, columns]: a warp adds up 8 columns, every lane a quarter of the clips in one of them.
__global__ void __launch_bounds__(warp::LANES) add_clips(const Call call, int columns) {
  const int column = blockIdx.x * 8 + row_of_quad();
  float sum = 0;
  for (int64_t clip = lane_of_quad(); clip < call.clips && column < columns; clip += 4) {
    sum += warp::load_one(call.clip_sums + clip * columns + column);
  }
  sum = Quad::sum(sum);
  if (lane_of_quad() == 0 && column < columns) warp::store_one(call.sums + column, sum);
}

// --- launches ----------------------------------------------------------------------------------------------------------

struct Kernels {
  void (*main)(Call);
  void (*add_parts)(Call, int, int);
};

template <class Half, int D>
Kernels kernels_of_width(bool forward, int longest) {
  if (forward) return {longest <= 16 ? forward_kernel<Half, D, 1> : forward_kernel<Half, D, 2>, add_parts<Half>};
  return {longest <= 16 ? backward_kernel<Half, D, 1> : backward_kernel<Half, D, 2>, add_parts<Half>};
}

template <class Half>
Kernels kernels_of(bool forward, int width, int longest) {
  return width == 32 ? kernels_of_width<Half, 32>(forward, longest) : kernels_of_width<Half, 64>(forward, longest);
}

// What a call of the op needs of its tensors: sizes [B, T, H, W, 3, N, D] and strides, in numbers.
struct Launch {
  Call call = {};
  int kinds, width, longest = 0;
  std::string unfit;  // why the kernels cannot run it

  Launch(bool forward, const int64_t* sizes, const int64_t* strides, const int64_t* cls_strides,
         const std::vector<std::string>& axes, double dropout_p, bool cls_in_context) {
    kinds = forward ? FORWARD_KINDS : BACKWARD_KINDS;
    width = static_cast<int>(sizes[6]);
    call.clips = static_cast<int>(sizes[0]);
    call.grid = {static_cast<int>(sizes[1]), static_cast<int>(sizes[2]), static_cast<int>(sizes[3])};
    call.heads = static_cast<int>(sizes[5]);
    call.heads_of_axis = call.heads / static_cast<int>(axes.size());
    call.cls_in_context = cls_in_context;
    Dropout dropout(dropout_p);
    call.dropout_threshold = dropout.threshold;
    call.dropout_scale = dropout.scale;
    const double scale = 1 / std::sqrt(static_cast<double>(width));
    call.score_scale = static_cast<float>(scale * LOG2E);
    call.gradient_scale = static_cast<float>(scale * dropout.scale);
    call.row_pieces = call.heads * (width / HALVES);
    if (axes.size() > 32) unfit = "more than 32 axes";
    int tiles = 0;
    for (size_t i = 0; i < axes.size() && i < 32; ++i) {
      int axis = axes[i] == "T" ? 0 : axes[i] == "H" ? 1 : 2;
      if (axes[i] != "T" && axes[i] != "H" && axes[i] != "W") unfit = "axis " + axes[i];
      call.axes |= static_cast<uint64_t>(axis) << (2 * i);
      int length = call.grid.length(axis), packed = Work::lines_of_tile(length);
      int tiles_of_axis = (call.grid.lines(axis) + packed - 1) / packed;
      longest = length > longest ? length : longest;
      tiles = tiles_of_axis > tiles ? tiles_of_axis : tiles;
    }
    call.splits = (tiles + TILES - 1) / TILES;
    int64_t extent = 0;
    for (int i = 0; i < 3; ++i) extent += (sizes[i + 1] - 1) * strides[i + 1] / HALVES;
    int64_t row_pieces = 3 * sizes[5] * sizes[6] / HALVES;
    if (width != 32 && width != 64) unfit = "a head width other than 32 and 64";
    if (longest > LONGEST_LINE) unfit = "lines of more than 32 tokens";
    if (extent >= INT32_MAX || int64_t{call.grid.tokens()} * row_pieces >= INT32_MAX) unfit = "a clip of more than 32 GiB";
    if (warps() > INT32_MAX || sizes[0] * kinds * sizes[5] * sizes[6] / 2 >= UINT32_MAX - ADDERS) unfit = "too many heads";
    for (int i = 0; i < 6; ++i) {
      bool apart = strides[i] % HALVES != 0 && sizes[i] > 1;
      bool cls_apart = i < 3 && cls_strides[i] % HALVES != 0 && (i == 0 ? sizes[0] : sizes[3 + i]) > 1;
      if (apart || cls_apart) unfit = "strides that are no multiples of 8 elements";
    }
    call.clip_stride = strides[0] / HALVES;
    for (int i = 0; i < 3; ++i) call.stride[i] = static_cast<int>(strides[i + 1] / HALVES);
    call.kind_stride = strides[4] / HALVES;
    call.head_stride = strides[5] / HALVES;
    call.cls_clip_stride = cls_strides[0] / HALVES;
    call.cls_kind_stride = cls_strides[1] / HALVES;
    call.cls_head_stride = cls_strides[2] / HALVES;
  }

  int64_t warps() const { return int64_t{call.clips} * call.splits * call.heads; }
  int written() const { return kinds == FORWARD_KINDS ? 1 : 3; }  // rows of out for each of the tokens' and [CLS]'s
  unsigned blocks_of_parts() const {
    int64_t threads = int64_t{call.clips} * written() * call.heads * (width / 2);
    return static_cast<unsigned>((threads + ADDERS - 1) / ADDERS);
  }
  int columns() const { return 3 * call.heads * width; }  // of sums
  unsigned blocks_of_sums() const { return static_cast<unsigned>((columns() + 7) / 8); }
  int64_t parts() const { return warps() * kinds * width; }  // floats
};

// --- ops ---------------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__) && !defined(KERNELS_ONLY)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Copied where a view starts between two pieces.
Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % BYTES == 0 ? x : torch::stable::clone(x);
}

// Packed rows: without `grad` the outputs [B·T·H·W + B, N, D], else the gradients [.., 3, N, D], whose sums over rows [3, N, D]
// go to `sums`, float32.
Tensor run(const Tensor* grad, Tensor* sums, Tensor qkv, Tensor cls_qkv, const std::vector<std::string>& axes,
           const std::optional<Tensor>& pad, double dropout_p, const std::optional<Tensor>& seed, bool cls_in_context) {
  qkv = aligned(qkv), cls_qkv = aligned(cls_qkv);
  Launch launch(!grad, qkv.sizes().data(), qkv.strides().data(), cls_qkv.strides().data(), axes, dropout_p, cls_in_context);
  Call& call = launch.call;
  const ScalarType kind = qkv.scalar_type();
  STD_TORCH_CHECK(kind == ScalarType::BFloat16 || kind == ScalarType::Half, "axial_attention.cuda takes bfloat16 and float16");
  STD_TORCH_CHECK(launch.unfit.empty(), "axial_attention.cuda cannot run ", launch.unfit);
  const int64_t rows = call.tokens() + call.clips;
  Tensor out = grad ? torch::stable::new_empty(qkv, {rows, 3, call.heads, launch.width})
                    : torch::stable::new_empty(qkv, {rows, call.heads, launch.width});
  if (call.clips == 0) return out;
  Tensor clip_sums = torch::stable::new_empty(qkv, {grad ? call.clips * launch.columns() : 0}, ScalarType::Float);
  Tensor parts = torch::stable::new_empty(qkv, {launch.parts()}, ScalarType::Float);
  std::optional<Tensor> is_pad;
  if (pad) is_pad = torch::stable::contiguous(*pad);

  call.qkv = static_cast<const char*>(qkv.const_data_ptr());
  call.cls_qkv = static_cast<const char*>(cls_qkv.const_data_ptr());
  call.grad = grad ? static_cast<const char*>(grad->const_data_ptr()) : nullptr;
  call.pad = is_pad ? static_cast<const uint8_t*>(is_pad->const_data_ptr()) : nullptr;
  call.seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  call.out = static_cast<char*>(out.mutable_data_ptr());
  call.parts = static_cast<float*>(parts.mutable_data_ptr());
  call.clip_sums = static_cast<float*>(clip_sums.mutable_data_ptr());
  call.sums = sums ? static_cast<float*>(sums->mutable_data_ptr()) : nullptr;
  STD_TORCH_CHECK(call.seed || call.dropout_threshold == 0, "axial_attention.cuda: dropout needs a seed");

  torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(qkv.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const Kernels kernels = kind == ScalarType::BFloat16 ? kernels_of<warp::BFloat16>(!grad, launch.width, launch.longest)
                                                       : kernels_of<warp::Float16>(!grad, launch.width, launch.longest);
  kernels.main<<<launch.warps(), warp::LANES, 0, stream>>>(call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  kernels.add_parts<<<launch.blocks_of_parts(), ADDERS, 0, stream>>>(call, launch.kinds, launch.width);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!sums) return out;
  add_clips<<<launch.blocks_of_sums(), warp::LANES, 0, stream>>>(call, launch.columns());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor forward(Tensor qkv, Tensor cls_qkv, std::vector<std::string> axes, std::optional<Tensor> pad, double dropout_p,
               std::optional<Tensor> seed, bool cls_in_context) {
  return run(nullptr, nullptr, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context);
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor qkv, Tensor cls_qkv, std::vector<std::string> axes,
                                    std::optional<Tensor> pad, double dropout_p, std::optional<Tensor> seed,
                                    bool cls_in_context) {
  STD_TORCH_CHECK(grad.is_contiguous(), "axial_attention_backward.cuda needs a contiguous gradient");
  grad = aligned(grad);
  const std::vector<int64_t> shape = {3, qkv.size(5), qkv.size(6)};
  Tensor sums = qkv.size(0) ? torch::stable::new_empty(qkv, shape, ScalarType::Float)
                            : torch::stable::new_zeros(qkv, shape, ScalarType::Float);
  Tensor out = run(&grad, &sums, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context);
  return {out, sums};
}

#endif

}  // namespace
}  // namespace vimpac::axial

#if defined(__CUDACC__) && !defined(KERNELS_ONLY)
STABLE_TORCH_LIBRARY_IMPL(vimpac, CUDA, m) {
  m.impl("axial_attention.cuda", TORCH_BOX(&vimpac::axial::forward));
  m.impl("axial_attention_backward.cuda", TORCH_BOX(&vimpac::axial::backward));
}
#endif
