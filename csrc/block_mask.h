// Block masks' arithmetic that a GPU and a CPU share: which blocks a clip gets, which tokens are masked on their own, and what
// a masked token becomes. vimpac/ops/block_mask.py has the definition, word by word.
#pragma once

#include <cstring>

#include "host_device.h"
#include "philox.h"

namespace vimpac::masking {

enum Purpose : uint32_t { BLOCKS, IID, NOISE };  // the fourth counter word

constexpr int64_t PAD_OFFSET = 1, MASK_OFFSET = 4;  // special ids after the vocabulary

// The 32-bit word below which a uniform word falls with this probability, up to 2^32. Halves round to even, as in Python.
constexpr uint64_t threshold(double probability) {
  double words = probability * 4294967296.0;
  uint64_t whole = static_cast<uint64_t>(words);
  double rest = words - static_cast<double>(whole);
  return whole + (rest > 0.5 || (rest == 0.5 && whole % 2 == 1));
}

constexpr uint64_t NOISE_MASKS = threshold(0.8), NOISE_CHANGES = threshold(0.9);  // what is not below either is kept

struct Grid {
  int size[3];  // T, H, W
  HOST_DEVICE int tokens() const { return size[0] * size[1] * size[2]; }
  HOST_DEVICE uint32_t longest(int axis) const {  // block side
    int longest = axis == 0 ? static_cast<int>(2LL * size[0] / 3) : size[axis] / 2;
    return static_cast<uint32_t>(longest > 1 ? longest : 1);
  }
};

// The words of one clip: its id and the seed.
struct Stream {
  int64_t sample;
  PhiloxKey key;
  HOST_DEVICE Words<uint32_t> words(uint32_t index, Purpose purpose) const {
    uint64_t id = static_cast<uint64_t>(sample);
    return philox<10>(static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), index, static_cast<uint32_t>(purpose), key);
  }
};

struct Block {
  uint32_t length[3], start[3];
  HOST_DEVICE bool covers(int axis, int place) const { return static_cast<uint32_t>(place) - start[axis] < length[axis]; }
};

HOST_DEVICE Block draw_block(Grid grid, Stream stream, uint32_t b) {
  Words<uint32_t> lengths = stream.words(2 * b, BLOCKS), starts = stream.words(2 * b + 1, BLOCKS);
  Block block;
  UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    block.length[axis] = 1 + below(lengths.w[axis], grid.longest(axis));
    block.start[axis] = below(starts.w[axis], static_cast<uint32_t>(grid.size[axis]) - block.length[axis] + 1);
  }
  return block;
}

// What the masked token `id` at raster index i becomes under BERT's noise: MASK, a random code or itself.
template <class Token>
HOST_DEVICE Token noisy_token(Token id, Token mask_id, uint32_t i, Stream stream, uint32_t vocab_size) {
  Words<uint32_t> words = stream.words(i, NOISE);
  if (words.w[0] < NOISE_MASKS) return mask_id;
  return words.w[0] < NOISE_CHANGES ? static_cast<Token>(below(words.w[1], vocab_size)) : id;
}

// --- on the host -------------------------------------------------------------------------------------------------------

inline void mask_block(Grid grid, const Block& block, bool* mask) {  // [T, H, W]
  const uint32_t H = static_cast<uint32_t>(grid.size[1]), W = static_cast<uint32_t>(grid.size[2]);
  for (uint32_t t = block.start[0]; t < block.start[0] + block.length[0]; ++t) {
    for (uint32_t h = block.start[1]; h < block.start[1] + block.length[1]; ++h) {
      std::memset(mask + (t * H + h) * W + block.start[2], 1, block.length[2]);
    }
  }
}

// Draws a clip's blocks into its mask [T, H, W]; see(b, block) gets each of them.
template <class See>
void mask_blocks(Grid grid, Stream stream, int64_t n_blocks, bool* mask, const See& see) {
  std::memset(mask, 0, static_cast<size_t>(grid.tokens()));
  for (int64_t b = 0; b < n_blocks; ++b) {
    const Block block = draw_block(grid, stream, static_cast<uint32_t>(b));
    mask_block(grid, block, mask);
    see(b, block);
  }
}

// One clip's blocks: their lengths and starts on T, H and W, [n_blocks, 3] each, and their union, mask [T, H, W].
inline void sample_blocks(
    Grid grid, int64_t seed, int64_t sample_id, int n_blocks, int32_t* lengths, int32_t* starts, bool* mask) {
  mask_blocks(grid, Stream{sample_id, PhiloxKey(seed)}, n_blocks, mask, [&](int64_t b, const Block& block) {
    for (int axis = 0; axis < 3; ++axis) {
      lengths[3 * b + axis] = static_cast<int32_t>(block.length[axis]);
      starts[3 * b + axis] = static_cast<int32_t>(block.start[axis]);
    }
  });
}

}  // namespace vimpac::masking
