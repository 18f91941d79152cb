// Shared memory of sm90_fp8_decode.cu: where everything lies, and which barriers order it.
//
// Most of it is Q, as 16-bit numbers or e4m3, and a ring of stages. A stage holds the rows of a tile of
// 64 tokens as they lie in the cache, in FP8, and P of the tile.
#pragma once
#include "sm90_fp8_format.cuh"
// ptx.cuh looks at the format's macros, so that comes first.
#include "sm90_arrivals.cuh"
#define MAP_COMES_FIRST  // for sm90_pieces.cuh

constexpr int ROWS = 64;    // query rows of a thread block
constexpr int TOKENS = 64;  // of a tile, of the schedule and of a stage
constexpr int STAGES = 3;   // of the ring

// Four warpgroups: 0 has the score role, 1 and 2 the value role, 3 the load role.
constexpr int GROUP_THREADS = 128, BLOCK_THREADS = 4 * GROUP_THREADS, GROUP_WARPS = 4;
constexpr int WARP_TOKENS = TOKENS / GROUP_WARPS;        // of a tile, that a warp loads, or scores
constexpr uint32_t ALL_TOKENS = (1 << WARP_TOKENS) - 1;  // bits
DEVICE uint32_t thread_in_group() { return thread_index() & (GROUP_THREADS - 1); }

// ---- the memory map -------------------------------------------------------------------------
// Byte offsets, and what lies there.

constexpr int Q_BLOCK_BYTES = ROWS * 128;
// At 0: blocks of Q, of 64 columns of 16 bits or of 128 of e4m3, swizzled.
constexpr int Q_BYTES = (QUERY_IS_E4M3 ? (COLUMN_BLOCKS + 1) / 2 : COLUMN_BLOCKS) * Q_BLOCK_BYTES;
constexpr int P_BYTES = TOKENS * ROWS * 2;
constexpr int P_TILES = Q_BYTES;                  // [STAGES][token][query row], swizzled
constexpr int RING = P_TILES + STAGES * P_BYTES;  // [STAGES][64] rows
constexpr int STAGE_BYTES = TOKENS * STAGED_ROW;

// Of the query rows: {float scale, m}, of S and the running maximum; by warp of the score role,
// what it knows of a maximum or a sum; for each half of O and warp of the value role, the largest
// value there; factors of O, 1 / l.
constexpr int ROW_STATES = RING + STAGES * STAGE_BYTES;             // float2 [64]
constexpr int WARP_MAXIMA = ROW_STATES + ROWS * 8;                  // float [4][64]
constexpr int WARP_SUMS = WARP_MAXIMA + GROUP_WARPS * ROWS * 4;     // float [4][64]
constexpr int LARGEST_LOGITS = WARP_SUMS + GROUP_WARPS * ROWS * 4;  // float [4][64]
constexpr int LARGEST = LARGEST_LOGITS + GROUP_WARPS * ROWS * 4;    // float [2][64][4]
constexpr int FACTORS = LARGEST + 2 * GROUP_WARPS * ROWS * 4;       // float [STAGES][64]
constexpr int INVERSE_L = FACTORS + STAGES * ROWS * 4;              // float [64]
constexpr int POSITIONS = INVERSE_L + ROWS * 4;  // int32 [64], query positions, causal masks' own
constexpr int PART_ROW = POSITIONS + ROWS * 4;   // int32 [8], the part's metadata
constexpr int ROW_BLOCK = PART_ROW + 32;         // int32 [4], a RowBlock
constexpr int TOKEN_BITS = ROW_BLOCK + 16;  // uint32 [STAGES][4]: of a warp's tokens, which count
constexpr int RESCALE = TOKEN_BITS + STAGES * 16;  // uint32 [STAGES]: whether O shrinks
constexpr int RESULT = RESCALE + STAGES * 4;       // int32: where the piece's results go
constexpr int BARRIERS = RESULT + 4;               // uint64 [MBARRIERS]

extern __shared__ __align__(1024) uint8_t shared[];

DEVICE uint32_t shared_base() { return shared_address(shared); }
DEVICE uint32_t p_tile(uint32_t stage) { return shared_base() + P_TILES + stage * P_BYTES; }
DEVICE uint32_t staged_rows(uint32_t stage) { return shared_base() + RING + stage * STAGE_BYTES; }
DEVICE uint32_t row_state(int row) { return shared_base() + ROW_STATES + row * 8; }
DEVICE uint32_t row_float(uint32_t offset, int row) { return shared_base() + offset + row * 4; }
DEVICE uint32_t factors(uint32_t stage) { return FACTORS + stage * ROWS * 4; }  // for row_float()
DEVICE uint32_t token_bits(uint32_t stage, int warp) {
  return shared_base() + TOKEN_BITS + stage * 16 + warp * 4;
}
DEVICE uint32_t rescale_flag(uint32_t stage) { return shared_base() + RESCALE + stage * 4; }
DEVICE uint32_t part_row() { return shared_base() + PART_ROW; }
DEVICE uint32_t row_block_address() { return shared_base() + ROW_BLOCK; }

// ---- barriers -------------------------------------------------------------------------------
//
//   mbarrier         who arrives                      who waits      what it means
//   full             load, 4 warps, and bytes         score, value   the rows of the tile are there
//   p_ready          score, 4 warps                   value          P of the tile is written
//   empty            score, value, 12 warps           load           the stage may be filled again
//   results_ready    score, 4 warps                   value          INVERSE_L, RESULT are written
//   results_free     value, 8 warps                   score          they have been read
//   q_full           TMA                              score          Q is there
//
// The first three are there once for each stage.

enum MbarrierIndex {
  FULL = 0,
  EMPTY = FULL + STAGES,
  P_READY = EMPTY + STAGES,
  RESULTS_FREE = P_READY + STAGES,
  RESULTS_READY,
  Q_FULL,
  MBARRIERS
};
constexpr int SHARED_BYTES = BARRIERS + MBARRIERS * 8;
static_assert(RING % 16 == 0 && ROW_STATES % 16 == 0 && PART_ROW % 16 == 0, "aligned");
static_assert(BARRIERS % 8 == 0 && SHARED_BYTES <= 232448, "of a block");
static_assert(SHARED_BYTES == LAUNCH_SHARED_BYTES, "gpu/gather_kernels.py has it, too");

// Named barriers, of the score warps, and of the value warps of each half; 0 is __syncthreads().
enum NamedBarrier { SCORE_BARRIER = 1, VALUE_BARRIERS };

DEVICE uint32_t mbarrier(uint32_t index) { return shared_base() + BARRIERS + index * 8; }
DEVICE uint32_t full(uint32_t stage) { return mbarrier(FULL + stage); }
DEVICE uint32_t empty(uint32_t stage) { return mbarrier(EMPTY + stage); }
DEVICE uint32_t p_ready(uint32_t stage) { return mbarrier(P_READY + stage); }
DEVICE uint32_t results_free() { return mbarrier(RESULTS_FREE); }
DEVICE uint32_t results_ready() { return mbarrier(RESULTS_READY); }
DEVICE uint32_t q_full() { return mbarrier(Q_FULL); }

DEVICE void init_mbarriers() {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(full(stage), GROUP_WARPS * ARRIVALS);
    mbarrier_init(empty(stage), 12 * ARRIVALS);
    mbarrier_init(p_ready(stage), 4 * ARRIVALS);
  }
  mbarrier_init(results_free(), 8 * ARRIVALS);
  mbarrier_init(results_ready(), 4 * ARRIVALS);
  mbarrier_init(q_full(), 1);
  fence_mbarrier_init();
}

DEVICE void arrive(uint32_t barrier) {
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
