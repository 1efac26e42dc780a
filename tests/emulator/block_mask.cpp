// The kernel of csrc/block_mask.cu on host memory, for tests/ops/test_block_mask_cuda.py.
#include "../../csrc/block_mask.cu"

using namespace vimpac::masking;

extern "C" {

struct Arguments {
  const void* tokens;
  const int64_t *sample_ids, *seed;
  void* out;
  uint8_t* mask;
  int64_t *indices, *counts;
  Counter* state;
  int64_t sizes[4], strides[4], id_stride;
  int64_t tokens_bytes, ids_bytes;  // from the addresses given
  int64_t bytes, n_blocks, vocab_size;
  double ratio;  // negative: blocks
  int32_t noisy, blocks, threads;  // of the launch, 0 for its own
  int32_t resident, seed_of_schedule;
};

static std::string message;

int64_t state_size() { return STATE; }
uint64_t threshold_of(double probability) { return threshold(probability); }
void sample(const int32_t* grid, int64_t seed, int64_t sample_id, int32_t n_blocks, int32_t* lengths, int32_t* starts, bool* mask) {
  sample_blocks({{grid[0], grid[1], grid[2]}}, seed, sample_id, n_blocks, lengths, starts, mask);
}
uint64_t bytes_loaded() { return emulator::bytes_loaded; }
uint64_t bytes_stored() { return emulator::bytes_stored; }

// What went wrong, "" if nothing did.
const char* run(const Arguments* a) {
  Launch launch(a->tokens, a->sizes, a->strides, a->bytes, a->n_blocks, a->ratio < 0 ? std::nullopt : std::optional(a->ratio),
                a->noisy, a->vocab_size);
  message = launch.unfit;
  if (!message.empty()) return message.c_str();
  Call& call = launch.call;
  call.sample_ids = a->sample_ids, call.id_stride = a->id_stride, call.seed = a->seed;
  call.out = a->out, call.mask = a->mask, call.indices = a->indices, call.counts = a->counts, call.state = a->state;
  const int64_t tokens = call.clips * call.grid.tokens();
  emulator::forget_buffers();
  emulator::buffer(a->tokens, a->tokens_bytes, false);
  emulator::buffer(a->sample_ids, a->ids_bytes, false);
  emulator::buffer(a->seed, 8, false);
  emulator::buffer(a->out, tokens * a->bytes, true);
  emulator::buffer(a->mask, tokens, true);
  emulator::buffer(a->indices, tokens * 8, true);
  emulator::buffer(a->counts, call.clips * 8, true);
  emulator::buffer(a->state, STATE * sizeof(Counter), true);
  const Kernel kernel = kernel_of(a->bytes);
  emulator::launch(a->blocks ? a->blocks : launch.blocks, a->threads ? a->threads : launch.threads, [&] { kernel(call); },
                   {unsigned(a->resident), unsigned(a->seed_of_schedule)});
  message = emulator::error;
  return message.c_str();
}
}
