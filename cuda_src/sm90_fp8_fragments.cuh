// What wgmma wants to know of shared memory, and which part of a product a thread holds, where the
// latent is A: query rows are the columns of S^T and O^T.
#pragma once
#include "sm90_gathered_tokens.cuh"
#include "sm90_swizzle.cuh"
#include "wgmma.cuh"

// Of P^T, MN-major with 64 columns: the next 8 tokens lie 1024 bytes on, as rows do K-major.
DEVICE uint64_t descriptor_mn_major(uint32_t a) { return descriptor_k_major(a); }

// The thread's columns: c 0 to 15, in pairs of neighbours, eight columns apart.
DEVICE int my_column(int c) { return (c >> 1) * 8 + (lane_index() & 3) * 2 + (c & 1); }
// Of two lanes, each keeps one half of the columns that are left, of both.
template <int Kept, class Operation>
DEVICE void halve_columns(float (&v)[16], int& first, Operation operation) {
  const bool upper = lane_index() & 2 * Kept;
  if (upper) first += Kept;
#pragma unroll
  for (int c = 0; c < Kept; ++c) {
    const float sent = upper ? v[c] : v[c + Kept], own = upper ? v[c + Kept] : v[c];
    v[c] = operation(own, __shfl_xor_sync(~0u, sent, 2 * Kept));
  }
}
// Reduces the thread's columns over the eight lanes that have them. Returns the first of the two
// columns that are this lane's then, in v[0] and v[1].
template <class Operation>
DEVICE int reduce_columns(float (&v)[16], Operation operation) {
  int first = 0;
  halve_columns<8>(v, first, operation);
  halve_columns<4>(v, first, operation);
  halve_columns<2>(v, first, operation);
  return my_column(first);
}
DEVICE int max_of_columns(float (&v)[16]) {
  return reduce_columns(v, [](float x, float y) { return fmaxf(x, y); });
}
DEVICE int sum_of_columns(float (&v)[16]) {
  return reduce_columns(v, [](float x, float y) { return x + y; });
}
