// How the numbers of an FP8 row become those of the products, in registers: which scale a column has,
// and what is multiplied by it.
//
// In float16 an e4m3 number, and its product with a power of two, are exact within float16's range.
// With WIDE_PRODUCTS the products are of bfloat16, for values beyond it: then a product with any
// other scale is rounded to bfloat16.
#pragma once
#include "sm90_gather_cursor.cuh"

// Byte offsets in a staged row. A tail lies behind it.
#if defined(FORMAT_V32)
constexpr int SCALES = 512, ROTARY = 528, SCALE_GROUP_BLOCKS = 2, SCALE_GROUPS = 4;
#elif defined(FORMAT_V4)
constexpr int SCALES = 576, ROTARY = 448, SCALE_GROUP_BLOCKS = 1, SCALE_GROUPS = 8;
#else
constexpr int SCALES = 0, ROTARY = 512, SCALE_GROUP_BLOCKS = 1, SCALE_GROUPS = 1;
#endif
constexpr bool HAS_SCALES = SCALES > 0;
constexpr bool IS_E4M3_ROTARY = !HAS_SCALES;
constexpr int LATENT_LANES = (ROTARY < 512 ? ROTARY : 512) / 16;  // that copy 16 bytes of a row

// The scale of one token and group of columns, as `convert` wants it. Each lane loads one of a
// chunk's, and shuffles tell the others.
typedef uint32_t ColumnScale;
DEVICE ColumnScale scale_from(float x) {
#if defined(WIDE_PRODUCTS)
  return __float_as_uint(x);
#else
  return half_x2(x * LATENT_UP, x * LATENT_UP);
#endif
}
// That of the token and group that the lane looks after; `rows`: the chunk in staging.
DEVICE ColumnScale load_scale(uint32_t rows, uint32_t lane) {
#if defined(FORMAT_V32)
  const uint32_t token = lane / SCALE_GROUPS & 3, group = lane % SCALE_GROUPS;
  return scale_from(ld_shared_f32(rows + token * STAGED_ROW + SCALES + group * 4));
#elif defined(FORMAT_V4)
  const uint32_t token = lane / SCALE_GROUPS, group = lane % SCALE_GROUPS;
  const uint32_t exponent = ld_shared_u8(rows + token * STAGED_ROW + SCALES + group);
  return scale_from(__uint_as_float(exponent << 23 | (exponent == 255) << 22));  // 255: NaN
#else
  return 0;
#endif
}
// That of a token of the chunk in a column block.
DEVICE ColumnScale scale_of_block(ColumnScale mine, uint32_t token, uint32_t block) {
  if (!HAS_SCALES) return 0;
  return __shfl_sync(~0u, mine, token * SCALE_GROUPS + block / SCALE_GROUP_BLOCKS);
}

// Two e4m3, in the low half of x.
DEVICE uint32_t product_from_e4m3(uint32_t x, ColumnScale scale) {
  const uint32_t halves = half_x2_from_e4m3(x);
  if (!HAS_SCALES) return halves;
#if defined(WIDE_PRODUCTS)
  const float2 v = from_half_x2(halves);
  return cvt_x2(v.x * __uint_as_float(scale), v.y * __uint_as_float(scale));
#else
  return mul_half_x2(halves, scale);
#endif
}
// Eight e4m3, in two registers, to eight numbers at `to`.
DEVICE void convert(uint32_t to, uint32_t first, uint32_t second, ColumnScale scale) {
  st_shared_v4(to, {product_from_e4m3(first, scale), product_from_e4m3(first >> 16, scale),
                    product_from_e4m3(second, scale), product_from_e4m3(second >> 16, scale)});
}
// Two bfloat16, rotary columns of a key.
DEVICE uint32_t product_from_bf16(uint32_t x) {
#if defined(WIDE_PRODUCTS)
  return x;
#else
  constexpr float up = LATENT_UP / ROTARY_Q_UP;
  return half_x2(__uint_as_float(x << 16) * up, __uint_as_float(x & 0xffff0000) * up);
#endif
}
