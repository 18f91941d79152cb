// Shared memory of sm90_gather_decode.cu: where everything lies, and which barriers order it.
//
// Most of it is a ring of stages. A stage holds one tile of K, 48 tokens in the 16-bit type of the
// products: column blocks of 48 rows x 128 bytes, swizzled. P of the tile is written to the ninth,
// over the rotary columns where they are no part of V. Over an FP8 cache, two stages ahead of the
// tiles of each piece hold the block's rows of Q, column blocks 0 to 3 and from 4 on, of 64 rows
// each; over 16-bit rows Q has room of its own.
//
// Rows of an FP8 cache wait in `staging` as they are, until they are converted into the ring: as
// many as a tile has. Each warp of the gather warpgroup has its own part of it, where no other warp
// looks.
#pragma once
#include "sm90_arrivals.cuh"
#include "sm90_gather_format.cuh"

constexpr int ROWS = 64;    // query rows of a thread block
constexpr int TOKENS = 64;  // tokens of a tile of the schedule, at which pieces begin
constexpr int TILE = 48;    // tokens of a tile here
constexpr int STAGES = 3;  // of the ring
// Over 16-bit rows there is room for Q beside the ring; over FP8 it comes by way of two stages.
constexpr bool Q_HAS_ROOM = !IS_FP8;
constexpr int Q_STAGES = Q_HAS_ROOM ? 0 : 2;

constexpr int BLOCK_BYTES = TILE * 128;
constexpr int P_BLOCK = 8;  // where P is, in column blocks
constexpr int STAGE_BYTES = (P_BLOCK + 1) * BLOCK_BYTES;
constexpr int Q_BLOCK_BYTES = ROWS * 128;
// Column blocks of Q that are loaded first: into the first of its stages, or, while the piece before
// is computed, into its room.
constexpr int Q_FIRST_BLOCKS = Q_HAS_ROOM ? COLUMN_BLOCKS - 2 * Q_TAIL_BLOCKS : 4;
constexpr int STEPS = 4 * COLUMN_BLOCKS;            // of Q, 16 columns each
constexpr int Q_STEPS = STEPS - 4 * Q_TAIL_BLOCKS;  // of them, kept in registers
static_assert((COLUMN_BLOCKS - Q_FIRST_BLOCKS) * Q_BLOCK_BYTES <= STAGE_BYTES, "Q in two stages");
constexpr int P_STEP_BYTES = ROWS * 32;  // 16 columns of P, core matrices
static_assert(TILE / 16 * P_STEP_BYTES == BLOCK_BYTES, "P takes the place of a column block");

// Four warpgroups: 0 has the softmax role, 1 and 2 the matrix role, 3 gathers.
constexpr int GROUP_THREADS = 128, BLOCK_THREADS = 4 * GROUP_THREADS, GROUP_WARPS = 4;
DEVICE uint32_t thread_in_group() { return thread_index() & (GROUP_THREADS - 1); }

// A warp of the gather warpgroup takes chunks of four tokens, in turns with the other three: chunk
// c of warp w is tokens 16 c + 4 w to 16 c + 4 w + 3 of the tile. So a chunk lies in one page.
constexpr int CHUNK = 4, TILE_CHUNKS = TILE / (CHUNK * GROUP_WARPS);
constexpr int WARP_TOKENS = CHUNK * TILE_CHUNKS;  // of a tile
// Over 16-bit rows two pairs of warps take turns, and a warp has half of a tile.
constexpr int FILLING_WARPS = IS_FP8 ? GROUP_WARPS : 2;  // of a tile

// ---- the memory map -------------------------------------------------------------------------
// Byte offsets, and what lies there.

constexpr int Q_ROOM = STAGES * STAGE_BYTES;  // column blocks of Q
constexpr int Q_TAIL = Q_ROOM + Q_HAS_ROOM * Q_FIRST_BLOCKS * Q_BLOCK_BYTES;  // the last ones of Q
// Where those behind the first ones go: the tail, and ahead of it what goes to registers.
constexpr int Q_REST = Q_TAIL - Q_TAIL_BLOCKS * Q_BLOCK_BYTES;
constexpr int STAGING = Q_TAIL + Q_TAIL_BLOCKS * Q_BLOCK_BYTES;  // [4 warps][12] rows
constexpr int WALKS = STAGING + GROUP_WARPS * WARP_TOKENS * STAGED_ROW;  // [4 warps]; of each, in
constexpr int TILE_POINTERS = WARP_TOKENS * 8;                     // it: for two tiles
constexpr int ROW_POINTERS = 0;                                    // uint64 [2][12]
constexpr int TAIL_POINTERS = ROW_POINTERS + 2 * TILE_POINTERS;    // uint64 [2][12]
constexpr int ENTRIES = TAIL_POINTERS + 2 * TILE_POINTERS;         // int32 [2][12]
constexpr int NEXT_TILE = ENTRIES + 2 * WARP_TOKENS * 4;           // Vector4: Walk
constexpr int REQUEST = NEXT_TILE + 16;                        // int32: that of the next tile
constexpr int BEGUN = REQUEST + 4;                             // int32: begun_request()
constexpr int SECOND_LIST_AT = BEGUN + 4;                      // int32
constexpr int SECOND_TILE = SECOND_LIST_AT + 4;                // uint32: the word about it
constexpr int WALK_BYTES = SECOND_TILE + 4;

constexpr int FACTORS = WALKS + GROUP_WARPS * WALK_BYTES;
constexpr int INVERSE_L = FACTORS + STAGES * ROWS * 2;  // behind uint16 [STAGES][64]; float [64]
constexpr int PART_ROW = INVERSE_L + ROWS * 4;          // int32 [8], the part's metadata
constexpr int ROW_BLOCK = PART_ROW + 32;                // int32 [3], a RowBlock
constexpr int RESULT = ROW_BLOCK + 12;                  // int32: where the piece's results go
constexpr int RESCALE = RESULT + 4;                     // uint32 [STAGES][4], of each softmax warp
constexpr int LIVE = RESCALE + STAGES * 16;  // uint16 [STAGES][4]: bit 4 c + i of warp w is token i
                                             // of its chunk c, and set if that counts; over 16-bit
                                             // rows uint32 [STAGES][2], 24 tokens each
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
//   full             gather, and TMA           softmax              K of the tile, or Q, is there
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
// The first three are there once for each stage. Of a stage with Q only the softmax warpgroup takes
// note: it waits for full, meets itself at p_ready, and arrives at empty for the matrix warpgroups.
// Those of Q are there over 16-bit rows only, where no stage has Q.

enum MbarrierIndex {
  FULL = 0,
  EMPTY = FULL + STAGES,
  P_READY = EMPTY + STAGES,
  RESULTS_FREE = P_READY + STAGES,
  RESULTS_READY,
  Q_BARRIERS,
  MBARRIERS = Q_BARRIERS + (Q_HAS_ROOM ? 4 : 0)
};
constexpr int SHARED_BYTES = BARRIERS + MBARRIERS * 8;
static_assert(NEXT_TILE % 16 == 0 && WALK_BYTES % 16 == 0 && FACTORS % 16 == 0, "aligned");
static_assert(BARRIERS % 8 == 0 && SHARED_BYTES <= 232448, "of a block");
static_assert(SHARED_BYTES == LAUNCH_SHARED_BYTES, "gpu/kernels.py has it, too");

DEVICE uint32_t mbarrier(uint32_t index) { return shared_base() + BARRIERS + index * 8; }
DEVICE uint32_t full(uint32_t stage) { return mbarrier(FULL + stage); }
DEVICE uint32_t empty(uint32_t stage) { return mbarrier(EMPTY + stage); }
DEVICE uint32_t p_ready(uint32_t stage) { return mbarrier(P_READY + stage); }
DEVICE uint32_t results_free() { return mbarrier(RESULTS_FREE); }
DEVICE uint32_t results_ready() { return mbarrier(RESULTS_READY); }
DEVICE uint32_t q_full() { return mbarrier(Q_BARRIERS); }
DEVICE uint32_t q_rest_full() { return mbarrier(Q_BARRIERS + 1); }
DEVICE uint32_t q_first_taken() { return mbarrier(Q_BARRIERS + 2); }
DEVICE uint32_t q_taken() { return mbarrier(Q_BARRIERS + 3); }

DEVICE void init_mbarriers() {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(full(stage), FILLING_WARPS * ARRIVALS);
    mbarrier_init(empty(stage), 8 * ARRIVALS);
    mbarrier_init(p_ready(stage), 4 * ARRIVALS);
  }
  mbarrier_init(results_free(), 8 * ARRIVALS);
  mbarrier_init(results_ready(), 4 * ARRIVALS);
  if (Q_HAS_ROOM) {
    mbarrier_init(q_full(), 1);
    mbarrier_init(q_rest_full(), 1);
    mbarrier_init(q_first_taken(), 4 * ARRIVALS);
    mbarrier_init(q_taken(), 4 * ARRIVALS);
  }
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
