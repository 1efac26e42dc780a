// The op vimpac::block_mask.cuda: masks of all clips, their tokens and the packed indices in one launch.
// vimpac/ops/block_mask.py has the definition.
//
// A thread block owns a run of consecutive clips. For each it first writes to shared memory which blocks of the mask cover each
// place on T, on H and on W, one bit a block: every lane draws one, and a ballot makes the word. A token is masked if the words
// of its three places have a bit in common. Threads take four neighbours at a time, since one call of Philox serves four i.i.d.
// tokens.
//
// A thread block's indices come after those of the blocks before it, so it must then know how many positions these have masked.
// It publishes its own number and adds up all of theirs, reading each as soon as it is there: one step, not a chain. Blocks
// number themselves by a counter as they start. So a block only waits for blocks that already run, even where few fit on the
// device at once. Last, warps pack the mask: a ballot gives every lane its slot. Unmasked positions write their -1 from the end
// of `indices` backwards, so no block waits for the total. Sums are of integers, so results do not depend on the order of blocks.
//
// Bytes moved: tokens in and out, 1 for the mask written and read (from a cache), 8 an index.

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>
#endif

#include "block_mask.h"
#include "warp.h"

namespace vimpac::masking {

using Counter = unsigned long long;  // what atomicAdd takes

constexpr int BLOCKS_AT_MOST = 1024;  // each reads the numbers of all before it, 4 MB from L2 altogether
constexpr int STATE = BLOCKS_AT_MOST + 2;  // their numbers plus one, how many have started, how many have finished
constexpr int THREADS_AT_MOST = 320;  // 5×16×16 tokens, four each; as 4 blocks fit on a multiprocessor, 132 hold 512 clips
constexpr int WORDS_AT_MOST = 2048;  // T + H + W for every 32 blocks of a mask

struct Call {
  const void* tokens;
  int64_t strides[4];
  const int64_t* sample_ids;
  int64_t id_stride;
  const int64_t* seed;
  void* out;  // contiguous, as all results
  uint8_t* mask;
  int64_t *indices, *counts;
  Counter* state;  // STATE zeros, as the launch leaves them behind
  int64_t clips;
  Grid grid;
  int n_blocks;        // 0: i.i.d.
  uint64_t threshold;  // of an i.i.d. token's word
  bool noisy, aligned;  // aligned: four tokens lie together, at an address that one access can read
  uint32_t vocab_size;

  HOST_DEVICE int places() const { return grid.size[0] + grid.size[1] + grid.size[2]; }
  HOST_DEVICE int groups() const { return (n_blocks + 31) / 32; }
};

// --- a clip ------------------------------------------------------------------------------------------------------------

// words [groups, T + H + W]: bit b of a place's word says whether block b of 32 covers it. All warps share the places.
DEVICE void note_blocks(const Call& call, Stream stream, uint32_t* words) {
  const int warp = threadIdx.x / warp::LANES, warps = blockDim.x / warp::LANES, places = call.places();
  for (int group = 0; group < call.groups(); ++group) {
    const int b = warp::LANES * group + warp::lane();
    const Block block = draw_block(call.grid, stream, static_cast<uint32_t>(b));
    for (int place = warp; place < places; place += warps) {
      const int h = place - call.grid.size[0], w = h - call.grid.size[1];
      const bool covers = h < 0 ? block.covers(0, place) : w < 0 ? block.covers(1, h) : block.covers(2, w);
      const uint32_t word = warp::ballot(covers && b < call.n_blocks);
      if (warp::lane() == 0) words[group * places + place] = word;
    }
  }
}

// Whether blocks cover each of four tokens from raster index i on.
DEVICE void covered(const Call& call, const uint32_t* words, int i, bool (&masked)[4]) {
  const auto [T, H, W] = call.grid.size;
  int row = i / W, w = i - row * W, t = row / H, h = row - t * H;
  UNROLL
  for (int k = 0; k < 4; ++k) {
    masked[k] = false;
    for (int group = 0; t < T && group < call.groups(); ++group) {
      const uint32_t* of = words + group * call.places();
      masked[k] |= (of[t] & of[T + h] & of[T + H + w]) != 0;
    }
    if (++w == W) w = 0, ++h;
    if (h == H) h = 0, ++t;
  }
}

// Of 4, 8 or 16 bytes, in one access: left to itself the compiler writes one number after the other.
template <int BYTES>
DEVICE void store_bits(void* to, const void* from) {
  std::conditional_t<BYTES == 16, warp::Piece<4>, std::conditional_t<BYTES == 8, uint64_t, uint32_t>> bits;
  memcpy(&bits, from, BYTES);
  if constexpr (BYTES == 16) {
    warp::store(to, bits);
  } else {
    warp::store_one(static_cast<decltype(bits)*>(to), bits);
  }
}

// Four neighbours of a clip from raster index i on; what lies past its end is not read or written.
template <class Token>
struct Tokens {
  static constexpr int TOGETHER = 16 / sizeof(Token) < 4 ? 16 / sizeof(Token) : 4;
  struct alignas(TOGETHER * sizeof(Token)) Piece {
    Token id[TOGETHER];
  };
  Piece pieces[4 / TOGETHER] = {};

  DEVICE Token& operator[](int k) { return pieces[k / TOGETHER].id[k % TOGETHER]; }

  DEVICE void load(const Call& call, const Token* clip, int i) {
    if (call.aligned) {
      UNROLL
      for (int p = 0; p < 4 / TOGETHER; ++p) pieces[p] = warp::load_one(reinterpret_cast<const Piece*>(clip + i) + p);
      return;
    }
    const int H = call.grid.size[1], W = call.grid.size[2];
    UNROLL
    for (int k = 0; k < 4; ++k) {
      const int row = (i + k) / W, t = row / H, h = row - t * H, w = i + k - row * W;
      if (t < call.grid.size[0]) {
        (*this)[k] = warp::load_one(clip + t * call.strides[1] + h * call.strides[2] + w * call.strides[3]);
      }
    }
  }

  DEVICE void store(Token* clip, int i, int size) {
    if (size % 4 == 0) {
      UNROLL
      for (int p = 0; p < 4 / TOGETHER; ++p) {
        store_bits<sizeof(Piece)>(clip + i + p * TOGETHER, &pieces[p]);
      }
      return;
    }
    UNROLL
    for (int k = 0; k < 4; ++k) {
      if (i + k < size) warp::store_one(clip + i + k, (*this)[k]);
    }
  }
};

// Writes a clip's tokens and mask. Returns how many positions this thread has masked.
template <class Token>
DEVICE int mask_clip(const Call& call, int64_t clip, Stream stream, const uint32_t* words) {
  const int size = call.grid.tokens();
  const auto pad_id = static_cast<Token>(call.vocab_size + PAD_OFFSET);
  const auto mask_id = static_cast<Token>(call.vocab_size + MASK_OFFSET);
  const Token* from = static_cast<const Token*>(call.tokens) + clip * call.strides[0];
  int count = 0;
  for (int i = 4 * threadIdx.x; i < size; i += 4 * blockDim.x) {
    Tokens<Token> tokens;
    tokens.load(call, from, i);
    bool masked[4];
    if (call.n_blocks > 0) {
      covered(call, words, i, masked);
    } else {
      const Words<uint32_t> own = stream.words(static_cast<uint32_t>(i / 4), IID);
      UNROLL
      for (int k = 0; k < 4; ++k) masked[k] = own.w[k] < call.threshold;
    }
    Tokens<uint8_t> bytes;
    UNROLL
    for (int k = 0; k < 4; ++k) {
      masked[k] = masked[k] && tokens[k] != pad_id && i + k < size;
      if (masked[k] && call.noisy) {
        tokens[k] = noisy_token(tokens[k], mask_id, static_cast<uint32_t>(i + k), stream, call.vocab_size);
      } else if (masked[k]) {
        tokens[k] = mask_id;
      }
      bytes[k] = masked[k];
      count += masked[k];
    }
    tokens.store(static_cast<Token*>(call.out) + clip * size, i, size);
    bytes.store(call.mask + clip * size, i, size);
  }
  return count;
}

// --- all clips ---------------------------------------------------------------------------------------------------------

DEVICE Counter load_again(const Counter* from) {  // what another thread block may just have written
#ifdef __CUDACC__
  Counter value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
#else
  return emulator::poll(from);
#endif
}

DEVICE void publish(Counter* to, Counter value) {  // only the number is handed over, so no order with other memory is needed
#ifdef __CUDACC__
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
#else
  emulator::store(to, value);
#endif
}

// Sum over the block's threads; `parts` are shared, one a warp.
DEVICE int64_t block_sum(int64_t value, int64_t* parts) {
  for (int distance = warp::LANES / 2; distance > 0; distance /= 2) value += warp::shfl_xor(value, distance);
  __syncthreads();  // the parts before have been read
  if (warp::lane() == 0) parts[threadIdx.x / warp::LANES] = value;
  __syncthreads();
  int64_t sum = 0;
  for (unsigned i = 0; i < blockDim.x / warp::LANES; ++i) sum += parts[i];
  return sum;
}

// Of the masks from position `first` on, this warp's share of `size`.
struct Share {
  int64_t begin, end;
  DEVICE Share(int64_t first, int64_t size) {
    const int warps = blockDim.x / warp::LANES, warp = threadIdx.x / warp::LANES;
    const int64_t each = (size + warps * warp::LANES - 1) / (warps * warp::LANES) * warp::LANES, end_of_all = first + size;
    begin = first + warp * each;
    end = begin + each < end_of_all ? begin + each : end_of_all;
  }

  // f(i, masks of 32 positions from it on), in order.
  template <class F>
  DEVICE void for_masks(const uint8_t* mask, const F& f) const {
    for (int64_t i = begin; i < end; i += warp::LANES) {
      const int64_t own = i + warp::lane();
      f(own, warp::ballot(own < end && warp::load_one(mask + own)));
    }
  }
};

DEVICE int bits(uint32_t word) {
#ifdef __CUDACC__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

template <class Token>
__global__ void __launch_bounds__(THREADS_AT_MOST, 4) draw(const Call call) {
  __shared__ uint32_t words[WORDS_AT_MOST];
  __shared__ int64_t parts[THREADS_AT_MOST / warp::LANES];
  __shared__ Counter ticket;
  const int64_t size = call.grid.tokens();
  const PhiloxKey key(warp::load_one(call.seed));
  if (threadIdx.x == 0) ticket = warp::atomic_add(call.state + BLOCKS_AT_MOST, Counter{1});
  __syncthreads();
  const int64_t first = call.clips * ticket / gridDim.x, last = call.clips * (ticket + 1) / gridDim.x;

  int64_t total = 0;
  for (int64_t clip = first; clip < last; ++clip) {
    const Stream stream{warp::load_one(call.sample_ids + clip * call.id_stride), key};
    if (call.n_blocks > 0) note_blocks(call, stream, words);
    __syncthreads();
    const int64_t count = block_sum(mask_clip<Token>(call, clip, stream, words), parts);
    if (threadIdx.x == 0) warp::store_one(call.counts + clip, count);
    total += count;
  }
  // 0 = not there yet. No block reads the last one's, so its store could land after the zeros below.
  if (threadIdx.x == 0 && ticket + 1 < gridDim.x) publish(call.state + ticket, total + 1);

  // Masked in this warp's share, before the thread block, and then before the share. Masks are visible since block_sum.
  const Share share(first * size, (last - first) * size);
  int64_t own = 0, before = 0;
  share.for_masks(call.mask, [&](int64_t, uint32_t masks) { own += bits(masks); });
  for (Counter other = threadIdx.x; other < ticket; other += blockDim.x) {
    Counter number;
    do number = load_again(call.state + other);
    while (number == 0);
    before += number - 1;
  }
  before = block_sum(before, parts);
  Counter finished = 0;  // not awaited until the end
  __threadfence();       // what was published and read comes before the zeros that follow the last block's count
  if (threadIdx.x == 0) finished = warp::atomic_add(call.state + BLOCKS_AT_MOST + 1, Counter{1});
  __syncthreads();
  if (warp::lane() == 0) parts[threadIdx.x / warp::LANES] = own;
  __syncthreads();
  for (unsigned i = 0; i < threadIdx.x / warp::LANES; ++i) before += parts[i];

  const uint32_t lanes_before = (1u << warp::lane()) - 1;
  share.for_masks(call.mask, [&](int64_t i, uint32_t masks) {
    const int64_t rank = before + bits(masks & lanes_before);
    const bool masked = masks >> warp::lane() & 1;
    const int64_t slot = masked ? rank : call.clips * size - 1 - (i - rank);
    if (i < share.end) warp::store_one(call.indices + slot, masked ? i : int64_t{-1});
    before += bits(masks);
  });

  if (threadIdx.x >= warp::LANES || warp::shfl(finished, 0) != gridDim.x - 1) return;
  __threadfence();
  __syncwarp();  // a shuffle orders no memory; lane 0's count, by which all others have read, comes before every lane's zeros
  for (int i = warp::lane(); i < STATE; i += warp::LANES) publish(call.state + i, 0);
}

using Kernel = void (*)(Call);

// Ids are compared and copied only: their width is all that matters.
inline Kernel kernel_of(size_t bytes) {
  return bytes == 8 ? draw<uint64_t> : bytes == 4 ? draw<uint32_t> : bytes == 2 ? draw<uint16_t> : draw<uint8_t>;
}

// A call without its results' addresses, and how it is launched.
struct Launch {
  Call call = {};
  int blocks, threads;
  std::string unfit;  // why the kernel cannot run it

  Launch(const void* tokens, const int64_t* sizes, const int64_t* strides, size_t bytes, int64_t n_blocks,
         std::optional<double> ratio, bool noisy, int64_t vocab_size) {
    const int64_t size = sizes[1] * sizes[2] * sizes[3], places = sizes[1] + sizes[2] + sizes[3];
    if (size > 1 << 30) unfit = "clips of " + std::to_string(size) + " tokens, it takes up to 2^30";
    if (!ratio && (n_blocks + 31) / 32 * places > WORDS_AT_MOST) {
      unfit = std::to_string(n_blocks) + " blocks with T + H + W of " + std::to_string(places) + ", it takes a product of 2^16";
    }
    if (vocab_size >= (int64_t{1} << 31) - MASK_OFFSET) unfit = "vocab_size of " + std::to_string(vocab_size);
    const size_t access = std::min<size_t>(16, 4 * bytes);
    call.tokens = tokens;
    call.clips = sizes[0];
    call.aligned = size % 4 == 0 && reinterpret_cast<uintptr_t>(tokens) % access == 0 && strides[0] * bytes % access == 0;
    int64_t packed = 1;
    for (int i = 3; i >= 0; --i) {
      call.strides[i] = strides[i];
      if (i > 0) {
        call.grid.size[i - 1] = static_cast<int>(sizes[i]);
        call.aligned &= sizes[i] == 1 || strides[i] == packed;
        packed *= sizes[i];
      }
    }
    call.n_blocks = ratio ? 0 : static_cast<int>(n_blocks);
    call.threshold = ratio ? threshold(*ratio) : 0;
    call.noisy = noisy;
    call.vocab_size = static_cast<uint32_t>(vocab_size);
    blocks = static_cast<int>(std::min<int64_t>(call.clips, BLOCKS_AT_MOST));
    threads = static_cast<int>(std::min<int64_t>((size + 127) / 128 * warp::LANES, THREADS_AT_MOST));
  }
};

// --- the op ------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The state of launches on a stream, which follow one another. It is made once and never freed, outside torch's allocator:
// where torch.compile records its CUDA graphs, that would give memory of a pool which the graphs use again later.
Counter* state_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, Counter*> states;
  const std::lock_guard<std::mutex> lock(mutex);
  Counter*& state = states[{device, stream}];
  if (state == nullptr) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // cudaMalloc is allowed while another thread captures
    STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    Counter* zeros = nullptr;
    cudaError_t made = cudaMalloc(&zeros, STATE * sizeof(Counter));
    if (made == cudaSuccess) made = cudaMemsetAsync(zeros, 0, STATE * sizeof(Counter), stream);
    if (made != cudaSuccess) {
      cudaFree(zeros);
      cudaGetLastError();  // this library's own runtime would report it again after the next launch
    }
    STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    STD_CUDA_CHECK(made);
    state = zeros;
  }
  return state;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> block_mask(const Tensor& tokens, const Tensor& sample_ids, const Tensor& seed,
                                                      int64_t n_blocks, std::optional<double> ratio, bool noisy,
                                                      int64_t vocab_size) {
  Launch launch(tokens.const_data_ptr(), tokens.sizes().data(), tokens.strides().data(), tokens.element_size(), n_blocks, ratio,
                noisy, vocab_size);
  STD_TORCH_CHECK(launch.unfit.empty(), "block_mask.cuda cannot run ", launch.unfit);
  const int device = tokens.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(tokens, tokens.sizes());
  Tensor mask = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Bool);
  Tensor indices = torch::stable::new_empty(tokens, {tokens.numel()}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(sample_ids, sample_ids.sizes());
  if (tokens.numel() == 0) return {out, mask, indices, counts};

  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  cudaStreamCaptureStatus capture;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  Call& call = launch.call;
  Tensor zeros;  // a captured graph's own, filled at each replay; freed below, it is given away on this stream only
  if (capture == cudaStreamCaptureStatusNone) {
    call.state = state_of(device, stream);
  } else {
    zeros = torch::stable::new_zeros(tokens, {STATE}, ScalarType::Long);
    call.state = static_cast<Counter*>(zeros.mutable_data_ptr());
  }
  call.sample_ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  call.id_stride = sample_ids.stride(0);
  call.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  call.out = out.mutable_data_ptr();
  call.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  call.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  call.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  kernel_of(tokens.element_size())<<<launch.blocks, launch.threads, 0, stream>>>(call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, mask, indices, counts};
}

#endif

}  // namespace vimpac::masking

#ifdef __CUDACC__
STABLE_TORCH_LIBRARY_IMPL(vimpac, CUDA, m) { m.impl("block_mask.cuda", TORCH_BOX(&vimpac::masking::block_mask)); }
#endif
