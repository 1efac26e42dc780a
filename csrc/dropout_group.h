// The dropout mask of residual connections, by groups of elements; vimpac/ops/dropout_add.py has the definition.
#pragma once

#include "dropout_add_cpu.h"
#include "simd.h"

namespace vimpac {

constexpr int DROPOUT_COUNTERS = DROPOUT_GROUP / 4;
constexpr int DROPOUT_ROUNDS = 7;
constexpr uint32_t DROPOUT_PURPOSE = 2;

// Of a counter register c of a group: its words, each of WIDTH<uint32_t> neighbouring elements, 16 elements from word to word.
template <int LANES>
HOST_DEVICE auto dropout_group_words(int64_t group, int c, PhiloxKey seed) {
  using U = Vector<uint32_t, LANES>;
  const uint64_t first = static_cast<uint64_t>(group) * DROPOUT_COUNTERS;
  U lane;
  UNROLL
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  U low = lane + (static_cast<uint32_t>(first) + c), high = U{} + static_cast<uint32_t>(first >> 32);
  return philox<DROPOUT_ROUNDS>(low, high, U{}, U{} + DROPOUT_PURPOSE, seed);
}

// The words of a register, as dropout's factors: 0 or scale.
template <class A, int LANES>
HOST_DEVICE Vector<A, LANES> dropout_factors(Vector<uint32_t, LANES> words, uint32_t threshold, A scale) {
  using Word = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  auto word = __builtin_convertvector(words, Vector<Word, LANES>);
  return word >= Word{threshold} ? Vector<A, LANES>{} + scale : Vector<A, LANES>{};
}

}  // namespace vimpac
