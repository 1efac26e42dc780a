// The ops vimpac::axial_attention.cpu and vimpac::axial_attention_backward.cpu; vimpac/ops/axial_attention.py has their schemas.

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "axial_attention_cpu.h"
#include "memory.h"

namespace vimpac::axial {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int axis_code(const std::string& axis) {
  STD_TORCH_CHECK(axis == "T" || axis == "H" || axis == "W", "axial_attention.cpu: axis ", axis, ", it takes T, H and W");
  return axis == "T" ? 0 : axis == "H" ? 1 : 2;
}

const LineKernels& kernels_for(ScalarType type) {
  const Kernels& kernels = axial_attention_kernels();
  switch (type) {
    case ScalarType::Float:
      return kernels.of_float;
    case ScalarType::Double:
      return kernels.of_double;
    case ScalarType::BFloat16:
      return kernels.of_bfloat16;
    default:
      STD_TORCH_CHECK(false, "axial_attention.cpu takes float32, float64 and bfloat16");
  }
}

Call call_of(const Tensor& qkv, const Tensor& cls, const std::vector<std::string>& axes, const std::optional<Tensor>& pad,
             double dropout_p, const std::optional<Tensor>& seed, bool cls_in_context) {
  Call call{};
  call.qkv = qkv.const_data_ptr();
  int64_t* strides[] = {&call.s_b, &call.s_t, &call.s_h, &call.s_w, &call.s_3, &call.s_n};
  for (int i = 0; i < 6; ++i) *strides[i] = qkv.stride(i);
  call.cls = cls.const_data_ptr();
  call.c_b = cls.stride(0), call.c_3 = cls.stride(1), call.c_n = cls.stride(2);
  if (pad) {
    call.pad = static_cast<const bool*>(pad->const_data_ptr());
    call.p_b = pad->stride(0), call.p_t = pad->stride(1), call.p_h = pad->stride(2), call.p_w = pad->stride(3);
  }
  call.B = qkv.size(0);
  call.grid = {static_cast<int>(qkv.size(1)), static_cast<int>(qkv.size(2)), static_cast<int>(qkv.size(3))};
  call.N = static_cast<int>(qkv.size(5)), call.D = static_cast<int>(qkv.size(6));
  call.groups = static_cast<int>(axes.size());
  STD_TORCH_CHECK(0 < call.groups && call.groups <= MOST_GROUPS, "axial_attention.cpu takes 1 to 16 axes");
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

// 22 MB and more: 8 clips of 5×16×16 and width 512; streamed, forward and backward took 19 ms instead of 23.
constexpr size_t PAST_CACHES = size_t{16} << 20;

void write_to(Call& call, const Tensor& out) {
  call.out = out.mutable_data_ptr();
  size_t bytes = out.numel() * out.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(call.out) % 64 == 0 && call.D * out.element_size() % 64 == 0;
  call.streams = bytes >= PAST_CACHES && aligned;
  prefer_huge_pages(call.out, bytes);
}

void run(Call& call, ScalarType type, bool backward) {
  const LineKernels& kernels = kernels_for(type);
  const int kinds = backward ? 3 : 1;
  Memory parts = allocate(kernels.parts(call, kinds));
  call.parts = parts.get();
  torch::stable::parallel_for(0, call.items(), 1, [&](int64_t begin, int64_t end) {
    size_t bytes = kernels.scratch(call);
    Memory scratch = allocate(bytes);
    std::fill_n(static_cast<char*>(scratch.get()), bytes, char{0});
    for (int64_t item = begin; item < end; ++item) {
      (backward ? kernels.backward : kernels.forward)(call, item, scratch.get());
    }
  });
  torch::stable::parallel_for(0, call.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t clip = begin; clip < end; ++clip) kernels.add_parts(call, clip, kinds);
  });
}

Tensor forward(const Tensor& qkv, const Tensor& cls, const std::vector<std::string>& axes, const std::optional<Tensor>& pad,
               double dropout_p, const std::optional<Tensor>& seed, bool cls_in_context) {
  Call call = call_of(qkv, cls, axes, pad, dropout_p, seed, cls_in_context);
  Tensor out = torch::stable::new_empty(qkv, {call.B * call.grid.tokens() + call.B, call.N, call.D});
  write_to(call, out);
  run(call, qkv.scalar_type(), false);
  return out;
}

Tensor backward(const Tensor& grad, const Tensor& qkv, const Tensor& cls, const std::vector<std::string>& axes,
                const std::optional<Tensor>& pad, double dropout_p, const std::optional<Tensor>& seed, bool cls_in_context) {
  Call call = call_of(qkv, cls, axes, pad, dropout_p, seed, cls_in_context);
  Tensor rows = torch::stable::contiguous(grad);
  call.grad = rows.const_data_ptr();
  Tensor out = torch::stable::new_empty(qkv, {call.B * call.grid.tokens() + call.B, 3, call.N, call.D});
  write_to(call, out);
  run(call, qkv.scalar_type(), true);
  return out;
}

}  // namespace

}  // namespace vimpac::axial

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) {
  m.impl("axial_attention.cpu", TORCH_BOX(&vimpac::axial::forward));
  m.impl("axial_attention_backward.cpu", TORCH_BOX(&vimpac::axial::backward));
}
