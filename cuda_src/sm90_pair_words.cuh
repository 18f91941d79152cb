// The word of `pairs` by which the two pieces of a pair meet.
//
// It holds the number of this launch (its epoch) once the back is written. Any other number means
// that it is not, since scratch memory comes as it is. The front does not wait: `combine` takes
// less time than a wait and the rest of the way through memory. In a graph every replay has the
// same number, so `combine` clears the words after each.
#pragma once
#include "sm90_pieces.cuh"

DEVICE uint64_t* pair_word(const Params& params, int part_of_back) {
  const int row_blocks = gridDim.x * gridDim.y;
  return params.pairs + (int64_t)part_of_back * row_blocks + blockIdx.y * gridDim.x + blockIdx.x;
}
// Says that the back is written. By one thread, after a barrier that follows all stores of the
// block.
DEVICE void announce_back(const Params& params) {
  fence_acq_rel_gpu();
  st_relaxed(pair_word(params, blockIdx.z), params.epoch);
}
// Asked by one thread of the front's block.
DEVICE bool is_back_written(const Params& params) {
  return ld_acquire(pair_word(params, blockIdx.z + 1)) == params.epoch;
}
