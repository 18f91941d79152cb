// Pairs: the two pieces of a request that neighbouring parts share, merged without `combine`.
//
// The front is the last piece of part n, the back the first one of part n + 1. So the back is
// usually long done when the front ends, and the front merges the two: it copies the back's partial
// result into the ring, which nothing else needs any more, and writes out and lse. Otherwise
// `combine` does. Every request that the schedule splits in two is a pair, and `combine` takes two
// pieces for one: their partial results are floats, however many rows there are (merge.cuh).
//
// They meet in a word of `pairs`: sm90_pair_words.cuh.
//
// The arithmetic is the same for both (merge.cuh): who merges changes no bit.
#pragma once
#include "merge.cuh"
#include "sm90_pair_words.cuh"

// The back lies in two stages of the ring. Its rows are padded there, so that the quads of lanes
// that read two rows at once meet 32 different banks.
constexpr int BACK_ROW_BYTES = 512 * 4, BACK_PITCH = BACK_ROW_BYTES + 64;
constexpr int BACK_ROWS = 32;  // of a stage
static_assert(BACK_PITCH * BACK_ROWS <= STAGE_BYTES && 2 * BACK_ROWS == ROWS, "two stages");
// Where Q was: float [64] each, what out of the front (with l divided out) and of the back weigh.
constexpr int FRONT_WEIGHTS = Q_STEP_31, BACK_WEIGHTS = FRONT_WEIGHTS + ROWS * 4;

// Says that the back is written. By one thread, after a barrier that follows all stores of the
// block.
DEVICE void announce_back_for_tma(const Params& params) {
  fence_proxy_async_all();
  announce_back(params);
}

// Loads the back's rows from `slot` into the two stages that follow the front's last one, by one
// warp. `last` is the place of the front's last tile.
DEVICE void fetch_back(const Params& params, const RowBlock& block, int slot, Place last) {
  Place place = last;
  for (int i = 0; i < 2; ++i) {  // P V of the tiles before may still read them
    place.retreat();
    mbarrier_wait(empty(0, place.stage), place.phase);
    mbarrier_wait(empty(1, place.stage), place.phase);
  }
  const int rows = min(ROWS, params.slab_rows - block.first_row);
  if (lane_index() == 0) mbarrier_arrive_expect_tx(back_full(), rows * BACK_ROW_BYTES);
  __syncwarp();
  fence_proxy_async_all();
  const float* from = params.out_partial + partial_row(params, slot, block, block.first_row) * 512;
  last.advance();
  for (int row = lane_index(); row < rows; row += 32) {
    const uint32_t stage = row < BACK_ROWS ? last.stage : (last.stage + 1) % STAGES;
    cp_async_bulk(stage_address(stage) + row % BACK_ROWS * BACK_PITCH, from + row * 512,
                  BACK_ROW_BYTES, back_full());
  }
}
// Where row `row` of the back lies; `stage` is the one after that of the front's last tile.
DEVICE uint32_t back_row(uint32_t stage, int row) {
  if (row >= BACK_ROWS) stage = (stage + 1) % STAGES;
  return stage_address(stage) + row % BACK_ROWS * BACK_PITCH;
}
