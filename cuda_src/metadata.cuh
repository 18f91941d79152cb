// How tile_scheduler_metadata packs two of its columns; flashmla_cupy/schedule.py documents all eight.
// schedule.cu writes them, dense_decode.cu reads column 4 and combine.cu column 7.
#pragma once
#include "ptx.cuh"

// Column 4, above the slot: the part's first piece is the second of a pair, its last one the first.
constexpr int BEGINS_IN_PAIR = 1 << 16, ENDS_IN_PAIR = 1 << 17;
// Column 4, above the flags: the check of the row, the upper 14 bits of the sum modulo 2^32 of
//
//     CHECK_FACTOR^(c + 1) row[c], CHECK_FACTOR^9 part, CHECK_FACTOR^10 batch
//
// where row[4] is without the check. Zeros, garbage and rows of other parts hardly ever pass it.
constexpr int CHECK_SHIFT = 18;
constexpr int UNCHECKED = (1 << CHECK_SHIFT) - 1;  // the bits of column 4 below
constexpr uint32_t CHECK_FACTOR = 0x9E3779B1;
DEVICE uint32_t check_term(int place, uint32_t value) {
  for (int i = 0; i <= place; ++i) value *= CHECK_FACTOR;
  return value;
}
// Column 7: a split request, and above it its first slot.
constexpr int REQUEST_BITS = 20, NO_REQUEST = (1 << REQUEST_BITS) - 1;
