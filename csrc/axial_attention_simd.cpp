// Axial attention on a CPU, one line of one head at a time, all of it in the first cache.
//
// Keys and values are read where they lie, row by row; the only copies are of a line's keys (and, backward, values) turned round
// so that the lanes of a register are keys: q·k is then a sum over the head's width of broadcast q times a register of k. All
// other products are sums of rows with weights, in which lanes run along the head's width. [CLS] is the row after the line's
// last token, as a query and as a key. Other element types, and widths that do not fill registers, go through copies of rows.

#include "axial_attention_cpu.h"
#include "simd.h"

namespace vimpac::axial {

template <class V>
struct Exp2 {
  static HOST_DEVICE V of(V x) {
    if constexpr (std::is_floating_point_v<V>) {
      return exp2_series(Vector<V, 1>{x})[0];
    } else {
      return exp2_series(x);
    }
  }
};

}  // namespace vimpac::axial

namespace vimpac::axial::VIMPAC_ISA {

namespace {

constexpr int ROWS = 6;                              // that a product computes at once
constexpr int COLUMNS = VECTOR_BYTES == 64 ? 4 : 2;  // registers of a row: ROWS × COLUMNS sums stay in registers
constexpr int ROW_LIMIT = (LONGEST_LINE + ROWS) / ROWS * ROWS;  // a line and [CLS], in full groups of ROWS
constexpr int ASK = 4;  // rows asked for at a time: 16 lines of 64 bytes at width 64, what a core can have under way

constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

template <class A>
using MaskWord = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

// A thread's memory for one line.
template <class A>
struct Scratch {
  static constexpr int KEYS = LONGEST_LINE + 16;  // of a row of weights: the line's, [CLS]'s, and what is computed beside them

  int width;  // of a head, filled up to whole registers
  A *copies[4], *keys, *values, *weights, *score_gradients, *zeros;
  MaskWord<A>* is_key;
  uint16_t* bits;

  // With null, only how many bytes there are.
  size_t place(int D, char* memory) {
    width = round_up(D, WIDTH<A>);
    size_t used = 0;
    auto take = [&](auto*& pointer, size_t count) {
      if (memory) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
      used += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    for (A*& copy : copies) take(copy, ROW_LIMIT * width);
    take(keys, LONGEST_LINE * width);
    take(values, LONGEST_LINE * width);
    take(weights, ROW_LIMIT * KEYS);
    take(score_gradients, ROW_LIMIT * KEYS);
    take(zeros, width);  // memory comes as zeros, and these are never written
    take(is_key, LONGEST_LINE);
    take(bits, ROW_LIMIT * 96);
    return used;
  }
};

// The rows of one line, [CLS] last; then [CLS] again, up to a multiple of ROWS.
template <class A>
struct Rows {
  const A* row[ROW_LIMIT];
};

// to[d][j] = from.row[j][d] for j < count, zeros up to `lanes` keys.
template <class A>
void turn(const Rows<A>& from, int count, int lanes, int width, A* to) {
  alignas(64) static const A zeros[4] = {};
  for (int j = 0; j < lanes; j += 4) {
    const A* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = j + i < count ? from.row[j + i] : nullptr;
    int d = 0;
    for (; d + 4 <= width; d += 4) {
      Vector<A, 4> x[4];
      for (int i = 0; i < 4; ++i) x[i] = load<4>(rows[i] ? rows[i] + d : zeros);
      transpose<A>(x);
      for (int i = 0; i < 4; ++i) store<4>(to + (d + i) * lanes + j, x[i]);
    }
    for (; d < width; ++d) {
      for (int i = 0; i < 4; ++i) to[d * lanes + j + i] = rows[i] ? rows[i][d] : A(0);
    }
  }
}

// scores[r][k] = rows.row[first + r] · (key k), keys turned; r < ROWS.
template <int LANES, int NK, class A>
HOST_DEVICE void multiply_keys(const Rows<A>& rows, int first, const A* keys, int width, A* scores) {
  constexpr int N = NK < 2 ? NK : 2;
  using V = Vector<A, LANES>;
  for (int k = 0; k < NK; k += N) {
    V sum[ROWS][N];
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = V{};
    }
    for (int d = 0; d < width; ++d) {
      V key[N];
      UNROLL
      for (int n = 0; n < N; ++n) key[n] = load<LANES>(keys + (d * NK + k + n) * LANES);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int n = 0; n < N; ++n) sum[r][n] += rows.row[first + r][d] * key[n];
      }
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      UNROLL
      for (int n = 0; n < N; ++n) store<LANES>(scores + r * Scratch<A>::KEYS + (k + n) * LANES, sum[r][n]);
    }
  }
}

// products[r] = rows.row[first + r] · x, r < ROWS.
template <class A>
HOST_DEVICE void multiply_vector(const Rows<A>& rows, int first, const A* x, int width, A (&products)[ROWS]) {
  using V = Vector<A, WIDTH<A>>;
  V sum[ROWS];
  UNROLL
  for (int r = 0; r < ROWS; ++r) sum[r] = V{};
  for (int d = 0; d < width; d += WIDTH<A>) {
    V part = load<WIDTH<A>>(x + d);
    UNROLL
    for (int r = 0; r < ROWS; ++r) sum[r] += load<WIDTH<A>>(rows.row[first + r] + d) * part;
  }
  UNROLL
  for (int r = 0; r < ROWS; ++r) products[r] = Lanes::sum(sum[r]);
}

// Row i of `count` rows: Σ_j weights[i · of_row + j · of_term] · terms.row[j], N registers of it from element d on handed to
// write(i, d, registers). `pause` is called between the parts of the work. The first `summed` rows are added to `total`.
template <int N, class A, class Write, class Pause>
HOST_DEVICE void add_rows_at(const A* weights, int of_row, int of_term, const Rows<A>& terms, int n, int count, int d,
                             int summed, A* total, const Write& write, const Pause& pause) {
  using V = Vector<A, WIDTH<A>>;
  for (int i = 0; i < count; i += ROWS) {
    V sum[ROWS][N];
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      UNROLL
      for (int c = 0; c < N; ++c) sum[r][c] = V{};
    }
    const A* w = weights + i * of_row;
    for (int j = 0; j < n; ++j, w += of_term) {
      V term[N];
      UNROLL
      for (int c = 0; c < N; ++c) term[c] = load<WIDTH<A>>(terms.row[j] + d + c * WIDTH<A>);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int c = 0; c < N; ++c) sum[r][c] += w[r * of_row] * term[c];
      }
    }
    pause();
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      if (i + r < count) write(i + r, d, sum[r]);
    }
    if (!total) continue;
    UNROLL
    for (int c = 0; c < N; ++c) {
      A* to = total + d + c * WIDTH<A>;
      V all = load<WIDTH<A>>(to);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        if (i + r < summed) all += sum[r][c];
      }
      store<WIDTH<A>>(to, all);
    }
  }
}

template <class A, class Write, class Pause>
HOST_DEVICE void add_rows(const A* weights, int of_row, int of_term, const Rows<A>& terms, int n, int count, int width,
                          int summed, A* total, const Write& write, const Pause& pause) {
  int d = 0;
  for (; d + COLUMNS * WIDTH<A> <= width; d += COLUMNS * WIDTH<A>) {
    add_rows_at<COLUMNS>(weights, of_row, of_term, terms, n, count, d, summed, total, write, pause);
  }
  for (; d < width; d += WIDTH<A>) add_rows_at<1>(weights, of_row, of_term, terms, n, count, d, summed, total, write, pause);
}

// 16 bits for each probability of the line, [row][key] with `keys_apart` keys a row; [CLS]'s row is named by the first token's.
template <class A>
void draw_bits(const Call& call, const int64_t* rows, int L, int keys, int keys_apart, uint16_t* bits) {
  constexpr int LANES = WIDTH<uint32_t>;
  using U = Vector<uint32_t, LANES>;
  PhiloxKey seed(call.seed);
  int calls = keys <= 8 ? 1 : 4, at_once = LANES / calls;  // lanes: rows × calls
  for (int i = 0; i <= L; i += at_once) {
    uint32_t low[LANES], high[LANES], number[LANES], is_cls[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      int r = i + lane / calls < L ? i + lane / calls : L;
      int64_t row = rows[r < L ? r : 0];
      low[lane] = static_cast<uint32_t>(row);
      high[lane] = static_cast<uint32_t>(row >> 32);
      number[lane] = lane % calls;
      is_cls[lane] = r == L;
    }
    for (int group = 0; group < (calls == 1 ? 1 : (keys + 31) / 32); ++group) {
      U counter = raw_load<U>(number) + static_cast<uint32_t>(4 * group);
      auto words = dropout_words(raw_load<U>(low), raw_load<U>(high), counter, raw_load<U>(is_cls), seed);
      uint32_t word[4][LANES];
      for (int w = 0; w < 4; ++w) raw_store(word[w], words.w[w]);
      for (int r = 0; r < at_once && i + r <= L; ++r) {  // key 32·group + 8·word + 2·call + half is then at its place
        uint16_t* to = bits + (i + r) * keys_apart + 32 * group;
        for (int w = 0; w < 4; ++w) __builtin_memcpy(to + 2 * calls * w, word[w] + calls * r, 4 * calls);
      }
    }
  }
}

template <class T>
struct Line {
  using A = typename Arithmetic<T>::type;

  const Call& call;
  Scratch<A>& s;
  int64_t clip;
  int axis, line, head, L;
  bool in_place;  // rows are used where they lie
  bool broken[LONGEST_LINE];  // PAD tokens whose query is not finite
  int64_t offset[LONGEST_LINE], number[LONGEST_LINE];  // of the line's tokens: in qkv, and in raster order of all clips
  Rows<A> q, k, v, g;
  const T* ahead[4 * LONGEST_LINE];  // rows of the next head, to ask memory for while this one is computed
  int rows_ahead, asked;

  Line(const Call& call, Scratch<A>& s, int64_t clip, int axis, int line)
      : call(call), s(s), clip(clip), axis(axis), line(line), head(0), L(call.grid.length(axis)),
        in_place(std::is_same_v<T, A> && s.width == call.D) {
    for (int i = 0; i < LONGEST_LINE; ++i) s.is_key[i] = 0;
    for (int i = 0; i < L; ++i) {
      Position at = position(call.grid, axis, line, i);
      offset[i] = clip * call.s_b + at.t * call.s_t + at.h * call.s_h + at.w * call.s_w;
      number[i] = clip * call.grid.tokens() + at.raster(call.grid);
      bool pad = call.pad && call.pad[clip * call.p_b + at.t * call.p_t + at.h * call.p_h + at.w * call.p_w];
      s.is_key[i] = pad ? 0 : ~MaskWord<A>{0};
    }
  }

  // Where a row lies, or a copy of it in the arithmetic's type with zeros behind it.
  const A* row(const T* from, A* copy) {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place) return from;
    }
    int d = 0;
    for (; d + WIDTH<A> <= call.D; d += WIDTH<A>) store<WIDTH<A>>(copy + d, load<WIDTH<A>>(from + d));
    for (; d < s.width; ++d) copy[d] = d < call.D ? to_arithmetic(from[d]) : A(0);
    return copy;
  }

  // What stands at PAD: keys and values are no one's, and a query that is not finite counts as zeros. Else 0 · NaN would reach
  // the line's other tokens.
  bool counts_as_zeros(int part, int i, const T* from) {
    if (s.is_key[i]) return broken[i] = false;
    if (part > 0) return true;
    A sum = 0;
    for (int d = 0; d < call.D; ++d) sum += to_arithmetic(from[d]) - to_arithmetic(from[d]);  // 0, or NaN of what is not finite
    return broken[i] = sum != 0;
  }

  void read(int part, Rows<A>& rows) {
    const T* tokens = static_cast<const T*>(call.qkv) + part * call.s_3 + head * call.s_n;
    const T* cls = static_cast<const T*>(call.cls) + clip * call.c_b + part * call.c_3 + head * call.c_n;
    for (int i = 0; i < L; ++i) ahead[rows_ahead++] = tokens + offset[i] + call.s_n;
    for (int i = 0; i <= L; ++i) {
      const T* from = i < L ? tokens + offset[i] : cls;
      bool zeros = i < L && counts_as_zeros(part, i, from);
      rows.row[i] = zeros ? s.zeros : row(from, s.copies[part] + i * s.width);
    }
    for (int i = L + 1; i < ROW_LIMIT; ++i) rows.row[i] = rows.row[L];
  }

  // The upstream gradient; [CLS]'s output is a mean over lines, so its rows get their share.
  void read_gradient() {
    const T* grad = static_cast<const T*>(call.grad) + static_cast<int64_t>(head) * call.D;
    int64_t apart = static_cast<int64_t>(call.N) * call.D;
    for (int i = 0; i < L; ++i) {
      const T* from = grad + number[i] * apart;
      ahead[rows_ahead++] = from + call.D;
      g.row[i] = row(from, s.copies[3] + i * s.width);
    }
    A* cls = s.copies[3] + L * s.width;
    const T* from = grad + (call.B * call.grid.tokens() + clip) * apart;
    for (int d = 0; d < s.width; ++d) cls[d] = d < call.D ? to_arithmetic(from[d]) / call.grid.lines(axis) : A(0);
    for (int i = L; i < ROW_LIMIT; ++i) g.row[i] = cls;
  }

  // Asks for a few of the next head's rows; called between the parts of the work, so that memory is never idle and never asked
  // for more at once than it can have under way.
  HOST_DEVICE void ask(int rows) {
    for (; rows > 0 && asked < rows_ahead; --rows, ++asked) {
      const char* from = reinterpret_cast<const char*>(ahead[asked]);
      for (int byte = 0; byte < call.D * static_cast<int>(sizeof(T)); byte += 64) __builtin_prefetch(from + byte);
    }
  }

  template <int LANES, int NK>
  void probabilities(bool backward) {
    constexpr int APART = Scratch<A>::KEYS;
    using V = Vector<A, LANES>;
    int keys = L + call.cls_in_context, keys_apart = keys <= 8 ? 8 : round_up(keys, 32);
    bool drops = call.dropout.threshold > 0;
    if (drops) {
      int64_t rows[LONGEST_LINE];
      for (int i = 0; i < L; ++i) rows[i] = number[i] * call.N + head;
      draw_bits<A>(call, rows, L, keys, keys_apart, s.bits);
    }
    turn(k, L, NK * LANES, s.width, s.keys);
    if (backward) turn(v, L, NK * LANES, s.width, s.values);
    const A scale = A(1) / sqrt_of(A(call.D)), in_bits = scale * A(1.4426950408889634074);
    for (int first = 0; first <= L; first += ROWS) {
      A *weights = s.weights + first * APART, *gradients = s.score_gradients + first * APART, on_cls[ROWS], from_cls[ROWS];
      multiply_keys<LANES, NK>(q, first, s.keys, s.width, weights);
      ask(ASK);
      multiply_vector(q, first, k.row[L], s.width, on_cls);
      if (backward) {
        multiply_keys<LANES, NK>(g, first, s.values, s.width, gradients);
        ask(ASK);
        multiply_vector(g, first, v.row[L], s.width, from_cls);
      }
      for (int r = 0; r < ROWS && first + r <= L; ++r) {
        V p[NK], keep[NK];
        A cls = call.cls_in_context ? on_cls[r] * in_bits : -static_cast<A>(INFINITY), keep_cls = 1;
        for (int n = 0; n < NK; ++n) {
          auto is_key = raw_load<Vector<MaskWord<A>, LANES>>(s.is_key + n * LANES);
          p[n] = is_key ? load<LANES>(weights + r * APART + n * LANES) * in_bits : V{} - static_cast<A>(INFINITY);
          keep[n] = V{} + A(1);
        }
        softmax<Lanes>(p, cls);
        if (drops) {
          const uint16_t* bits = s.bits + (first + r) * keys_apart;
          for (int n = 0; n < NK; ++n) {
            auto words = __builtin_convertvector(raw_load<Vector<uint16_t, LANES>>(bits + n * LANES), Vector<MaskWord<A>, LANES>);
            keep[n] = words >= MaskWord<A>{call.dropout.threshold} ? V{} + A(call.dropout.scale) : V{};
          }
          keep_cls = call.cls_in_context && bits[L] >= call.dropout.threshold ? A(call.dropout.scale) : A(0);
        }
        if (backward) {
          V dp[NK];
          for (int n = 0; n < NK; ++n) dp[n] = load<LANES>(gradients + r * APART + n * LANES) * keep[n];
          A dp_cls = from_cls[r] * keep_cls;
          softmax_gradient<Lanes>(p, cls, dp, dp_cls, first + r < L && broken[first + r] ? A(0) : scale);
          for (int n = 0; n < NK; ++n) store<LANES>(gradients + r * APART + n * LANES, dp[n]);
          gradients[r * APART + L] = dp_cls;
        }
        for (int n = 0; n < NK; ++n) store<LANES>(weights + r * APART + n * LANES, p[n] * keep[n]);
        weights[r * APART + L] = cls * keep_cls;
      }
    }
  }

  static A sqrt_of(A x) {
    if constexpr (sizeof(A) == 4) {
      return __builtin_sqrtf(x);
    } else {
      return __builtin_sqrt(x);
    }
  }

  // Probabilities (and the scores' gradients) of the line, in registers of as few lanes as hold it.
  void weigh(bool backward) {
    constexpr int W = WIDTH<A>;
    if (W >= 8 && L <= W / 2) return probabilities<(W >= 8 ? W / 2 : W), 1>(backward);
    if (L <= W) return probabilities<W, 1>(backward);
    if (L <= 2 * W) return probabilities<W, 2>(backward);
    if (L <= 4 * W) return probabilities<W, 4>(backward);
    if constexpr (8 * W <= LONGEST_LINE) {
      if (L <= 8 * W) return probabilities<W, 8>(backward);
    }
    if constexpr (16 * W <= LONGEST_LINE) {
      if (L <= 16 * W) return probabilities<W, 16>(backward);
    }
    if constexpr (32 * W <= LONGEST_LINE) return probabilities<W, 32>(backward);
  }

  // Writes sums of rows: a token's to `to` + its number · apart, [CLS]'s onto `cls`. Tokens' are added to `total`, if given.
  HOST_DEVICE void write(const A* weights, int of_row, int of_term, const Rows<A>& terms, int n, int count, T* to, int64_t apart,
                         A* cls, A* total = nullptr) {
    constexpr int W = WIDTH<A>;
    const int last = L, D = call.D;
    const bool streams = call.streams;
    auto write_registers = [&](int i, int d, auto& sum) {
      constexpr int N = sizeof(sum) / sizeof(sum[0]);
      if (i == last) {
        UNROLL
        for (int c = 0; c < N; ++c) store<W>(cls + d + c * W, load<W>(cls + d + c * W) + sum[c]);
        return;
      }
      T* row = to + number[i] * apart + d;
      if (d + N * W <= D) {
        if constexpr (std::is_same_v<T, A>) {
          if (streams) {
            UNROLL
            for (int c = 0; c < N; ++c) stream<W>(row + c * W, sum[c]);
            return;
          }
        }
        UNROLL
        for (int c = 0; c < N; ++c) store<W>(row + c * W, sum[c]);
      } else {
        A rest[N * W];  // indexed in place of `sum`, which clang would keep in memory then, in the loop that adds it up, too
        UNROLL
        for (int c = 0; c < N; ++c) store<W>(rest + c * W, sum[c]);
        for (int e = 0; d + e < D; ++e) from_arithmetic(row[e], rest[e]);
      }
    };
    add_rows(weights, of_row, of_term, terms, n, count, s.width, L, total, write_registers, [&] { ask(ASK); });
  }

  void forward(int n, A* part) {
    head = n;
    rows_ahead = asked = 0;
    read(0, q), read(1, k), read(2, v);
    weigh(false);
    T* out = static_cast<T*>(call.out) + static_cast<int64_t>(head) * call.D;
    int keys = L + call.cls_in_context;
    write(s.weights, Scratch<A>::KEYS, 1, v, keys, L + 1, out, static_cast<int64_t>(call.N) * call.D, part);
  }

  void backward(int n, A* part) {
    head = n;
    rows_ahead = asked = 0;
    read(0, q), read(1, k), read(2, v);
    read_gradient();
    weigh(true);
    T* out = static_cast<T*>(call.out) + static_cast<int64_t>(head) * call.D;
    int64_t apart = static_cast<int64_t>(call.N) * call.D;
    int keys = L + call.cls_in_context;
    constexpr int APART = Scratch<A>::KEYS;
    write(s.score_gradients, APART, 1, k, keys, L + 1, out, 3 * apart, part, part + 3 * s.width);
    write(s.score_gradients, 1, APART, q, L + 1, keys, out + apart, 3 * apart, part + s.width);
    write(s.weights, 1, APART, g, L + 1, keys, out + 2 * apart, 3 * apart, part + 2 * s.width, part + 4 * s.width);
  }
};

template <class T, bool BACKWARD>
void run_item(const Call& call, int64_t item, void* memory) {
  using A = typename Arithmetic<T>::type;
  constexpr int KINDS = BACKWARD ? BACKWARD_KINDS : FORWARD_KINDS;
  int chunk = static_cast<int>(item % call.chunks), group = static_cast<int>(item / call.chunks % call.groups);
  int64_t clip = item / call.chunks / call.groups;
  int axis = call.axes[group];
  if (chunk >= call.chunks_of(axis)) return;
  Scratch<A> s;
  s.place(call.D, static_cast<char*>(memory));
  int first = chunk * call.lines_of_item(axis), last = first + call.lines_of_item(axis);
  if (last > call.grid.lines(axis)) last = call.grid.lines(axis);
  const int size = KINDS * s.width, begin = group * call.heads(), end = begin + call.heads();
  A* parts = static_cast<A*>(call.parts) + (clip * call.chunks + chunk) * call.N * size;
  for (int i = begin * size; i < end * size; ++i) parts[i] = 0;
  for (int line = first; line < last; ++line) {
    Line<T> now(call, s, clip, axis, line);
    for (int n = begin; n < end; ++n) BACKWARD ? now.backward(n, parts + n * size) : now.forward(n, parts + n * size);
  }
  finish_streams();
}

template <class T>
void add_parts(const Call& call, int64_t clip, int kinds) {
  using A = typename Arithmetic<T>::type;
  const int written = kinds == FORWARD_KINDS ? 1 : 3;
  T* out = static_cast<T*>(call.out) + (call.B * call.grid.tokens() + clip) * written * call.N * call.D;
  const int width = round_up(call.D, WIDTH<A>);
  const A* parts = static_cast<const A*>(call.parts) + clip * call.chunks * call.N * kinds * width;
  for (int n = 0; n < call.N; ++n) {
    int axis = call.axes[n / call.heads()];
    A share = kinds == FORWARD_KINDS ? A(1) / call.grid.lines(axis) : A(1);
    for (int kind = 0; kind < written; ++kind) {
      for (int d = 0; d < call.D; ++d) {
        A sum = 0;
        for (int chunk = 0; chunk < call.chunks_of(axis); ++chunk) {
          sum += parts[((static_cast<int64_t>(chunk) * call.N + n) * kinds + kind) * width + d];
        }
        from_arithmetic(out[(kind * call.N + n) * call.D + d], sum * share);
      }
    }
  }
}

// Sums over all clips' tokens and [CLS] of a head's gradients; those of keys add up to 0.
template <class T>
void add_sums(const Call& call, int head, void* to) {
  using A = typename Arithmetic<T>::type;
  const int width = round_up(call.D, WIDTH<A>), chunks = call.chunks_of(call.axes[head / call.heads()]);
  A* sums = static_cast<A*>(to);
  for (int kind = 0; kind < 3; ++kind) {
    A* row = sums + (static_cast<int64_t>(kind) * call.N + head) * call.D;
    for (int d = 0; d < call.D; ++d) row[d] = 0;
    for (int64_t item = 0; kind != 1 && item < call.B * chunks; ++item) {
      const int64_t clip = item / chunks, chunk = item % chunks;
      const A* part = static_cast<const A*>(call.parts) + ((clip * call.chunks + chunk) * call.N + head) * BACKWARD_KINDS * width;
      const A *cls = part + kind * width, *tokens = part + (kind == 0 ? 3 : 4) * width;
      for (int d = 0; d < call.D; ++d) row[d] += tokens[d] + cls[d];
    }
  }
}

template <class T>
size_t scratch_bytes(const Call& call) {
  Scratch<typename Arithmetic<T>::type> scratch;
  return scratch.place(call.D, nullptr);
}

template <class T>
size_t parts_bytes(const Call& call, int kinds) {
  using A = typename Arithmetic<T>::type;
  return call.B * call.chunks * call.N * kinds * round_up(call.D, WIDTH<A>) * sizeof(A);
}

template <class T>
constexpr LineKernels kernels_of() {
  return {scratch_bytes<T>, parts_bytes<T>, run_item<T, false>, run_item<T, true>, add_parts<T>, add_sums<T>};
}

}  // namespace

const Kernels axial_attention_kernels = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>()};

}  // namespace vimpac::axial::VIMPAC_ISA
