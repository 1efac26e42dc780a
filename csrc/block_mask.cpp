// The op vimpac::block_mask.cpu; vimpac/ops/block_mask.py has the definition and the schema.
//
// Clips are drawn in parallel, each with its count; a running sum of the counts then says where each clip's indices start, and
// they are packed in parallel.

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "block_mask.h"
#include "memory.h"

namespace vimpac::masking {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 16384;  // tokens that are worth a thread

struct Options {
  Grid grid;
  int64_t n_blocks;
  std::optional<uint64_t> iid;  // threshold of a token's own word; none: blocks
  bool noisy;
  int64_t vocab_size;
};

void draw_mask(const Options& options, Stream stream, bool* mask) {
  const int size = options.grid.tokens();
  if (!options.iid) return mask_blocks(options.grid, stream, options.n_blocks, mask, [](int64_t, const Block&) {});
  for (int i = 0; i < size; i += 4) {
    Words<uint32_t> words = stream.words(static_cast<uint32_t>(i / 4), IID);
    for (int k = 0; k < std::min(4, size - i); ++k) mask[i + k] = words.w[k] < *options.iid;
  }
}

// A row of W tokens: takes PAD out of the mask, writes MASK, returns how many are masked.
template <class Token>
int mask_row(const Token* tokens, int64_t stride, Token pad_id, Token mask_id, Token* out, bool* mask, int W) {
  int count = 0;
  for (int w = 0; w < W; ++w) {
    Token id = tokens[w * stride];
    bool masked = mask[w] & (id != pad_id);
    mask[w] = masked;
    out[w] = masked ? mask_id : id;
    count += masked;
  }
  return count;
}

// One clip, out and mask its own [T, H, W]. Returns how many tokens are masked.
template <class Token>
int64_t mask_clip(const Options& options, Stream stream, const Token* tokens, const int64_t* strides, Token* out, bool* mask) {
  const auto [T, H, W] = options.grid.size;
  const auto pad_id = static_cast<Token>(options.vocab_size + PAD_OFFSET);
  const auto mask_id = static_cast<Token>(options.vocab_size + MASK_OFFSET);
  draw_mask(options, stream, mask);
  int64_t total = 0;
  for (int row = 0; row < T * H; ++row) {
    const Token* from = tokens + row / H * strides[1] + row % H * strides[2];
    const int64_t i = int64_t{row} * W;
    const int count = strides[3] == 1 ? mask_row(from, 1, pad_id, mask_id, out + i, mask + i, W)  // a loop of its own: vectors
                                      : mask_row(from, strides[3], pad_id, mask_id, out + i, mask + i, W);
    for (int w = 0; options.noisy && count > 0 && w < W; ++w) {
      if (!mask[i + w]) continue;
      out[i + w] = noisy_token(from[w * strides[3]], mask_id, static_cast<uint32_t>(i + w), stream,
                               static_cast<uint32_t>(options.vocab_size));
    }
    total += count;
  }
  return total;
}

// The `count` positions masked among `size`, as indices from `first` on.
void pack(const bool* mask, int64_t size, int64_t first, int64_t count, int64_t* indices) {
  int64_t slot = 0;
  for (int64_t i = 0; slot < count;) {
    uint64_t next = 0;
    if (i + 8 <= size) std::memcpy(&next, mask + i, 8);
    if (i + 8 <= size && next == 0) {  // most tokens are not masked
      i += 8;
      continue;
    }
    for (int64_t end = std::min(i + 8, size); i < end && slot < count; ++i) {
      indices[slot] = first + i;
      slot += mask[i];
    }
  }
}

template <class Token>
void draw(const Options& options, const Tensor& tokens, const Tensor& sample_ids, int64_t seed, Tensor& out, Tensor& mask,
          Tensor& indices, Tensor& counts) {
  const int64_t B = tokens.size(0), size = options.grid.tokens();
  const int64_t strides[4] = {tokens.stride(0), tokens.stride(1), tokens.stride(2), tokens.stride(3)};
  const int64_t id_stride = sample_ids.stride(0), grain = std::max<int64_t>(1, GRAIN / size);
  const auto* p_tokens = static_cast<const Token*>(tokens.const_data_ptr());
  const auto* p_ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  auto* p_out = static_cast<Token*>(out.mutable_data_ptr());
  auto* p_mask = static_cast<bool*>(mask.mutable_data_ptr());
  auto* p_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* p_counts = static_cast<int64_t*>(counts.mutable_data_ptr());

  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Stream stream{p_ids[b * id_stride], PhiloxKey(seed)};
      p_counts[b] = mask_clip(options, stream, p_tokens + b * strides[0], strides, p_out + b * size, p_mask + b * size);
    }
  });
  std::vector<int64_t> before(static_cast<size_t>(B) + 1, 0);
  std::partial_sum(p_counts, p_counts + B, before.begin() + 1);
  const int64_t total = before[static_cast<size_t>(B)], rest = B * size - total;
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      pack(p_mask + b * size, size, b * size, p_counts[b], p_indices + before[static_cast<size_t>(b)]);
    }
    std::fill(p_indices + total + rest * begin / B, p_indices + total + rest * end / B, -1);  // a share of what is left over
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_mask(const Tensor& tokens, const Tensor& sample_ids, const Tensor& seed,
                                                      int64_t n_blocks, std::optional<double> ratio, bool noisy,
                                                      int64_t vocab_size) {
  const int64_t B = tokens.size(0), T = tokens.size(1), H = tokens.size(2), W = tokens.size(3);
  STD_TORCH_CHECK(T * H * W <= 1 << 30, "block_mask.cpu cannot run clips of ", T * H * W, " tokens, it takes up to 2^30");
  STD_TORCH_CHECK(vocab_size < (int64_t{1} << 31) - MASK_OFFSET, "block_mask.cpu cannot run a vocab_size of ", vocab_size);
  Options options{{{static_cast<int>(T), static_cast<int>(H), static_cast<int>(W)}}, n_blocks, std::nullopt, noisy, vocab_size};
  if (ratio) options.iid = threshold(*ratio);
  Tensor out = torch::stable::new_empty(tokens, {B, T, H, W});
  Tensor mask = torch::stable::new_empty(tokens, {B, T, H, W}, ScalarType::Bool);
  Tensor indices = torch::stable::new_empty(tokens, {B * T * H * W}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(sample_ids, {B});
  for (const Tensor& x : {out, mask, indices}) prefer_huge_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  if (B > 0) {
    const int64_t key = *static_cast<const int64_t*>(seed.const_data_ptr());
    // ids are compared and copied only: their width is all that matters
    auto* run = tokens.element_size() == 8   ? draw<uint64_t>
                : tokens.element_size() == 4 ? draw<uint32_t>
                : tokens.element_size() == 2 ? draw<uint16_t>
                                             : draw<uint8_t>;
    run(options, tokens, sample_ids, key, out, mask, indices, counts);
  }
  return {out, mask, indices, counts};
}

}  // namespace

}  // namespace vimpac::masking

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) { m.impl("block_mask.cpu", TORCH_BOX(&vimpac::masking::block_mask)); }
