#include "isa.h"

#include <cstdlib>
#include <exception>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace vimpac {

namespace {

const char* const NAMES[] = {"portable", "avx2", "avx512"};

// Of those whose flags in setup.py let the compiler use no more than this processor has.
Isa widest() {
#ifdef VIMPAC_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa choose() {
  const char* named = std::getenv("VIMPAC_CPU_ISA");
  if (named == nullptr || *named == '\0') return widest();
  for (int i = 0; i < 3; ++i) {
    if (std::string(named) != NAMES[i]) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(widest()), "VIMPAC_CPU_ISA=", named, ", but this processor has ",
                    NAMES[static_cast<int>(widest())], " at most");
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "VIMPAC_CPU_ISA=", named, " is not one of portable, avx2, avx512");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace vimpac

extern "C" __attribute__((visibility("default"))) const char* vimpac_cpu_isa() {
  try {
    return vimpac::NAMES[static_cast<int>(vimpac::isa())];
  } catch (const std::exception& error) {  // a caller in C knows none: the sentence in place of the name
    static thread_local std::string sentence;
    return (sentence = error.what()).c_str();
  }
}
