// The ops vimpac::residual_norm.cpu and vimpac::residual_norm_backward.cpu; vimpac/ops/residual_norm.py has their schemas.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtypes.h"
#include "memory.h"
#include "residual_norm_cpu.h"
#include "results.h"

namespace vimpac::residual_norm {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 32;  // rows that are worth a thread

ScalarType arithmetic(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

const RowKernels& kernels_of(ScalarType x, ScalarType y) {
  const Kernels& kernels = residual_norm_kernels();
  if (x == ScalarType::Float && y == ScalarType::BFloat16) return kernels.of_mixed;
  STD_TORCH_CHECK(x == y, "residual_norm.cpu takes x and y of one dtype, or a float32 x and a bfloat16 y");
  return of_dtype(kernels, x, "residual_norm.cpu");
}

const void* vector_of(const Tensor& v, const Tensor& x) {
  STD_TORCH_CHECK(v.is_contiguous() && v.numel() == x.size(1) && v.scalar_type() == arithmetic(x.scalar_type()),
                  "residual_norm.cpu takes vectors as contiguous [C], float32 (of a float64 x: float64)");
  return v.const_data_ptr();
}

Call call_of(const Tensor& x, const Tensor& weight, const Tensor& norm_bias, double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.is_contiguous(), "residual_norm.cpu takes contiguous rows [R, C]");
  STD_TORCH_CHECK(p >= 0 && p < 1, "residual_norm.cpu takes p in [0, 1), got ", p);
  STD_TORCH_CHECK(p == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                  "residual_norm.cpu: dropout takes one int64 as seed");
  Call call{};
  call.rows = x.size(0), call.columns = x.size(1);
  call.weight = vector_of(weight, x), call.norm_bias = vector_of(norm_bias, x);
  call.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  call.scale = 4294967296.0 / (4294967296.0 - call.threshold);
  if (p > 0) call.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
  return call;
}

void check_like(const Tensor& one, const Tensor& x, ScalarType type, const char* name) {
  STD_TORCH_CHECK(one.dim() == 2 && one.size(0) == x.size(0) && one.size(1) == x.size(1) && one.is_contiguous() &&
                      one.scalar_type() == type,
                  "residual_norm.cpu takes ", name, " contiguous, of x's shape and dtype");
}

// Where the last rows are kept unrounded; sets how many.
const void* exact_of(Call& call, const std::optional<Tensor>& exact, const Tensor& x) {
  if (!exact) return nullptr;
  STD_TORCH_CHECK(exact->dim() == 2 && exact->size(0) <= call.rows && exact->size(1) == call.columns && exact->is_contiguous() &&
                      exact->scalar_type() == arithmetic(x.scalar_type()),
                  "residual_norm.cpu takes exact contiguous [B, C], B at most R, float32 (of a float64 x: float64)");
  call.exact_rows = exact->size(0);
  return exact->const_data_ptr();
}

template <class Work>
void in_parallel(const Call& call, const RowKernels& kernels, int64_t items, int64_t grain, const Work& work) {
  const size_t bytes = kernels.scratch(call);
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    Memory scratch(std::aligned_alloc(64, (bytes / 64 + 1) * 64), &std::free);  // an exception here would lose what it says
    if (!scratch) return failed.store(true);
    work(begin, end, scratch.get());
  });
  STD_TORCH_CHECK(!failed, "residual_norm.cpu: no memory for ", bytes, " bytes a thread");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const std::optional<Tensor>& bias,
                                                   const Tensor& weight, const Tensor& norm_bias, double p,
                                                   const std::optional<Tensor>& seed, double eps, bool writes_sum,
                                                   const std::optional<Tensor>& exact) {
  Call call = call_of(x, weight, norm_bias, p, seed);
  const RowKernels& kernels = kernels_of(x.scalar_type(), y.scalar_type());
  check_like(y, x, y.scalar_type(), "y");
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor sum = writes_sum ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  Tensor statistics = torch::stable::new_empty(x, {2, call.rows}, arithmetic(x.scalar_type()));
  call.x = x.const_data_ptr(), call.y = y.const_data_ptr();
  call.bias = bias ? vector_of(*bias, x) : nullptr;
  call.out = out.mutable_data_ptr(), call.sum = writes_sum ? sum.mutable_data_ptr() : nullptr;
  call.statistics = statistics.mutable_data_ptr();
  call.eps = eps;
  call.exact = exact_of(call, exact, x);
  Tensor out_exact = torch::stable::new_empty(x, {call.exact_rows, call.columns}, arithmetic(x.scalar_type()));
  call.out_exact = exact ? out_exact.mutable_data_ptr() : nullptr;
  call.streams = suits_streams(out);
  if (writes_sum) prefer_huge_pages(call.sum, sum.numel() * sum.element_size());
  in_parallel(call, kernels, call.rows, GRAIN,
              [&](int64_t begin, int64_t end, void* scratch) { kernels.forward(call, begin, end, scratch); });
  return {out, sum, statistics, out_exact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const std::optional<Tensor>& grad_sum,
                                                    const Tensor& kept, const Tensor& statistics, const Tensor& weight,
                                                    const Tensor& norm_bias, double p, const std::optional<Tensor>& seed,
                                                    bool from_sum, ScalarType dtype, const std::optional<Tensor>& grad_exact) {
  Call call = call_of(kept, weight, norm_bias, p, seed);
  const ScalarType type = kept.scalar_type(), sums = arithmetic(type);
  const RowKernels& kernels = kernels_of(type, dtype);
  check_like(grad, kept, type, "grad");
  if (grad_sum) check_like(*grad_sum, kept, type, "grad_sum");
  STD_TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == 2 * call.rows && statistics.scalar_type() == sums,
                  "residual_norm_backward.cpu takes statistics as forward returns them");
  const bool same = p == 0 && dtype == type && !grad_exact;
  Tensor of_x = torch::stable::new_empty(kept, kept.sizes());
  Tensor of_y = same ? torch::stable::new_empty(kept, {0}) : torch::stable::new_empty(kept, kept.sizes(), dtype);
  Tensor columns = torch::stable::new_empty(kept, {3, call.columns}, sums);
  Memory parts = allocate(call.chunks() * columns.numel() * columns.element_size());
  call.grad = grad.const_data_ptr(), call.grad_sum = grad_sum ? grad_sum->const_data_ptr() : nullptr;
  call.kept = kept.const_data_ptr(), call.statistics = const_cast<void*>(statistics.const_data_ptr());
  call.from_sum = from_sum;
  call.grad_exact = exact_of(call, grad_exact, kept);
  Tensor of_exact = torch::stable::new_empty(kept, {call.exact_rows, call.columns}, sums);
  call.of_exact = grad_exact ? of_exact.mutable_data_ptr() : nullptr;
  call.of_x = of_x.mutable_data_ptr(), call.of_y = same ? nullptr : of_y.mutable_data_ptr();
  call.parts = parts.get();
  call.streams = suits_streams(of_x);
  if (!same) call.streams = suits_streams(of_y) && call.streams;
  in_parallel(call, kernels, call.chunks(), 1,
              [&](int64_t begin, int64_t end, void* scratch) { kernels.backward(call, begin, end, scratch); });
  kernels.add_parts(call, columns.mutable_data_ptr());
  return {of_x, of_y, columns, of_exact};
}

}  // namespace

}  // namespace vimpac::residual_norm

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) {
  m.impl("residual_norm.cpu", TORCH_BOX(&vimpac::residual_norm::forward));
  m.impl("residual_norm_backward.cpu", TORCH_BOX(&vimpac::residual_norm::backward));
}
