// Philox4x32, the counter-based random numbers behind every mask (Salmon et al., SC 2011, figure 2).
//
// Generic in the type U of a word: uint32_t, or a vector of them, whose lanes are independent counters.
#pragma once

#include "host_device.h"

namespace vimpac {

// The 64-bit product of a word and a constant, as its two halves.
template <class U>
struct Product;

template <>
struct Product<uint32_t> {
  uint32_t high, low;
  HOST_DEVICE Product(uint32_t x, uint32_t multiplier) {
#ifdef __CUDA_ARCH__
    uint64_t product;  // the compiler's own product adds a zero to the high half
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(multiplier));
#else
    uint64_t product = uint64_t{x} * multiplier;
#endif
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

template <class U>
struct Words {
  U w[4];
};

struct PhiloxKey {
  uint32_t low, high;
  HOST_DEVICE explicit PhiloxKey(int64_t seed)
      : low(static_cast<uint32_t>(seed)), high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
};

template <int ROUNDS, class U>
HOST_DEVICE Words<U> philox(U c0, U c1, U c2, U c3, PhiloxKey key) {
  UNROLL
  for (int round = 0; round < ROUNDS; ++round) {
    Product<U> p0(c0, 0xD2511F53u), p1(c2, 0xCD9E8D57u);
    c0 = p1.high ^ c1 ^ key.low;
    c2 = p0.high ^ c3 ^ key.high;
    c1 = p1.low;
    c3 = p0.low;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform integer in [0, bound) from a uniform word.
template <class U>
HOST_DEVICE U below(U word, uint32_t bound) {
  return Product<U>(word, bound).high;
}

}  // namespace vimpac
