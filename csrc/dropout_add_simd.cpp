// x + dropout(y) on a CPU, group after group: draw a group's words, scale, add, write.

#include "dropout_add_cpu.h"
#include "simd.h"

namespace vimpac::dropout_add::VIMPAC_ISA {

namespace {

constexpr int ROUNDS = 7;
constexpr uint32_t PURPOSE = 2;
constexpr int COUNTERS = GROUP / 4;
constexpr int LANES = WIDTH<uint32_t>;

template <class Y, class T>
struct Group {
  const T* x;
  const Y* y;
  T* out;
};

template <class A>
using Word = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

template <class Y, class T, bool ADD, bool STREAM>
HOST_DEVICE void run_group(const Call& call, int64_t number, const Group<Y, T>& at) {
  using A = typename Arithmetic<T>::type;
  using U = Vector<uint32_t, LANES>;
  using V = Vector<A, LANES>;
  const uint64_t first = static_cast<uint64_t>(number) * COUNTERS;
  U lane;
  UNROLL
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  UNROLL
  for (int c = 0; c < COUNTERS; c += LANES) {
    U low = lane + (static_cast<uint32_t>(first) + c), high = U{} + static_cast<uint32_t>(first >> 32);
    auto words = philox<ROUNDS>(low, high, U{}, U{} + PURPOSE, PhiloxKey(call.seed));
    UNROLL
    for (int w = 0; w < 4; ++w) {
      const int i = w * COUNTERS + c;
      auto word = __builtin_convertvector(words.w[w], Vector<Word<A>, LANES>);
      V factor = word >= Word<A>{call.threshold} ? V{} + static_cast<A>(call.scale) : V{};
      V result = load<LANES>(at.y + i) * factor;
      if constexpr (ADD) result += load<LANES>(at.x + i);
      if constexpr (STREAM) {
        UNROLL
        for (int part = 0; part < LANES; part += WIDTH<A>) {
          Vector<A, WIDTH<A>> one;
          __builtin_memcpy(&one, reinterpret_cast<const char*>(&result) + part * sizeof(A), sizeof(one));
          stream<WIDTH<A>>(at.out + i + part, one);
        }
      } else {
        store<LANES>(at.out + i, result);
      }
    }
  }
}

template <class Y, class T, bool ADD, bool STREAM>
void run_groups(const Call& call, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(call.x);
  const Y* y = static_cast<const Y*>(call.y);
  T* out = static_cast<T*>(call.out);
  const int64_t whole = call.elements / GROUP < end ? call.elements / GROUP : end;
  for (int64_t k = begin; k < whole; ++k) {
    run_group<Y, T, ADD, STREAM>(call, k, {ADD ? x + k * GROUP : nullptr, y + k * GROUP, out + k * GROUP});
  }
  if (STREAM) finish_streams();
  if (whole == end) return;
  T to[GROUP], of_x[GROUP] = {};  // the last elements, and zeros up to a whole group
  Y of_y[GROUP] = {};
  const size_t rest = call.elements - whole * GROUP;
  if (ADD) __builtin_memcpy(of_x, x + whole * GROUP, rest * sizeof(T));
  __builtin_memcpy(of_y, y + whole * GROUP, rest * sizeof(Y));
  run_group<Y, T, ADD, false>(call, whole, {of_x, of_y, to});
  __builtin_memcpy(out + whole * GROUP, to, rest * sizeof(T));
}

// y of Y; x and out of T.
template <class Y, class T>
void run(const Call& call, int64_t begin, int64_t end) {
  constexpr bool STREAMS = std::is_same_v<T, typename Arithmetic<T>::type>;
  if (call.streams) {
    call.x ? run_groups<Y, T, true, STREAMS>(call, begin, end) : run_groups<Y, T, false, STREAMS>(call, begin, end);
  } else {
    call.x ? run_groups<Y, T, true, false>(call, begin, end) : run_groups<Y, T, false, false>(call, begin, end);
  }
}

}  // namespace

const Kernels dropout_add_kernels = {
    run<float, float>, run<double, double>, run<BFloat16, BFloat16>, run<BFloat16, float>, run<float, BFloat16>,
};

}  // namespace vimpac::dropout_add::VIMPAC_ISA
