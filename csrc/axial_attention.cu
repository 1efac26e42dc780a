// Axial attention with a shared [CLS] on tensor cores, forward and backward, for half-precision lines of 1 to 32 tokens.
// vimpac/ops/axial_attention.py has the formula.
//
// A block is one warp. It takes one head of one clip and a share of the lines of the head's axis, and walks over them a tile of
// 16·M rows at a time; a tile holds one line or, of lines of up to 7 tokens, as many as fit in 16 rows (at most 4), kept apart
// by a mask.
// Neighbouring warps take neighbouring heads, whose bytes are neighbours in memory. Nothing goes through shared memory: what a
// lane loads from global memory, 16 bytes at a time, is an operand of the matrix instructions, whatever the strides of rows.
//
// Two forms of a matrix of rows make that work, both free to permute the head's width D, since it is either summed over or
// permuted back where results are stored (warp.h has the operands' layout):
//
//   Rows    8 rows as an operand whose inner dimension is D: lane 4g + t holds dims 32c + 8t … 32c + 8t + 7 of row g
//   Pairs  16 rows as an operand whose inner dimension are the rows: pairs of rows 2t, 2t + 1 and 2t + 8, 2t + 9 at some dims,
//          chosen such that the results' lane holds just the dims that Rows has
//
// [CLS] costs no row of a tile. As a key it is a column of its own, by a product with 8 columns that all are [CLS]. As a query
// it is an extra row for each line of the tile; the tile's [CLS] rows have the layout of token rows, and share their softmax,
// dropout and mask. What it adds to outputs and gradients is one more step, 8 deep, of their products. Sums over lines
// ([CLS]'s output, its gradients) collect in registers, each warp writes its part of them, and a second kernel adds the parts
// in a fixed order: no atomics, the same inputs give the same bits, and a clip's bits do not depend on the batch.
//
// What stands at PAD counts as zeros, since 0 · NaN would reach other tokens: keys and values, and queries that are not finite.
// Tiles without PAD skip that.
//
// Backward recomputes the probabilities. First all probabilities and gradients of scores of the tile, kept as packed operands,
// then one product after another, whose Pairs are loaded again and come from the L1 cache.

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// KERNELS_ONLY: without the ops, for who compiles some of the kernels.
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

#include "axial_attention.h"
#include "philox.h"
#include "warp.h"

namespace vimpac::axial {

#ifdef __CUDACC__
template <>
struct Exp2<float> {
  static DEVICE float of(float x) { return warp::exp2_fast(x); }
};

template <>
struct Inverse<float> {
  static DEVICE float of(float x) { return warp::inverse_fast(x); }
};
#else
template <>
struct Exp2<float> {
  static float of(float x) { return exp2f(x); }
};
#endif

namespace {

using warp::lane;
using warp::mma;
using warp::pack;
using warp::Piece;
using warp::shfl;
using warp::shfl_xor;

constexpr int TILES = 16;          // of a warp: few, so that warps are many; [CLS]'s parts still cost under 1 % of the bytes
constexpr int LONGEST_LINE = 32;   // tokens
constexpr int LONGEST_PACKED = 7;  // tokens of lines that share a tile
constexpr int MOST_PACKED = 4;     // lines of a tile
constexpr int BYTES = 16;          // of a piece, in which offsets are counted
constexpr int HALVES = 8;          // numbers in a piece
constexpr int ADDERS = 128;        // threads of a block that adds parts

// All that a launch is told. Strides are counted in pieces of 16 bytes.
struct Call {
  const char *grad, *qkv, *cls_qkv;  // grad: packed rows [B·T·H·W + B, N, D]
  const uint8_t* pad;                // [B, T, H, W] or null
  const int64_t* seed;
  char* out;                         // packed rows [B·T·H·W + B, N, D], backward [.., 3, N, D]
  float* parts;                      // [B, splits, N, kinds, D]: of [CLS]'s output, backward of its three gradients
  int64_t clip_stride, kind_stride, head_stride, cls_clip_stride, cls_kind_stride, cls_head_stride;
  int stride[3];  // of T, H, W
  Grid grid;
  int clips, heads, heads_of_axis, splits;
  uint64_t axes;  // two bits for each group of heads
  uint32_t dropout_threshold;
  float dropout_scale;
  float score_scale, gradient_scale;  // of scores, log2(e) included; of their gradients, dropout_scale included
  int row_pieces;                     // of a row [N, D]
  bool cls_in_context;

  HOST_DEVICE int64_t tokens() const { return int64_t{clips} * grid.tokens(); }
};

DEVICE int row_of_quad() { return lane() / 4; }   // g
DEVICE int lane_of_quad() { return lane() % 4; }  // t

// --- rows of a tile ----------------------------------------------------------------------------------------------------

// A token: its index in its clip and where its row of qkv is, in pieces from the clip's first one.
struct Token {
  int index, source;
  DEVICE Token of_row(int row) const { return {shfl(index, row), shfl(source, row)}; }
};

// What a warp is to do, the same for all lanes.
struct Work {
  int head, split, clip;
  int length, lines, packed, tiles;  // lines of `length` tokens, `packed` of them a tile
  int along, outer, inner;           // the line's dimension, and those that number lines: line = o · size of inner + i

  DEVICE Work(const Call& call, uint32_t warp) {
    head = warp % call.heads;
    split = warp / call.heads % call.splits;
    clip = warp / call.heads / call.splits;
    along = call.axes >> (2 * (head / call.heads_of_axis)) & 3;
    outer = along == 0 ? 1 : 0;
    inner = along == 2 ? 1 : 2;
    length = call.grid.length(along);
    lines = call.grid.lines(along);
    packed = lines_of_tile(length);
    tiles = (lines + packed - 1) / packed;
  }

  static HOST_DEVICE int lines_of_tile(int length) {
    int fit = length <= LONGEST_PACKED ? 16 / length : 1;
    return fit < MOST_PACKED ? fit : MOST_PACKED;
  }

  // Which columns of a tile are on its i-th line.
  DEVICE uint32_t line(int i) const { return i < packed ? (0xFFFFFFFFu >> (32 - length)) << (i * length) : 0; }
};

// The tokens in row lane() of a warp's tiles, one tile after another without a division. A row without a token reads that of
// another row, which then meets only zeros: cheaper than loads that may not happen.
class Walk {
 public:
  DEVICE Walk(const Call& call, const Work& work) {
    const int raster[3] = {call.grid.H * call.grid.W, call.grid.W, 1}, size[3] = {call.grid.T, call.grid.H, call.grid.W};
    auto pick = [](const int(&x)[3], int i) { return i == 0 ? x[0] : i == 1 ? x[1] : x[2]; };
    outers_ = pick(size, work.outer), inners_ = pick(size, work.inner);
    is_row_ = lane() < work.packed * work.length;
    const int row = is_row_ ? lane() : work.packed * work.length - 1, place = row % work.length;
    const int line = work.split * work.packed + row / work.length, step = call.splits * work.packed;
    outer_ = line / inners_, inner_ = line % inners_;
    outer_step_ = step / inners_, inner_step_ = step % inners_;
    index_ = {pick(raster, work.outer), pick(raster, work.inner), place * pick(raster, work.along)};
    source_ = {pick(call.stride, work.outer), pick(call.stride, work.inner), place * pick(call.stride, work.along)};
  }

  DEVICE bool exists() const { return is_row_ && outer_ < outers_; }

  DEVICE Token token() const {
    int outer = outer_ < outers_ ? outer_ : outers_ - 1;
    return {outer * index_.outer + inner_ * index_.inner + index_.place,
            outer * source_.outer + inner_ * source_.inner + source_.place};
  }

  DEVICE void next() {
    outer_ += outer_step_;
    inner_ += inner_step_;
    if (inner_ >= inners_) ++outer_, inner_ -= inners_;
  }

 private:
  struct Steps {
    int outer, inner, place;
  };
  bool is_row_;
  int outers_, inners_, outer_, inner_, outer_step_, inner_step_;
  Steps index_, source_;
};

// --- matrices ----------------------------------------------------------------------------------------------------------

template <int D>
struct Rows {
  uint32_t w[D / 32][4];
};

template <int D>
struct Pairs {
  uint32_t w[D / 8][2];
};

template <int D>
struct Same {  // one row in place of all rows of a matrix in Pairs, 8 deep
  uint32_t w[D / 8][1];
};

// Of each GROUP dims, a lane of Pairs holds one in 8: GROUP_WORDS words of neighbours from first_dim on. Column 2t + e of the
// product with w[j] is then dim j of what lane t of Rows holds in its chunk e (D = 32: in half e of its chunk).
template <int D>
constexpr int GROUP = D == 32 ? 32 : 64;
template <int D>
constexpr int GROUP_WORDS = GROUP<D> / 16;
template <int D>
DEVICE int first_dim() {
  return D == 32 ? 4 * row_of_quad() : 32 * (row_of_quad() % 2) + 8 * (row_of_quad() / 2);
}

// Row g of 8 at `offset` (of each lane's own) or, without one, the same row for all g.
template <int D>
DEVICE Rows<D> load_rows(const char* matrix, int offset = 0) {
  const char* row = matrix + int64_t{offset} * BYTES + lane_of_quad() * BYTES;
  Rows<D> rows;
  UNROLL
  for (int c = 0; c < D / 32; ++c) {
    Piece<4> x = warp::load<4>(row + 64 * c);
    UNROLL
    for (int i = 0; i < 4; ++i) rows.w[c][i] = x.w[i];
  }
  return rows;
}

// offset: of rows 2t, 2t + 1, 2t + 8, 2t + 9.
template <int D>
DEVICE Pairs<D> load_pairs(const char* matrix, const int (&offset)[4]) {
  constexpr int WORDS = GROUP_WORDS<D>;
  Pairs<D> pairs;
  UNROLL
  for (int group = 0; group < D / GROUP<D>; ++group) {
    Piece<WORDS> x[4];
    UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = warp::load<WORDS>(matrix + int64_t{offset[i]} * BYTES + 2 * (GROUP<D> * group + first_dim<D>()));
    }
    UNROLL
    for (int i = 0; i < WORDS; ++i) {
      UNROLL
      for (int k = 0; k < 2; ++k) {
        pairs.w[2 * (WORDS * group + i)][k] = warp::lows(x[2 * k].w[i], x[2 * k + 1].w[i]);
        pairs.w[2 * (WORDS * group + i) + 1][k] = warp::highs(x[2 * k].w[i], x[2 * k + 1].w[i]);
      }
    }
  }
  return pairs;
}

// Zeros if `exists` is not.
template <int D>
DEVICE Same<D> load_same(const char* row, bool exists = true) {
  constexpr int WORDS = GROUP_WORDS<D>;
  Same<D> same = {};
  if (!exists) return same;
  UNROLL
  for (int group = 0; group < D / GROUP<D>; ++group) {
    Piece<WORDS> x = warp::load<WORDS>(row + 2 * (GROUP<D> * group + first_dim<D>()));
    UNROLL
    for (int i = 0; i < WORDS; ++i) {
      same.w[2 * (WORDS * group + i)][0] = warp::lows(x.w[i], x.w[i]);
      same.w[2 * (WORDS * group + i) + 1][0] = warp::highs(x.w[i], x.w[i]);
    }
  }
  return same;
}

// Zeros in place of a row, or of rows of Pairs, 16 from `first` on, that are not to be kept.
template <int D>
DEVICE void keep(Rows<D>& rows, bool kept) {
  UNROLL
  for (int c = 0; c < D / 32; ++c) {
    UNROLL
    for (int i = 0; i < 4; ++i) rows.w[c][i] = kept ? rows.w[c][i] : 0;
  }
}

// Of two rows: the low halves of words are the first's, the high ones the second's.
DEVICE uint32_t halves_of(uint32_t rows, int first) {
  return (rows >> first & 1 ? 0xFFFFu : 0) | (rows >> first & 2 ? 0xFFFF0000u : 0);
}

template <int D>
DEVICE void keep(Pairs<D>& pairs, uint32_t rows, int first) {
  UNROLL
  for (int k = 0; k < 2; ++k) {
    const uint32_t kept = halves_of(rows, first + 2 * lane_of_quad() + 8 * k);
    UNROLL
    for (int j = 0; j < D / 8; ++j) pairs.w[j][k] &= kept;
  }
}

// Which of rows 0 … 7 are not finite: bits 0, 4, … 28 of a word.
template <class Half, int D>
DEVICE uint32_t not_finite(const Rows<D>& rows) {
  uint32_t found = 0;
  UNROLL
  for (int c = 0; c < D / 32; ++c) {
    UNROLL
    for (int i = 0; i < 4; ++i) found |= warp::not_finite<Half>(rows.w[c][i]);
  }
  uint32_t lanes = warp::ballot(found);
  lanes |= lanes >> 1;
  return (lanes | lanes >> 2) & 0x11111111;
}

// Rows g (half = 0) or g + 8 (half = 1) of a product with Pairs, to the row at `to`.
template <class Half, int D>
DEVICE void store_row(char* to, const float (&y)[D / 8][4], int half) {
  constexpr int WORDS = GROUP_WORDS<D>;
  uint32_t w[D / 32][4];
  UNROLL
  for (int j = 0; j < D / 8; j += 2) {
    UNROLL
    for (int column = 0; column < 2; ++column) {
      int word = 2 * WORDS * (j / (2 * WORDS)) + WORDS * column + j % (2 * WORDS) / 2;
      w[word / 4][word % 4] = pack<Half>(y[j][2 * half + column], y[j + 1][2 * half + column]);
    }
  }
  UNROLL
  for (int c = 0; c < D / 32; ++c) {
    warp::store<4>(to + 64 * c + lane_of_quad() * BYTES, {{w[c][0], w[c][1], w[c][2], w[c][3]}});
  }
}

// --- products ----------------------------------------------------------------------------------------------------------

// y[j] = [low; high] rows[j]ᵀ, 8 columns each.
template <class Half, int D, int COLUMNS>
DEVICE void times_rows(float (&y)[COLUMNS][4], const Rows<D>& low, const Rows<D>& high, const Rows<D> (&rows)[COLUMNS]) {
  UNROLL
  for (int j = 0; j < COLUMNS; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) y[j][i] = 0;
    UNROLL
    for (int c = 0; c < D / 32; ++c) {
      UNROLL
      for (int i = 0; i < 4; i += 2) {
        mma<Half>(y[j], {low.w[c][i], high.w[c][i], low.w[c][i + 1], high.w[c][i + 1]}, {rows[j].w[c][i], rows[j].w[c][i + 1]});
      }
    }
  }
}

struct Operand {  // 16×16, on the left
  uint32_t w[4];
};

DEVICE Operand transpose(const Operand& a) {
  return {{warp::transpose(a.w[0]), warp::transpose(a.w[2]), warp::transpose(a.w[1]), warp::transpose(a.w[3])}};
}

template <class Half, int D>
DEVICE void add_product(float (&y)[D / 8][4], const Operand& a, const Pairs<D>& b) {
  UNROLL
  for (int j = 0; j < D / 8; ++j) mma<Half>(y[j], a.w, b.w[j]);
}

template <class Half, int D>
DEVICE void add_product(float (&y)[D / 8][4], const uint32_t (&a)[2], const Same<D>& b) {
  UNROLL
  for (int j = 0; j < D / 8; ++j) mma<Half>(y[j], a, b.w[j]);
}

// Weighted sums of rows: y[i] of rows' dims of word 2i and 2i + 1, a column for each of 8 sets of weights.
template <class Half, int D>
DEVICE void add_sums(float (&y)[D / 16][4], const Pairs<D>& rows, const uint32_t (&weights)[2]) {
  UNROLL
  for (int i = 0; i < D / 16; ++i) {
    mma<Half>(y[i], {rows.w[2 * i][0], rows.w[2 * i + 1][0], rows.w[2 * i][1], rows.w[2 * i + 1][1]}, weights);
  }
}

// The weights of rows g (low half) and g + 8 (high half) as weights for add_sums, in one column.
DEVICE void to_column(uint32_t (&weights)[2], uint32_t packed, int column) {
  uint32_t even = shfl(packed, 8 * lane_of_quad()), odd = shfl(packed, 8 * lane_of_quad() + 4);
  bool mine = row_of_quad() == column;
  weights[0] = mine ? warp::lows(even, odd) : 0;
  weights[1] = mine ? warp::highs(even, odd) : 0;
}

// --- rows of probabilities ---------------------------------------------------------------------------------------------

// A row of a tile is spread over a quad: lane t holds columns 8j + 2t and 8j + 2t + 1 at 2j and 2j + 1.
struct Quad {
  static DEVICE float max(float x) {
    x = fmaxf(x, shfl_xor(x, 1));
    return fmaxf(x, shfl_xor(x, 2));
  }
  static DEVICE float sum(float x) {
    x += shfl_xor(x, 1);
    return x + shfl_xor(x, 2);
  }
};

// Whether a set of columns has the k-th of this lane.
DEVICE bool column_bit(uint32_t columns, int k) { return columns >> (2 * lane_of_quad()) >> (8 * (k / 2) + k % 2) & 1; }

template <int K>
struct Row {
  float key[K], cls;

  // Scores as softmax takes them; `keys` are the columns that are keys.
  DEVICE void mask(uint32_t keys, float factor, bool cls_is_key) {
    UNROLL
    for (int k = 0; k < K; ++k) key[k] = column_bit(keys, k) ? key[k] * factor : -INFINITY;
    cls = cls_is_key ? cls * factor : -INFINITY;
  }
};

// Products of rows g and g + 8, `low` and `high`, with all rows of the tile and with [CLS].
template <class Half, int D, int K>
DEVICE void multiply(Row<K> (&row)[2], const Rows<D>& low, const Rows<D>& high, const Rows<D> (&rows)[K / 2],
                     const Rows<D>& cls) {
  float on_keys[K / 2][4], on_cls[1][4];
  times_rows<Half, D>(on_keys, low, high, rows);
  times_rows<Half, D>(on_cls, low, high, {cls});
  UNROLL
  for (int half = 0; half < 2; ++half) {
    UNROLL
    for (int k = 0; k < K; ++k) row[half].key[k] = on_keys[k / 2][2 * half + k % 2];
    row[half].cls = on_cls[0][2 * half];
  }
}

// Products of [CLS] with all rows of the tile, the same in all quads: [CLS]'s row of every line.
template <class Half, int D, int K>
DEVICE void multiply_cls(Row<K>& row, const Rows<D>& cls, const Rows<D> (&rows)[K / 2]) {
  float on_keys[K / 2][4];
  times_rows<Half, D>(on_keys, cls, Rows<D>{}, rows);
  UNROLL
  for (int k = 0; k < K; ++k) row.key[k] = on_keys[k / 2][k % 2];
}

template <class Half, int D>
DEVICE float dot(const Rows<D>& a, const Rows<D>& b) {  // of rows that are the same in all quads
  float y[1][4];
  times_rows<Half, D>(y, a, Rows<D>{}, {b});
  return y[0][0];
}

// Columns 16n … 16n + 15 of 16 rows, as an operand on the left.
template <class Half, int K>
DEVICE Operand operand_of(const Row<K> (&row)[2], int n, float factor) {
  Operand a;
  UNROLL
  for (int i = 0; i < 4; ++i) {
    int k = 4 * n + i / 2 * 2;
    a.w[i] = pack<Half>(row[i % 2].key[k] * factor, row[i % 2].key[k + 1] * factor);
  }
  return a;
}

// A row's weight of [CLS], as the first of 8 columns of an operand on the left; the others are zeros.
template <class Half>
DEVICE uint32_t first_column(float weight) {
  return lane_of_quad() == 0 ? pack<Half>(weight, 0) : 0;
}

// Columns 16n … 16n + 15 of [CLS]'s 8 rows, as weights for add_sums and, transposed, as an operand on the left.
template <class Half, int K>
DEVICE void weights_of(uint32_t (&weights)[2], const Row<K>& row, int n, float factor) {
  UNROLL
  for (int i = 0; i < 2; ++i) {
    int k = 4 * n + 2 * i;
    weights[i] = pack<Half>(row.key[k] * factor, row.key[k + 1] * factor);
  }
}

// Dropout of a tile's rows: token rows 8i + g and, the last, [CLS]'s row on the g-th line. It multiplies nothing by its scale.
template <int M>
class Dropping {
 public:
  static constexpr int ROWS = 2 * M + 1, K = 4 * M;

  DEVICE Dropping(const Call& call, const Work& work)
      : on_(call.dropout_threshold > 0),
        threshold_(call.dropout_threshold),
        length_(work.length),
        keys_(work.length + call.cls_in_context),
        heads_(call.heads),
        cls_(dropout_bits(length_, keys_)),
        first_(int64_t{work.clip} * call.grid.tokens() * call.heads + work.head),
        seed_(on_ ? warp::load_one(call.seed) : 0) {}

  // For a tile, whose rows are named by tokens `index`: the draws that lanes of a quad share out among them.
  DEVICE void start(const int (&index)[ROWS]) {
    if (!on_) return;
    UNROLL
    for (int i = 0; i < ROWS; ++i) index_[i] = index[i];
    const int t = lane_of_quad();
    if (M == 1 && keys_ <= 8) {
      // A row is one call, so lane t draws the t-th row. A line's keys move to its columns, [CLS] to bit 16.
      int own = t < 2 ? t : 2, line = own < 2 ? (8 * own + row_of_quad()) / length_ : row_of_quad();
      Words<uint32_t> drawn = words(own == 0 ? index[0] : own == 1 ? index[1] : index[2], 0, own == 2);
      uint32_t keys = 0;
      UNROLL
      for (int key = 0; key < 8; ++key) keys |= uint32_t{kept(drawn.w[key / 2], key % 2)} << key;
      keys = (keys << (line * length_ & 15) & 0xFFFF) | (keys >> length_ & 1) << 16;
      UNROLL
      for (int i = 0; i < ROWS; ++i) shared_[i] = shfl(keys, 4 * row_of_quad() + i);
    }
    if (M == 2 && keys_ == 33) {
      // [CLS] is a call of its own: lane t draws it for the t-th row of tokens, all lanes for [CLS]'s row.
      uint32_t own = words(t == 0 ? index[0] : t == 1 ? index[1] : t == 2 ? index[2] : index[3], 4, false).w[0];
      UNROLL
      for (int i = 0; i < ROWS - 1; ++i) shared_[i] = shfl(own, 4 * row_of_quad() + i);
      shared_[ROWS - 1] = words(index[ROWS - 1], 4, true).w[0];
    }
  }

  DEVICE void drop(Row<K>& row, int i) const {
    if (!on_) return;
    if (M == 1 && keys_ <= 8) {
      UNROLL
      for (int k = 0; k < K; ++k) row.key[k] = column_bit(shared_[i], k) ? row.key[k] : 0;
      row.cls = shared_[i] >> 16 & 1 ? row.cls : 0;
      return;
    }
    const Words<uint32_t> drawn = words(index_[i], lane_of_quad(), i == ROWS - 1);
    UNROLL
    for (int k = 0; k < K; ++k) row.key[k] = kept(drawn.w[k / 2], k % 2) ? row.key[k] : 0;
    uint32_t word = cls_.word == M ? drawn.w[M] : drawn.w[M + 1];  // after 8M … 16M keys
    word = M == 2 && keys_ == 33 ? shared_[i] : shfl(word, 4 * row_of_quad() + cls_.call);
    row.cls = half_word(word, cls_.half) >= threshold_ ? row.cls : 0;
  }

 private:
  DEVICE Words<uint32_t> words(int token, int call, bool is_cls) const {
    int64_t row = first_ + int64_t{token} * heads_;
    return dropout_words<uint32_t>(static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), call, is_cls, seed_);
  }
  DEVICE bool kept(uint32_t word, int half) const { return half ? word >= threshold_ << 16 : (word & 0xFFFF) >= threshold_; }

  bool on_;
  uint32_t threshold_;
  int length_, keys_, heads_;
  Bits cls_;  // where [CLS]'s are
  int64_t first_;
  PhiloxKey seed_;
  int index_[ROWS];
  uint32_t shared_[ROWS];
};

// --- what forward and backward share -----------------------------------------------------------------------------------

// Addresses of one head of a clip.
struct Head {
  const char *q, *k, *v, *grad;  // of the clip's first token
  const char *cls_q, *cls_k, *cls_v, *cls_grad;

  template <int D>
  static DEVICE Head of(const Call& call, const Work& work) {
    Head head;
    head.q = call.qkv + (work.clip * call.clip_stride + work.head * call.head_stride) * BYTES;
    head.k = head.q + call.kind_stride * BYTES;
    head.v = head.k + call.kind_stride * BYTES;
    head.cls_q = call.cls_qkv + (work.clip * call.cls_clip_stride + work.head * call.cls_head_stride) * BYTES;
    head.cls_k = head.cls_q + call.cls_kind_stride * BYTES;
    head.cls_v = head.cls_k + call.cls_kind_stride * BYTES;
    const char* grad = call.grad + int64_t{work.head} * (D * 2);
    head.grad = grad + int64_t{work.clip} * call.grid.tokens() * call.row_pieces * BYTES;
    head.cls_grad = grad + (call.tokens() + work.clip) * call.row_pieces * BYTES;
    return head;
  }

  // Before a loop: one sum for all accesses, where the compiler would add up an address's terms for each.
  DEVICE void settle() {
    q = warp::opaque(q), k = warp::opaque(k), v = warp::opaque(v), grad = warp::opaque(grad);
  }
};

// The tokens of a tile.
template <int M>
struct Tile {
  Token mine, row[2 * M];  // of rows lane() and 8i + g
  int name[2 * M + 1];     // tokens that name the rows for dropout
  uint32_t rows, keys;     // rows with a token, columns that are keys
  bool has_line;           // the g-th, which has the g-th row of [CLS]

  DEVICE Tile(const Call& call, const Work& work, const Walk& walk) : mine(walk.token()) {
    UNROLL
    for (int i = 0; i < 2 * M; ++i) {
      row[i] = mine.of_row(8 * i + row_of_quad());
      name[i] = row[i].index;
    }
    name[2 * M] = shfl(mine.index, row_of_quad() * work.length);
    keys = rows = warp::ballot(walk.exists());
    if (call.pad) {
      bool is_pad = warp::load_one(call.pad + int64_t{work.clip} * call.grid.tokens() + mine.index);
      keys &= ~warp::ballot(is_pad);
    }
    has_line = row_of_quad() < work.packed && (rows >> (row_of_quad() * work.length) & 1);
  }

  DEVICE bool exists(int i) const { return rows >> (8 * i + row_of_quad()) & 1; }
  DEVICE uint32_t pads() const { return rows & ~keys; }
};

// Zeros in place of the query of row 8i + g if that is at PAD and not finite.
template <class Half, int D, int M>
DEVICE void drop_broken(Rows<D>& q, const Tile<M>& at, int i) {
  keep(q, !(at.pads() >> (8 * i + row_of_quad()) & not_finite<Half>(q) >> (4 * row_of_quad()) & 1));
}

// Rows of the tile whose query is at PAD and not finite. Reads them once more, as who keeps them has no register left.
template <class Half, int D, int M>
DEVICE uint32_t broken_queries(const char* q, const Tile<M>& at) {
  uint32_t rows = 0;
  UNROLL
  for (int i = 0; i < 2 * M; ++i) {
    const uint32_t found = not_finite<Half>(load_rows<D>(q, at.mine.of_row(8 * i + row_of_quad()).source));
    UNROLL
    for (int g = 0; g < 8; ++g) rows |= (found >> (4 * g) & 1) << (8 * i + g);
  }
  return rows & at.pads();
}

// The keys of rows 8i + g and of [CLS]'s rows: those on the row's line.
template <int M>
struct Lines {
  uint32_t columns[2 * M], cls;

  DEVICE explicit Lines(const Work& work) {
    UNROLL
    for (int i = 0; i < 2 * M; ++i) columns[i] = work.line((8 * i + row_of_quad()) / work.length);
    cls = work.line(row_of_quad());
  }
  DEVICE uint32_t of_row(const Tile<M>& at, int i) const {
    if (M > 1) return at.exists(i) ? at.keys : 0;  // the tile is one line
    return at.keys & columns[i];
  }
  DEVICE uint32_t of_cls(const Tile<M>& at) const { return at.keys & cls; }
};

// Rows 2t, 2t + 1, 2t + 8, 2t + 9 of a tile's 16 from row `first` on: where they are in qkv, and their tokens times `pieces`.
DEVICE void sources(int (&offset)[4], Token mine, int first) {
  UNROLL
  for (int i = 0; i < 4; ++i) offset[i] = shfl(mine.source, first + 2 * lane_of_quad() + i % 2 + i / 2 * 8);
}

DEVICE void indices(int (&offset)[4], Token mine, int first, int pieces) {
  UNROLL
  for (int i = 0; i < 4; ++i) offset[i] = shfl(mine.index, first + 2 * lane_of_quad() + i % 2 + i / 2 * 8) * pieces;
}

DEVICE float sum_of_quads(float x) {
  x += shfl_xor(x, 4);
  x += shfl_xor(x, 8);
  return x + shfl_xor(x, 16);
}

// A warp's part of a sum for [CLS]: the sums collected over lines, of columns that `mine` says, and weight · row.
template <class Half, int D>
DEVICE void store_part(float* part, const float (&sums)[D / 16][4], bool mine, float factor, float weight, const Same<D>& row) {
  constexpr int DIMS = 2 * GROUP_WORDS<D>;
  UNROLL
  for (int i = 0; i < D / 16; i += 2) {
    Piece<4> x;
    UNROLL
    for (int k = 0; k < 4; ++k) {
      float sum = sums[i + k / 2][k % 2 * 2] + sums[i + k / 2][k % 2 * 2 + 1];
      float y = Quad::sum(mine ? sum : 0.0f) * factor + weight * warp::low_float<Half>(row.w[2 * i + k][0]);
      __builtin_memcpy(&x.w[k], &y, 4);
    }
    int dim = GROUP<D> * (2 * i / DIMS) + first_dim<D>() + 2 * i % DIMS;
    if (lane_of_quad() == 0) warp::store<4>(part + dim, x);
  }
}

// --- forward -----------------------------------------------------------------------------------------------------------

template <class Half, int D, int M>
DEVICE void forward_lines(const Call& call, const Work& work) {
  constexpr int K = 4 * M;
  const bool context = call.cls_in_context;
  Head head = Head::of<D>(call, work);
  head.settle();
  Dropping<M> dropping(call, work);
  const float keep_scale = call.dropout_scale;
  const Rows<D> cls_q = load_rows<D>(head.cls_q), cls_k = load_rows<D>(head.cls_k);
  const Same<D> cls_v = load_same<D>(head.cls_v, context);
  const float itself = dot<Half, D>(cls_q, cls_k);
  const Lines<M> lines(work);
  char* out = call.out + int64_t{work.clip} * call.grid.tokens() * call.row_pieces * BYTES + work.head * (D * 2);
  float sums[D / 16][4] = {};  // of [CLS]'s output, a column for each line of the tile
  float from_itself = 0;
  Walk walk(call, work);
  for (int tile = work.split; tile < work.tiles; tile += call.splits, walk.next()) {
    const Tile<M> at(call, work, walk);
    Rows<D> k[2 * M], q[M][2];
    Pairs<D> v[M];
    auto load_queries = [&](int m) {
      UNROLL
      for (int half = 0; half < 2; ++half) q[m][half] = load_rows<D>(head.q, at.row[2 * m + half].source);
    };
    auto load_values = [&] {
      UNROLL
      for (int m = 0; m < M; ++m) {
        int offset[4];
        sources(offset, at.mine, 16 * m);
        v[m] = load_pairs<D>(head.v, offset);
      }
    };
    UNROLL
    for (int i = 0; i < 2 * M; ++i) k[i] = load_rows<D>(head.k, at.row[i].source);
    load_queries(0);
    if (M == 1) load_values();  // all at once; registers do not allow it for two halves
    dropping.start(at.name);    // while the loads are under way

    Row<K> cls;
    multiply_cls<Half, D>(cls, cls_q, k);
    cls.cls = itself;
    cls.mask(lines.of_cls(at), call.score_scale, context && at.has_line);
    softmax<Quad>(cls.key, cls.cls);
    dropping.drop(cls, 2 * M);
    from_itself += cls.cls;
    uint32_t cls_probs[M][2];
    Operand probs[M][M];  // [16 queries][16 keys]
    uint32_t probs_on_cls[M][2];
    UNROLL
    for (int n = 0; n < M; ++n) weights_of<Half>(cls_probs[n], cls, n, 1);
    UNROLL
    for (int m = 0; m < M; ++m) {
      if (m > 0) load_queries(m);
      if (at.pads()) {
        UNROLL
        for (int half = 0; half < 2; ++half) drop_broken<Half>(q[m][half], at, 2 * m + half);
      }
      Row<K> row[2];
      multiply<Half, D>(row, q[m][0], q[m][1], k, cls_k);
      UNROLL
      for (int half = 0; half < 2; ++half) {
        int i = 2 * m + half;
        row[half].mask(lines.of_row(at, i), call.score_scale, context && at.exists(i));
        softmax<Quad>(row[half].key, row[half].cls);
        dropping.drop(row[half], i);
        probs_on_cls[m][half] = first_column<Half>(row[half].cls * keep_scale);
      }
      UNROLL
      for (int n = 0; n < M; ++n) probs[m][n] = operand_of<Half>(row, n, keep_scale);
    }

    if (M > 1) load_values();
    if (at.pads()) {
      UNROLL
      for (int n = 0; n < M; ++n) keep(v[n], at.keys, 16 * n);
    }
    UNROLL
    for (int n = 0; n < M; ++n) add_sums<Half, D>(sums, v[n], cls_probs[n]);
    UNROLL
    for (int m = 0; m < M; ++m) {
      float y[D / 8][4] = {};
      UNROLL
      for (int n = 0; n < M; ++n) add_product<Half, D>(y, probs[m][n], v[n]);
      add_product<Half, D>(y, probs_on_cls[m], cls_v);
      UNROLL
      for (int half = 0; half < 2; ++half) {
        int offset = at.row[2 * m + half].index * call.row_pieces;
        if (at.exists(2 * m + half)) store_row<Half, D>(out + int64_t{offset} * BYTES, y, half);
      }
    }
  }
  float inverse = keep_scale / work.lines;
  store_part<Half, D>(call.parts + int64_t{blockIdx.x} * D, sums, true, inverse, sum_of_quads(from_itself) * inverse, cls_v);
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

template <class Half, int D, int M>
DEVICE void backward_lines(const Call& call, const Work& work) {
  constexpr int K = 4 * M;
  constexpr int DQ = 0, DK = MOST_PACKED, DV = MOST_PACKED + 2;  // columns of sums for [CLS]: of q one for each line of a tile
  Head head = Head::of<D>(call, work);
  if (M == 1) head.settle();
  Dropping<M> dropping(call, work);
  const float keep_scale = call.dropout_scale, inverse = 1.0f / work.lines;
  const bool context = call.cls_in_context;
  const Lines<M> lines(work);
  const float itself = dot<Half, D>(load_rows<D>(head.cls_q), load_rows<D>(head.cls_k));
  const float dp_itself = context ? dot<Half, D>(load_rows<D>(head.cls_grad), load_rows<D>(head.cls_v)) : 0;
  char* out = call.out + int64_t{work.clip} * call.grid.tokens() * (3 * call.row_pieces) * BYTES + work.head * (D * 2);
  // [CLS]'s vectors are loaded anew for every tile, and not even their addresses are kept (opaque): registers are short. Two
  // 16-row halves leave none for the tokens' addresses either.
  auto base = [](const char* address) { return M == 1 ? address : warp::opaque(address); };
  float sums[D / 16][4] = {};
  float ds_itself = 0, from_itself = 0;
  Walk walk(call, work);
  for (int tile = work.split; tile < work.tiles; tile += call.splits, walk.next()) {
    const Tile<M> at(call, work, walk);
    Row<K> cls, row[M][2];  // probabilities
    Rows<D> k[2 * M];
    UNROLL
    for (int i = 0; i < 2 * M; ++i) k[i] = load_rows<D>(base(head.k), at.row[i].source);
    Rows<D> q[M][2], g[M][2], v[2 * M];
    auto load_queries = [&](int m) {
      UNROLL
      for (int half = 0; half < 2; ++half) q[m][half] = load_rows<D>(base(head.q), at.row[2 * m + half].source);
    };
    auto load_gradients = [&](int m) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        g[m][half] = load_rows<D>(base(head.grad), at.row[2 * m + half].index * call.row_pieces);
      }
    };
    auto load_values = [&] {
      UNROLL
      for (int i = 0; i < 2 * M; ++i) v[i] = load_rows<D>(base(head.v), at.row[i].source);
    };
    load_queries(0);
    if (M == 1) {  // all at once
      load_values();
      load_gradients(0);
    }
    dropping.start(at.name);
    multiply_cls<Half, D>(cls, load_rows<D>(warp::opaque(head.cls_q)), k);
    cls.cls = itself;
    cls.mask(lines.of_cls(at), call.score_scale, context && at.has_line);
    softmax<Quad>(cls.key, cls.cls);
    UNROLL
    for (int m = 0; m < M; ++m) {
      if (m > 0) load_queries(m);
      if (at.pads()) {
        UNROLL
        for (int half = 0; half < 2; ++half) drop_broken<Half>(q[m][half], at, 2 * m + half);
      }
      multiply<Half, D>(row[m], q[m][0], q[m][1], k, load_rows<D>(warp::opaque(head.cls_k)));
      UNROLL
      for (int half = 0; half < 2; ++half) {
        row[m][half].mask(lines.of_row(at, 2 * m + half), call.score_scale, context && at.exists(2 * m + half));
        softmax<Quad>(row[m][half].key, row[m][half].cls);
      }
    }

    // Dropout is a factor on both sides: of the probabilities and of their gradients.
    Operand probs[M][M], ds[M][M];           // [16 queries][16 keys]
    uint32_t cls_probs[M][2], cls_ds[M][2];  // [CLS]'s rows
    uint32_t probs_on_cls[M], ds_on_cls[M];  // of rows g and g + 8
    if (M > 1) load_values();
    if (at.pads()) {
      UNROLL
      for (int i = 0; i < 2 * M; ++i) keep(v[i], at.keys >> (8 * i + row_of_quad()) & 1);
    }
    Row<K> cls_dp;
    multiply_cls<Half, D>(cls_dp, load_rows<D>(warp::opaque(head.cls_grad)), v);
    cls_dp.cls = dp_itself;
    Row<K> kept = cls;
    dropping.drop(kept, 2 * M);
    softmax_gradient<Quad>(cls.key, cls.cls, kept.key, kept.cls, cls_dp.key, cls_dp.cls, call.gradient_scale);
    from_itself += kept.cls;
    ds_itself += cls_dp.cls;
    UNROLL
    for (int n = 0; n < M; ++n) {
      weights_of<Half>(cls_probs[n], kept, n, inverse * keep_scale);
      weights_of<Half>(cls_ds[n], cls_dp, n, 1);
    }
    UNROLL
    for (int m = 0; m < M; ++m) {
      Row<K> dp[2];
      if (M > 1) load_gradients(m);
      multiply<Half, D>(dp, g[m][0], g[m][1], v, load_rows<D>(warp::opaque(head.cls_v)));
      UNROLL
      for (int half = 0; half < 2; ++half) {
        dp[half].cls = context ? dp[half].cls : 0;  // whatever [CLS]'s value is
        Row<K> kept = row[m][half];
        dropping.drop(kept, 2 * m + half);
        const Row<K>& p = row[m][half];
        softmax_gradient<Quad>(p.key, p.cls, kept.key, kept.cls, dp[half].key, dp[half].cls, call.gradient_scale);
        row[m][half] = kept;
      }
      UNROLL
      for (int n = 0; n < M; ++n) {
        probs[m][n] = operand_of<Half>(row[m], n, keep_scale);
        ds[m][n] = operand_of<Half>(dp, n, 1);
      }
      probs_on_cls[m] = pack<Half>(row[m][0].cls, row[m][1].cls);
      ds_on_cls[m] = pack<Half>(dp[0].cls, dp[1].cls);
    }

    auto store_tile = [&](const float (&y)[D / 8][4], int m, int kind) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        int offset = (3 * at.row[2 * m + half].index + kind) * call.row_pieces;
        if (at.exists(2 * m + half)) store_row<Half, D>(out + int64_t{offset} * BYTES, y, half);
      }
    };
    uint32_t weights[2];
    int offset[4];
    {  // values: transposed probabilities by gradients
      Pairs<D> g[M];
      UNROLL
      for (int m = 0; m < M; ++m) {
        indices(offset, at.mine, 16 * m, call.row_pieces);
        g[m] = load_pairs<D>(base(head.grad), offset);
        to_column(weights, probs_on_cls[m], DV);
        add_sums<Half, D>(sums, g[m], weights);
      }
      Same<D> cls_grad = load_same<D>(warp::opaque(head.cls_grad));
      UNROLL
      for (int n = 0; n < M; ++n) {
        float y[D / 8][4] = {};
        UNROLL
        for (int m = 0; m < M; ++m) add_product<Half, D>(y, transpose(probs[m][n]), g[m]);
        add_product<Half, D>(y, {warp::transpose(cls_probs[n][0]), warp::transpose(cls_probs[n][1])}, cls_grad);
        store_tile(y, n, 2);
      }
    }

    const uint32_t broken = at.pads() ? broken_queries<Half, D>(base(head.q), at) : 0;
    {  // keys: transposed gradients of scores by queries
      Pairs<D> q[M];
      UNROLL
      for (int m = 0; m < M; ++m) {
        sources(offset, at.mine, 16 * m);
        q[m] = load_pairs<D>(base(head.q), offset);
        if (broken) keep(q[m], at.rows & ~broken, 16 * m);  // rows without a token read another's, a broken one's, too
        to_column(weights, ds_on_cls[m], DK);
        add_sums<Half, D>(sums, q[m], weights);
      }
      Same<D> cls_q = load_same<D>(warp::opaque(head.cls_q));
      UNROLL
      for (int n = 0; n < M; ++n) {
        float y[D / 8][4] = {};
        add_product<Half, D>(y, {warp::transpose(cls_ds[n][0]), warp::transpose(cls_ds[n][1])}, cls_q);
        UNROLL
        for (int i = 0; i < D / 2; ++i) y[i / 4][i % 4] *= inverse;  // here, as it may make weights too small for float16
        UNROLL
        for (int m = 0; m < M; ++m) add_product<Half, D>(y, transpose(ds[m][n]), q[m]);
        store_tile(y, n, 1);
      }
    }

    {  // queries: gradients of scores by keys
      Pairs<D> k[M];
      UNROLL
      for (int n = 0; n < M; ++n) {
        sources(offset, at.mine, 16 * n);
        k[n] = load_pairs<D>(base(head.k), offset);
        if (at.pads()) keep(k[n], at.keys, 16 * n);
        add_sums<Half, D>(sums, k[n], cls_ds[n]);
      }
      Same<D> cls_k = load_same<D>(warp::opaque(head.cls_k), context);
      UNROLL
      for (int m = 0; m < M; ++m) {
        float y[D / 8][4] = {};
        UNROLL
        for (int n = 0; n < M; ++n) add_product<Half, D>(y, ds[m][n], k[n]);
        bool first = lane_of_quad() == 0;  // a column of 8, as first_column
        add_product<Half, D>(y, {first ? ds_on_cls[m] & 0xFFFF : 0, first ? ds_on_cls[m] >> 16 : 0}, cls_k);
        if (broken) {
          UNROLL
          for (int i = 0; i < D / 2; ++i) y[i / 4][i % 4] = broken >> (16 * m + i % 4 / 2 * 8 + row_of_quad()) & 1 ? 0 : y[i / 4][i % 4];
        }
        store_tile(y, m, 0);
      }
    }
  }
  float* part = call.parts + int64_t{blockIdx.x} * (3 * D);
  float ds = sum_of_quads(ds_itself) * inverse, prob = sum_of_quads(from_itself) * inverse * keep_scale;
  auto columns = [](int first, int count) { return lane_of_quad() >= first / 2 && lane_of_quad() < (first + count) / 2; };
  store_part<Half, D>(part, sums, columns(DQ, MOST_PACKED), inverse, ds, load_same<D>(head.cls_k, context));
  store_part<Half, D>(part + D, sums, columns(DK, 2), 1, ds, load_same<D>(head.cls_q));
  store_part<Half, D>(part + 2 * D, sums, columns(DV, 2), keep_scale, prob, load_same<D>(head.cls_grad));
}

template <class Half, int D, int M>
__global__ void __launch_bounds__(warp::LANES, BACKWARD_WARPS<D, M>) backward_kernel(const Call call) {
  const Work work(call, blockIdx.x);
  if (M == 1 || work.length <= 16) return backward_lines<Half, D, 1>(call, work);
  backward_lines<Half, D, M>(call, work);
}

// --- [CLS] -------------------------------------------------------------------------------------------------------------

// [CLS]'s rows of out, [B, kinds, N, D], from the warps' parts [B, splits, N, kinds, D]; a thread adds two neighbours.
template <class Half>
__global__ void __launch_bounds__(ADDERS) add_parts(const Call call, int kinds, int width) {
  uint32_t i = blockIdx.x * ADDERS + threadIdx.x;
  int d = i % (width / 2) * 2, head = i / (width / 2) % call.heads, kind = i / (width / 2) / call.heads % kinds;
  int64_t clip = i / (width / 2) / call.heads / kinds;
  if (clip >= call.clips) return;
  const float* part = call.parts + ((clip * call.splits * call.heads + head) * kinds + kind) * width + d;
  float low = 0, high = 0;
  for (int split = 0; split < call.splits; ++split, part += int64_t{call.heads} * kinds * width) {
    low += warp::load_one(part);
    high += warp::load_one(part + 1);
  }
  int64_t row = (call.tokens() + clip) * kinds + kind;
  warp::store<1>(call.out + ((row * call.heads + head) * width + d) * 2, {{pack<Half>(low, high)}});
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
    kinds = forward ? 1 : 3;
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
  unsigned blocks_of_parts() const {
    int64_t threads = int64_t{call.clips} * kinds * call.heads * (width / 2);
    return static_cast<unsigned>((threads + ADDERS - 1) / ADDERS);
  }
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

// Packed rows: without `grad` the outputs [B·T·H·W + B, N, D], else the gradients [.., 3, N, D].
Tensor run(const Tensor* grad, Tensor qkv, Tensor cls_qkv, const std::vector<std::string>& axes,
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
  return out;
}

Tensor forward(Tensor qkv, Tensor cls_qkv, std::vector<std::string> axes, std::optional<Tensor> pad, double dropout_p,
               std::optional<Tensor> seed, bool cls_in_context) {
  return run(nullptr, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context);
}

Tensor backward(Tensor grad, Tensor qkv, Tensor cls_qkv, std::vector<std::string> axes, std::optional<Tensor> pad,
                double dropout_p, std::optional<Tensor> seed, bool cls_in_context) {
  STD_TORCH_CHECK(grad.is_contiguous(), "axial_attention_backward.cuda needs a contiguous gradient");
  grad = aligned(grad);
  return run(&grad, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context);
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
