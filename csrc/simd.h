// Vectors for CPU kernels. A kernel is written once, over the compiler's own vector types, and compiled once for each instruction
// set (setup.py sets VIMPAC_ISA and the compiler's flags); isa.h chooses among them at run time.
//
// What is compiled for an instruction set must not be linked in place of the same function compiled for another one. So such
// files call nothing of the standard library but what is inlined, and all their functions are static or always inlined.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "host_device.h"
#include "philox.h"

namespace vimpac {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};

template <class T, int LANES>
using Vector = typename VectorOf<T, LANES>::type;

template <class T>
constexpr int WIDTH = VECTOR_BYTES / static_cast<int>(sizeof(T));  // lanes that a register holds

struct BFloat16 {
  uint16_t bits;
};

// What a kernel computes in.
template <class T>
struct Arithmetic {
  using type = T;
};
template <>
struct Arithmetic<BFloat16> {
  using type = float;
};

// --- loads and stores, at any alignment --------------------------------------------------------------------------------

template <class V, class T>
HOST_DEVICE V raw_load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
HOST_DEVICE void raw_store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <int LANES>
HOST_DEVICE Vector<float, LANES> load(const float* from) {
  return raw_load<Vector<float, LANES>>(from);
}

template <int LANES>
HOST_DEVICE Vector<double, LANES> load(const double* from) {
  return raw_load<Vector<double, LANES>>(from);
}

template <int LANES>
HOST_DEVICE Vector<float, LANES> load(const BFloat16* from) {
  auto bits = __builtin_convertvector(raw_load<Vector<uint16_t, LANES>>(from), Vector<uint32_t, LANES>) << 16;
  return (Vector<float, LANES>)bits;
}

template <int LANES>
HOST_DEVICE void store(float* to, Vector<float, LANES> v) {
  raw_store(to, v);
}

template <int LANES>
HOST_DEVICE void store(double* to, Vector<double, LANES> v) {
  raw_store(to, v);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <int LANES>
HOST_DEVICE void store(BFloat16* to, Vector<float, LANES> v) {
  auto bits = (Vector<uint32_t, LANES>)v;
  auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  auto nan = (Vector<uint32_t, LANES>)(v != v);
  rounded = (nan & 0x7FC0u) | (~nan & rounded);
  raw_store(to, __builtin_convertvector(rounded, Vector<uint16_t, LANES>));
}

// Past the caches, to an address that is a multiple of the register's size: memory need not be read before it is overwritten.
template <int LANES, class T>
HOST_DEVICE void stream(T* to, Vector<T, LANES> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vector<T, LANES>*>(to));
#elif defined(__AVX512F__)
  using D = Vector<double, 8>;
  static_assert(sizeof(v) == sizeof(D));
  __builtin_ia32_movntpd512(reinterpret_cast<double*>(to), (D)v);
#elif defined(__AVX2__)
  using D = Vector<double, 4>;
  static_assert(sizeof(v) == sizeof(D));
  __builtin_ia32_movntpd256(reinterpret_cast<double*>(to), (D)v);
#else
  store<LANES>(to, v);
#endif
}

// Streamed stores are seen by other threads before what comes after this.
HOST_DEVICE void finish_streams() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}

HOST_DEVICE float to_arithmetic(float x) { return x; }
HOST_DEVICE double to_arithmetic(double x) { return x; }
HOST_DEVICE float to_arithmetic(BFloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

HOST_DEVICE void from_arithmetic(float& to, float x) { to = x; }
HOST_DEVICE void from_arithmetic(double& to, double x) { to = x; }
HOST_DEVICE void from_arithmetic(BFloat16& to, float x) { store<1>(&to, Vector<float, 1>{x}); }

// --- lanes -------------------------------------------------------------------------------------------------------------

// Lanes of a and b, numbered through; four of them.
template <int I0, int I1, int I2, int I3, class T>
HOST_DEVICE Vector<T, 4> lanes(Vector<T, 4> a, Vector<T, 4> b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I0, I1, I2, I3);
#else
  using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vector<I, 4>{I0, I1, I2, I3});
#endif
}

template <class T>
HOST_DEVICE void transpose(Vector<T, 4> (&x)[4]) {
  auto low0 = lanes<0, 4, 1, 5, T>(x[0], x[1]), high0 = lanes<2, 6, 3, 7, T>(x[0], x[1]);
  auto low1 = lanes<0, 4, 1, 5, T>(x[2], x[3]), high1 = lanes<2, 6, 3, 7, T>(x[2], x[3]);
  x[0] = lanes<0, 1, 4, 5, T>(low0, low1);
  x[1] = lanes<2, 3, 6, 7, T>(low0, low1);
  x[2] = lanes<0, 1, 4, 5, T>(high0, high1);
  x[3] = lanes<2, 3, 6, 7, T>(high0, high1);
}

// --- arithmetic --------------------------------------------------------------------------------------------------------

template <class V>
using Element = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;

template <class V>
constexpr int LANES_OF = sizeof(V) / sizeof(Element<V>);

// What combines the lanes of a register into one number.
struct Lanes {
  template <class V>
  static HOST_DEVICE Element<V> sum(V v) {
    if constexpr (LANES_OF<V> == 1) {
      return v[0];
    } else {
      Vector<Element<V>, LANES_OF<V> / 2> half[2];
      __builtin_memcpy(half, &v, sizeof(V));
      return sum(half[0] + half[1]);
    }
  }

  template <class V>
  static HOST_DEVICE Element<V> max(V v) {
    if constexpr (LANES_OF<V> == 1) {
      return v[0];
    } else {
      Vector<Element<V>, LANES_OF<V> / 2> half[2];
      __builtin_memcpy(half, &v, sizeof(V));
      return max(half[0] > half[1] ? half[0] : half[1]);
    }
  }
};

// Coefficients of 2^f = Σ (f ln 2)^k / k!.
template <class T, int DEGREE>
struct ExponentialSeries {
  T c[DEGREE + 1];
  constexpr ExponentialSeries() : c{} {
    double term = 1;
    for (int k = 0; k <= DEGREE; ++k) {
      c[k] = static_cast<T>(term);
      term *= 0.69314718055994530942 / (k + 1);
    }
  }
};

// 2^x = 2^n 2^f with n the nearest integer and |f| <= 1/2, where the series is as exact as the type. What lies below the smallest
// normal number is 0, NaN stays NaN, and x is at most what the type's exponent holds.
template <class V>
HOST_DEVICE V exp2_series(V x) {
  using T = Element<V>;
  constexpr bool SINGLE = sizeof(T) == 4;
  using U = Vector<std::conditional_t<SINGLE, uint32_t, uint64_t>, LANES_OF<V>>;
  constexpr int DEGREE = SINGLE ? 7 : 13;
  constexpr T LEAST = SINGLE ? -126 : -1022;
  constexpr T ROUND = SINGLE ? T(12582912) : T(6755399441055744);  // 1.5 · 2^mantissa: added, it leaves an integer
  constexpr ExponentialSeries<T, DEGREE> SERIES;
  V inside = x > LEAST ? x : LEAST + V{};
  V shifted = inside + ROUND;
  V f = inside - (shifted - ROUND);
  V power = SERIES.c[DEGREE] + V{};
  UNROLL
  for (int k = DEGREE - 1; k >= 0; --k) power = power * f + SERIES.c[k];
  U exponent = (U)shifted << (SINGLE ? 23 : 52);  // the integer is in the low bits
  V result = (V)((U)power + exponent);
  return x < LEAST ? V{} : x == x ? result : x;
}

// The low halves of 64-bit lanes times a constant. GCC does not see that high halves are zero and would multiply in full. NEON
// has no product of 64-bit lanes: GCC and clang would multiply lane by lane.
template <class W>
HOST_DEVICE W multiply_low_halves(W x, uint32_t multiplier) {
  [[maybe_unused]] W y = W{} + multiplier;
#if defined(__ARM_NEON)
  return (W)vmull_n_u32(vmovn_u64((uint64x2_t)x), multiplier);
#elif defined(__clang__) || !defined(__SSE2__)
  return (x & 0xFFFFFFFFu) * y;
#elif defined(__AVX512F__)
  return (W)__builtin_ia32_pmuludq512_mask((Vector<int, 16>)x, (Vector<int, 16>)y, Vector<long long, 8>{}, 0xFF);
#elif defined(__AVX2__)
  return (W)__builtin_ia32_pmuludq256((Vector<int, 8>)x, (Vector<int, 8>)y);
#else
  return (W)__builtin_ia32_pmuludq128((Vector<int, 4>)x, (Vector<int, 4>)y);
#endif
}

template <class V>
struct Product {  // philox.h's, for a register of words
  V high, low;
  HOST_DEVICE Product(V x, uint32_t multiplier) {
    static_assert(sizeof(V) == VECTOR_BYTES);
    constexpr uint64_t HIGH = ~uint64_t{0} << 32;
    auto pairs = (Vector<uint64_t, LANES_OF<V> / 2>)x;
    auto even = multiply_low_halves(pairs, multiplier), odd = multiply_low_halves(pairs >> 32, multiplier);
    high = (V)((even >> 32) | (odd & HIGH));  // lanes lie in memory the low one first, as on all that vectors are compiled for
    low = (V)((even & ~HIGH) | (odd << 32));
  }
};

}  // namespace vimpac
