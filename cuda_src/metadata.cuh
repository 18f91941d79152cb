// How tile_scheduler_metadata packs two of its columns; flashmla_cupy/schedule.py documents all eight.
// schedule.cu writes them, dense_decode.cu reads column 4 and combine.cu column 7.
#pragma once

// Column 4, above the slot: the part's first piece is the second of a pair, its last one the first.
constexpr int BEGINS_IN_PAIR = 1 << 16, ENDS_IN_PAIR = 1 << 17;
// Column 7: a split request, and above it its first slot.
constexpr int REQUEST_BITS = 20, NO_REQUEST = (1 << REQUEST_BITS) - 1;
