// Shared memory of sm90_gather_decode.cu: where everything lies, and which barriers order it.
//
// Most of it is a ring of stages. A stage holds one tile of K, 48 tokens: column blocks of 48 rows
// x 128 bytes, swizzled. P of the tile is written to the ninth, where rows of 576 columns have
// their last 64, which are no part of V. Beside the ring there is room for seven column blocks of
// Q, of 64 rows x 128 bytes; sm90_gather_queries.cuh says how the others get by.
#pragma once
#include "sm90_arrivals.cuh"
#include "sm90_gather_format.cuh"

constexpr int ROWS = 64;    // query rows of a thread block
constexpr int TOKENS = 64;  // tokens of a tile of the schedule, at which pieces begin
constexpr int TILE = 48;    // tokens of a tile here
constexpr int STAGES = 3;   // of the ring

constexpr int BLOCK_BYTES = TILE * 128;
constexpr int P_BLOCK = 8;  // where P is, in column blocks
constexpr int STAGE_BYTES = (P_BLOCK + 1) * BLOCK_BYTES;
constexpr int Q_BLOCK_BYTES = ROWS * 128;
// Column blocks of Q that are loaded first, while the piece before is computed.
constexpr int Q_FIRST_BLOCKS = COLUMN_BLOCKS - 2 * Q_TAIL_BLOCKS;
constexpr int STEPS = 4 * COLUMN_BLOCKS;            // of Q, 16 columns each
constexpr int Q_STEPS = STEPS - 4 * Q_TAIL_BLOCKS;  // of them, kept in registers
constexpr int P_STEP_BYTES = ROWS * 32;             // 16 columns of P, core matrices
static_assert(TILE / 16 * P_STEP_BYTES == BLOCK_BYTES, "P takes the place of a column block");

// Four warpgroups: 0 has the softmax role, 1 and 2 the matrix role, 3 gathers.
constexpr int GROUP_THREADS = 128, BLOCK_THREADS = 4 * GROUP_THREADS, GROUP_WARPS = 4;
DEVICE uint32_t thread_in_group() { return thread_index() & (GROUP_THREADS - 1); }

// Two pairs of warps of the gather warpgroup take turns with the tiles, and a warp has half of one.
constexpr int PAIR_WARPS = 2, PAIRS = GROUP_WARPS / PAIR_WARPS, HALF_TILE = TILE / PAIR_WARPS;

// ---- the memory map -------------------------------------------------------------------------
// Byte offsets, and what lies there.

constexpr int Q_ROOM = STAGES * STAGE_BYTES;                     // column blocks of Q
constexpr int Q_TAIL = Q_ROOM + Q_FIRST_BLOCKS * Q_BLOCK_BYTES;  // the last ones of Q
// Where those behind the first ones go: the tail, and ahead of it what goes to registers.
constexpr int Q_REST = Q_TAIL - Q_TAIL_BLOCKS * Q_BLOCK_BYTES;
constexpr int WALKS = Q_TAIL + Q_TAIL_BLOCKS * Q_BLOCK_BYTES;  // [4 warps]; of each, in it:
// Not all bytes are in use: where these numbers differ, ptxas takes other registers than those that
// the times of the lab notes are of.
constexpr int ROW_POINTERS = 0;       // uint64 [24]
constexpr int SEEN = 192, BAD = 196;  // uint32 each, bits of tokens
constexpr int ENTRIES = 384;          // int32 [24]
constexpr int NEXT_TILE = 480;        // Vector4: Walk
constexpr int REQUEST = 496;          // int32: that of the next tile
constexpr int SECOND_LIST_AT = 504;   // int32
constexpr int WALK_BYTES = 512;
static_assert(ROW_POINTERS + HALF_TILE * 8 <= SEEN && BAD < ENTRIES, "fit");
static_assert(ENTRIES + HALF_TILE * 4 <= NEXT_TILE && SECOND_LIST_AT < WALK_BYTES, "fit");

constexpr int FACTORS = WALKS + GROUP_WARPS * WALK_BYTES;
constexpr int INVERSE_L = FACTORS + STAGES * ROWS * 2;  // behind uint16 [STAGES][64]; float [64]
constexpr int PART_ROW = INVERSE_L + ROWS * 4;          // int32 [8], the part's metadata
constexpr int ROW_BLOCK = PART_ROW + 32;                // int32 [3], a RowBlock
constexpr int RESULT = ROW_BLOCK + 12;                  // int32: where the piece's results go
constexpr int RESCALE = RESULT + 4;                     // uint32 [STAGES][4], of each softmax warp
constexpr int LIVE = RESCALE + STAGES * 16;  // uint32 [STAGES][2], of the tokens of each half of a
                                             // tile: bit i is set if token i counts
constexpr int BARRIERS = LIVE + STAGES * 8;  // uint64 [MBARRIERS]

extern __shared__ __align__(1024) uint8_t shared[];

DEVICE uint32_t shared_base() { return shared_address(shared); }
DEVICE uint32_t stage_address(uint32_t stage) { return shared_base() + stage * STAGE_BYTES; }
DEVICE uint32_t part_row() { return shared_base() + PART_ROW; }
DEVICE uint32_t row_block_address() { return shared_base() + ROW_BLOCK; }
DEVICE uint32_t live_tokens(uint32_t stage) { return shared_base() + LIVE + stage * 8; }

// ---- mbarriers ------------------------------------------------------------------------------
//
//   barrier          who arrives               who waits            what it means
//   full             gather, 2 warps           softmax              K of the tile is there
//   p_ready          softmax, 4 warps          matrix, both halves  P of the tile is written
//   empty            matrix, 8 warps           gather               the stage may be filled again
//   results_ready    softmax, 4 warps          matrix, both halves  INVERSE_L, RESULT are written
//   results_free     matrix, 8 warps           softmax              they have been read
//
//   q_full           TMA                       softmax              the first blocks of Q are there
//   q_first_taken    softmax, 4 warps          softmax, warp 0      and in registers, S is complete
//   q_rest_full      TMA                       softmax              the rest of Q is there
//   q_taken          softmax, 4 warps          softmax, warp 0      the first may be loaded again
//
// The first three are there once for each stage.

enum MbarrierIndex {
  FULL = 0,
  EMPTY = FULL + STAGES,
  P_READY = EMPTY + STAGES,
  RESULTS_FREE = P_READY + STAGES,
  RESULTS_READY,
  Q_FULL,
  Q_REST_FULL,
  Q_FIRST_TAKEN,
  Q_TAKEN,
  MBARRIERS
};
constexpr int SHARED_BYTES = BARRIERS + MBARRIERS * 8;
static_assert(WALKS % 16 == 0 && NEXT_TILE % 16 == 0 && FACTORS % 16 == 0, "aligned");
static_assert(BARRIERS % 8 == 0 && SHARED_BYTES <= 232448, "of a block");
static_assert(SHARED_BYTES == LAUNCH_SHARED_BYTES, "gpu/gather_kernels.py has it");

DEVICE uint32_t mbarrier(uint32_t index) { return shared_base() + BARRIERS + index * 8; }
DEVICE uint32_t full(uint32_t stage) { return mbarrier(FULL + stage); }
DEVICE uint32_t empty(uint32_t stage) { return mbarrier(EMPTY + stage); }
DEVICE uint32_t p_ready(uint32_t stage) { return mbarrier(P_READY + stage); }
DEVICE uint32_t results_free() { return mbarrier(RESULTS_FREE); }
DEVICE uint32_t results_ready() { return mbarrier(RESULTS_READY); }
DEVICE uint32_t q_full() { return mbarrier(Q_FULL); }
DEVICE uint32_t q_rest_full() { return mbarrier(Q_REST_FULL); }
DEVICE uint32_t q_first_taken() { return mbarrier(Q_FIRST_TAKEN); }
DEVICE uint32_t q_taken() { return mbarrier(Q_TAKEN); }

DEVICE void init_mbarriers() {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(full(stage), PAIR_WARPS * ARRIVALS);
    mbarrier_init(empty(stage), 8 * ARRIVALS);
    mbarrier_init(p_ready(stage), 4 * ARRIVALS);
  }
  mbarrier_init(results_free(), 8 * ARRIVALS);
  mbarrier_init(results_ready(), 4 * ARRIVALS);
  mbarrier_init(q_full(), 1);
  mbarrier_init(q_rest_full(), 1);
  mbarrier_init(q_first_taken(), 4 * ARRIVALS);
  mbarrier_init(q_taken(), 4 * ARRIVALS);
  fence_mbarrier_init();
}

// Makes what this thread wrote to shared memory visible to wgmma and TMA; then its warp arrives.
DEVICE void release(uint32_t barrier) {
  fence_proxy_async();
  __syncwarp();
  if (arrives()) mbarrier_arrive(barrier);
}

// Where a role is in the ring: the stage, and the parity of how often it went round.
struct Place {
  uint32_t stage = 0, phase = 0;
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  DEVICE Place next() const {
    Place behind = *this;
    behind.advance();
    return behind;
  }
};
DEVICE bool is_full(Place place) { return mbarrier_test_wait(full(place.stage), place.phase); }
