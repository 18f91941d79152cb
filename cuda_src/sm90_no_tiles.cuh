// What becomes of a piece without tiles.
#pragma once
#include "merge.cuh"
#include "sm90_pieces.cuh"

// The results of a piece without tiles, by the threads of four warps.
DEVICE void store_no_tiles(const Params& params, int request, const Piece& piece) {
  const uint32_t thread = thread_in_group();
  if (piece.refused && thread == 0) {
#if defined(GATHERED)
    const List list = piece.reason == LENGTH ? list_of_length(params, request) : TABLE;
    refuse(params, request, piece.reason, list << LIST_SHIFT);
#else
    refuse(params, request, piece.reason, 0);
#endif
  }
  if (piece.slot < 0) {
    store_no_keys(params, request, piece.refused, thread, GROUP_THREADS);
    return;
  }
  // A split piece has tiles unless it is refused; combine makes the row NaN.
  const RowBlock block = row_block();
  if (thread < min(ROWS, params.slab_rows - block.first_row)) {
    const int64_t row = partial_row(params, piece.slot, block, block.first_row + thread);
    st_global_v4_f32(params.row_partial + row * 4, QUIET_NAN, 1.f, 1.f, QUIET_NAN);
  }
}
