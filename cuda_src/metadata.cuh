// The words in which schedule.cu, the decode kernels and combine.cu speak of a batch, and how
// tile_scheduler_metadata packs two of its columns. flashmla_cupy/schedule/split.py documents all
// eight; schedule.cu writes them, decode kernels read columns 0 to 6, and combine.cu column 7.
//
//   token      a row of k_cache: 576 values, of which the first 512 are V
//   tile       64 tokens of a request; the last tile of a request may have fewer
//   page       page_size tokens that lie together in k_cache; block_table names those of a request
//   row        a (query position, query head) pair of one kv head: a row of S, P and O
//   slab       the rows of a kv head that lie evenly in memory: all, or those of a query position
//   row block  64 rows of a slab, the last of which may have fewer: the rows of a thread block
//   part       a range of the batch's tiles, which may begin and end inside of requests: a row of
//              tile_scheduler_metadata. Each part has a thread block for every row block
//   piece      the tiles of one request that one part computes
//   split      a request in several pieces is split, and so are its pieces
//   slot       the place of a split piece in out_partial and row_partial
//   pair       the two pieces of a request that is split in two: the front, which ends its part,
//              and the back, which begins the next part
//   unit       of combine.cu: some columns of a row, merged by one team of warps at a time
#pragma once
#include "ptx.cuh"

// Column 4, above the slot: the first piece of the part is a back, its last one a front.
constexpr int BEGINS_IN_PAIR = 1 << 16, ENDS_IN_PAIR = 1 << 17;
// Column 4, above the flags: the check of the row, the upper 14 bits of the sum modulo 2^32 of
//
//     CHECK_FACTOR^(c + 1) row[c], CHECK_FACTOR^9 part, CHECK_FACTOR^10 batch
//
// where row[4] is without the check. Zeros, garbage and rows of other parts hardly ever pass it.
constexpr int CHECK_SHIFT = 18;
constexpr int UNCHECKED = (1 << CHECK_SHIFT) - 1;  // the bits of column 4 below the check
constexpr uint32_t CHECK_FACTOR = 0x9E3779B1;
DEVICE constexpr uint32_t check_term(int place, uint32_t value) {
  for (int i = 0; i <= place; ++i) value *= CHECK_FACTOR;
  return value;
}
// Column 7: a split request, and above it its first slot.
constexpr int REQUEST_BITS = 20, NO_REQUEST = (1 << REQUEST_BITS) - 1;
