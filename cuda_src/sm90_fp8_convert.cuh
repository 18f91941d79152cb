// How FP8 becomes an operand of the products, in registers: the latent is the A of both, K of
// S^T = K Q^T and V^T of O^T = V^T P^T.
//
// ldmatrix gives a thread four e4m3 of a row, columns 4 t to 4 t + 3 of 16, where the fragment of A
// wants columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. So columns of Q lie permuted (sm90_fp8_queries.cuh).
// Transposed, it gives columns 2 g and 2 g + 1 of two tokens: rows g and g + 8 of the fragment.
//
// In float16 an e4m3 number, and its product with a power of two, are exact within float16's range.
// With WIDE_PRODUCTS the products are of bfloat16, for values beyond it: then a product with any
// other scale is rounded to bfloat16.
#pragma once
#include "sm90_fp8_shared.cuh"

// What two numbers of a register are multiplied by.
#if defined(WIDE_PRODUCTS)
typedef float2 Factors;
#else
typedef uint32_t Factors;
#endif
DEVICE Factors factors_of(float low, float high) {
#if defined(WIDE_PRODUCTS)
  return {low, high};
#else
  return half_x2(low * LATENT_UP, high * LATENT_UP);
#endif
}
// The scale of a token for the 64 columns of a block.
DEVICE float scale_at(uint32_t row, int block) {
#if defined(FORMAT_V32)
  return ld_shared_f32(row + SCALES + (block >> 1) * 4);
#elif defined(FORMAT_V4)
  // The lowest bit makes NaN of 255, and is rounded away elsewhere.
  return __uint_as_float(ld_shared_u8(row + SCALES + block) << 23 | 1);
#else
  return 1.f;
#endif
}

DEVICE uint32_t product_of(uint32_t halves, const Factors& factors) {
#if defined(WIDE_PRODUCTS)
  const float2 v = from_half_x2(halves);
  return HAS_SCALES ? cvt_x2(v.x * factors.x, v.y * factors.y) : cvt_x2(v.x, v.y);
#else
  return HAS_SCALES ? mul_half_x2(halves, factors) : halves;
#endif
}
// Two bfloat16, rotary columns of a key.
DEVICE uint32_t product_from_bf16(uint32_t x) {
#if !defined(WIDE_PRODUCTS)
  if (ROTARY_K_UP != 1) x = mul_bfloat_x2(x, bfloat_x2(ROTARY_K_UP, ROTARY_K_UP));
  x = half_x2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
#endif
  return x;
}
