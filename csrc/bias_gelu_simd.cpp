// GELU with a bias on a CPU.

#include "bias_gelu_cpu.h"
#include "pieces.h"
#include "simd.h"

namespace vimpac::bias_gelu::VIMPAC_ISA {

namespace {

// Φ, the normal distribution, and φ, its density. In float32 the relative error of Φ is 5e-7 near 0, and 6e-8 · z² in the left tail:
//
//     Φ(-√2 u) = exp(-u²) · erfcx(u) / 2,   erfcx(u) ≈ t · P(t),   t = 1 / (1 + 0.3 u),   u ≥ 0
//
// P of degree 8 was fitted to minimise the largest relative error, 2e-8, on 0 ≤ u ≤ 10. Beyond, exp(-u²) is 0 in float32.
template <class A>
struct Normal {
  using V = Vector<A, WIDTH<A>>;
  V distribution, density;

  HOST_DEVICE explicit Normal(V z) {
    if constexpr (sizeof(A) == 4) {
      constexpr float P[] = {0.169188006f,  0.170715206f,  0.148339319f, 0.214925466f,  -0.094649313f,
                             0.547717954f,  -0.512276249f, 0.485562308f, -0.129522717f};
      const V u = (z < V{} ? -z : z) * 0.70710678f;
      const V t = 1.0f / (1.0f + 0.3f * u);
      V erfcx = V{} + P[8];
      UNROLL
      for (int i = 7; i >= 0; --i) erfcx = erfcx * t + P[i];
      const V exponential = exp2_series(z * z * -0.72134752f);  // exp(-z² / 2)
      const V tail = 0.5f * exponential * erfcx * t;
      distribution = z < V{} ? tail : 1.0f - tail;
      distribution = z == z ? distribution : z;
      density = exponential * 0.39894228f;
    } else {
      UNROLL
      for (int i = 0; i < WIDTH<A>; ++i) {
        distribution[i] = 0.5 * __builtin_erfc(z[i] * -0.70710678118654752440);
        density[i] = 0.39894228040143267794 * __builtin_exp(-0.5 * z[i] * z[i]);
      }
    }
  }
};

template <class T, class A>
void forward(const Call& call, int64_t begin, int64_t end) {
  const A* bias = static_cast<const A*>(call.bias);
  for (int64_t r = begin; r < end; ++r) {
    const T* h = static_cast<const T*>(call.h) + r * call.columns;
    T* out = static_cast<T*>(call.out) + r * call.columns;
    for_pieces<A>(call.columns, [&](auto piece) {
      const auto z = piece.read(h) + piece.read(bias);
      piece.write_result(out, z * Normal<A>(z).distribution, call.streams);
    });
  }
  finish_streams();
}

template <class T, class A>
void backward(const Call& call, int64_t begin, int64_t end) {
  const A* bias = static_cast<const A*>(call.bias);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* part = static_cast<A*>(call.parts) + chunk * call.columns;
    for (int64_t d = 0; d < call.columns; ++d) part[d] = 0;
    const int64_t last = (chunk + 1) * call.chunk_rows() < call.rows ? (chunk + 1) * call.chunk_rows() : call.rows;
    for (int64_t r = chunk * call.chunk_rows(); r < last; ++r) {
      const T *h = static_cast<const T*>(call.h) + r * call.columns, *grad = static_cast<const T*>(call.grad) + r * call.columns;
      T* of_h = static_cast<T*>(call.of_h) + r * call.columns;
      T* out = call.out ? static_cast<T*>(call.out) + r * call.columns : nullptr;
      for_pieces<A>(call.columns, [&](auto piece) {
        const auto z = piece.read(h) + piece.read(bias);
        const Normal<A> normal(z);
        const auto gradient = piece.read(grad) * (normal.distribution + z * normal.density);
        piece.write_result(of_h, gradient, call.streams);
        if (out) piece.write_result(out, z * normal.distribution, call.streams);
        piece.add(part, gradient);
      });
    }
  }
  finish_streams();
}

template <class A>
void add_parts(const Call& call, void* of_bias) {
  A* to = static_cast<A*>(of_bias);
  const A* parts = static_cast<const A*>(call.parts);
  for (int64_t d = 0; d < call.columns; ++d) to[d] = 0;
  for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
    for_pieces<A>(call.columns, [&](auto piece) { piece.add(to, piece.read(parts + chunk * call.columns)); });
  }
}

template <class T>
constexpr RowKernels kernels_of() {
  using A = typename Arithmetic<T>::type;
  return {forward<T, A>, backward<T, A>, add_parts<A>};
}

}  // namespace

const Kernels bias_gelu_kernels = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>()};

}  // namespace vimpac::bias_gelu::VIMPAC_ISA
