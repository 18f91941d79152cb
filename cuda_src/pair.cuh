// Pairs: the two pieces of a request that neighbouring parts share, merged without `combine`.
//
// The tail is the first piece of part p, the head the last one of part p - 1. So the tail is usually
// long done when the head ends, and the head merges: it copies the tail's partial result into the
// ring, which nothing else needs any more, and writes out and lse. Otherwise `combine` does. Whatever
// schedule.py cuts in two is a pair, and `combine` takes two pieces for one: their partial results are
// floats, however many rows there are (merge.cuh).
//
// They meet in a word of `pairs`, which holds the number of this launch once the tail is written. Any
// other number, since scratch memory comes as it is, means that it is not: the head does not wait, as
// `combine` then takes less time than a wait and the rest of the way through memory. In a graph every
// replay has the same number: `combine` clears the words.
//
// The arithmetic is the same (merge.cuh): who merges changes no bit.
#pragma once
#include "merge.cuh"
#include "ring.cuh"

// In the ring, rows are padded so that a quad of lanes each from 2 rows reads 32 different banks.
constexpr int OTHER_PITCH = 2048 + 64, OTHER_ROWS = 32;  // of each of two stages
static_assert(OTHER_PITCH * OTHER_ROWS <= STAGE_BYTES, "half of the rows fit a stage");
// Where Q was: what out of the head (with l divided out) and out of the tail weigh.
constexpr int WEIGHTS = Q_STEP_31;  // float [2][64]

DEVICE uint64_t* pair_word(const Params& p, int tail_part) {
  const int row_blocks = gridDim.x * gridDim.y;
  return p.pairs + (int64_t)tail_part * row_blocks + blockIdx.y * gridDim.x + blockIdx.x;
}
// By one thread, after a barrier behind all stores of the block.
DEVICE void tail_written(const Params& p) {
  fence_proxy_async_all();  // the head reads by TMA
  fence_acq_rel_gpu();
  st_relaxed(pair_word(p, blockIdx.z), p.epoch);
}
DEVICE bool is_tail_written(const Params& p) {
  return ld_acquire(pair_word(p, blockIdx.z + 1)) == p.epoch;
}

// Brings the tail's rows into the two stages after the last one of the head, by one warp. `last` is
// the place of the head's last tile.
DEVICE void fetch_tail(const Params& p, const RowBlock& block, int slot, Place last) {
  Place place = last;
  for (int i = 0; i < 2; ++i) {  // P V of the tiles before may still read them
    place.retreat();
    mbarrier_wait(empty(0, place.stage), place.phase);
    mbarrier_wait(empty(1, place.stage), place.phase);
  }
  const int rows = min(ROWS, p.slab_rows - block.first_row);
  if (lane_index() == 0) mbarrier_arrive_expect_tx(other_full(), rows * 2048);
  __syncwarp();
  fence_proxy_async_all();
  const float* from = p.out_partial + partial_row(p, slot, block, block.first_row) * 512;
  last.advance();
  for (int row = lane_index(); row < rows; row += 32) {
    const uint32_t stage = row < OTHER_ROWS ? last.stage : (last.stage + 1) % STAGES;
    cp_async_bulk(stage_address(stage) + row % OTHER_ROWS * OTHER_PITCH, from + row * 512, 2048,
                  other_full());
  }
}
// The address of a row of the tail, for the place after the head's last tile.
DEVICE uint32_t tail_row(uint32_t stage, int row) {
  if (row >= OTHER_ROWS) stage = (stage + 1) % STAGES;
  return stage_address(stage) + row % OTHER_ROWS * OTHER_PITCH;
}
