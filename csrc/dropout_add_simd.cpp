// x + dropout(y) on a CPU, group after group: draw a group's words, scale, add, write.

#include "dropout_add_cpu.h"
#include "dropout_group.h"
#include "simd.h"

namespace vimpac::dropout_add::VIMPAC_ISA {

namespace {

constexpr int LANES = WIDTH<uint32_t>;

template <class Y, class T>
struct Group {
  const T* x;
  const Y* y;
  T* out;
};

template <class Y, class T, bool ADD, bool STREAM>
HOST_DEVICE void run_group(const Call& call, int64_t number, const Group<Y, T>& at) {
  using A = typename Arithmetic<T>::type;
  using V = Vector<A, LANES>;
  UNROLL
  for (int c = 0; c < DROPOUT_COUNTERS; c += LANES) {
    auto words = dropout_group_words<LANES>(number, c, PhiloxKey(call.seed));
    UNROLL
    for (int w = 0; w < 4; ++w) {
      const int i = w * DROPOUT_COUNTERS + c;
      V result = load<LANES>(at.y + i) * dropout_factors<A, LANES>(words.w[w], call.threshold, static_cast<A>(call.scale));
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
  const int64_t whole = call.elements / DROPOUT_GROUP < end ? call.elements / DROPOUT_GROUP : end;
  for (int64_t k = begin; k < whole; ++k) {
    run_group<Y, T, ADD, STREAM>(call, k, {ADD ? x + k * DROPOUT_GROUP : nullptr, y + k * DROPOUT_GROUP, out + k * DROPOUT_GROUP});
  }
  if (STREAM) finish_streams();
  if (whole == end) return;
  T to[DROPOUT_GROUP], of_x[DROPOUT_GROUP] = {};  // the last elements, and zeros up to a whole group
  Y of_y[DROPOUT_GROUP] = {};
  const size_t rest = call.elements - whole * DROPOUT_GROUP;
  if (ADD) __builtin_memcpy(of_x, x + whole * DROPOUT_GROUP, rest * sizeof(T));
  __builtin_memcpy(of_y, y + whole * DROPOUT_GROUP, rest * sizeof(Y));
  run_group<Y, T, ADD, false>(call, whole, {of_x, of_y, to});
  __builtin_memcpy(out + whole * DROPOUT_GROUP, to, rest * sizeof(T));
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
