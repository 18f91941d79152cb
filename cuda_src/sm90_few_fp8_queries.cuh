// Q of sm90_few_fp8_decode.cu in registers, as fragments of A, and who has which part of S and P.
//
// Rotary columns of V32 and V4 are multiplied in bfloat16, as they are; those of a float16 Q are
// two bfloat16, whose sum is exact.
#pragma once
#include "row_statistics.cuh"
#include "sm90_few_fp8_loader.cuh"

#if defined(FORMAT_V32) || defined(FORMAT_V4)
#define ROTARY_IN_BF16
constexpr int LATENT_STEPS = 4 * (COLUMN_BLOCKS - 1);  // of 16 columns, in float16
#if defined(DTYPE_FP16)
constexpr int ROTARY_PARTS = 2;
#else
constexpr int ROTARY_PARTS = 1;
#endif
constexpr int ROTARY_STEPS = 4;  // of bfloat16, each with so many parts of Q
#else
constexpr int LATENT_STEPS = 36, ROTARY_PARTS = 0, ROTARY_STEPS = 0;  // all columns are alike
#endif

// A thread has, of S and P, two tokens of each octet of the warp, my_token(octet, 0) and
// my_token(octet, 1), in two rows: [0] and [1] of this row, [2] and [3] of the row eight further.
DEVICE int first_row() { return lane_index() >> 2; }
DEVICE int my_token(int octet, int i) { return product_token(octet, 2 * (lane_index() & 3) + i); }
DEVICE uint32_t warp_token_row(uint32_t slot, int token) {
  return token_row(slot, warp_in_group() * WARP_TOKENS + token);
}

DEVICE float2 q_pair(uint32_t x) {
#if defined(DTYPE_FP16)
  return from_half_x2(x);
#else
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
#endif
}

// As fragments of A. A row of a bfloat16 Q is scaled by the power of two that brings its largest
// value to [2^13, 2^14), which is exact for all values that matter; `down` takes that back. With
// QUERY_E4M3, which float16 holds exactly, rows are read from global memory.
struct Queries {
  uint32_t latent[4 * LATENT_STEPS];
  uint32_t rotary[4 * ROTARY_STEPS * ROTARY_PARTS + 1];  // one part behind the other
  float down[2];

  // 16 bytes of each of the thread's rows, of column block `block`: two products.
  DEVICE static void load(uint32_t (&to)[8], int block, uint32_t chunk) {
    const uint32_t row = first_row();
    const uint32_t from = shared_base() + block * Q_BLOCK_BYTES + row * 128 + ((chunk ^ row) << 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Vector4 v = ld_shared_v4(from + h * 8 * 128);
      to[h] = v.x, to[2 + h] = v.y, to[4 + h] = v.z, to[6 + h] = v.w;
    }
  }
#if defined(QUERY_E4M3)
  DEVICE void take(const Params& params, int request, uint32_t) {
    const RowBlock block = row_block();
    const int position = block.slab + request % params.lse_group;
    const uint8_t* from = params.q + request / params.lse_group * params.q_batch_stride +
                          position * params.q_position_stride +
                          (block.first_head + block.first_row) * params.q_head_stride +
                          (lane_index() & 3) * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row() + 8 * h;
      const bool is_there = block.first_row + row < params.slab_rows;
#pragma unroll
      for (int i = 0; i < COLUMN_BLOCKS; ++i) {
        Vector4 v = {0, 0, 0, 0};
        if (is_there) v = ld_global_v4(from + row * params.q_head_stride + i * 64);
        const uint32_t x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          latent[16 * i + 4 * step + h] = half_x2_from_e4m3(x[step]);
          latent[16 * i + 4 * step + 2 + h] = half_x2_from_e4m3_high(x[step]);
        }
      }
    }
    down[0] = down[1] = 1.f;
  }
#else
  DEVICE void take(const Params&, int, uint32_t phase) {
    mbarrier_wait(q_full(), phase);
    const uint32_t c = lane_index() & 3;
#pragma unroll
    for (int i = 0; i < LATENT_STEPS / 2; ++i) {
      uint32_t x[8];
      load(x, i >> 1, 2 * c + (i & 1));
#pragma unroll
      for (int j = 0; j < 8; ++j) latent[8 * i + j] = x[j];
    }
#if defined(ROTARY_IN_BF16)
#pragma unroll
    for (int i = 0; i < ROTARY_STEPS / 2; ++i) {
      uint32_t x[8];
      load(x, COLUMN_BLOCKS - 1, 4 * i + c);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#if defined(DTYPE_FP16)
        const float2 v = from_half_x2(x[j]);
        const uint32_t high = bfloat_x2(v.x, v.y);
        rotary[8 * i + j] = high;
        rotary[8 * i + j + 4 * ROTARY_STEPS] = bfloat_x2(
            v.x - __uint_as_float(high << 16), v.y - __uint_as_float(high & 0xffff0000));
#else
        rotary[8 * i + j] = x[j];
#endif
      }
    }
#endif
    arrive(q_empty());
    down[0] = down[1] = 1.f;
#if !defined(DTYPE_FP16)
    float up[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = h; i < 4 * LATENT_STEPS; i += 2) largest = max_abs_x2(largest, latent[i]);
      const float2 pair = q_pair(largest);
      const uint32_t bits = __float_as_uint(quad_max(fmaxf(pair.x, pair.y)));
      const int exponent = max(17, (int)(bits >> 23));
      up[h] = __int_as_float((267 - exponent) << 23);
      down[h] = __int_as_float((exponent - 13) << 23);
    }
#pragma unroll
    for (int i = 0; i < 4 * LATENT_STEPS; ++i) {
      const float2 v = q_pair(latent[i]);
      latent[i] = half_x2(v.x * up[i & 1], v.y * up[i & 1]);
    }
#endif
  }
#endif
};
