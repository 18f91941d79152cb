// Rows of Q in e4m3 (QUERY_E4M3): the gather warpgroup reads them, 16 bytes a lane, and stores them as
// float16 in the stages of Q, where TMA would put rows of 16 bits. The softmax role sees no
// difference.
#pragma once
#include "sm90_gather_shared.cuh"
#include "sm90_pieces.cuh"

#if defined(QUERY_E4M3)
constexpr bool QUERY_IS_E4M3 = true;
#else
constexpr bool QUERY_IS_E4M3 = false;
#endif

// Column blocks of Q from `first` on, as many as `blocks`, into a stage. `row`: the block's first.
// A warp has 16 of the 64 rows; those past `rows` become 0.
DEVICE void convert_q(const uint8_t* row, int64_t row_bytes, int rows, int first, int blocks,
                      uint32_t stage) {
  constexpr int AT_ONCE = 2;  // loads on their way
  const int vectors = blocks * 4, warp_row = warp_in_group() * 16;  // vectors of 16 e4m3 a row
  row += first * 64;
#pragma unroll 1
  for (int from = lane_index(); from < 16 * vectors; from += 32 * AT_ONCE) {
    Vector4 v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = from + i * 32, r = warp_row + at / vectors;
      v[i] = {0, 0, 0, 0};
      if (at < 16 * vectors && r < rows) v[i] = ld_global_v4(row + r * row_bytes + at % vectors * 16);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = from + i * 32, r = warp_row + at / vectors, column = at % vectors;
      if (at >= 16 * vectors) continue;
      const uint32_t to = stage + (column >> 2) * Q_BLOCK_BYTES + r * 128 +
                          ((((column & 3) * 2) ^ (r & 7)) << 4);
      const Vector4 x = v[i];
      st_shared_v4(to, {half_x2_from_e4m3(x.x), half_x2_from_e4m3(x.x >> 16),
                        half_x2_from_e4m3(x.y), half_x2_from_e4m3(x.y >> 16)});
      st_shared_v4(to ^ 16, {half_x2_from_e4m3(x.z), half_x2_from_e4m3(x.z >> 16),
                             half_x2_from_e4m3(x.w), half_x2_from_e4m3(x.w >> 16)});
    }
  }
}
