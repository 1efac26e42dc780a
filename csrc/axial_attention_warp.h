// Axial attention's tiles on a GPU: which lines a warp walks over, a tile's tokens, its rows of probabilities and their dropout.
#pragma once

#include <cmath>
#include <cstdint>

#include "axial_attention.h"
#include "philox.h"
#include "tiles.h"
#include "warp.h"

namespace vimpac::axial {

using namespace tiles;

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

constexpr int LONGEST_PACKED = 7;  // tokens of lines that share a tile
constexpr int MOST_PACKED = 4;     // lines of a tile

// The arguments of a launch. Strides are counted in pieces of 16 bytes.
struct Call {
  const char *grad, *qkv, *cls_qkv;  // grad: packed rows [B·T·H·W + B, N, D]
  const uint8_t* pad;                // [B, T, H, W] or null
  const int64_t* seed;
  char* out;                         // packed rows [B·T·H·W + B, N, D], backward [.., 3, N, D]
  float* parts;                      // [B, splits, N, kinds, D]: of [CLS]'s output; of its gradients and two sums over tokens
  float *clip_sums, *sums;           // backward: sums over rows of gradients, [B, 3, N, D] and [3, N, D]
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

// --- lines of a warp ---------------------------------------------------------------------------------------------------

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

// --- a tile's tokens ---------------------------------------------------------------------------------------------------

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

// Rows of the tile whose query is at PAD and not finite. Reads them once more: no registers are left to keep them.
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

// --- rows of probabilities ---------------------------------------------------------------------------------------------

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

// Which of the 8 columns of collected sums a lane adds: columns first … first + count - 1.
struct Columns {
  bool even, odd;
  DEVICE Columns(int first, int count)
      : even(first <= 2 * lane_of_quad() && 2 * lane_of_quad() < first + count),
        odd(first <= 2 * lane_of_quad() + 1 && 2 * lane_of_quad() + 1 < first + count) {}
};

// A warp's part of a sum for [CLS] or over tokens: the sums collected over lines in some columns, and weight · row.
template <class Half, int D>
DEVICE void store_part(float* part, const float (&sums)[D / 16][4], Columns mine, float factor, float weight,
                       const Same<D>& row) {
  constexpr int DIMS = 2 * GROUP_WORDS<D>;
  UNROLL
  for (int i = 0; i < D / 16; i += 2) {
    Piece<4> x;
    UNROLL
    for (int k = 0; k < 4; ++k) {
      const float(&pair)[4] = sums[i + k / 2];
      float sum = (mine.even ? pair[k % 2 * 2] : 0.0f) + (mine.odd ? pair[k % 2 * 2 + 1] : 0.0f);
      float y = Quad::sum(sum) * factor + weight * warp::low_float<Half>(row.w[2 * i + k][0]);
      __builtin_memcpy(&x.w[k], &y, 4);
    }
    int dim = GROUP<D> * (2 * i / DIMS) + first_dim<D>() + 2 * i % DIMS;
    if (lane_of_quad() == 0) warp::store<4>(part + dim, x);
  }
}

}  // namespace vimpac::axial
