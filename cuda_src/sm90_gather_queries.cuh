// Rows of Q, by the softmax warpgroup. There is room for most of them beside the ring: the first
// column blocks of a piece are loaded while that before is computed, and the rest as these are
// taken to registers, over the last of them and the tail of the piece before. Warp 0 asks for both.
#pragma once
#include "sm90_gather_cursor.cuh"

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

struct Queries {
  const TensorMap &first_map, &rest_map;
  uint32_t phase = 0;
  bool is_taken = false;  // and the next not yet asked for

  // Of the part's first piece.
  DEVICE void begin(const Params& params) const {
    if (uniform(warp_in_group()) == 0) ask_ahead(params, part_of(params).first_request - 1);
  }
  DEVICE void ask_for_first(const Params& params, int request) const {
    if (!elect_sync()) return;
    const QRows at(params, request);
    mbarrier_arrive_expect_tx(q_full(), Q_FIRST_BLOCKS * Q_BLOCK_BYTES);
    cp_async_bulk_tensor_5d(shared_base() + Q_ROOM, first_map, q_full(), 0, at.first, 0,
                            at.position, at.of_call, createpolicy_evict_first());
    prefetch_bulk_tensor_5d(rest_map, 0, at.first, Q_FIRST_BLOCKS, at.position, at.of_call);
  }
  DEVICE void ask_for_rest(const Params& params, int request) const {
    if (!elect_sync()) return;
    const QRows at(params, request);
    mbarrier_arrive_expect_tx(q_rest_full(), 2 * Q_TAIL_BLOCKS * Q_BLOCK_BYTES);
    cp_async_bulk_tensor_5d(shared_base() + Q_REST, rest_map, q_rest_full(), 0, at.first,
                            Q_FIRST_BLOCKS, at.position, at.of_call, createpolicy_evict_first());
  }
  // Asks for the first blocks of the next request that has tiles, if there is one.
  DEVICE void ask_ahead(const Params& params, int request) const {
    const int last = uniform(part_of(params).last_request);
    while (++request <= last) {
      if (uniform(piece_tiles(piece_of(params, request))) == 0) continue;
      ask_for_first(params, request);
      break;
    }
    __syncwarp();
  }
  // Takes the rows of Q [64, d_qk] to registers, but for the tail.
  DEVICE void take(const Params& params, int request, uint32_t (&q)[4 * Q_STEPS]) {
    const uint32_t from = shared_base() + Q_ROOM + fragment_offset();
    auto load = [&](int k, uint32_t block) {
      ldmatrix_x4(block ^ ((k & 3) << 5), q[4 * k], q[4 * k + 1], q[4 * k + 2], q[4 * k + 3]);
    };
    mbarrier_wait(q_full(), phase);
#pragma unroll
    for (int k = 0; k < 4 * Q_FIRST_BLOCKS; ++k) load(k, from + (k >> 2) * Q_BLOCK_BYTES);
    release(q_first_taken());
    if (uniform(warp_in_group()) == 0) {
      mbarrier_wait(q_first_taken(), phase);
      ask_for_rest(params, request);
      __syncwarp();
    }
    mbarrier_wait(q_rest_full(), phase);
#pragma unroll
    for (int k = 4 * Q_FIRST_BLOCKS; k < Q_STEPS; ++k) {
      load(k, from + ((k >> 2) - Q_TAIL_BLOCKS) * Q_BLOCK_BYTES);
    }
    release(q_taken());
    is_taken = true;
  }
  // Of the tile that was just asked for, while the tensor cores compute them.
  DEVICE void scores_are_issued(const Params& params, int request) {
    if (!is_taken) return;
    is_taken = false;
    if (uniform(warp_in_group()) == 0) {
      mbarrier_wait(q_taken(), phase);
      ask_ahead(params, request);
    }
    phase ^= 1;
  }
};
