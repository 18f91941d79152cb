// The load role, of one warp, which fills the ring by TMA, as soon as a slot is empty.
//
// It walks over the tokens of its part, piece by piece: first the rows of Q for the piece's
// request, then the tokens, 32 at a time. A request whose length or metadata is refused has none; a
// page id out of range is refused here, and reads as NaN.
#pragma once
#include "sm90_few_rows_shared.cuh"
#include "sm90_pieces.cuh"

// A piece in tokens [begin, end) of its request, and how many slots they take.
struct Tokens {
  int begin, end, slots;
};
DEVICE Tokens tokens_of(const Piece& piece) {
  if (piece.begin >= piece.end) return {0, 0, 0};
  const int begin = piece.begin * TOKENS, last_tile = (piece.length - 1) >> 6;
  const int end = piece.end > last_tile ? piece.length : piece.end * TOKENS;
  return {begin, end, (end - begin - 1) / SLOT_TOKENS + 1};
}

DEVICE int page_column(const Params& params, int token) {
  return PAGE_SIZE < TOKENS ? token / PAGE_SIZE : (token >> 6) >> params.page_tiles_log2;
}
// Brings block_table and cache_seqlens to the L2 cache, a line a lane, before the wait for the
// kernel ahead: what they hold by then does not matter. The first lines of all rows come first,
// since tables have room to spare at their ends.
DEVICE void prefetch_tables(const Params& params) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = block * 32 + lane_index();
  const int line = i / params.batch, request = i - line * params.batch;
  const int first_page = line * 32;  // a line has 32 page ids
  if (line == 0 && request % 32 == 0) prefetch_l2(params.cache_seqlens + request);
  if (first_page <= page_column(params, params.max_length - 1)) {
    prefetch_l2(params.block_table + request * params.table_stride + first_page);
  }
}
// The page id of a token. That need not be one of the request, but what is read lies in the
// request's row of block_table.
DEVICE int page_of(const Params& params, int request, int token) {
  if (token >= params.max_length) return -1;
  return __ldg(params.block_table + request * params.table_stride + page_column(params, token));
}

DEVICE void load_role(const Params& params, const TensorMap& q_map, const TensorMap& k_map) {
  const int lane = lane_index();
  const uint64_t policy = createpolicy_evict_first();
  const Part part = part_of(params);
  Place place;
#pragma unroll 1
  for (int request = uniform(part.first_request); request <= uniform(part.last_request);
       ++request) {
    const int first_tile = request == part.first_request ? max(part.begin_tile, 0) : 0;
    // Of this lane's box. The page id is on its way before the length is known: latency is all that
    // a short request consists of.
    int token = min(first_tile, 1 << 24) * TOKENS + lane % BOXES * BOX_TOKENS;
    int page = page_of(params, request, token);
    const Tokens tokens = tokens_of(piece_of(params, request));
    const int slots = uniform(tokens.slots);
    if (slots == 0) continue;
    mbarrier_wait(empty(place.slot), place.phase ^ 1);
    __syncwarp();  // once the slot is loaded, its next phase may end before a lane has looked
    if (lane == 0) {
      const RowBlock block = row_block();
      mbarrier_arrive_expect_tx(full(place.slot), Q_BYTES);
      cp_async_bulk_tensor_5d(slot_address(place.slot), q_map, full(place.slot), 0,
                              block.first_head + block.first_row, 0, block.slab, request, policy);
    }
    __syncwarp();
    place.advance();
#pragma unroll 1
    for (int i = 0; i < slots; ++i) {
      // The box at page == num_pages is out of bounds, and TMA fills it with NaN without a look at
      // memory: so a page id outside of the pool makes its request NaN.
      const bool used = token < tokens.end, bad = (uint32_t)page >= (uint32_t)params.num_pages;
      if (used && bad && lane < BOXES) refuse(params, request, PAGE_ID, page_column(params, token));
      const int from_page = used && !bad ? page : params.num_pages;
      const int row = PAGE_SIZE < TOKENS ? 0 : token & ((TOKENS << params.page_tiles_log2) - 1);
      token += SLOT_TOKENS;
      if (i + 1 < slots) page = page_of(params, request, token);
      mbarrier_wait(empty(place.slot), place.phase ^ 1);
      if (lane == 0) mbarrier_arrive_expect_tx(full(place.slot), SLOT_BYTES);
      __syncwarp();  // the same, and bytes are expected before any arrive
      if (lane < BOXES) {
        cp_async_bulk_tensor_5d(slot_address(place.slot) + lane * BOX_BYTES, k_map,
                                full(place.slot), 0, row, 0, blockIdx.y, from_page, policy);
      }
      __syncwarp();
      place.advance();
    }
  }
}
