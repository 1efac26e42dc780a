// What kernels do as a warp: exchanges between lanes, matrix products, and loads and stores of up to 16 bytes a lane.
//
// On a GPU these are its instructions. Compiled for a host they call tests/emulator/warp_emulator.h, which runs a kernel's
// threads as fibers and checks every access.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_device.h"

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#include "warp_emulator.h"
#define DEVICE inline
#endif

namespace vimpac::warp {

constexpr int LANES = 32;
constexpr unsigned ALL = 0xFFFFFFFFu;

DEVICE int lane() { return threadIdx.x % LANES; }

// --- exchanges ---------------------------------------------------------------------------------------------------------

template <class T>
DEVICE T shfl(T value, int from) {
#ifdef __CUDACC__
  return __shfl_sync(ALL, value, from);
#else
  return emulator::shuffle(value, from);
#endif
}

template <class T>
DEVICE T shfl_xor(T value, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(ALL, value, mask);
#else
  return emulator::shuffle(value, lane() ^ mask);
#endif
}

DEVICE uint32_t ballot(bool value) {
#ifdef __CUDACC__
  return __ballot_sync(ALL, value);
#else
  return emulator::ballot(value);
#endif
}

// --- 16-bit numbers, two in a word -------------------------------------------------------------------------------------

// Each says how PTX calls it, and how a host reads and rounds it.
struct BFloat16 {
  static constexpr bool IS_BFLOAT = true;
#ifndef __CUDACC__
  static float to_float(uint16_t bits) {
    uint32_t word = uint32_t{bits} << 16;
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
  }
  static uint16_t round(float value) {
    uint32_t word;
    __builtin_memcpy(&word, &value, 4);
    if (value != value) return 0x7FFF;
    return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
#endif
};

struct Float16 {
  static constexpr bool IS_BFLOAT = false;
#ifndef __CUDACC__
  static float to_float(uint16_t bits) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  static uint16_t round(float value) {
    _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
  }
#endif
};

// The sign's bit in each half of a word that is NaN or infinite: an exponent of ones carries into it.
template <class Half>
DEVICE uint32_t not_finite(uint32_t word) {
  constexpr uint32_t EXPONENT = Half::IS_BFLOAT ? 0x7F807F80 : 0x7C007C00, LOWEST = Half::IS_BFLOAT ? 0x00800080 : 0x04000400;
  return ((word & EXPONENT) + LOWEST) & 0x80008000;
}

template <class Half>
DEVICE uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  if constexpr (Half::IS_BFLOAT) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return Half::round(low) | uint32_t{Half::round(high)} << 16;
#endif
}

template <class Half>
DEVICE float low_float(uint32_t word) {
#ifdef __CUDACC__
  if constexpr (Half::IS_BFLOAT) {
    return __uint_as_float(word << 16);
  } else {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(word));
    return value;
  }
#else
  return Half::to_float(static_cast<uint16_t>(word));
#endif
}

DEVICE uint32_t lows(uint32_t a, uint32_t b) {  // their low halves, a's first
#ifdef __CUDACC__
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xFFFF) | b << 16;
#endif
}

DEVICE uint32_t highs(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xFFFF0000);
#endif
}

// 2^x, wrong in the last bits; 0 for what would be no normal number.
DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

DEVICE float inverse_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// --- matrices on tensor cores, lane 4g + t -----------------------------------------------------------------------------
//
// c[0, 1] are elements (row g, columns 2t and 2t + 1) of a 16×8 matrix, c[2, 3] those of row g + 8. An operand's word holds two
// neighbours of the inner dimension k: a[0] those at 2t of row g, a[1] of row g + 8, b[0] those at 2t of column g; a[2], a[3]
// and b[1] are the same eight further on. So two packed neighbours of a product's result are a word of the next one's operand.
// Volatile, as all lanes have to be there: the compiler may not move one of these into a branch.

template <class Half>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  // c += a b, inner dimension 16
#ifdef __CUDACC__
#define VIMPAC_MMA(KIND)                                                                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
      "{%8, %9}, {%0, %1, %2, %3};"                                                                               \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (Half::IS_BFLOAT) {
    VIMPAC_MMA("bf16");
  } else {
    VIMPAC_MMA("f16");
  }
#undef VIMPAC_MMA
#else
  emulator::matrix_product<2, Half::to_float>(c, a, b);
#endif
}

template <class Half>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {  // inner dimension 8
#ifdef __CUDACC__
#define VIMPAC_MMA(KIND)                                                                                       \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, " \
      "{%0, %1, %2, %3};"                                                                                      \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(b[0]))
  if constexpr (Half::IS_BFLOAT) {
    VIMPAC_MMA("bf16");
  } else {
    VIMPAC_MMA("f16");
  }
#undef VIMPAC_MMA
#else
  emulator::matrix_product<1, Half::to_float>(c, a, b);
#endif
}

// An 8×8 matrix of 16-bit numbers, two of row g a lane, transposed.
DEVICE uint32_t transpose(uint32_t word) {
#ifdef __CUDACC__
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
#else
  return emulator::movmatrix(word);
#endif
}

// --- memory ------------------------------------------------------------------------------------------------------------

template <int WORDS>
struct alignas(4 * WORDS) Piece {
  uint32_t w[WORDS];
};

// From memory that the kernel does not write. Volatile: what a loop loads again stays in the L1 cache, not in registers.
template <int WORDS>
DEVICE Piece<WORDS> load(const void* from) {
  static_assert(WORDS == 2 || WORDS == 4);
#ifdef __CUDACC__
  Piece<WORDS> x;
  if constexpr (WORDS == 4) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
                 : "l"(from));
  } else {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "l"(from));
  }
  return x;
#else
  return emulator::load(static_cast<const Piece<WORDS>*>(from));
#endif
}

// The same address, of which the compiler no longer knows where it came from. Before a loop this keeps it from adding up the
// address's terms anew for every access; inside, from keeping what it adds to the address in registers.
DEVICE const char* opaque(const char* address) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(address));
#endif
  return address;
}

template <int WORDS>
DEVICE void store(void* to, Piece<WORDS> x) {
  static_assert(WORDS == 1 || WORDS == 4);
#ifdef __CUDACC__
  if constexpr (WORDS == 4) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
                 : "memory");
  } else {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(x.w[0]) : "memory");
  }
#else
  emulator::store(static_cast<Piece<WORDS>*>(to), x);
#endif
}

// One number of global memory, read or written as such.
template <class T>
DEVICE T load_one(const T* from) {
#ifdef __CUDACC__
  return *from;
#else
  return emulator::load(from);
#endif
}

template <class T>
DEVICE void store_one(T* to, T value) {
#ifdef __CUDACC__
  *to = value;
#else
  emulator::store(to, value);
#endif
}

template <class T>
DEVICE T atomic_add(T* to, T value) {
#ifdef __CUDACC__
  return atomicAdd(to, value);
#else
  return emulator::atomic_add(to, value);
#endif
}

}  // namespace vimpac::warp
