// S^T [64 tokens, 64 query rows] = K Q^T of a tile where both are e4m3, by the score warps: K is A, of
// which a warp has 16 tokens, as it lies in the cache.
//
// The tensor cores sum products of e4m3 to some 14 bits. So what a chunk of 128 columns gives is
// added up in float32.
#pragma once
#include "sm90_fp8_key_rows.cuh"

constexpr int CHUNK_STEPS = 4;  // of 32 columns
constexpr int STEPS = LATENT_BLOCKS * 2, CHUNKS = (STEPS + CHUNK_STEPS - 1) / CHUNK_STEPS;

struct Keys {
  uint32_t fragments[CHUNK_STEPS][4];

  DEVICE void load(const KeyRows& rows, int chunk) {
#pragma unroll
    for (int i = 0; i < CHUNK_STEPS; ++i) {
      const int step = chunk * CHUNK_STEPS + i;
      if (step == STEPS) return;
      uint32_t (&x)[4] = fragments[i];
      ldmatrix_x4(rows.latent + step * 32, x[0], x[1], x[2], x[3]);
    }
  }

  // As those of sm90_fp8_keys.cuh.
  DEVICE void begin(uint32_t stage) { load(KeyRows(stage), 0); }
  DEVICE void compute(float (&s)[SCORES], RowStates& states, uint32_t& bits, uint32_t stage,
                      uint32_t to_release) {
    const KeyRows rows(stage);
    const uint64_t q = descriptor_k_major(shared_base());
    float sums[SCORES];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < CHUNK_STEPS && chunk * CHUNK_STEPS + i < STEPS; ++i) {
        const uint64_t columns = q + chunk * (Q_BLOCK_BYTES >> 4) + i * 2;
        wgmma_e4m3_m64n64k32_rs(sums, fragments[i], columns, i != 0);
      }
      wgmma_commit_group();
      if (chunk + 1 == CHUNKS) {
        if (to_release) arrive(to_release);
        bits = ld_shared_u32(token_bits(stage, warp_in_group()));
      }
      wgmma_wait_group<0>();
      pin(sums);
      if (chunk + 1 < CHUNKS) load(rows, chunk + 1);
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] = chunk ? s[i] + sums[i] : sums[i];
    }
    states.load();
  }
};
