// The maximum and the sum of a row of S or P, of which the four lanes of a quad have two columns
// each of every eight. The running maximum m is lazy: it moves only when the row exceeds it by more
// than LAZY, and by whole numbers, so that the factors for O are exact powers of two.
#pragma once
#include "ptx.cuh"

constexpr float LAZY = 8.f;  // in log2 units

// Over the four lanes that share a row.
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// A new maximum `top` for a row: m moves, and what is summed so far shrinks by the returned factor.
DEVICE float raise_maximum(float& m, float& l, float top) {
  const float by = ceilf(top - m);
  float factor;
  if (by < 126.f) {
    m += by;
    factor = __uint_as_float((127 - (int)by) << 23);
  } else {  // the first keys, or all before them are negligible: one dominant key has P == 1
    m = top;
    factor = 0.f;
  }
  l *= factor;
  return factor;
}
