// Partial results of a row: how they lie in memory, and the arithmetic of merging them. Each has
// its lse in log2:
//
//     lse = log2 sum_i 2^lse_i        out = sum_i 2^(lse_i - lse) out_i
//
// combine.cu merges any number of pieces, sm90_pair.cuh two inside of the decode kernel. For two,
// both use the same functions, so who merges changes no bit.
#pragma once
#include "ptx.cuh"

#define POS_INF __int_as_float(0x7f800000)
#define NEG_INF __int_as_float(0xff800000)
#define QUIET_NAN __int_as_float(0x7fffffff)
constexpr float LN2 = 0.69314718056f, LOG2E = 1.44269504089f;

// What row_partial holds for lse of a row that dense_decode has merged, so that `combine` leaves it
// alone: a NaN that no arithmetic makes.
constexpr uint32_t MERGED_LSE = 0x7fc0ffee;
constexpr float LEAST_LSE = -1e38f;  // where maxima start, since a row without keys has only -inf

// out_i lies in memory as floats if its request is in two pieces, or its slab has at most FEW_ROWS
// rows. Otherwise it lies there in 16 bits, since short requests are bound by writing and reading
// it: each half of a row, 256 columns, is scaled by the power of two that brings its largest value
// to [2^14, 2^15), and rounded to float16. So a value is as exact as any of 11 bits, down to 2^-29
// of the largest.
constexpr int FEW_ROWS = 16;
struct Scale {
  float up, down;  // up * down = 1
};
DEVICE Scale scale_of(float largest) {
  const int exponent =
      max(15, (int)(__float_as_uint(largest) >> 23));  // smaller ones have no `down`
  return {__int_as_float((268 - exponent) << 23), __int_as_float((exponent - 14) << 23)};
}
// The columns of a row lie in the order in which the lanes of a quad hold the accumulators of
// wgmma. Of every 16 columns (of halves, every 32), a lane stores together, as 16 bytes, its
// columns 2 i, 2 i + 1, 2 i + 8, 2 i + 9 and so on, where i is its place in the quad. These
// functions give the column at an even position; the next position has the next column.
DEVICE int column_of_float(int position) {
  return (position & ~15) + (position >> 1 & 1) * 8 + (position >> 2 & 3) * 2;
}
DEVICE int column_of_half(int position) {
  return (position & ~31) + (position >> 1 & 3) * 8 + (position >> 3 & 3) * 2;
}
// Exchanges register i of lane j with register j of lane i, within each quad of lanes. This brings
// columns from that order to their own.
DEVICE Vector4 transpose_quads(Vector4 v) {
  const bool odd = lane_index() & 1, upper = lane_index() & 2;
  uint32_t a = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1);
  uint32_t b = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
  if (odd) {
    v.x = a, v.z = b;
  } else {
    v.y = a, v.w = b;
  }
  a = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2);
  b = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
  if (upper) {
    v.x = a, v.y = b;
  } else {
    v.z = a, v.w = b;
  }
  return v;
}

// Where the lse of a row is in [batch, h_q, s_q]. Of query tokens that are requests of their own,
// with s_q 1, `group` belong together: [batch / group, h_q, group].
DEVICE int64_t lse_index(int request, int position, int head, int s_q, int h_q, int group) {
  const int first = group > 1 ? request / group : request;
  return ((int64_t)first * h_q + head) * (s_q * group) + (request - first * group) * s_q + position;
}

// What a piece adds to the sum of weights, given the largest lse. NaN stays NaN.
DEVICE float weight_of(float lse, float max_lse) { return ex2(lse - max_lse); }
// 1 / the sum, to which a sink, a logit without a value, may add.
DEVICE float inverse_of(float sum, float sink, float max_lse) {
  return sum == 0.f ? 0.f : rcp(sum + ex2(sink - max_lse));
}
// lse as a natural logarithm; +inf for a row without keys.
DEVICE float merged_lse(float sum, float max_lse) {
  return sum == 0.f ? POS_INF : (lg2(sum) + max_lse) * LN2;
}
// One value of out of a pair. A piece without a key of this row weighs 0, and may be NaN from V.
DEVICE float merge_two(float front_weight, float front, float back_weight, float back) {
  const float x = __fmul_rn(front_weight, front), y = __fmul_rn(back_weight, back);
  return __fadd_rn(front_weight == 0.f ? 0.f : x, back_weight == 0.f ? 0.f : y);
}
// From lse of the two pieces of a row, in log2: lse of both, a natural logarithm, and their
// weights.
struct Merged {
  float lse, front, back;
};
DEVICE Merged merge_rows(float front_lse, float back_lse, float sink = NEG_INF) {
  const float top = fmaxf(fmaxf(LEAST_LSE, front_lse), back_lse);
  const float front = weight_of(front_lse, top), back = weight_of(back_lse, top),
              sum = front + back;
  const float inverse = inverse_of(sum, sink, top);
  return {merged_lse(sum, top), front * inverse, back * inverse};
}
