// The ops vimpac::axial_attention.cpu and vimpac::axial_attention_backward.cpu; vimpac/ops/axial_attention.py has their schemas.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "axial_attention_cpu.h"
#include "dtypes.h"
#include "memory.h"

namespace vimpac::axial {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MOST_TOKENS = int64_t{1} << 30;  // of a clip: they are counted in 32 bits

int axis_code(const std::string& axis) {
  STD_TORCH_CHECK(axis == "T" || axis == "H" || axis == "W", "axial_attention.cpu: axis ", axis, ", it takes T, H and W");
  return axis == "T" ? 0 : axis == "H" ? 1 : 2;
}

Call call_of(const Tensor& qkv, const Tensor& cls, const std::vector<std::string>& axes, const std::optional<Tensor>& pad,
             double dropout_p, const std::optional<Tensor>& seed, bool cls_in_context) {
  STD_TORCH_CHECK(qkv.dim() == 7 && qkv.size(4) == 3 && cls.dim() == 4 && cls.size(0) == qkv.size(0) && cls.size(1) == 3 &&
                      cls.size(2) == qkv.size(5) && cls.size(3) == qkv.size(6) && cls.scalar_type() == qkv.scalar_type() &&
                      (qkv.size(6) == 1 || (qkv.stride(6) == 1 && cls.stride(3) == 1)),
                  "axial_attention.cpu takes qkv [B, T, H, W, 3, N, D] and cls_qkv [B, 3, N, D] of one dtype, rows contiguous");
  STD_TORCH_CHECK(qkv.size(1) * qkv.size(2) * qkv.size(3) <= MOST_TOKENS, "axial_attention.cpu takes clips of up to 2^30 tokens");
  STD_TORCH_CHECK(dropout_p == 0 || seed, "axial_attention.cpu: dropout needs a seed");
  Call call{};
  call.qkv = qkv.const_data_ptr();
  int64_t* strides[] = {&call.s_b, &call.s_t, &call.s_h, &call.s_w, &call.s_3, &call.s_n};
  for (int i = 0; i < 6; ++i) *strides[i] = qkv.stride(i);
  call.cls = cls.const_data_ptr();
  call.c_b = cls.stride(0), call.c_3 = cls.stride(1), call.c_n = cls.stride(2);
  if (pad) {
    STD_TORCH_CHECK(pad->dim() == 4 && pad->scalar_type() == ScalarType::Bool && pad->size(0) == qkv.size(0) &&
                        pad->size(1) == qkv.size(1) && pad->size(2) == qkv.size(2) && pad->size(3) == qkv.size(3),
                    "axial_attention.cpu takes pad as bool [B, T, H, W]");
    call.pad = static_cast<const bool*>(pad->const_data_ptr());
    call.p_b = pad->stride(0), call.p_t = pad->stride(1), call.p_h = pad->stride(2), call.p_w = pad->stride(3);
  }
  call.B = qkv.size(0);
  call.grid = {static_cast<int>(qkv.size(1)), static_cast<int>(qkv.size(2)), static_cast<int>(qkv.size(3))};
  call.N = static_cast<int>(qkv.size(5)), call.D = static_cast<int>(qkv.size(6));
  call.groups = static_cast<int>(axes.size());
  STD_TORCH_CHECK(0 < call.groups && call.groups <= MOST_GROUPS, "axial_attention.cpu takes 1 to 16 axes");
  STD_TORCH_CHECK(call.N % call.groups == 0, "axial_attention.cpu: ", call.N, " heads cannot be split over ", call.groups, " axes");
  for (int i = 0; i < call.groups; ++i) {
    call.axes[i] = axis_code(axes[i]);
    STD_TORCH_CHECK(call.grid.length(call.axes[i]) <= LONGEST_LINE, "axial_attention.cpu takes lines of at most 64 tokens");
    call.chunks = std::max(call.chunks, call.chunks_of(call.axes[i]));
  }
  call.cls_in_context = cls_in_context;
  call.dropout = Dropout(dropout_p);
  if (seed) call.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
  return call;
}

void write_to(Call& call, const Tensor& out) {
  call.out = out.mutable_data_ptr();
  size_t bytes = out.numel() * out.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(call.out) % 64 == 0 && call.D * out.element_size() % 64 == 0;
  call.streams = bytes >= PAST_CACHES && aligned;  // 8 clips of 5×16×16, width 512: both passes took 19 ms instead of 23
  prefer_huge_pages(call.out, bytes);
}

// sums: where the sums over rows of the gradients go; backward only.
void run(Call& call, ScalarType type, void* sums) {
  const bool backward = sums != nullptr;
  const LineKernels& kernels = of_dtype(axial_attention_kernels(), type, "axial_attention.cpu");
  const int kinds = backward ? BACKWARD_KINDS : FORWARD_KINDS;
  Memory parts = allocate(kernels.parts(call, kinds));
  call.parts = parts.get();
  const size_t bytes = kernels.scratch(call);
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, call.items(), 1, [&](int64_t begin, int64_t end) {
    Memory scratch(std::calloc(bytes + 64, 1), &std::free);  // exceptions of this function would lose what they say
    if (!scratch) return failed.store(true);
    void* aligned = scratch.get();
    size_t room = bytes + 64;
    std::align(64, bytes, aligned, room);
    for (int64_t item = begin; item < end; ++item) {
      (backward ? kernels.backward : kernels.forward)(call, item, aligned);
    }
  });
  STD_TORCH_CHECK(!failed, "axial_attention.cpu: no memory for ", bytes, " bytes a thread");
  torch::stable::parallel_for(0, call.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t clip = begin; clip < end; ++clip) kernels.add_parts(call, clip, kinds);
  });
  if (!sums) return;
  torch::stable::parallel_for(0, call.N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) kernels.add_sums(call, static_cast<int>(head), sums);
  });
}

Tensor forward(const Tensor& qkv, const Tensor& cls, const std::vector<std::string>& axes, const std::optional<Tensor>& pad,
               double dropout_p, const std::optional<Tensor>& seed, bool cls_in_context) {
  Call call = call_of(qkv, cls, axes, pad, dropout_p, seed, cls_in_context);
  Tensor out = torch::stable::new_empty(qkv, {call.B * call.grid.tokens() + call.B, call.N, call.D});
  write_to(call, out);
  run(call, qkv.scalar_type(), nullptr);
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& qkv, const Tensor& cls,
                                    const std::vector<std::string>& axes, const std::optional<Tensor>& pad, double dropout_p,
                                    const std::optional<Tensor>& seed, bool cls_in_context) {
  Call call = call_of(qkv, cls, axes, pad, dropout_p, seed, cls_in_context);
  const int64_t rows = call.B * call.grid.tokens() + call.B;
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == rows * call.N * call.D && grad.scalar_type() == qkv.scalar_type(),
                  "axial_attention_backward.cpu takes grad as contiguous rows [B·T·H·W + B, N, D] of qkv's dtype");
  call.grad = grad.const_data_ptr();
  Tensor out = torch::stable::new_empty(qkv, {rows, 3, call.N, call.D});
  const ScalarType type = qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor sums = torch::stable::new_empty(qkv, {3, call.N, call.D}, type);
  write_to(call, out);
  run(call, qkv.scalar_type(), sums.mutable_data_ptr());
  return {out, sums};
}

}  // namespace

}  // namespace vimpac::axial

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) {
  m.impl("axial_attention.cpu", TORCH_BOX(&vimpac::axial::forward));
  m.impl("axial_attention_backward.cpu", TORCH_BOX(&vimpac::axial::backward));
}
