// Matrices of 16-bit rows as operands of matrix instructions, read straight from global memory: nothing goes through shared
// memory. What a lane loads, 16 bytes at a time, is an operand already, whatever the strides of rows.
//
// Two forms of a matrix of rows make that work. Both may permute the width D of a row, since D is either summed over or permuted
// back where results are stored (warp.h has the operands' layout):
//
//   Rows    8 rows as an operand whose inner dimension is D: lane 4g + t holds dims 32c + 8t … 32c + 8t + 7 of row g
//   Pairs  16 rows as an operand whose inner dimension is the rows: pairs of rows 2t, 2t + 1 and 2t + 8, 2t + 9 at some dims,
//          chosen such that the lane of the results holds the dims that Rows has
#pragma once

#include <cstdint>

#include "warp.h"

namespace vimpac::tiles {

using warp::lane;
using warp::mma;
using warp::pack;
using warp::Piece;
using warp::shfl;
using warp::shfl_xor;

constexpr int BYTES = 16;  // of a piece, in which offsets are counted
constexpr int HALVES = 8;  // numbers in a piece

DEVICE int row_of_quad() { return lane() / 4; }   // g
DEVICE int lane_of_quad() { return lane() % 4; }  // t

// A row of a product's result is spread over a quad: lane t holds columns 8j + 2t and 8j + 2t + 1 at 2j and 2j + 1.
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

DEVICE float sum_of_quads(float x) {
  x += shfl_xor(x, 4);
  x += shfl_xor(x, 8);
  return x + shfl_xor(x, 16);
}

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

// The weights of rows g (low half) and g + 8 (high half) as weights for add_sums, in one column; what the others have stays.
DEVICE void to_column(uint32_t (&weights)[2], uint32_t packed, int column) {
  uint32_t even = shfl(packed, 8 * lane_of_quad()), odd = shfl(packed, 8 * lane_of_quad() + 4);
  bool mine = row_of_quad() == column;
  weights[0] = mine ? warp::lows(even, odd) : weights[0];
  weights[1] = mine ? warp::highs(even, odd) : weights[1];
}

template <class Half, int D>
DEVICE float dot(const Rows<D>& a, const Rows<D>& b) {  // of rows that are the same in all quads
  float y[1][4];
  times_rows<Half, D>(y, a, Rows<D>{}, {b});
  return y[0][0];
}

}  // namespace vimpac::tiles
