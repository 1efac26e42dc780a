// A GPU's warps on a CPU, so that tests run the very kernels of csrc/*.cu where there is no GPU.
//
// Each thread of a block is a fiber with its own stack. Where threads of a warp exchange data (a shuffle, a ballot, a matrix
// product) a fiber leaves the addresses of its operand and its result and waits; when all 32 have come, one function works on
// all lanes at once. Blocks run one after another in order, and fibers change only where they wait, so atomics are plain.
//
// What stops a launch with a message in `emulator::error`: lanes of a warp that wait for different things or that wait for a
// lane that has returned, __syncthreads that some threads never reach, and an access to memory that is misaligned, outside
// every buffer that the test has named with `emulator::buffer`, or that writes a read-only one.
//
// To run a kernel: include its .cu, compile with g++, name the buffers, then
//   emulator::launch(blocks, threads, [&] { kernel(arguments); });
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct Index3 {  // what a kernel of one dimension reads of uint3 and dim3
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10;

inline std::string error;  // of the last launch, empty if there was none

// --- memory ------------------------------------------------------------------------------------------------------------

struct Buffer {
  const char* begin;
  size_t bytes;
  bool writable;
};
inline std::vector<Buffer> buffers;
inline uint64_t bytes_loaded, bytes_stored;  // asked of global memory since `forget_buffers`

inline void forget_buffers() {
  buffers.clear();
  bytes_loaded = bytes_stored = 0;
}

inline void buffer(const void* begin, size_t bytes, bool writable) {
  if (begin && bytes) buffers.push_back({static_cast<const char*>(begin), bytes, writable});
}

[[noreturn]] void fail(const std::string& message);

inline void check_access(const void* address, size_t bytes, bool writes) {
  (writes ? bytes_stored : bytes_loaded) += bytes;
  const char* p = static_cast<const char*>(address);
  auto access = [&] { return (writes ? "store of " : "load of ") + std::to_string(bytes) + " bytes"; };
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned " + access());
  for (const Buffer& b : buffers) {
    if (p < b.begin || p + bytes > b.begin + b.bytes) continue;
    if (writes && !b.writable) fail("store to a read-only buffer");
    return;
  }
  fail(access() + " outside all buffers");
}

template <class T>
T load(const T* from) {
  check_access(from, sizeof(T), false);
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void store(T* to, T value) {
  check_access(to, sizeof(T), true);
  memcpy(to, &value, sizeof(T));
}

template <class T>
T atomic_add(T* to, T value) {
  T before = load(to);
  store(to, T(before + value));
  return before;
}

// --- fibers ------------------------------------------------------------------------------------------------------------

// What all lanes of a warp have brought to a collective.
struct Lanes {
  const void* in[WARP];
  void* out[WARP];
};
using Collective = void (*)(Lanes&);

enum class State { READY, IN_WARP, IN_BLOCK, RETURNED };

struct Fiber {
  State state;
  const char* name;  // of what it waits for
  Collective function;
  const void* in;
  void* out;
  ucontext_t start;
  jmp_buf place;
  bool started;
};

struct Block {
  const std::function<void()>* kernel;
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  ucontext_t main;
  jmp_buf scheduler;
  unsigned current;
};
inline Block block;

inline void leave(State state) {
  block.fibers[block.current].state = state;
  if (!_setjmp(block.fibers[block.current].place)) _longjmp(block.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
  error = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " + message;
  _longjmp(block.scheduler, 2);
}

inline void run_fiber() {
  (*block.kernel)();
  leave(State::RETURNED);
}

// Waits until all lanes of the warp are here and `function` has filled every lane's `out` from the lanes' `in`.
inline void collective(const char* name, Collective function, const void* in, void* out) {
  Fiber& self = block.fibers[block.current];
  self.name = name;
  self.function = function;
  self.in = in;
  self.out = out;
  leave(State::IN_WARP);
}

inline void run_collective(unsigned first) {
  Lanes lanes;
  Fiber* warp = &block.fibers[first];
  for (int lane = 0; lane < WARP; ++lane) {
    threadIdx.x = first + lane;
    if (warp[lane].state != State::IN_WARP) {
      fail(std::string("lane is not at the warp's ") + warp[0].name +
           (warp[lane].state == State::RETURNED ? ", it has returned" : ", it is at __syncthreads"));
    }
    if (strcmp(warp[lane].name, warp[0].name)) {
      fail(std::string("lanes diverge: ") + warp[lane].name + ", lane 0 is at " + warp[0].name);
    }
    lanes.in[lane] = warp[lane].in;
    lanes.out[lane] = warp[lane].out;
  }
  warp[0].function(lanes);
  for (int lane = 0; lane < WARP; ++lane) warp[lane].state = State::READY;
}

inline void resume(unsigned thread) {
  block.current = threadIdx.x = thread;
  Fiber& fiber = block.fibers[thread];
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs the block's fibers until all have returned. Locals must not live across the _setjmp, so they are Block's.
inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.state = State::READY;
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = block.stacks.get() + i * STACK_BYTES;
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = &block.main;
    makecontext(&fiber.start, run_fiber, 0);
  }
  if (_setjmp(block.scheduler) == 2) return;  // fail()
  for (unsigned first = 0; first < block.fibers.size(); first += WARP) {
    for (unsigned i = first; i < first + WARP; ++i) {
      if (block.fibers[i].state == State::READY) resume(i);
    }
    for (unsigned i = first; i < first + WARP; ++i) {
      if (block.fibers[i].state == State::IN_WARP) {
        run_collective(first);
        _longjmp(block.scheduler, 1);  // look again from the first warp
      }
    }
  }
  unsigned returned = 0;
  for (const Fiber& fiber : block.fibers) returned += fiber.state == State::RETURNED;
  if (returned == block.fibers.size()) return;
  if (returned) fail("__syncthreads that " + std::to_string(returned) + " threads of the block never reach");
  for (Fiber& fiber : block.fibers) fiber.state = State::READY;
  _longjmp(block.scheduler, 1);
}

// Whether it ran without an error; `threads` a block, a multiple of 32.
inline bool launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  error.clear();
  block.kernel = &kernel;
  if (block.fibers.size() != threads) {
    block.fibers.resize(threads);
    block.stacks.reset(new char[threads * STACK_BYTES]);
  }
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks && error.empty(); ++blockIdx.x) run_block(threads);
  return error.empty();
}

// --- collectives -------------------------------------------------------------------------------------------------------

template <class T>
struct FromLane {
  T value;
  int lane;
};

template <class T>
T shuffle(T value, int lane) {
  FromLane<T> in{value, lane & (WARP - 1)};
  T out;
  collective("shuffle", [](Lanes& lanes) {
    for (int i = 0; i < WARP; ++i) {
      int from = static_cast<const FromLane<T>*>(lanes.in[i])->lane;
      *static_cast<T*>(lanes.out[i]) = static_cast<const FromLane<T>*>(lanes.in[from])->value;
    }
  }, &in, &out);
  return out;
}

inline uint32_t ballot(bool value) {
  uint32_t out;
  collective("ballot", [](Lanes& lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < WARP; ++i) bits |= uint32_t{*static_cast<const bool*>(lanes.in[i])} << i;
    for (int i = 0; i < WARP; ++i) *static_cast<uint32_t*>(lanes.out[i]) = bits;
  }, &value, &out);
  return out;
}

inline void syncwarp() {
  collective("syncwarp", [](Lanes&) {}, nullptr, nullptr);
}

// 16 bits of a lane's word: element (row, 2 · (lane % 4) + half) of an 8×8 matrix is half `half` of lane 4 · row + column / 2.
inline uint32_t movmatrix(uint32_t word) {
  uint32_t out;
  collective("movmatrix", [](Lanes& lanes) {
    for (int i = 0; i < WARP; ++i) {
      uint32_t result = 0;
      for (int half = 0; half < 2; ++half) {
        int row = 2 * (i % 4) + half, column = i / 4;
        uint32_t from = *static_cast<const uint32_t*>(lanes.in[4 * row + column / 2]);
        result |= (column % 2 ? from >> 16 : from & 0xFFFF) << (16 * half);
      }
      *static_cast<uint32_t*>(lanes.out[i]) = result;
    }
  }, &word, &out);
  return out;
}

// D = A B + C of mma.m16n8k16 and (STEPS = 1) m16n8k8, elements placed as the PTX manual has them; `to_float` reads 16 bits.
template <int STEPS, float (*to_float)(uint16_t)>
void matrix_product(float (&c)[4], const uint32_t (&a)[2 * STEPS], const uint32_t (&b)[STEPS]) {
  struct Operands {
    uint32_t a[2 * STEPS], b[STEPS];
    float c[4];
  } in;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, c, sizeof c);
  collective(STEPS == 2 ? "mma k16" : "mma k8", [](Lanes& lanes) {
    float left[16][8 * STEPS], right[8][8 * STEPS];
    for (int lane = 0; lane < WARP; ++lane) {
      auto& x = *static_cast<const Operands*>(lanes.in[lane]);
      int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int step = 0; step < STEPS; ++step) {
          int k = 8 * step + 2 * t + half;
          left[g][k] = to_float(static_cast<uint16_t>(x.a[2 * step] >> (16 * half)));
          left[g + 8][k] = to_float(static_cast<uint16_t>(x.a[2 * step + 1] >> (16 * half)));
          right[g][k] = to_float(static_cast<uint16_t>(x.b[step] >> (16 * half)));
        }
      }
    }
    for (int lane = 0; lane < WARP; ++lane) {
      auto& x = *static_cast<const Operands*>(lanes.in[lane]);
      for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        float sum = x.c[i];
        for (int k = 0; k < 8 * STEPS; ++k) sum += left[row][k] * right[column][k];
        static_cast<float*>(lanes.out[lane])[i] = sum;
      }
    }
  }, &in, c);
}

}  // namespace emulator

inline void __threadfence() {}  // fibers run one at a time
inline void __syncthreads() { emulator::leave(emulator::State::IN_BLOCK); }
