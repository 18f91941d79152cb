// The producers, which fill the ring by TMA. Each half of a stage has its own: warp 0 of the matrix
// warpgroup that multiplies with that half.
//
// A producer walks over the tiles of its part with a Cursor, piece by piece: first the rows of Q
// for the piece's request, then each tile of K. A request whose length or metadata is refused has
// no tiles; a page id out of range is refused here, and reads as NaN.
#pragma once
#include "sm90_pieces.cuh"

#if PAGE_SIZE < 64
constexpr int PAGES_PER_TILE = TOKENS / PAGE_SIZE;
#else
constexpr int PAGES_PER_TILE = 1;  // or less: PAGE_SIZE 64 stands for 128 and 256 as well
#endif

// What to load next, the same in all lanes of the warp. The page id is fetched one stage ahead.
struct Cursor {
  enum { LOADS_Q = -1, DONE = -2 };  // values of `tile`
  int request, tile, end;
  int page;  // of the tile; of small pages, lane i has page i % PAGES_PER_TILE of the tile
};

// A condition on the cursor. With the shuffles of small pages the compiler must know that it is the
// same in all lanes, or it guards every shuffle of the role (see uniform).
DEVICE bool same(bool condition) { return PAGES_PER_TILE > 1 ? uniform(condition) : condition; }
// The column of block_table for a tile; of small pages, for this lane's page of it.
DEVICE int page_column(const Params& params, int tile) {
  if (PAGES_PER_TILE > 1) return tile * PAGES_PER_TILE + lane_index() % PAGES_PER_TILE;
  return tile >> params.page_tiles_log2;
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
  if (first_page <= page_column(params, (params.max_length - 1) >> 6)) {
    prefetch_l2(params.block_table + request * params.table_stride + first_page);
  }
}
// Loads the page id of cursor.tile. That need not be a tile of the request, but what is read lies
// in the request's row of block_table.
DEVICE void fetch_page(const Params& params, Cursor& cursor) {
  const int column = page_column(params, cursor.tile);
  bool in_row = cursor.tile <= (params.max_length - 1) >> 6;
  if (PAGES_PER_TILE > 1) in_row &= column * PAGE_SIZE < params.max_length;
  if (in_row)
    cursor.page = __ldg(params.block_table + cursor.request * params.table_stride + column);
}
// Moves on to the first request after cursor.request that has something to compute. The page id is
// on its way before the length is known: latency is all that a short request consists of.
DEVICE void next_piece(const Params& params, Cursor& cursor) {
  const Part part = part_of(params);
  while (same(++cursor.request <= part.last_request)) {
    cursor.tile = cursor.request == part.first_request ? max(part.begin_tile, 0) : 0;
    fetch_page(params, cursor);
    const Piece piece = piece_of(params, cursor.request);
    if (same(piece.begin < piece.end)) {
      cursor.tile = Cursor::LOADS_Q, cursor.end = piece.end;
      return;
    }
  }
  cursor.tile = Cursor::DONE;
}

// The page to load. For a page id outside of the pool, which is refused, and for a page that the
// request does not use, that is num_pages: such a box is out of bounds, and TMA fills it with NaN
// without a look at memory. So a bad page id makes its request NaN.
DEVICE int checked_page(const Params& params, const Cursor& cursor) {
  const int column = page_column(params, cursor.tile);
  const bool used =
      PAGES_PER_TILE == 1 || column * PAGE_SIZE < __ldg(params.cache_seqlens + cursor.request);
  const bool bad = (uint32_t)cursor.page >= (uint32_t)params.num_pages;
  if (used && bad) refuse(params, cursor.request, PAGE_ID, column);
  return used && !bad ? cursor.page : params.num_pages;
}

// Loads what the cursor says into this half of the stage at `place`, once it is empty, and moves
// on.
DEVICE void produce(const Params& params, int half, const TensorMap& q_map, const TensorMap& k_map,
                    Cursor& cursor, Place place, bool wait) {
  if (same(cursor.tile == Cursor::DONE)) return;
  const int first = half * 4;
  const uint32_t to = stage_address(place.stage) + first * BLOCK_BYTES;
  const uint32_t barrier = full(half, place.stage);
  if (wait) mbarrier_wait(empty(half, place.stage), place.phase);
  if (same(cursor.tile == Cursor::LOADS_Q)) {
    if (elect_sync()) {
      const RowBlock block = row_block();
      mbarrier_arrive_expect_tx(barrier, half_blocks(half) * BLOCK_BYTES);
      cp_async_bulk_tensor_5d(to, q_map, barrier, 0, block.first_head + block.first_row, first,
                              block.slab, cursor.request, createpolicy_evict_first());
    }
    __syncwarp();
    const Part part = part_of(params);
    cursor.tile = cursor.request == part.first_request ? part.begin_tile : 0;
    return;
  }
  const int page = checked_page(params, cursor);
#if PAGE_SIZE < 64
  int pages[PAGES_PER_TILE];
#pragma unroll
  for (int i = 0; i < PAGES_PER_TILE; ++i) pages[i] = __shfl_sync(~0u, page, i);
#endif
  if (elect_sync()) {
    const uint64_t policy = createpolicy_evict_first();
    mbarrier_arrive_expect_tx(barrier, half_blocks(half) * BLOCK_BYTES);
#if PAGE_SIZE < 64
#pragma unroll
    for (int i = 0; i < PAGES_PER_TILE; ++i) {
#pragma unroll 1
      for (int block = 0; block < half_blocks(half); ++block) {
        cp_async_bulk_tensor_5d(to + block * BLOCK_BYTES + i * PAGE_SIZE * 128, k_map, barrier, 0,
                                0, first + block, blockIdx.y, pages[i], policy);
      }
    }
#else
    const int row = (cursor.tile & ((1 << params.page_tiles_log2) - 1)) * TOKENS;
    cp_async_bulk_tensor_5d(to, k_map, barrier, 0, row, first, blockIdx.y, page, policy);
#endif
  }
  __syncwarp();
  ++cursor.tile;
  if (same(cursor.tile < cursor.end)) {
    fetch_page(params, cursor);
  } else {
    next_piece(params, cursor);
  }
}
