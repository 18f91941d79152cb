// What S^T = K Q^T of a tile reads in shared memory, keys and what is known of the query rows: for
// sm90_fp8_keys.cuh and sm90_fp8_e4m3_keys.cuh, of which a kernel has one.
#pragma once
#include "sm90_fp8_fragments.cuh"

constexpr int SCORES = ROWS / 2;  // of a thread: two tokens by a quarter of the query rows

// The 16 tokens of a warp in a stage, as a lane reads them.
struct KeyRows {
  uint32_t latent;  // its row for ldmatrix
  uint32_t row;     // the first of the two rows that it has fragments of
  DEVICE KeyRows(uint32_t stage) {
    const uint32_t lane = lane_index();
    const uint32_t rows = staged_rows(stage) + warp_in_group() * WARP_TOKENS * STAGED_ROW;
    latent = rows + (lane & 15) * STAGED_ROW + (lane >> 4) * 16;
    row = rows + (lane >> 2) * STAGED_ROW;
  }
};

// {scale, m} of the thread's query rows, loaded together.
struct RowStates {
  float4 of_pair[8];
  DEVICE void load() {
#pragma unroll
    for (int i = 0; i < 8; ++i) of_pair[i] = ld_shared_v4_f32(row_state(my_column(2 * i)));
  }
};
