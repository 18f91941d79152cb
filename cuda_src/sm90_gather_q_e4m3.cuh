// Rows of Q in e4m3 (QUERY_E4M3): the softmax warpgroup reads them itself, 16 bytes a lane, into the
// stages that TMA would fill with rows of 16 bits, as float16. For what comes then there is no
// difference.
#pragma once
#include "sm90_pieces.cuh"

#if defined(QUERY_E4M3)
constexpr bool QUERY_IS_E4M3 = true;
#else
constexpr bool QUERY_IS_E4M3 = false;
#endif

// Where the block's rows are in q: those of a query token that is a request of its own are at a
// position of a request of the call.
struct QRows {
  int first, position, of_call;
  DEVICE QRows(const Params& params, int request) {
    const RowBlock block = row_block();
    first = block.first_head + block.first_row;
    of_call = request / params.lse_group;
    position = block.slab + request - of_call * params.lse_group;
  }
};

// All column blocks of Q into two stages. A warp has 16 of the 64 rows, those that it reads later.
// Rows past the slab become 0.
DEVICE void convert_q(const Params& params, int request, uint32_t first_stage,
                      uint32_t second_stage) {
  constexpr int VECTORS = COLUMN_BLOCKS * 4, AT_ONCE = VECTORS / 4;  // 16 e4m3 each; of a row
  const QRows at(params, request);
  const int warp_row = warp_in_group() * 16;
  const int rows = params.slab_rows - row_block().first_row - warp_row;
  const uint8_t* from = params.q + at.of_call * params.q_batch_stride +
                        at.position * params.q_position_stride +
                        (at.first + warp_row) * params.q_head_stride;
#pragma unroll 1
  for (int begin = lane_index(); begin < 16 * VECTORS; begin += 32 * AT_ONCE) {
    Vector4 v[AT_ONCE];  // on their way together
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int row = (begin + i * 32) / VECTORS, column = (begin + i * 32) % VECTORS;
      v[i] = {0, 0, 0, 0};
      if (row < rows) v[i] = ld_global_v4(from + row * params.q_head_stride + column * 16);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int row = (begin + i * 32) / VECTORS, column = (begin + i * 32) % VECTORS;
      const int block = column >> 2;
      const uint32_t stage = block < Q_FIRST_BLOCKS
                                 ? first_stage + block * Q_BLOCK_BYTES
                                 : second_stage + (block - Q_FIRST_BLOCKS) * Q_BLOCK_BYTES;
      const uint32_t to =
          stage + (warp_row + row) * 128 + ((((column & 3) * 2) ^ (row & 7)) << 4);
      const Vector4 x = v[i];
      st_shared_v4(to, {half_x2_from_e4m3(x.x), half_x2_from_e4m3(x.x >> 16),
                        half_x2_from_e4m3(x.y), half_x2_from_e4m3(x.y >> 16)});
      st_shared_v4(to ^ 16, {half_x2_from_e4m3(x.z), half_x2_from_e4m3(x.z >> 16),
                             half_x2_from_e4m3(x.w), half_x2_from_e4m3(x.w >> 16)});
    }
  }
  __syncwarp();
}
