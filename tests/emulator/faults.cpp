// Kernels with a fault each, for the test of the emulator itself. Each returns the error that stopped it, "" if none did.
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
}
