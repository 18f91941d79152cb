// Shared memory of sm90_few_fp8_decode.cu: where everything lies, and which barriers order it.
//
// Most of it is a ring of slots of 64 tokens, whose rows lie there as they do in the cache.
#pragma once
#include "ptx.cuh"
#include "sm90_arrivals.cuh"
#include "sm90_fp8_rows.cuh"
#define MAP_COMES_FIRST  // for sm90_pieces.cuh

// GROUPS: of columns of V in units of their own: those of a scale, and the rotary columns of V4.
// P_VERSIONS: of P, for value warps. SLOTS: of the ring.
#if defined(FORMAT_V32)
constexpr int GROUPS = 4, P_VERSIONS = 4, SLOTS = 4, LAUNCH_SHARED_BYTES = 222008;
constexpr int SCALES = 512;  // byte offset in a row
#elif defined(FORMAT_V4)
constexpr int GROUPS = 8, P_VERSIONS = 1, SLOTS = 5, LAUNCH_SHARED_BYTES = 223600;
#else
constexpr int GROUPS = 1, P_VERSIONS = 1, SLOTS = 5, LAUNCH_SHARED_BYTES = 215280;
#endif

constexpr int ROWS = 16;         // query rows of a thread block
constexpr int TOKENS = 64;       // tokens of a tile of the schedule
constexpr int SLOT_TOKENS = 64;  // of a slot of the ring
constexpr int SLOT_BYTES = SLOT_TOKENS * ROW_BYTES;

// Thread blocks have three groups of four warps. Group 0 has the score role, group 1 the value
// role, group 2 the load role.
constexpr int GROUP_WARPS = 4, GROUP_THREADS = 32 * GROUP_WARPS;
constexpr int WARP_TOKENS = SLOT_TOKENS / GROUP_WARPS;  // of a slot, that a warp loads or scores
constexpr int OCTETS = WARP_TOKENS / 8;  // of tokens: as many as a product has
DEVICE uint32_t thread_in_group() { return thread_index() & (GROUP_THREADS - 1); }

// Products take an octet of a warp's tokens, of which this is number n. Which tokens these are
// follows from the distance of rows, so that few banks are met twice. Lane l loads 16 bytes at a
// time: of K, chunk c = l % 4 of number l / 4, and of V, chunk l / 4 of number 2 c, then of
// number 2 c + 1. Eight lanes load at once.
DEVICE int product_token(int octet, int n) {
  const int c = n >> 1, i = n & 1;
#if defined(FORMAT_V32)  // rows are 16 bytes apart, modulo 128: no bank is
  return octet + (i ? 8 + ((2 * c + 4) & 7) : 2 * c);
#else  // 64 bytes: each is, of V
  return 8 * octet + 2 * c + (i ^ (c & 1));
#endif
}

// ---- the memory map -------------------------------------------------------------------------
// Byte offsets, and what lies there.

constexpr int Q_BLOCK_BYTES = ROWS * 128;
constexpr int Q_BYTES = COLUMN_BLOCKS * Q_BLOCK_BYTES;     // at 0: Q, swizzled by TMA
constexpr int P_BYTES = ROWS * SLOT_TOKENS * 2;
constexpr int RING = Q_BYTES;
constexpr int P_TILES = RING + SLOTS * SLOT_BYTES;  // [SLOTS][P_VERSIONS], as fragments of A
constexpr int TAILS = P_TILES + SLOTS * P_VERSIONS * P_BYTES;  // [SLOTS][SLOT_TOKENS], of V4
// float16 [SLOTS][GROUPS][4 score warps][4 lanes of a quad][OCTETS][2]: scales of V4, for P
constexpr int P_SCALES = TAILS + SLOTS * SLOT_TOKENS * TAIL_BYTES;
constexpr int P_SCALE_BYTES = TAIL_BYTES ? GROUPS * SLOT_TOKENS * 2 : 0;
constexpr int FACTORS = P_SCALES + SLOTS * P_SCALE_BYTES;  // float [SLOTS][GROUPS][ROWS], for O
constexpr int MAXIMA = FACTORS + SLOTS * GROUPS * ROWS * 4;  // float [SLOTS][ROWS][GROUP_WARPS]
constexpr int SUMS = MAXIMA + SLOTS * ROWS * GROUP_WARPS * 4;  // float [ROWS][GROUP_WARPS]
constexpr int INVERSE_L = SUMS + ROWS * GROUP_WARPS * 4;   // float [GROUPS][ROWS]
constexpr int PART_ROW = INVERSE_L + GROUPS * ROWS * 4;    // int32 [8], the part's metadata
constexpr int ROW_BLOCK = PART_ROW + 32;                   // int32 [4], a RowBlock
constexpr int TOKEN_BITS = ROW_BLOCK + 16;  // uint32 [SLOTS][4 load warps]: which tokens count and,
                                            // 16 bits up, which of them are bad
constexpr int RESCALE = TOKEN_BITS + SLOTS * 16;  // uint32 [SLOTS][2]: whether O shrinks
constexpr int RESULT = RESCALE + SLOTS * 8;       // int32 [2]: where the results go
constexpr int BARRIERS = RESULT + 8;              // uint64 [MBARRIERS]

extern __shared__ __align__(1024) uint8_t shared[];

DEVICE uint32_t shared_base() { return shared_address(shared); }
// The row of a token of a slot.
DEVICE uint32_t token_row(uint32_t slot, int token) {
  return shared_base() + RING + slot * SLOT_BYTES + token * ROW_BYTES;
}
DEVICE uint32_t token_tail(uint32_t slot, int token) {
  return shared_base() + TAILS + (slot * SLOT_TOKENS + token) * TAIL_BYTES;
}
DEVICE uint32_t p_tile(uint32_t slot, int version) {
  return shared_base() + P_TILES + (slot * P_VERSIONS + version) * P_BYTES;
}
DEVICE uint32_t p_scales(uint32_t slot, int group, int warp) {
  return shared_base() + P_SCALES + slot * P_SCALE_BYTES + (group * GROUP_WARPS + warp) * 32;
}
DEVICE uint32_t factors(uint32_t slot, int group, int row) {
  return shared_base() + FACTORS + ((slot * GROUPS + group) * ROWS + row) * 4;
}
DEVICE uint32_t inverse_l(int group, int row) {
  return shared_base() + INVERSE_L + (group * ROWS + row) * 4;
}
DEVICE uint32_t row_float(uint32_t offset, int row) { return shared_base() + offset + row * 4; }
DEVICE uint32_t token_bits(uint32_t slot, int warp) {
  return shared_base() + TOKEN_BITS + slot * 16 + warp * 4;
}
DEVICE uint32_t rescale_flag(uint32_t slot) { return shared_base() + RESCALE + slot * 8; }
DEVICE uint32_t part_row() { return shared_base() + PART_ROW; }
DEVICE uint32_t row_block_address() { return shared_base() + ROW_BLOCK; }

// ---- mbarriers ------------------------------------------------------------------------------
//
//   barrier        who arrives                      who waits     what it means
//   full           load, 4 warps, and bytes         score, value  the slot is loaded
//   p_ready        score, 4 warps                   value         P of the slot is written
//   maxima_ready   score, 4 warps                   score, value  S is computed, and their maxima
//   empty          score and value, 8 warps         load          the slot may be loaded again
//   q_full         a load warp, and TMA, by bytes   score         Q is loaded
//   q_empty        score, 4 warps                   a load warp   Q is in registers
//   results_ready  score warp 0                     value         INVERSE_L and RESULT are written
//   results_free   value, 4 warps                   score warp 0  they have been read
//
// The first four are there once for each slot.

enum MbarrierIndex {
  FULL = 0,
  EMPTY = FULL + SLOTS,
  P_READY = EMPTY + SLOTS,
  MAXIMA_READY = P_READY + SLOTS,
  Q_FULL = MAXIMA_READY + SLOTS,
  Q_EMPTY,
  RESULTS_READY,
  RESULTS_FREE,
  MBARRIERS
};
constexpr int SHARED_BYTES = BARRIERS + MBARRIERS * 8;
static_assert(PART_ROW % 16 == 0 && TOKEN_BITS % 16 == 0 && SHARED_BYTES <= 232448, "of a block");
static_assert(SHARED_BYTES == LAUNCH_SHARED_BYTES, "gpu/kernels.py has it, too");

DEVICE uint32_t mbarrier(uint32_t index) { return shared_base() + BARRIERS + index * 8; }
DEVICE uint32_t full(uint32_t slot) { return mbarrier(FULL + slot); }
DEVICE uint32_t empty(uint32_t slot) { return mbarrier(EMPTY + slot); }
DEVICE uint32_t p_ready(uint32_t slot) { return mbarrier(P_READY + slot); }
DEVICE uint32_t maxima_ready(uint32_t slot) { return mbarrier(MAXIMA_READY + slot); }
DEVICE uint32_t q_full() { return mbarrier(Q_FULL); }
DEVICE uint32_t q_empty() { return mbarrier(Q_EMPTY); }
DEVICE uint32_t results_ready() { return mbarrier(RESULTS_READY); }
DEVICE uint32_t results_free() { return mbarrier(RESULTS_FREE); }

DEVICE void arrive(uint32_t barrier) {
  __syncwarp();
  if (arrives()) mbarrier_arrive(barrier);
}

DEVICE void init_mbarriers() {
  for (int slot = 0; slot < SLOTS; ++slot) {
    mbarrier_init(full(slot), GROUP_WARPS * ARRIVALS);
    mbarrier_init(empty(slot), 2 * GROUP_WARPS * ARRIVALS);
    mbarrier_init(p_ready(slot), GROUP_WARPS * ARRIVALS);
    mbarrier_init(maxima_ready(slot), GROUP_WARPS * ARRIVALS);
  }
  mbarrier_init(q_full(), 1);
  mbarrier_init(q_empty(), GROUP_WARPS * ARRIVALS);
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

enum NamedBarrier { SCORE_BARRIER = 1 };  // of the score warps; 0 is __syncthreads()
