// The ops vimpac::dropout_add.cpu and vimpac::dropout_add_backward.cpu; vimpac/ops/dropout_add.py has their schemas.

#include <algorithm>
#include <cmath>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dropout_add_cpu.h"
#include "dtypes.h"
#include "memory.h"

namespace vimpac::dropout_add {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 512;  // groups that are worth a thread

// From y, or without a sum the upstream gradient, to a result of a dtype.
Kernels::Run kernel_of(ScalarType from, ScalarType to, bool adds) {
  const Kernels& kernels = dropout_add_kernels();
  if (from == ScalarType::BFloat16 && to == ScalarType::Float) return kernels.widening;
  if (from == ScalarType::Float && to == ScalarType::BFloat16 && !adds) return kernels.narrowing;
  STD_TORCH_CHECK(from == to, "dropout_add.cpu takes x and y of one dtype, or a float32 x and a bfloat16 y");
  return of_dtype(kernels, from, "dropout_add.cpu");
}

Tensor run(const Tensor* x, const Tensor& y, double p, const Tensor& seed, ScalarType dtype) {
  const Kernels::Run kernel = kernel_of(y.scalar_type(), dtype, x != nullptr);
  STD_TORCH_CHECK(y.is_contiguous() && (!x || x->is_contiguous()), "dropout_add.cpu takes contiguous tensors");
  STD_TORCH_CHECK(!x || x->numel() == y.numel(), "dropout_add.cpu takes x and y of one shape");
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_add.cpu takes p in [0, 1), got ", p);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "dropout_add.cpu takes one int64 as seed");
  Tensor out = torch::stable::new_empty(y, y.sizes(), dtype);
  Call call{};
  call.x = x ? x->const_data_ptr() : nullptr;
  call.y = y.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.elements = y.numel();
  call.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  call.scale = 4294967296.0 / (4294967296.0 - call.threshold);
  call.seed = *static_cast<const int64_t*>(seed.const_data_ptr());
  const size_t bytes = call.elements * out.element_size();
  call.streams = bytes >= PAST_CACHES && reinterpret_cast<uintptr_t>(call.out) % 64 == 0;  // 21 MB: 1.8 ms instead of 2.1
  prefer_huge_pages(call.out, bytes);
  torch::stable::parallel_for(0, (call.elements + DROPOUT_GROUP - 1) / DROPOUT_GROUP, GRAIN,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return out;
}

Tensor forward(const Tensor& x, const Tensor& y, double p, const Tensor& seed) {
  return run(&x, y, p, seed, x.scalar_type());
}

Tensor backward(const Tensor& grad, double p, const Tensor& seed, ScalarType dtype) {
  return run(nullptr, grad, p, seed, dtype);
}

}  // namespace

}  // namespace vimpac::dropout_add

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) {
  m.impl("dropout_add.cpu", TORCH_BOX(&vimpac::dropout_add::forward));
  m.impl("dropout_add_backward.cpu", TORCH_BOX(&vimpac::dropout_add::backward));
}
