// Shared memory of sm90_dense_decode.cu: where everything lies, and which barriers order it.
//
// Most of it is a ring of three stages. A stage holds one tile of K or, ahead of the tiles of each
// piece, the block's rows of Q: nine column blocks of 64 rows x 128 bytes, swizzled. The halves of
// a stage have barriers of their own, since another warpgroup multiplies with each: half 0 is
// column blocks 0 to 3 (the first 256 columns of V), half 1 is column blocks 4 to 8 (the other 256,
// and the rotary columns).
#pragma once
#include "ptx.cuh"
#include "sm90_arrivals.cuh"

constexpr int ROWS = 64;    // query rows of a thread block
constexpr int TOKENS = 64;  // tokens of a tile
constexpr int STAGES = 3;   // of the ring

constexpr int BLOCK_BYTES = ROWS * 128, COLUMN_BLOCKS = 9;
constexpr int ROPE = 8;  // the column block of the rotary columns; P of the tile overwrites it
constexpr int STAGE_BYTES = COLUMN_BLOCKS * BLOCK_BYTES;
DEVICE int half_blocks(int half) { return 4 + half; }

// Thread blocks have three warpgroups: number 0 has the softmax role, 1 and 2 have the matrix role,
// for half 0 and half 1.
constexpr int GROUP_THREADS = 128, BLOCK_THREADS = 3 * GROUP_THREADS;
DEVICE uint32_t thread_in_group() { return thread_index() & (GROUP_THREADS - 1); }

// ---- the memory map -------------------------------------------------------------------------
// Byte offsets, and what lies there.

constexpr int Q_ROPE = STAGES * STAGE_BYTES;            // column block 8 of Q
constexpr int Q_STEP_31 = Q_ROPE + BLOCK_BYTES;         // columns 496..511 of Q, core matrices
constexpr int FACTORS = Q_STEP_31 + ROWS * 32;          // uint16 [STAGES][64], top halves of floats
constexpr int INVERSE_L = FACTORS + STAGES * ROWS * 2;  // float [64]
constexpr int RESCALE = INVERSE_L + ROWS * 4;           // uint32 [STAGES][4], of each warp
constexpr int PART_ROW = RESCALE + STAGES * 16;         // int32 [8], the part's metadata
constexpr int ROW_BLOCK = PART_ROW + 32;                // int32 [3], a RowBlock
constexpr int RESULT = ROW_BLOCK + 12;                  // int32: where the piece's results go
constexpr int BARRIERS = RESULT + 4;                    // uint64 [MBARRIERS]

extern __shared__ __align__(1024) uint8_t shared[];

DEVICE uint32_t shared_base() { return shared_address(shared); }
DEVICE uint32_t stage_address(uint32_t stage) { return shared_base() + stage * STAGE_BYTES; }
DEVICE uint32_t part_row() { return shared_base() + PART_ROW; }
DEVICE uint32_t row_block_address() { return shared_base() + ROW_BLOCK; }

// ---- mbarriers ------------------------------------------------------------------------------
//
//   barrier        who arrives             who waits            what it means
//   full[half]     TMA, by bytes           softmax              this half of the stage is loaded
//   p_ready        softmax, 4 warps        matrix, both halves  P of the tile is written
//   empty[0]       matrix half 0, 4 warps  producer 0           half 0 may be loaded again
//   empty[1]       matrix, 8 warps         producer 1           half 1 may be loaded again: P lies
//                                                               in it, so both must be done
//   results_ready  softmax, 4 warps        matrix, both halves  INVERSE_L and RESULT are written
//   results_free   matrix, 8 warps         softmax              they have been read
//   back_full      TMA, by bytes           matrix, both halves  the back of a pair is in the ring
//
// The first four are there once for each stage. When a stage holds Q, only the softmax warpgroup
// takes note: it waits for full, waits for itself at p_ready, and arrives at empty in place of the
// matrix warpgroups. The front of a pair also waits for empty, before it loads the back there.

enum MbarrierIndex {
  FULL = 0,
  EMPTY = FULL + 2 * STAGES,
  P_READY = EMPTY + 2 * STAGES,
  RESULTS_FREE = P_READY + STAGES,
  BACK_FULL,
  RESULTS_READY,
  MBARRIERS
};
constexpr int SHARED_BYTES = BARRIERS + MBARRIERS * 8;
static_assert(BARRIERS % 8 == 0 && SHARED_BYTES == 232304, "of 232448; the launch has it too");

DEVICE uint32_t mbarrier(uint32_t index) { return shared_base() + BARRIERS + index * 8; }
DEVICE uint32_t full(int half, uint32_t stage) { return mbarrier(FULL + half * STAGES + stage); }
DEVICE uint32_t empty(int half, uint32_t stage) { return mbarrier(EMPTY + half * STAGES + stage); }
DEVICE uint32_t p_ready(uint32_t stage) { return mbarrier(P_READY + stage); }
DEVICE uint32_t results_free() { return mbarrier(RESULTS_FREE); }
DEVICE uint32_t back_full() { return mbarrier(BACK_FULL); }
DEVICE uint32_t results_ready() { return mbarrier(RESULTS_READY); }

DEVICE void init_mbarriers() {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(full(0, stage), 1);
    mbarrier_init(full(1, stage), 1);
    mbarrier_init(empty(0, stage), 4 * ARRIVALS);
    mbarrier_init(empty(1, stage), 8 * ARRIVALS);
    mbarrier_init(p_ready(stage), 4 * ARRIVALS);
  }
  mbarrier_init(results_free(), 8 * ARRIVALS);
  mbarrier_init(back_full(), 1);
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

// ---- named barriers (bar.sync) --------------------------------------------------------------
// 0 is __syncthreads(), of all threads at the beginning.

enum NamedBarrier {
  SOFTMAX_BARRIER = 1,  // the softmax warpgroup
  MATRIX_BARRIER = 2,   // + half: that matrix warpgroup
  PAIR_BARRIER = 4      // all threads, of whom only the matrix warpgroups wait: sm90_pair.cuh
};
