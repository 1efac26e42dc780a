// The ops vimpac::info_nce_pack.cpu, info_nce.cpu and info_nce_backward.cpu; vimpac/ops/info_nce.py has formula and schemas.
//
// Scores exist a tile at a time, small enough for the cache: torch's own product makes it, vectorised code turns it into sums
// of exponentials or into weights of the gradient, and torch's products take those to the features. Memory beyond the features:
// one more copy of them, of length 1, a tile, and a few numbers a row.
//
// Scores s are symmetric. So of the square of this process's rows only tiles on and above the diagonal are made, each for its
// rows and, mirrored, for its columns; other ranks' columns are scored plainly. Row i's partner is p, its negatives are the j:
//
//     loss_i = log(1 + Σ_j exp(s_ij - s_ip)),  lse_i = s_ip + loss_i,  p_ij = exp(s_ij - lse_i),  R_i = Σ_j p_ij
//     d loss / d unit_i = (Σ_j (g_i p_ij + g_j p_ji) unit_j - (g_i R_i + g_p R_p) unit_p) / (m γ)
//
// with g_i the upstream gradient of i's rank. Nothing cancels where partners agree: p_ip - 1 = -R_i is a sum of small terms.
// The order of all sums depends on the sizes alone, except within torch's products.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "info_nce_cpu.h"

namespace vimpac::contrastive {

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STRIP = 32;       // rows of a tile that a thread takes at a time
constexpr int64_t GRAIN = 64;       // features that are worth a thread
constexpr double SHORTEST = 1e-12;  // a length below counts as this

template <class T>
const InfoNceKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return info_nce_float();
  } else {
    return info_nce_double();
  }
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* input(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

Tensor slice(Tensor x, int64_t first, int64_t count) { return torch::stable::narrow(x, 0, first, count); }

// out = beta out + alpha a @ b. A shim that torch keeps stable; the dispatcher takes no scalars from here.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// --- tiles -------------------------------------------------------------------------------------------------------------

struct Range {
  int64_t first, size;
  int64_t end() const { return first + size; }
};

// Scores of a tile. Beyond its last column they are -infinity, up to a multiple of what a vector holds.
template <class T>
struct Tile {
  Range rows, columns;  // numbers of features
  bool mirrored;        // also stands for its transpose, which is not visited
  Tensor tensor;        // [rows, columns]
  T* scores;
  int64_t stride, padded;

  T& at(int64_t i, int64_t j) const { return scores[(i - rows.first) * stride + j - columns.first]; }

  // f(first row in the tile, rows, number of the strip)
  template <class F>
  void strips(const F& f) const {
    parallel((rows.size + STRIP - 1) / STRIP, 1, [&](int64_t k) { f(k * STRIP, std::min(STRIP, rows.size - k * STRIP), k); });
  }
};

// The rows that this process scores, among all features.
struct Problem {
  int64_t N, offset, rows;
  int64_t tile() const { return N < 8192 ? 512 : 1024; }  // rows and columns; in small tiles less lies on the diagonal
  int64_t partner(int64_t i) const { return i < offset + rows / 2 ? i + rows / 2 : i - rows / 2; }
};

template <class T>
Tensor units(const Tensor& features, const Tensor& inverse) {
  const int64_t N = features.size(0), d = features.size(1);
  Tensor out = torch::stable::new_empty(features, {N, d}, inverse.scalar_type());
  auto widen = [&](const auto* from) {
    parallel(N, GRAIN, [=, to = data<T>(out), length = input<T>(inverse)](int64_t i) {
      for (int64_t k = i * d; k < (i + 1) * d; ++k) to[k] = static_cast<T>(from[k]) * length[i];
    });
  };
  features.scalar_type() == ScalarType::BFloat16 ? widen(input<BFloat16>(features)) : widen(input<T>(features));
  return out;
}

std::vector<Range> cut(Range range, int64_t size) {
  std::vector<Range> pieces;
  for (int64_t first = range.first; first < range.end(); first += size) {
    pieces.push_back({first, std::min(size, range.end() - first)});
  }
  return pieces;
}

// f(tile) for all tiles of the rows. Without `mirror` both triangles of the square are visited.
template <class T, class F>
void for_tiles(const Tensor& unit, Problem problem, double temperature, bool mirror, const F& f) {
  constexpr int64_t LANES = InfoNceKernels<T>::COLUMNS;
  const int64_t size = problem.tile(), stride = (std::min(size, problem.N) + LANES - 1) / LANES * LANES;
  Tensor buffer = torch::stable::new_empty(unit, {std::min(size, problem.rows), stride});
  auto visit = [&](Range rows, Range columns, bool mirrored) {
    Tensor strip = slice(buffer, 0, rows.size), tensor = torch::stable::narrow(strip, 1, 0, columns.size);
    Tensor others = torch::stable::transpose(slice(unit, columns.first, columns.size), 0, 1);
    multiply(tensor, slice(unit, rows.first, rows.size), others, 0, 1 / temperature);
    const int64_t padded = (columns.size + LANES - 1) / LANES * LANES;
    Tile<T> tile{rows, columns, mirrored, tensor, data<T>(buffer), stride, padded};
    for (int64_t i = rows.first; i < rows.end(); ++i) {
      std::fill(&tile.at(i, columns.end()), &tile.at(i, columns.first) + padded, -std::numeric_limits<T>::infinity());
    }
    f(tile);
  };
  const int64_t end = problem.offset + problem.rows;
  const std::vector<Range> square = cut({problem.offset, problem.rows}, size), after = cut({end, problem.N - end}, size);
  std::vector<Range> others = cut({0, problem.offset}, size);
  others.insert(others.end(), after.begin(), after.end());
  for (size_t i = 0; i < square.size(); ++i) {
    for (size_t j = mirror ? i : 0; j < square.size(); ++j) visit(square[i], square[j], mirror && j > i);
    for (Range columns : others) visit(square[i], columns, false);
  }
}

// Leaves negatives only.
template <class T>
void drop_itself_and_partner(const Tile<T>& tile, Problem problem) {
  for (int64_t i = tile.rows.first; i < tile.rows.end(); ++i) {
    for (int64_t j : {i, problem.partner(i)}) {
      if (tile.columns.first <= j && j < tile.columns.end()) tile.at(i, j) = -std::numeric_limits<T>::infinity();
    }
  }
}

// What belongs to each feature, with room for a tile's last vector.
template <class T>
std::vector<T> of_features(Problem problem, T value) {
  return std::vector<T>(problem.N + InfoNceKernels<T>::COLUMNS, value);
}

// Sums over the negatives of each row: visits the tile with a kernel that adds to those of rows and of columns.
template <class T>
class BothSums {
 public:
  explicit BothSums(Problem problem)
      : sums(problem.rows), problem_(problem), of_columns_(problem.tile() / STRIP * problem.tile()) {}

  template <class Kernel>
  void visit(const Tile<T>& tile, Kernel kernel, const std::vector<T>& shift, const std::vector<T>& g) {
    const int64_t i = tile.rows.first, j = tile.columns.first;
    tile.strips([&](int64_t row, int64_t rows, int64_t strip) {
      T* of_columns = &of_columns_[strip * problem_.tile()];
      std::fill(of_columns, of_columns + tile.padded, T(0));
      kernel(tile.scores + row * tile.stride, tile.stride, rows, tile.padded, &shift[i + row], &g[i + row], &shift[j], &g[j],
             &sums[i + row - problem_.offset], of_columns);
    });
    for (int64_t strip = 0; tile.mirrored && strip * STRIP < tile.rows.size; ++strip) {
      for (int64_t k = 0; k < tile.columns.size; ++k) sums[j + k - problem_.offset] += of_columns_[strip * problem_.tile() + k];
    }
  }

  std::vector<T> sums;

 private:
  Problem problem_;
  std::vector<T> of_columns_;  // of every strip of a tile: strips are visited in parallel and added up in order
};

// --- forward -----------------------------------------------------------------------------------------------------------

// Whether exp(s_ij - s_ip), at most exp(2 / γ) and at least its inverse, and sums of millions of it are normal numbers. Then
// scores are shifted by the partner's, and otherwise by a running maximum, for which the square is visited whole.
template <class T>
bool partners_will_do(double temperature) {
  return temperature > 0 && 2 / temperature <= (std::is_same_v<T, float> ? 64 : 600);  // a learned one may have become anything
}

// s_ip of this process's rows, among all features.
template <class T>
std::vector<T> partner_scores(const Tensor& unit, Problem problem, double temperature) {
  const int64_t d = unit.size(1);
  std::vector<T> scores = of_features(problem, T(0));
  const InfoNceKernels<T>& kernel = kernels<T>();
  parallel(problem.rows / 2, GRAIN, [&, u = input<T>(unit)](int64_t k) {
    const int64_t i = problem.offset + k, partner = problem.partner(i);
    scores[i] = scores[partner] = kernel.dot(u + i * d, u + partner * d, d) * static_cast<T>(1 / temperature);
  });
  return scores;
}

// log Σ_j exp(s_ij - s_ip) of each row.
template <class T>
std::vector<double> log_sums(const Tensor& unit, const std::vector<T>& partners, Problem problem, double temperature) {
  std::vector<double> logs(problem.rows);
  if (partners_will_do<T>(temperature)) {
    const std::vector<T> ones = of_features(problem, T(1));
    BothSums<T> both(problem);
    for_tiles<T>(unit, problem, temperature, true, [&](const Tile<T>& tile) {
      drop_itself_and_partner(tile, problem);
      both.visit(tile, kernels<T>().add_to_both, partners, ones);
    });
    for (int64_t i = 0; i < problem.rows; ++i) logs[i] = std::log(double{both.sums[i]});
  } else {
    std::vector<T> maxima(problem.rows, -std::numeric_limits<T>::infinity()), sums(problem.rows);
    for_tiles<T>(unit, problem, temperature, false, [&](const Tile<T>& tile) {
      drop_itself_and_partner(tile, problem);
      tile.strips([&](int64_t row, int64_t rows, int64_t) {
        const int64_t i = tile.rows.first + row - problem.offset;
        kernels<T>().add_to_rows(tile.scores + row * tile.stride, tile.stride, rows, tile.padded, &maxima[i], &sums[i]);
      });
    });
    for (int64_t i = 0; i < problem.rows; ++i) logs[i] = maxima[i] - partners[problem.offset + i] + std::log(double{sums[i]});
  }
  return logs;
}

template <class T>
std::tuple<Tensor, Tensor> forward_of(const Tensor& features, const Tensor& inverse, Problem problem, double temperature) {
  const Tensor unit = units<T>(features, inverse);
  const std::vector<T> partners = partner_scores<T>(unit, problem, temperature);
  const std::vector<double> logs = log_sums(unit, partners, problem, temperature);
  Tensor loss = torch::stable::new_empty(inverse, {}), lse = torch::stable::new_empty(inverse, {problem.rows});
  double total = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    const double x = logs[i], loss_i = std::log1p(std::exp(-std::abs(x))) + (x > 0 ? x : 0);  // log(1 + exp(x))
    data<T>(lse)[i] = static_cast<T>(partners[problem.offset + i] + loss_i);
    total += loss_i;
  }
  *data<T>(loss) = static_cast<T>(total / (problem.rows / 2));
  return {loss, lse};
}

// --- backward ----------------------------------------------------------------------------------------------------------

// The gradient of the rows' features of length 1, times m γ, [rows, d].
template <class T>
Tensor gradient_of_units(const Tensor& grad, const Tensor& unit, const Tensor& lse, Problem problem, double temperature) {
  const int64_t d = unit.size(1);
  std::vector<T> lses = of_features(problem, T(0)), g = lses;
  for (int64_t j = 0; j < problem.N; ++j) {
    lses[j] = input<T>(lse)[j * lse.stride(0)];
    g[j] = input<T>(grad)[j / problem.rows * grad.stride(0)];
  }
  Tensor out = torch::stable::new_zeros(unit, {problem.rows, d});
  BothSums<T> both(problem);
  for_tiles<T>(unit, problem, temperature, true, [&](const Tile<T>& tile) {
    const auto [i, rows] = tile.rows;
    const auto [j, columns] = tile.columns;
    drop_itself_and_partner(tile, problem);
    both.visit(tile, kernels<T>().weigh, lses, g);
    multiply(slice(out, i - problem.offset, rows), tile.tensor, slice(unit, j, columns), 1, 1);
    if (!tile.mirrored) return;
    multiply(slice(out, j - problem.offset, columns), torch::stable::transpose(tile.tensor, 0, 1), slice(unit, i, rows), 1, 1);
  });
  parallel(problem.rows, GRAIN, [&, u = input<T>(unit), to = data<T>(out)](int64_t i) {
    const int64_t partner = problem.partner(problem.offset + i);
    const T weight = both.sums[i] + both.sums[partner - problem.offset];
    for (int64_t k = 0; k < d; ++k) to[i * d + k] -= weight * u[partner * d + k];
  });
  return out;
}

// Back through x / max(length, SHORTEST): (gradient - unit (unit·gradient)) / length, and unit·gradient.
template <class T>
std::tuple<Tensor, Tensor> backward_of(const Tensor& grad, const Tensor& features, const Tensor& inverse, const Tensor& lse,
                                       Problem problem, double temperature) {
  const int64_t d = features.size(1);
  const Tensor unit = units<T>(features, inverse), gradient = gradient_of_units<T>(grad, unit, lse, problem, temperature);
  Tensor along = torch::stable::new_empty(inverse, {problem.rows});
  const double scale = 1 / (problem.rows / 2 * temperature);
  auto write = [&](auto* out) {
    parallel(problem.rows, GRAIN, [&, lengths = input<T>(inverse), u = input<T>(unit), g = input<T>(gradient),
                                   products = data<T>(along)](int64_t i) {
      const T *u_i = u + (problem.offset + i) * d, *g_i = g + i * d, length = lengths[problem.offset + i];
      const T product = kernels<T>().dot(u_i, g_i, d), taken_out = length < T(1) / T(SHORTEST) ? product : T(0);
      products[i] = static_cast<T>(product * scale);
      const T scale_i = static_cast<T>(scale * length);
      for (int64_t k = 0; k < d; ++k) {
        out[i * d + k] = static_cast<std::remove_reference_t<decltype(*out)>>((g_i[k] - taken_out * u_i[k]) * scale_i);
      }
    });
  };
  if (features.scalar_type() != ScalarType::BFloat16) {
    write(data<T>(gradient));
    return {gradient, along};
  }
  Tensor rounded = torch::stable::new_empty(features, {problem.rows, d});
  write(data<BFloat16>(rounded));
  return {rounded, along};
}

// --- ops ---------------------------------------------------------------------------------------------------------------

template <class From, class To, class T>
void pack_view(const Tensor& z, To* features, T* inverse) {
  const int64_t d = z.size(1), s_n = z.stride(0), s_d = z.stride(1);
  parallel(z.size(0), GRAIN, [=, from = input<From>(z)](int64_t i) {
    double sum = 0;
    for (int64_t k = 0; k < d; ++k) {
      const From x = from[i * s_n + k * s_d];
      features[i * d + k] = static_cast<To>(x);
      sum += static_cast<double>(x) * static_cast<double>(x);
    }
    inverse[i] = T(1) / std::max(static_cast<T>(std::sqrt(sum)), static_cast<T>(SHORTEST));
  });
}

template <class From, class To, class T>
std::tuple<Tensor, Tensor> pack_as(const Tensor& z1, const Tensor& z2, ScalarType packed, ScalarType accumulator) {
  const int64_t m = z1.size(0), d = z1.size(1);
  Tensor features = torch::stable::new_empty(z1, {2 * m, d}, packed);
  Tensor inverse = torch::stable::new_empty(z1, {2 * m}, accumulator);
  pack_view<From>(z1, data<To>(features), data<T>(inverse));
  pack_view<From>(z2, data<To>(features) + m * d, data<T>(inverse) + m);
  return {features, inverse};
}

std::tuple<Tensor, Tensor> pack(const Tensor& z1, const Tensor& z2) {
  switch (z1.scalar_type()) {
    case ScalarType::Float:
      return pack_as<float, float, float>(z1, z2, ScalarType::Float, ScalarType::Float);
    case ScalarType::Double:
      return pack_as<double, double, double>(z1, z2, ScalarType::Double, ScalarType::Double);
    case ScalarType::Half:
      return pack_as<Half, float, float>(z1, z2, ScalarType::Float, ScalarType::Float);
    case ScalarType::BFloat16:
      return pack_as<BFloat16, BFloat16, float>(z1, z2, ScalarType::BFloat16, ScalarType::Float);
    default:
      STD_TORCH_CHECK(false, "info_nce_pack.cpu takes float32, float64, float16 and bfloat16");
  }
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& features, const Tensor& inverse, int64_t offset, int64_t rows, double temperature) {
  auto* run = inverse.scalar_type() == ScalarType::Double ? forward_of<double> : forward_of<float>;
  return run(torch::stable::contiguous(features), torch::stable::contiguous(inverse), {features.size(0), offset, rows},
             temperature);
}

std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& features, const Tensor& inverse, const Tensor& lse,
                                     int64_t offset, int64_t rows, double temperature) {
  auto* run = inverse.scalar_type() == ScalarType::Double ? backward_of<double> : backward_of<float>;
  return run(grad, torch::stable::contiguous(features), torch::stable::contiguous(inverse), lse,
             {features.size(0), offset, rows}, temperature);
}

Tensor backward(const Tensor& grad, const Tensor& features, const Tensor& inverse, const Tensor& lse, int64_t offset,
                int64_t rows, double temperature) {
  return std::get<0>(gradients(grad, features, inverse, lse, offset, rows, temperature));
}

double number(const Tensor& learned) {
  STD_TORCH_CHECK(learned.numel() == 1, "info_nce_learned.cpu takes one temperature");
  switch (learned.scalar_type()) {
    case ScalarType::Float:
      return *input<float>(learned);
    case ScalarType::Double:
      return *input<double>(learned);
    default:
      STD_TORCH_CHECK(false, "info_nce_learned.cpu takes a temperature of float32 or float64");
  }
}

std::tuple<Tensor, Tensor> forward_learned(
    const Tensor& features, const Tensor& inverse, const Tensor& learned, int64_t offset, int64_t rows) {
  return forward(features, inverse, offset, rows, number(learned));
}

std::tuple<Tensor, Tensor> backward_learned(const Tensor& grad, const Tensor& features, const Tensor& inverse,
                                            const Tensor& lse, const Tensor& learned, int64_t offset, int64_t rows) {
  return gradients(grad, features, inverse, lse, offset, rows, number(learned));
}

}  // namespace

}  // namespace vimpac::contrastive

STABLE_TORCH_LIBRARY_IMPL(vimpac, CPU, m) {
  m.impl("info_nce_pack.cpu", TORCH_BOX(&vimpac::contrastive::pack));
  m.impl("info_nce.cpu", TORCH_BOX(&vimpac::contrastive::forward));
  m.impl("info_nce_backward.cpu", TORCH_BOX(&vimpac::contrastive::backward));
  m.impl("info_nce_learned.cpu", TORCH_BOX(&vimpac::contrastive::forward_learned));
  m.impl("info_nce_learned_backward.cpu", TORCH_BOX(&vimpac::contrastive::backward_learned));
}
