// Rows of any length, register after register: whole registers first, then what is left.
#pragma once

#include "simd.h"

namespace vimpac {

// The first `count` lanes from memory, zeros behind them.
template <class A, class T>
HOST_DEVICE Vector<A, WIDTH<A>> load_some(const T* from, int64_t count) {
  T some[WIDTH<A>] = {};
  __builtin_memcpy(some, from, count * sizeof(T));
  return load<WIDTH<A>>(some);
}

// One register of a row: `count` lanes of it are columns, from column `at` on.
template <class A, bool WHOLE>
struct Piece {
  using V = Vector<A, WIDTH<A>>;
  int64_t at, count;

  template <class T>
  HOST_DEVICE V read(const T* row) const {
    if constexpr (WHOLE) {
      return load<WIDTH<A>>(row + at);
    } else {
      return load_some<A>(row + at, count);
    }
  }

  template <class T>
  HOST_DEVICE void write(T* row, V v) const {
    if constexpr (WHOLE) {
      store<WIDTH<A>>(row + at, v);
    } else {
      T some[WIDTH<A>];
      store<WIDTH<A>>(some, v);
      __builtin_memcpy(row + at, some, count * sizeof(T));
    }
  }

  // `streams`: past the caches, where the type allows it and the row's address suits.
  template <class T>
  HOST_DEVICE void write_result(T* row, V v, bool streams) const {
    if constexpr (WHOLE && std::is_same_v<T, A>) {
      if (streams) return stream<WIDTH<A>>(row + at, v);
    }
    write(row, v);
  }

  HOST_DEVICE void add(A* row, V v) const { write(row, read(row) + v); }

  // Zeros in the lanes that are no columns.
  HOST_DEVICE V columns_of(V v) const {
    if constexpr (WHOLE) {
      return v;
    } else {
      A some[WIDTH<A>];
      store<WIDTH<A>>(some, v);
      return load_some<A>(some, count);
    }
  }
};

template <class A, class Body>
HOST_DEVICE void for_pieces(int64_t columns, const Body& body) {
  int64_t d = 0;
  for (; d + WIDTH<A> <= columns; d += WIDTH<A>) body(Piece<A, true>{d, WIDTH<A>});
  if (d < columns) body(Piece<A, false>{d, columns - d});
}

}  // namespace vimpac
