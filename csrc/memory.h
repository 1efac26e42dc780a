// Memory of CPU ops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/headeronly/util/Exception.h>

namespace vimpac {

using Memory = std::unique_ptr<void, decltype(&std::free)>;

inline Memory allocate(size_t bytes) {
  Memory memory(std::aligned_alloc(64, (bytes / 64 + 1) * 64), &std::free);
  STD_TORCH_CHECK(memory, "no memory for ", bytes, " bytes");
  return memory;
}

// Results of this size and more are written past the caches, which would not hold them until they are read.
constexpr size_t PAST_CACHES = size_t{16} << 20;

// Of a large result that was just allocated: its first touch in pages of 4 KB would cost as much as computing it (63 MB: 14 ms of
// 33 on 2 cores). Only an advice, so failure does not matter.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t{2} << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vimpac
