// A GPU's warps on a CPU, so that tests run the kernels of csrc/*.cu themselves where there is no GPU.
//
// Each thread of a block is a fiber with its own stack. Where threads of a warp exchange data (a shuffle, a ballot, a matrix
// product) a fiber leaves the addresses of its operand and its result and waits. When all 32 have come, one function works on
// all lanes at once. Fibers change only where they wait, so atomics are plain.
//
// Blocks run one after another in order, or interleaved: some of them are resident at a time, they start in a random order, and
// at random memory accesses another one takes over, as a seed decides. Each resident block is a thread of the host, of which
// only the one that has the turn runs. All see memory in the order of accesses: what a GPU may reorder is not emulated.
//
// What stops a launch with a message in `emulator::error`: lanes of a warp that wait for different things or for a lane that has
// returned; __syncthreads that some threads never reach; an access to memory that is misaligned, outside every buffer that the
// test has named with `emulator::buffer`, or writes to a read-only one; and polling a number that no block changes.
//
// To run a kernel: include its .cu, compile with g++ -pthread, name the buffers, then
//   emulator::launch(blocks, threads, [&] { kernel(arguments); });                             // in order
//   emulator::launch(blocks, threads, [&] { kernel(arguments); }, {.resident = 4, .seed = 1});  // interleaved
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static thread_local  // a thread of the host runs one block at a time
#define __launch_bounds__(...)

struct Index3 {  // what a kernel of one dimension reads of uint3 and dim3
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 blockDim, gridDim;
inline thread_local Index3 threadIdx, blockIdx;

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10;

inline std::string error;  // of the last launch, empty if there was none

// --- turns of blocks ---------------------------------------------------------------------------------------------------

struct Schedule {
  unsigned resident = 1;  // blocks that run at a time; 1: one after another, in order
  unsigned seed = 0;
};

// Whose turn it is among the resident blocks' threads. Only the thread that has the turn touches any of the emulator's state.
class Turns {
 public:
  bool interleaved() const { return waiting_.size() > 1; }

  void begin(Schedule schedule) {
    random_.seed(schedule.seed);
    waiting_.assign(schedule.resident, true);
    holder_ = 0;
  }

  template <class Sequence>
  void shuffle(Sequence& x) { std::shuffle(x.begin(), x.end(), random_); }

  void await(unsigned self) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return holder_ == self; });
  }

  // Another thread's turn, or this one's again.
  void pass(unsigned self) {
    if (choose() != self) await(self);
  }

  void leave(unsigned self) {
    waiting_[self] = false;
    if (std::find(waiting_.begin(), waiting_.end(), true) != waiting_.end()) choose();
  }

  bool sometimes() { return random_() % 8 == 0; }

 private:
  unsigned choose() {
    unsigned next = random_() % waiting_.size();
    while (!waiting_[next]) next = (next + 1) % waiting_.size();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      holder_ = next;
    }
    changed_.notify_all();
    return next;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937 random_;
  std::vector<bool> waiting_;
  unsigned holder_ = 0;
};
inline Turns turns;
inline thread_local unsigned resident;  // which of the resident blocks' threads this is

// --- memory ------------------------------------------------------------------------------------------------------------

struct Buffer {
  const char* begin;
  size_t bytes;
  bool writable;
};
inline std::vector<Buffer> buffers;
inline uint64_t bytes_loaded, bytes_stored;  // of global memory since `forget_buffers`

inline void forget_buffers() {
  buffers.clear();
  bytes_loaded = bytes_stored = 0;
}

inline void buffer(const void* begin, size_t bytes, bool writable) {
  if (begin && bytes) buffers.push_back({static_cast<const char*>(begin), bytes, writable});
}

[[noreturn]] void fail(const std::string& message);
void give_turn();

constexpr uint64_t POLLS_IN_VAIN = 1 << 16;
inline uint64_t polls_in_vain;  // since the last store

inline void check_access(const void* address, size_t bytes, bool writes) {
  if (turns.interleaved() && turns.sometimes()) give_turn();
  if (writes) polls_in_vain = 0;
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

// What another block may write meanwhile.
template <class T>
T poll(const T* from) {
  T value = load(from);
  if (++polls_in_vain > POLLS_IN_VAIN) fail("polls a number that no block changes");
  if (turns.interleaved()) give_turn();
  return value;
}

template <class T>
T atomic_add(T* to, T value) {
  check_access(to, sizeof(T), false);
  check_access(to, sizeof(T), true);
  T before = *to;
  *to = T(before + value);
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
inline thread_local Block block;

inline void leave(State state) {
  block.fibers[block.current].state = state;
  if (!_setjmp(block.fibers[block.current].place)) _longjmp(block.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
  error = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " + message;
  _longjmp(block.scheduler, 2);
}

inline void give_turn() {
  turns.pass(resident);
  if (!error.empty()) _longjmp(block.scheduler, 2);  // of another block
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

inline void prepare_block(unsigned threads, const std::function<void()>& kernel) {
  block.kernel = &kernel;
  if (block.fibers.size() == threads) return;
  block.fibers.resize(threads);
  block.stacks.reset(new char[threads * STACK_BYTES]);
}

// Whether it ran without an error; `threads` a block, a multiple of 32.
inline bool launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel, Schedule schedule = {}) {
  error.clear();
  polls_in_vain = 0;
  gridDim.x = blocks;
  blockDim.x = threads;
  turns.begin(schedule);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule.resident > 1) turns.shuffle(order);
  unsigned started = 0;
  auto run_blocks = [&] {
    prepare_block(threads, kernel);
    while (started < blocks && error.empty()) {
      blockIdx.x = order[started++];
      run_block(threads);
    }
  };
  if (schedule.resident == 1) {
    run_blocks();
    return error.empty();
  }
  std::vector<std::thread> residents;
  for (unsigned self = 0; self < schedule.resident; ++self) {
    residents.emplace_back([&, self] {
      resident = self;
      turns.await(self);
      run_blocks();
      turns.leave(self);
    });
  }
  for (std::thread& thread : residents) thread.join();
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

inline void __threadfence() {}  // memory is seen in the order of accesses
inline void __syncwarp() { emulator::syncwarp(); }
inline void __syncthreads() { emulator::leave(emulator::State::IN_BLOCK); }
