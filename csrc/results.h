// Results of CPU ops that are rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "memory.h"

namespace vimpac {

// Whether a large result's rows [R, C], just allocated, may be written past the caches.
inline bool suits_streams(const torch::stable::Tensor& out) {
  const size_t bytes = out.numel() * out.element_size();
  prefer_huge_pages(out.mutable_data_ptr(), bytes);
  return bytes >= PAST_CACHES && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0 &&
         out.size(1) * out.element_size() % 64 == 0;
}

}  // namespace vimpac
