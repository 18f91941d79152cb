// The ring of three stages in shared memory, and the producers that fill it by TMA.
//
// A slot of the ring is one tile of K, or, ahead of the tiles of each piece, the block's rows of Q:
// nine column blocks of 64 rows x 128 bytes, swizzled. A slot has two halves with barriers of their
// own: half 0 is column blocks 0..3 (the first half of V), half 1 is 4..8 (the second, and the
// rotary columns). Each half has its producer: warp 0 of the warpgroup that multiplies with it.
#pragma once
#include "work.cuh"

constexpr int STAGES = 3;
constexpr int BLOCK_BYTES = ROWS * 128, COLUMN_BLOCKS = 9, ROPE = 8;  // ROPE: the last block
constexpr int STAGE_BYTES = COLUMN_BLOCKS * BLOCK_BYTES;
DEVICE int half_blocks(int half) { return 4 + half; }

// Byte offsets in shared memory.
constexpr int Q_ROPE = STAGES * STAGE_BYTES;           // column block 8 of Q
constexpr int Q_STEP_31 = Q_ROPE + BLOCK_BYTES;        // columns 496..511 of Q, core matrices
constexpr int FACTORS = Q_STEP_31 + ROWS * 32;         // uint16 [STAGES][64], top halves of floats
constexpr int INVERSE_L = FACTORS + STAGES * ROWS * 2;  // float [64]
constexpr int RESCALE = INVERSE_L + ROWS * 4;          // uint32 [STAGES][4], of each warp
constexpr int PART_ROW = RESCALE + STAGES * 16;        // int32 [8]
constexpr int ROW_BLOCK = PART_ROW + 32;               // int32 [3]
constexpr int RESULT = ROW_BLOCK + 12;                 // int32: where the piece's results go
constexpr int BARRIERS = RESULT + 4;
constexpr int SHARED_BYTES = BARRIERS + 5 * STAGES * 8 + 24;
static_assert(BARRIERS % 8 == 0 && SHARED_BYTES == 232304, "of 232448; launches.py has it too");

extern __shared__ __align__(1024) uint8_t shared[];

DEVICE uint32_t shared_base() { return shared_address(shared); }
DEVICE uint32_t stage_address(uint32_t stage) { return shared_base() + stage * STAGE_BYTES; }
// Barriers: data has arrived; all have finished with it (4 and 8 warps); P is written (4 warps).
DEVICE uint32_t full(int half, uint32_t stage) {
  return shared_base() + BARRIERS + (half * STAGES + stage) * 8;
}
DEVICE uint32_t empty(int half, uint32_t stage) {
  return shared_base() + BARRIERS + ((2 + half) * STAGES + stage) * 8;
}
DEVICE uint32_t p_ready(uint32_t stage) {
  return shared_base() + BARRIERS + (4 * STAGES + stage) * 8;
}
// INVERSE_L and RESULT have been read (8 warps).
DEVICE uint32_t results_free() { return shared_base() + BARRIERS + 5 * STAGES * 8; }
// The other piece of a pair has arrived (pair.cuh).
DEVICE uint32_t other_full() { return shared_base() + BARRIERS + 5 * STAGES * 8 + 8; }
// INVERSE_L and RESULT are written (4 warps).
DEVICE uint32_t results_ready() { return shared_base() + BARRIERS + 5 * STAGES * 8 + 16; }
DEVICE uint32_t part_row() { return shared_base() + PART_ROW; }
DEVICE uint32_t row_block_address() { return shared_base() + ROW_BLOCK; }

// One lane arrives for its warp, behind __syncwarp. racecheck does not see that order, so for it
// (tests/gpu/sanitize.py) every lane arrives.
#if defined(EVERY_LANE_ARRIVES)
constexpr int ARRIVALS = 32;
DEVICE bool arrives() { return true; }
#else
constexpr int ARRIVALS = 1;  // of a warp
DEVICE bool arrives() { return lane_index() == 0; }
#endif

DEVICE void init_barriers() {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(full(0, stage), 1);
    mbarrier_init(full(1, stage), 1);
    mbarrier_init(empty(0, stage), 4 * ARRIVALS);
    mbarrier_init(empty(1, stage), 8 * ARRIVALS);
    mbarrier_init(p_ready(stage), 4 * ARRIVALS);
  }
  mbarrier_init(results_free(), 8 * ARRIVALS);
  mbarrier_init(other_full(), 1);
  mbarrier_init(results_ready(), 4 * ARRIVALS);
  fence_mbarrier_init();
}

// Where a role is in the ring: the stage, and the parity of how often it went round.
struct Place {
  uint32_t stage = 0, phase = 0;
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  DEVICE void retreat() {
    if (stage-- == 0) stage = STAGES - 1, phase ^= 1;
  }
};

// ---- producers ------------------------------------------------------------------------------

#if PAGE_SIZE < 64
constexpr int PAGES_PER_TILE = TOKENS / PAGE_SIZE;
#else
constexpr int PAGES_PER_TILE = 1;  // or less: PAGE_SIZE 64 stands for 128 and 256 as well
#endif

// The next slot to load: a warp-uniform walk over the tiles of the part. The page id is loaded one
// slot ahead. A cursor in shared memory was 700 cycles a slot slower.
struct Cursor {
  enum { Q_SLOT = -1, DONE = -2 };
  int request, tile, end;
  int page;  // of the tile; small pages: lane i has that of page i % PAGES_PER_TILE
};

// A condition of the cursor. With the shuffles of small pages the compiler must know that it is the same
// in all lanes, or it guards every shuffle of the role (uniform).
DEVICE bool same(bool condition) { return PAGES_PER_TILE > 1 ? uniform(condition) : condition; }
DEVICE int page_column(const Params& p, int tile) {
  if (PAGES_PER_TILE > 1) return tile * PAGES_PER_TILE + lane_index() % PAGES_PER_TILE;
  return tile >> p.page_tiles_log2;
}
// Brings block_table and cache_seqlens to the L2 cache, a line a lane, ahead of the wait: what they
// hold by then does not matter. The first lines of all rows come first, since tables have room to spare.
DEVICE void prefetch_tables(const Params& p) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = block * 32 + lane_index();
  const int line = i / p.batch, request = i - line * p.batch;
  const int first_page = line * 32;
  if (line == 0 && request % 32 == 0) prefetch_l2(p.cache_seqlens + request);
  if (first_page <= page_column(p, (p.max_length - 1) >> 6)) {
    prefetch_l2(p.block_table + request * p.table_stride + first_page);
  }
}
// Loads the page id of cursor.tile, which need not be a tile of the request, but lies in its row of
// block_table.
DEVICE void fetch_page(const Params& p, Cursor& cursor) {
  const int column = page_column(p, cursor.tile);
  bool in_row = cursor.tile <= (p.max_length - 1) >> 6;
  if (PAGES_PER_TILE > 1) in_row &= column * PAGE_SIZE < p.max_length;
  if (in_row) cursor.page = __ldg(p.block_table + cursor.request * p.table_stride + column);
}
// To the first request after cursor.request with something to compute. The page id is on its way
// before the length is known: latency is all that a short request consists of.
DEVICE void next_piece(const Params& p, Cursor& cursor) {
  const Part part = part_of(p);
  while (same(++cursor.request <= part.last_request)) {
    cursor.tile = cursor.request == part.first_request ? max(part.begin_tile, 0) : 0;
    fetch_page(p, cursor);
    const Piece piece = piece_of(p, cursor.request);
    if (same(piece.begin < piece.end)) {
      cursor.tile = Cursor::Q_SLOT, cursor.end = piece.end;
      return;
    }
  }
  cursor.tile = Cursor::DONE;
}

// The box at page == num_pages is out of bounds, and TMA fills it with NaN without a look at
// memory: so a page id outside of the pool makes its request NaN.
DEVICE int checked_page(const Params& p, const Cursor& cursor) {
  const int column = page_column(p, cursor.tile);
  const bool used =
      PAGES_PER_TILE == 1 || column * PAGE_SIZE < __ldg(p.cache_seqlens + cursor.request);
  const bool bad = (uint32_t)cursor.page >= (uint32_t)p.num_pages;
  if (used && bad) refuse(p, cursor.request, PAGE_ID, column);
  return used && !bad ? cursor.page : p.num_pages;
}

// Loads this half of the cursor's slot into its stage, once it is empty, and moves on.
DEVICE void produce(const Params& p, int half, const TensorMap& q_map, const TensorMap& k_map,
                    Cursor& cursor, Place place, bool wait) {
  if (same(cursor.tile == Cursor::DONE)) return;
  const int first = half * 4;
  const uint32_t to = stage_address(place.stage) + first * BLOCK_BYTES;
  const uint32_t barrier = full(half, place.stage);
  if (wait) mbarrier_wait(empty(half, place.stage), place.phase);
  if (same(cursor.tile == Cursor::Q_SLOT)) {
    if (elect_sync()) {
      const RowBlock block = row_block();
      mbarrier_arrive_expect_tx(barrier, half_blocks(half) * BLOCK_BYTES);
      cp_async_bulk_tensor_5d(to, q_map, barrier, 0, block.first_head + block.first_row, first,
                              block.slab, cursor.request, createpolicy_evict_first());
    }
    __syncwarp();
    const Part part = part_of(p);
    cursor.tile = cursor.request == part.first_request ? part.begin_tile : 0;
    return;
  }
  const int page = checked_page(p, cursor);
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
    const int row = (cursor.tile & ((1 << p.page_tiles_log2) - 1)) * TOKENS;
    cp_async_bulk_tensor_5d(to, k_map, barrier, 0, row, first, blockIdx.y, page, policy);
#endif
  }
  __syncwarp();
  ++cursor.tile;
  if (same(cursor.tile < cursor.end)) {
    fetch_page(p, cursor);
  } else {
    next_piece(p, cursor);
  }
}
