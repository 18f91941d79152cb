// The rows of an FP8 cache, whose format one macro names:
//
//   FORMAT_V32         656 bytes: 512 e4m3, 4 float scales of 128 columns, 64 bfloat16 (rotary)
//   FORMAT_V4          576 bytes: 448 e4m3, 64 bfloat16; behind the rows of a page 8 bytes a token,
//                      7 e8m0 scales of 64 columns
//   FORMAT_PER_TENSOR  576 bytes: 512 + 64 e4m3 of one scale, which is no part of the cache
//
// V is the first 512 columns. Where a key has no more than these, its rotary columns are V's, too.
#pragma once

// ROW_BYTES: from a row of a page to the next. TAIL_BYTES: of a token behind the rows of its page.
// COLUMN_BLOCKS: of 64 columns of a key. ROTARY: where its rotary columns begin, in bytes.
#if defined(FORMAT_V32)
constexpr int ROW_BYTES = 656, TAIL_BYTES = 0, COLUMN_BLOCKS = 9, ROTARY = 528;
#elif defined(FORMAT_V4)
constexpr int ROW_BYTES = 576, TAIL_BYTES = 8, COLUMN_BLOCKS = 8, ROTARY = 448;
#else
constexpr int ROW_BYTES = 576, TAIL_BYTES = 0, COLUMN_BLOCKS = 9, ROTARY = 512;
#endif
