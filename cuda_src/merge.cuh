// The arithmetic of merging partial results of a row, each with its lse in log2:
//
//     lse = log2 sum_i 2^lse_i        out = sum_i 2^(lse_i - lse) out_i
//
// combine.cu merges any number of pieces, pair.cuh two inside of dense_decode. Both use these, so who
// merges changes no bit.
#pragma once
#include "ptx.cuh"

#define POS_INF __int_as_float(0x7f800000)
#define NEG_INF __int_as_float(0xff800000)
#define QUIET_NAN __int_as_float(0x7fffffff)
constexpr float LN2 = 0.69314718056f;

// In lse_partial: a row that `combine` must leave alone. A NaN that no arithmetic makes.
constexpr uint32_t MERGED_LSE = 0x7fc0ffee;
constexpr float LEAST_LSE = -1e38f;  // the maximum starts here: a row without keys has -inf only

// What a piece adds to the sum of weights, given the largest lse. NaN stays NaN.
DEVICE float weight_of(float lse, float max_lse) { return ex2(lse - max_lse); }
DEVICE float inverse_of(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }
// The natural logarithm; +inf for a row without keys.
DEVICE float merged_lse(float sum, float max_lse) {
  return sum == 0.f ? POS_INF : (lg2(sum) + max_lse) * LN2;
}
// Rounded twice, so that the order of two pieces does not matter.
DEVICE float add_product(float sum, float weight, float out) {
  return __fadd_rn(sum, __fmul_rn(weight, out));
}
