// Shared memory of sm90_few_rows_decode.cu: where everything lies, and which barriers order it.
//
// Most of it is a ring of slots. A slot holds 32 tokens of K or, ahead of the tokens of each piece,
// the block's rows of Q: nine column blocks of rows of 128 bytes, swizzled, so that ldmatrix meets
// no bank twice. The tokens lie there box by box: in one box of 32 or, of pages of 16, in two, each
// with its nine blocks.
#pragma once
#include "ptx.cuh"
#include "sm90_arrivals.cuh"
#define MAP_COMES_FIRST  // for sm90_pieces.cuh

constexpr int ROWS = 16;         // query rows of a thread block
constexpr int TOKENS = 64;       // tokens of a tile of the schedule
constexpr int SLOT_TOKENS = 32;  // of a slot of the ring
constexpr int SLOTS = 3;

constexpr int COLUMN_BLOCKS = 9;
constexpr int BOX_TOKENS = PAGE_SIZE < SLOT_TOKENS ? PAGE_SIZE : SLOT_TOKENS;
constexpr int BOXES = SLOT_TOKENS / BOX_TOKENS;
constexpr int BLOCK_BYTES = BOX_TOKENS * 128, BOX_BYTES = COLUMN_BLOCKS * BLOCK_BYTES;
constexpr int SLOT_BYTES = BOXES * BOX_BYTES;
constexpr int Q_BLOCK_BYTES = ROWS * 128, Q_BYTES = COLUMN_BLOCKS * Q_BLOCK_BYTES;

// Thread blocks have three groups of four warps. Group 0 has the score role, group 1 the value
// role, and the first warp of group 2 the load role; its other warps only give away registers.
constexpr int GROUP_WARPS = 4, GROUP_THREADS = 32 * GROUP_WARPS;
DEVICE uint32_t thread_in_group() { return thread_index() & (GROUP_THREADS - 1); }

// ---- the memory map -------------------------------------------------------------------------
// Byte offsets, and what lies there.

constexpr int P_BYTES = ROWS * SLOT_TOKENS * 2;
constexpr int P_TILES = SLOTS * SLOT_BYTES;               // [SLOTS], P as fragments of A
constexpr int FACTORS = P_TILES + SLOTS * P_BYTES;        // float [SLOTS][ROWS], for O
constexpr int MAXIMA = FACTORS + SLOTS * ROWS * 4;        // float [2][ROWS][GROUP_WARPS]
constexpr int SUMS = MAXIMA + 2 * ROWS * GROUP_WARPS * 4;  // float [ROWS][GROUP_WARPS]
constexpr int INVERSE_L = SUMS + ROWS * GROUP_WARPS * 4;  // float [ROWS]
constexpr int FRONT_WEIGHTS = INVERSE_L + ROWS * 4;       // float [ROWS], of a pair
constexpr int BACK_WEIGHTS = FRONT_WEIGHTS + ROWS * 4;    // float [ROWS]
constexpr int PART_ROW = BACK_WEIGHTS + ROWS * 4;         // int32 [8], the part's metadata
constexpr int ROW_BLOCK = PART_ROW + 32;                  // int32 [4], a RowBlock
constexpr int RESCALE = ROW_BLOCK + 16;                   // uint32 [SLOTS]: whether O shrinks
constexpr int RESULT = RESCALE + SLOTS * 4;               // int32: a Kind
constexpr int BARRIERS = RESULT + 4;                      // uint64 [MBARRIERS]

extern __shared__ __align__(1024) uint8_t shared[];

DEVICE uint32_t shared_base() { return shared_address(shared); }
DEVICE uint32_t slot_address(uint32_t slot) { return shared_base() + slot * SLOT_BYTES; }
// The 128 bytes that a token of a slot has of column block 0.
DEVICE uint32_t token_row(uint32_t slot, int token) {
  return slot_address(slot) + token / BOX_TOKENS * BOX_BYTES + token % BOX_TOKENS * 128;
}
DEVICE uint32_t p_tile(uint32_t slot) { return shared_base() + P_TILES + slot * P_BYTES; }
DEVICE uint32_t row_float(uint32_t offset, int row) { return shared_base() + offset + row * 4; }
DEVICE uint32_t part_row() { return shared_base() + PART_ROW; }
DEVICE uint32_t row_block_address() { return shared_base() + ROW_BLOCK; }

// ---- mbarriers ------------------------------------------------------------------------------
//
//   barrier        who arrives               who waits     what it means
//   full           TMA, by bytes             score, value  the slot is loaded
//   p_ready        score, 4 warps            value         P of the slot is written
//   empty          score and value, 8 warps  load          the slot may be loaded again
//   results_ready  score warp 0              value         INVERSE_L, RESULT and the weights are
//                                                          written
//   results_free   value, 4 warps            score warp 0  they have been read
//
// The first three are there once for each slot. When a slot holds Q, the score warps arrive at
// empty for the value warps as well, and nobody waits for p_ready.

enum MbarrierIndex {
  FULL = 0,
  EMPTY = FULL + SLOTS,
  P_READY = EMPTY + SLOTS,
  RESULTS_READY = P_READY + SLOTS,
  RESULTS_FREE,
  MBARRIERS
};
constexpr int SHARED_BYTES = BARRIERS + MBARRIERS * 8;
static_assert(PART_ROW % 16 == 0 && BARRIERS % 8 == 0 && SHARED_BYTES == 114968,
              "the launch has it too");

DEVICE uint32_t mbarrier(uint32_t index) { return shared_base() + BARRIERS + index * 8; }
DEVICE uint32_t full(uint32_t slot) { return mbarrier(FULL + slot); }
DEVICE uint32_t empty(uint32_t slot) { return mbarrier(EMPTY + slot); }
DEVICE uint32_t p_ready(uint32_t slot) { return mbarrier(P_READY + slot); }
DEVICE uint32_t results_ready() { return mbarrier(RESULTS_READY); }
DEVICE uint32_t results_free() { return mbarrier(RESULTS_FREE); }

DEVICE void arrive(uint32_t barrier, uint32_t count = 1) {
  __syncwarp();
  if (arrives()) mbarrier_arrive(barrier, count);
}

DEVICE void init_mbarriers() {
  for (int slot = 0; slot < SLOTS; ++slot) {
    mbarrier_init(full(slot), 1);
    mbarrier_init(empty(slot), 2 * GROUP_WARPS * ARRIVALS);
    mbarrier_init(p_ready(slot), GROUP_WARPS * ARRIVALS);
  }
  mbarrier_init(results_ready(), ARRIVALS);
  mbarrier_init(results_free(), GROUP_WARPS * ARRIVALS);
  fence_mbarrier_init();
}

// Where a role is in the ring: the slot, and the parity of how often it went round.
struct Place {
  uint32_t slot = 0, phase = 0;
  DEVICE void advance() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

// ---- named barriers (bar.sync) --------------------------------------------------------------
// 0 is __syncthreads(), of all threads at the beginning.

enum NamedBarrier {
  SCORE_BARRIER = 1,  // the score warps
  BACK_BARRIER = 2    // the value warps, and score warp 0, which writes lse: a back is written
};
constexpr int BACK_BARRIER_THREADS = GROUP_THREADS + 32;
