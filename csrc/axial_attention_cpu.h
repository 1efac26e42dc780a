// What axial_attention.cpp (torch) and axial_attention_simd.cpp (arithmetic) say to each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "axial_attention.h"
#include "isa.h"

namespace vimpac::axial {

constexpr int LONGEST_LINE = 64;  // tokens
constexpr int FORWARD_KINDS = 1, BACKWARD_KINDS = 5;  // of parts
constexpr int MOST_GROUPS = 16;   // of heads: one an axis

// One call of the op, forward or backward. Strides count elements. Results are packed rows: tokens, then [CLS].
struct Call {
  const void* qkv;  // [B, T, H, W, 3, N, D]
  int64_t s_b, s_t, s_h, s_w, s_3, s_n;
  const void* cls;  // [B, 3, N, D]
  int64_t c_b, c_3, c_n;
  const void* grad;  // [B·T·H·W + B, N, D], contiguous; backward only
  const bool* pad;   // [B, T, H, W] or null
  int64_t p_b, p_t, p_h, p_w;
  void* out;  // [B·T·H·W + B, N, D], backward [.., 3, N, D]

  int64_t B;
  Grid grid;
  int N, D;
  int groups, axes[MOST_GROUPS];  // of heads: each attends along its axis
  bool cls_in_context;
  Dropout dropout;
  int64_t seed;

  // Work is split into items: some lines of one clip, for one group of heads. What an item adds to [CLS]'s rows it leaves in
  // parts [B, chunks, N, kinds, D] of the type that the kernel computes in, D filled up to whole registers; they are added up in
  // order. Backward has two kinds more: sums over the item's tokens of the gradients of queries and of values.
  void* parts;
  int chunks;  // of a clip, at most
  bool streams;  // results go past the caches: they are more than those hold, and every row's address suits

  HOST_DEVICE int heads() const { return N / groups; }
  HOST_DEVICE int lines_of_item(int axis) const { return grid.length(axis) < 64 ? 64 / grid.length(axis) : 1; }
  HOST_DEVICE int chunks_of(int axis) const { return (grid.lines(axis) + lines_of_item(axis) - 1) / lines_of_item(axis); }
  HOST_DEVICE int64_t items() const { return B * groups * chunks; }
};

struct LineKernels {
  size_t (*scratch)(const Call&);                           // bytes that a thread needs
  size_t (*parts)(const Call&, int kinds);                  // bytes of all parts
  void (*forward)(const Call&, int64_t item, void* scratch);
  void (*backward)(const Call&, int64_t item, void* scratch);
  void (*add_parts)(const Call&, int64_t clip, int kinds);  // parts of a clip → its [CLS] row of `out`
  void (*add_sums)(const Call&, int head, void* sums);      // parts → a head's sums over all rows, [3, N, D] of the parts' type
};

struct Kernels {
  LineKernels of_float, of_double, of_bfloat16;
};

VIMPAC_KERNELS(Kernels, axial_attention_kernels)

}  // namespace vimpac::axial
