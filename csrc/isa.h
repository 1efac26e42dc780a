// Which instruction set CPU kernels use: the widest that this processor has, or what VIMPAC_CPU_ISA names. Decided once.
#pragma once

namespace vimpac {

enum class Isa { portable, avx2, avx512 };

Isa isa();

// Of one set of kernels compiled for each, the one to use.
template <class Kernels>
const Kernels& pick(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
  switch (isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return portable;
  }
}

}  // namespace vimpac

// Declares `extern const KERNELS NAME` of every instruction set, and `const KERNELS& NAME()`, the one to use.
#ifdef VIMPAC_X86
#define VIMPAC_KERNELS(KERNELS, NAME)                            \
  namespace portable {                                           \
  extern const KERNELS NAME;                                     \
  }                                                              \
  namespace avx2 {                                               \
  extern const KERNELS NAME;                                     \
  }                                                              \
  namespace avx512 {                                             \
  extern const KERNELS NAME;                                     \
  }                                                              \
  inline const KERNELS& NAME() { return pick(portable::NAME, avx2::NAME, avx512::NAME); }
#else
#define VIMPAC_KERNELS(KERNELS, NAME) \
  namespace portable {                \
  extern const KERNELS NAME;          \
  }                                   \
  inline const KERNELS& NAME() { return portable::NAME; }
#endif
