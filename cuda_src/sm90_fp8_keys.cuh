// S^T [64 tokens, 64 query rows] = K Q^T of a tile, by the score warps: K is A, of which a warp has 16
// tokens, converted to 16 bits on the way to registers.
#pragma once
#include "sm90_fp8_convert.cuh"
#include "sm90_fp8_key_rows.cuh"

// K is taken in units of 32 columns, two steps of wgmma each: rotary columns first, if they need no
// conversion from FP8. UNITS_IN_USE of them have registers: one is converted while the products take
// the others.
constexpr int UNITS = COLUMN_BLOCKS * 2, E4M3_UNITS = LATENT_BLOCKS * 2;
constexpr int ROTARY_UNITS = UNITS - E4M3_UNITS, UNITS_IN_USE = 3;

struct Keys {
  uint32_t fragments[UNITS_IN_USE][8];
  uint32_t loaded[2][4];  // units of e4m3 on their way
  float scales[2];        // the same of the next block

  DEVICE void load(const KeyRows& rows, int unit) {
    uint32_t (&x)[4] = loaded[unit & 1];
    ldmatrix_x4(rows.latent + unit * 32, x[0], x[1], x[2], x[3]);
  }
  DEVICE void load_rotary(const KeyRows& rows, int unit) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t* x = fragments[unit] + 4 * i;
      ldmatrix_x4(rows.latent + ROTARY + (unit * 2 + i) * 32, x[0], x[1], x[2], x[3]);
    }
  }
  DEVICE void load_scales(const KeyRows& rows, int block) {
    if (!HAS_SCALES) return;
    scales[0] = scale_at(rows.row, block), scales[1] = scale_at(rows.row + 8 * STAGED_ROW, block);
  }
  DEVICE static void convert(uint32_t (&to)[8], const uint32_t (&x)[4],
                             const Factors (&factors)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t* y = to + 4 * (j >> 1) + (j & 1);
      y[0] = product_of(half_x2_from_e4m3(x[j]), factors[j & 1]);
      y[2] = product_of(half_x2_from_e4m3_high(x[j]), factors[j & 1]);
    }
  }

  // Loads what the first products of the tile in a stage take: as much as has registers beside P of
  // the tile before.
  DEVICE void begin(uint32_t stage) {
    const KeyRows rows(stage);
    if (ROTARY_UNITS) load_rotary(rows, 0);
    load_scales(rows, 0);
    load(rows, 0);
    if (!ROTARY_UNITS) load(rows, 1);
  }
  // Computes S^T for the tile in a stage, after begin(). `to_release` is p_ready of the tile before,
  // if it is yet to be released, or 0. Loads what comes into play then: `states`, and `bits` of the
  // warp's tokens that count.
  DEVICE void compute(float (&s)[SCORES], RowStates& states, uint32_t& bits, uint32_t stage,
                      uint32_t to_release) {
    const KeyRows rows(stage);
    const uint64_t q = descriptor_k_major(shared_base());
    Factors factors[2] = {};
    if (ROTARY_UNITS) load_rotary(rows, 1), load(rows, 1);
#pragma unroll
    for (int n = 0; n < UNITS; ++n) {
      const int unit = n - ROTARY_UNITS, step = (n & 1) * 2;
      const int block = n < ROTARY_UNITS ? ROTARY_BLOCK : unit >> 1;
      uint32_t (&now)[8] = fragments[n % UNITS_IN_USE];
      const uint64_t columns = q + block * (Q_BLOCK_BYTES >> 4) + step * 2;
      if (n < ROTARY_UNITS) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (!ROTARY_IN_BF16) now[j] = product_from_bf16(now[j]);
        }
      } else {
        if (HAS_SCALES && (unit & 1) == 0) {
          factors[0] = factors_of(scales[0], scales[0]);
          factors[1] = factors_of(scales[1], scales[1]);
          if (block + 1 < LATENT_BLOCKS) load_scales(rows, block + 1);
        }
        if (n >= UNITS_IN_USE) wgmma_wait_group<UNITS_IN_USE - 1>();
        convert(now, loaded[unit & 1], factors);
        if (unit + 2 < E4M3_UNITS) load(rows, unit + 2);
      }
      wgmma_fence();
      if (n < ROTARY_UNITS && ROTARY_IN_BF16) {
        wgmma_bf16_m64n64k16_rs(s, now, columns, n != 0);
        wgmma_bf16_m64n64k16_rs(s, now + 4, columns + 2, 1);
      } else {
        wgmma_m64n64k16_rs(s, now, columns, n != 0);
        wgmma_m64n64k16_rs(s, now + 4, columns + 2, 1);
      }
      wgmma_commit_group();
    }
    if (to_release) arrive(to_release);
    wgmma_wait_group<1>();
    bits = ld_shared_u32(token_bits(stage, warp_in_group()));
    states.load();
    wgmma_wait_group<0>();
    pin(s);
  }
};
