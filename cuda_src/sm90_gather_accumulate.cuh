// The matrix role, of warpgroups 1 and 2: O += P V for one half of the 512 columns of V, and where
// O goes in the end. O takes 128 of the 160 registers of a thread.
#pragma once
#include "sm90_gather_cursor.cuh"
#include "sm90_results.cuh"

// O += P V, with both in shared memory.
DEVICE void accumulate(float (&o)[128], uint32_t stage, int half) {
  const uint64_t v_tile = descriptor_mn_major(stage + half * 4 * BLOCK_BYTES);
  const uint64_t p_tile = descriptor_k_major_plain(stage + P_BLOCK * BLOCK_BYTES);
  constexpr int NEXT_COLUMNS = 2 * (BLOCK_BYTES >> 4);
  pin(o);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < TILE / 16; ++k) {
    const uint64_t p_columns = p_tile + k * (P_STEP_BYTES >> 4);
    wgmma_m64n128k16_ss(o, p_columns, v_tile + k * 128);
    wgmma_m64n128k16_ss(o + 64, p_columns, v_tile + k * 128 + NEXT_COLUMNS);
  }
  wgmma_commit_group();
  wgmma_wait_all();
  pin(o);
}

DEVICE void matrix_role(const Params& params, int half) {
  float o[128];
  Place place;
  uint32_t results_phase = 0;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    int tiles;
    {
      const Piece piece = piece_of(params, request);
      tiles = uniform(piece_tiles(piece));
      if (tiles == 0) continue;  // the softmax warpgroup stores the results of no keys
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0.f;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      mbarrier_wait(p_ready(place.stage), place.phase);
      if (i > 0 && uniform(ld_shared_u32(rescale_flag(place.stage)))) {
        const float a = __uint_as_float(ld_shared_u16(factors(place.stage)) << 16);
        const float b =
            __uint_as_float(ld_shared_u16(factors(place.stage) + SECOND_ROW_FACTOR) << 16);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          o[4 * j] *= a, o[4 * j + 1] *= a;
          o[4 * j + 2] *= b, o[4 * j + 3] *= b;
        }
      }
      accumulate(o, stage_address(place.stage), half);
      __syncwarp();
      if (arrives()) mbarrier_arrive(empty(place.stage));
      place.advance();
    }
    mbarrier_wait(results_ready(), results_phase);
    results_phase ^= 1;
    const float inverse0 = ld_shared_f32(row_floats(INVERSE_L));
    const float inverse1 = ld_shared_f32(row_floats(INVERSE_L) + SECOND_ROW_FLOAT);
    const uint32_t result = uniform(ld_shared_u32(shared_base() + RESULT));
    __syncwarp();
    if (arrives()) mbarrier_arrive(results_free());
    const Kind kind = kind_of(result);
    const int slot = slot_of(result);
    if (kind == WHOLE) {
      store_out(o, half, params, request, inverse0, inverse1);
    } else if (kind == SPLIT && params.slab_rows > FEW_ROWS) {
      store_halves(o, half, params, slot, inverse0, inverse1);
    } else {  // also the pieces of a pair, which combine merges
      store_floats(o, half, params, slot, inverse0, inverse1);
    }
  }
}
