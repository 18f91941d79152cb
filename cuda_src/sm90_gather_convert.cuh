// How the numbers of an FP8 row become those of the products, in registers: which scale a column has,
// and what is multiplied by it.
//
// In float16 an e4m3 number, and its product with a power of two, are exact within float16's range.
// With WIDE_PRODUCTS the products are of bfloat16, for values beyond it: then a product with any
// other scale is rounded to bfloat16.
#pragma once
#include "sm90_gather_cursor.cuh"

// Byte offsets in a staged row, behind which lies a tail; bytes of a scale, and its column blocks.
#if defined(FORMAT_V32)
constexpr int SCALES = 512, ROTARY = 528, SCALE_BYTES = 4, SCALE_BLOCKS = 2;
#elif defined(FORMAT_V4)
constexpr int SCALES = 576, ROTARY = 448, SCALE_BYTES = 1, SCALE_BLOCKS = 1;
#else
constexpr int SCALES = 0, ROTARY = 512, SCALE_BYTES = 0, SCALE_BLOCKS = 2;
#endif
constexpr bool HAS_SCALES = SCALES > 0;
constexpr bool IS_E4M3_ROTARY = !HAS_SCALES;
constexpr int LATENT_LANES = (ROTARY < 512 ? ROTARY : 512) / 16;  // that copy 16 bytes of a row

// The scales of one token in two column blocks, as they come from staging, and one of them as
// `convert` wants it.
typedef uint32_t StagedScales;
typedef uint32_t ColumnScale;
DEVICE StagedScales load_scales(uint32_t from) {
#if defined(FORMAT_V32)
  return ld_shared_u32(from);  // of both
#elif defined(FORMAT_V4)
  return ld_shared_u16(from);
#else
  return 0;
#endif
}
DEVICE ColumnScale scale_of(StagedScales x, int block) {
  if (!HAS_SCALES) return 0;
#if defined(FORMAT_V4)
  // The lowest bit makes NaN of 255, and is rounded away elsewhere.
  x = (block ? x >> 8 : x & 255) << 23 | 1;
#endif
#if defined(WIDE_PRODUCTS)
  return x;
#else
  return half_x2(__uint_as_float(x) * LATENT_UP, __uint_as_float(x) * LATENT_UP);
#endif
}

// Two e4m3, as two float16, times their scale.
DEVICE uint32_t product_of(uint32_t halves, ColumnScale scale) {
  if (!HAS_SCALES) return halves;
#if defined(WIDE_PRODUCTS)
  const float2 v = from_half_x2(halves);
  return cvt_x2(v.x * __uint_as_float(scale), v.y * __uint_as_float(scale));
#else
  return mul_half_x2(halves, scale);
#endif
}
// Eight e4m3, in two registers, to eight numbers at `to`, if they are wanted.
DEVICE void convert(uint32_t to, uint32_t first, uint32_t second, ColumnScale scale,
                    bool wanted = true) {
  st_shared_v4_if(wanted, to,
                  {product_of(half_x2_from_e4m3(first), scale),
                   product_of(half_x2_from_e4m3_high(first), scale),
                   product_of(half_x2_from_e4m3(second), scale),
                   product_of(half_x2_from_e4m3_high(second), scale)});
}
// Two bfloat16, rotary columns of a key.
DEVICE uint32_t product_from_bf16(uint32_t x) {
#if !defined(WIDE_PRODUCTS)
  constexpr float up = LATENT_UP / ROTARY_Q_UP;
  if (up != 1) x = mul_bfloat_x2(x, bfloat_x2(up, up));
  x = half_x2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
#endif
  return x;
}
