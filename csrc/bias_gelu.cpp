// The ops vimpac::bias_gelu.cpu and vimpac::bias_gelu_backward.cpu; vimpac/ops/bias_gelu.py has their schemas.

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bias_gelu_cpu.h"
#include "dtypes.h"
#include "memory.h"
#include "results.h"

namespace vimpac::bias_gelu {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 8;  // rows that are worth a thread

Call call_of(const Tensor& h, const Tensor& bias) {
  const ScalarType sums = h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), "bias_gelu.cpu takes contiguous rows [R, F]");
  STD_TORCH_CHECK(bias.is_contiguous() && bias.numel() == h.size(1) && bias.scalar_type() == sums,
                  "bias_gelu.cpu takes bias as contiguous [F], float32 (of a float64 h: float64)");
  Call call{};
  call.rows = h.size(0), call.columns = h.size(1);
  call.h = h.const_data_ptr(), call.bias = bias.const_data_ptr();
  return call;
}

Tensor forward(const Tensor& h, const Tensor& bias) {
  Call call = call_of(h, bias);
  const RowKernels& kernels = of_dtype(bias_gelu_kernels(), h.scalar_type(), "bias_gelu.cpu");
  Tensor out = torch::stable::new_empty(h, h.sizes());
  call.out = out.mutable_data_ptr();
  call.streams = suits_streams(out);
  torch::stable::parallel_for(0, call.rows, GRAIN, [&](int64_t begin, int64_t end) { kernels.forward(call, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& h, const Tensor& bias, bool with_output) {
  Call call = call_of(h, bias);
  const RowKernels& kernels = of_dtype(bias_gelu_kernels(), h.scalar_type(), "bias_gelu.cpu");
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == h.numel() && grad.scalar_type() == h.scalar_type(),
                  "bias_gelu_backward.cpu takes grad contiguous, of h's shape and dtype");
  Tensor of_h = torch::stable::new_empty(h, h.sizes());
  Tensor out = with_output ? torch::stable::new_empty(h, h.sizes()) : torch::stable::new_empty(h, {0});
  Tensor of_bias = torch::stable::new_empty(bias, bias.sizes());
  Memory parts = allocate(call.chunks() * of_bias.numel() * of_bias.element_size());
  call.grad = grad.const_data_ptr();
  call.of_h = of_h.mutable_data_ptr(), call.out = with_output ? out.mutable_data_ptr() : nullptr;
  call.parts = parts.get();
  call.streams = suits_streams(of_h);
  if (with_output) call.streams = suits_streams(out) && call.streams;
  torch::stable::parallel_for(0, call.chunks(), 1, [&](int64_t begin, int64_t end) { kernels.backward(call, begin, end); });
  kernels.add_parts(call, of_bias.mutable_data_ptr());
  return {of_h, out, of_bias};
}

}  // namespace

}  // namespace vimpac::bias_gelu

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) {
  m.impl("bias_gelu.cpu", TORCH_BOX(&vimpac::bias_gelu::forward));
  m.impl("bias_gelu_backward.cpu", TORCH_BOX(&vimpac::bias_gelu::backward));
}
