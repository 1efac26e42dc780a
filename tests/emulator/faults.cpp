// Kernels for the test of the emulator itself, most with a fault each. They return the error that stopped them, "" if none did.
#include "../../csrc/warp.h"

using namespace vimpac;

static int numbers[64];

static const char* run(unsigned threads, const std::function<void()>& kernel) {
  emulator::forget_buffers();
  emulator::buffer(numbers, sizeof numbers, true);
  emulator::launch(2, threads, kernel);
  return emulator::error.c_str();
}

extern "C" {

// Every warp adds up its lanes' numbers, then every thread reads what its neighbour warp wrote.
const char* no_fault() {
  for (int& x : numbers) x = 1;
  const char* error = run(64, [] {
    __shared__ int sums[2];
    int sum = warp::load_one(&numbers[threadIdx.x]);
    for (int mask = 16; mask; mask /= 2) sum += warp::shfl_xor(sum, mask);
    if (warp::ballot(threadIdx.x % 2) != 0xAAAAAAAA) sum = -1;
    if (warp::lane() == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    warp::store_one(&numbers[threadIdx.x], sums[1 - threadIdx.x / 32]);
  });
  for (int x : numbers) {
    if (x != 32 * 32) return "wrong sums";
  }
  return error;
}

const char* diverges() {
  return run(32, [] {
    if (warp::lane() < 5) warp::ballot(true);
    warp::shfl(1, 0);
  });
}

const char* returns_early() {
  return run(32, [] {
    if (warp::lane() == 7) return;
    warp::shfl(1, 0);
  });
}

const char* misses_barrier() {
  return run(64, [] {
    if (threadIdx.x < 40) __syncthreads();
  });
}

const char* reads_outside() {
  return run(32, [] { warp::load_one(&numbers[33 + warp::lane()]); });
}

const char* misaligned() {
  return run(32, [] { warp::load<4>(&numbers[1]); });
}

const char* writes_input() {
  static int input;
  return run(32, [] {
    emulator::buffer(&input, 4, false);
    warp::store_one(&input, 1);
  });
}

const char* polls_in_vain() {
  return run(32, [] {
    while (emulator::poll(&numbers[0]) >= 0) continue;
  });
}

// Of 8 blocks that each add 1 a hundred times, by a load and a store.
int lost_additions(unsigned resident, unsigned seed) {
  emulator::forget_buffers();
  emulator::buffer(numbers, sizeof numbers, true);
  numbers[0] = 0;
  emulator::launch(8, 32, [] {
    for (int i = 0; threadIdx.x == 0 && i < 100; ++i) warp::store_one(&numbers[0], warp::load_one(&numbers[0]) + 1);
  }, {resident, seed});
  return 800 - numbers[0];
}

// Each of 8 blocks announces itself and waits until the one before has, the first for the last.
const char* ring(unsigned resident, unsigned seed) {
  emulator::forget_buffers();
  emulator::buffer(numbers, sizeof numbers, true);
  for (int& x : numbers) x = 0;
  emulator::launch(8, 64, [] {
    __shared__ unsigned own;
    if (threadIdx.x == 0) own = blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 40) {
      warp::store_one(&numbers[own], 1);
      while (emulator::poll(&numbers[(own + 7) % 8]) == 0) continue;
    }
    __syncthreads();
    if (own != blockIdx.x) emulator::fail("another block's shared memory");
  }, {resident, seed});
  return emulator::error.c_str();
}
}
