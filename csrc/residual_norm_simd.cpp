// The residual connection with its norm on a CPU, a row at a time. A row's numbers stay in the first cache from pass to pass.

#include "dropout_group.h"
#include "pieces.h"
#include "residual_norm_cpu.h"
#include "simd.h"

namespace vimpac::residual_norm::VIMPAC_ISA {

namespace {

constexpr int LANES = WIDTH<uint32_t>;

template <class A>
struct Scratch {
  A *factors, *row, *products, *inverse_weight;

  static constexpr int64_t ROOM = 2 * DROPOUT_GROUP;  // a row's first and last group may reach into its neighbours

  Scratch(const Call& call, void* memory) {
    const int64_t size = (call.columns + ROOM + 63) / 64 * 64;
    factors = static_cast<A*>(memory);
    row = factors + size, products = row + size, inverse_weight = products + size;
  }
  static size_t bytes(const Call& call) { return 4 * ((call.columns + ROOM + 63) / 64 * 64) * sizeof(A); }
};

// Dropout's factors of a row, 0 or the scale.
template <class A>
const A* draw(const Call& call, int64_t r, A* factors) {
  const int64_t first = r * call.columns, group = first / DROPOUT_GROUP;
  const int64_t last = (first + call.columns - 1) / DROPOUT_GROUP;
  for (int64_t g = group; g <= last; ++g) {
    A* to = factors + (g - group) * DROPOUT_GROUP;
    UNROLL
    for (int c = 0; c < DROPOUT_COUNTERS; c += LANES) {
      auto words = dropout_group_words<LANES>(g, c, PhiloxKey(call.seed));
      UNROLL
      for (int w = 0; w < 4; ++w) {
        auto factor = dropout_factors<A, LANES>(words.w[w], call.threshold, static_cast<A>(call.scale));
        raw_store(to + w * DROPOUT_COUNTERS + c, factor);
      }
    }
  }
  return factors + (first - group * DROPOUT_GROUP);
}

template <class A>
A inverse_root(A x) {
  if constexpr (sizeof(A) == 4) {
    return A(1) / __builtin_sqrtf(x);
  } else {
    return A(1) / __builtin_sqrt(x);
  }
}

// --- forward -------------------------------------------------------------------------------------------------------------

// Of a row that is kept unrounded, its place in these; else null.
template <class T, class Pointer>
T* exact_row(const Call& call, Pointer of, int64_t r) {
  const int64_t first = call.rows - call.exact_rows;
  return of && r >= first ? static_cast<T*>(of) + (r - first) * call.columns : nullptr;
}

template <class X, class Y, class A, bool DROPS>
void forward_row(const Call& call, int64_t r, const Scratch<A>& scratch) {
  using V = Vector<A, WIDTH<A>>;
  const int64_t C = call.columns;
  const X* x = static_cast<const X*>(call.x) + r * C;
  const Y* y = static_cast<const Y*>(call.y) + r * C;
  const A *bias = static_cast<const A*>(call.bias), *weight = static_cast<const A*>(call.weight);
  const A* norm_bias = static_cast<const A*>(call.norm_bias);
  X *out = static_cast<X*>(call.out) + r * C, *sum = call.sum ? static_cast<X*>(call.sum) + r * C : nullptr;
  const A* exact = exact_row<const A>(call, call.exact, r);
  A *out_exact = exact_row<A>(call, call.out_exact, r), *row = scratch.row;
  const A* factors = DROPS ? draw(call, r, scratch.factors) : nullptr;
  V total{}, squares{};
  for_pieces<A>(C, [&](auto piece) {
    V added = piece.read(y);
    if (bias) added += piece.read(bias);
    if constexpr (DROPS) added *= piece.read(factors);
    V s = (exact ? piece.read(exact) : piece.read(x)) + added;
    if (sum) {
      piece.write(sum, s);
      if (!exact) s = piece.read(sum);
    }
    piece.write(row, s);
    total += piece.columns_of(s);
  });
  const A mean = Lanes::sum(total) / C;
  for_pieces<A>(C, [&](auto piece) {
    V centred = piece.columns_of(piece.read(row) - mean);
    squares += centred * centred;
  });
  const A rstd = inverse_root(Lanes::sum(squares) / C + static_cast<A>(call.eps));
  for_pieces<A>(C, [&](auto piece) {
    V result = (piece.read(row) - mean) * rstd * piece.read(weight) + piece.read(norm_bias);
    piece.write_result(out, result, call.streams);
    if (out_exact) piece.write(out_exact, result);
  });
  A* statistics = static_cast<A*>(call.statistics);
  statistics[r] = mean, statistics[call.rows + r] = rstd;
}

template <class X, class Y, class A>
void forward(const Call& call, int64_t begin, int64_t end, void* memory) {
  const Scratch<A> scratch(call, memory);
  for (int64_t r = begin; r < end; ++r) {
    call.threshold ? forward_row<X, Y, A, true>(call, r, scratch) : forward_row<X, Y, A, false>(call, r, scratch);
  }
  finish_streams();
}

// --- backward ------------------------------------------------------------------------------------------------------------

template <class X, class Y, class A, bool DROPS>
void backward_row(const Call& call, int64_t r, const Scratch<A>& scratch, A* of_weight, A* of_norm_bias, A* of_bias) {
  using V = Vector<A, WIDTH<A>>;
  const int64_t C = call.columns;
  const X *grad = static_cast<const X*>(call.grad) + r * C, *kept = static_cast<const X*>(call.kept) + r * C;
  const X* grad_sum = call.grad_sum ? static_cast<const X*>(call.grad_sum) + r * C : nullptr;
  const A *weight = static_cast<const A*>(call.weight), *norm_bias = static_cast<const A*>(call.norm_bias);
  X* of_x = static_cast<X*>(call.of_x) + r * C;
  Y* of_y = call.of_y ? static_cast<Y*>(call.of_y) + r * C : nullptr;
  const A* statistics = static_cast<const A*>(call.statistics);
  const A mean = statistics[r], rstd = statistics[call.rows + r];
  A *normalised = scratch.row, *products = scratch.products;
  const A* factors = DROPS ? draw(call, r, scratch.factors) : nullptr;
  const A* grad_exact = exact_row<const A>(call, call.grad_exact, r);
  A* of_exact = exact_row<A>(call, call.of_exact, r);
  V total{}, dot{};
  for_pieces<A>(C, [&](auto piece) {
    V g = piece.read(grad), k = piece.read(kept);
    if (grad_exact) g += piece.read(grad_exact);
    V n = call.from_sum ? (k - mean) * rstd : (k - piece.read(norm_bias)) * piece.read(scratch.inverse_weight);
    V a = g * piece.read(weight);
    piece.write(normalised, n);
    piece.write(products, a);
    piece.add(of_weight, g * n);
    piece.add(of_norm_bias, g);
    total += piece.columns_of(a);
    dot += piece.columns_of(a * n);
  });
  const A mean_product = Lanes::sum(total) / C, mean_dot = Lanes::sum(dot) / C;
  for_pieces<A>(C, [&](auto piece) {
    V ds = (piece.read(products) - mean_product - piece.read(normalised) * mean_dot) * rstd;
    if (grad_sum) ds += piece.read(grad_sum);
    piece.write_result(of_x, of_exact ? V{} : ds, call.streams);
    if (of_exact) piece.write(of_exact, ds);
    if constexpr (DROPS) ds *= piece.read(factors);
    if (of_y) piece.write_result(of_y, ds, call.streams);
    piece.add(of_bias, ds);
  });
}

template <class X, class Y, class A>
void backward(const Call& call, int64_t begin, int64_t end, void* memory) {
  const Scratch<A> scratch(call, memory);
  const A* weight = static_cast<const A*>(call.weight);
  for (int64_t d = 0; d < call.columns; ++d) {
    const A inverse = A(1) / weight[d];
    scratch.inverse_weight[d] = __builtin_isfinite(inverse) ? inverse : A(0);
  }
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* parts = static_cast<A*>(call.parts) + chunk * 3 * call.columns;
    for (int64_t i = 0; i < 3 * call.columns; ++i) parts[i] = 0;
    const int64_t last = (chunk + 1) * call.chunk_rows() < call.rows ? (chunk + 1) * call.chunk_rows() : call.rows;
    A *of_norm_bias = parts + call.columns, *of_bias = of_norm_bias + call.columns;
    for (int64_t r = chunk * call.chunk_rows(); r < last; ++r) {
      call.threshold ? backward_row<X, Y, A, true>(call, r, scratch, parts, of_norm_bias, of_bias)
                     : backward_row<X, Y, A, false>(call, r, scratch, parts, of_norm_bias, of_bias);
    }
  }
  finish_streams();
}

template <class A>
void add_parts(const Call& call, void* columns) {
  A* to = static_cast<A*>(columns);
  const A* parts = static_cast<const A*>(call.parts);
  const int64_t size = 3 * call.columns;
  for (int64_t i = 0; i < size; ++i) to[i] = 0;
  for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
    for_pieces<A>(size, [&](auto piece) { piece.add(to, piece.read(parts + chunk * size)); });
  }
}

template <class X, class Y>
constexpr RowKernels kernels_of() {
  using A = typename Arithmetic<X>::type;
  return {Scratch<A>::bytes, forward<X, Y, A>, backward<X, Y, A>, add_parts<A>};
}

}  // namespace

const Kernels residual_norm_kernels = {kernels_of<float, float>(), kernels_of<double, double>(),
                                       kernels_of<BFloat16, BFloat16>(), kernels_of<float, BFloat16>()};

}  // namespace vimpac::residual_norm::VIMPAC_ISA
