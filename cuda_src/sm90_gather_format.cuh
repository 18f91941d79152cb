// The formats of a cache whose rows are gathered one by one. One macro says which it is:
//
//   FORMAT_V32         656 bytes: 512 e4m3, 4 float scales of 128 columns, 64 bfloat16 (rotary)
//   FORMAT_V4          576 bytes: 448 e4m3, 64 bfloat16; behind the rows of a page 8 bytes a token,
//                      7 e8m0 scales of 64 columns
//   FORMAT_PER_TENSOR  576 bytes: 512 + 64 e4m3 of one scale, which is no part of the cache
//   FORMAT_16BIT_512   1024 bytes: 512 values of the type of q
//   none of them       1152 bytes: 576 values of the type of q
//
// GATHER is the name of the kernel. QUERY_E4M3 says that q is in e4m3, and out in bfloat16.
//
// V is the first 512 columns. Where a key has no more than these, its rotary columns are V's, too.
//
// FP8 is converted to float16, which is exact, and multiplied in float16; with WIDE_PRODUCTS, in
// bfloat16, for values beyond float16's range (sm90_gather_convert.cuh). To keep scales out of
// float16's subnormals, what has scales is multiplied by 8 on the way, and so are the rotary
// columns: in V32, where they are no part of V, by way of Q. The softmax scale and 1 / l take it
// back.
#pragma once

#if defined(FORMAT_V32) || defined(FORMAT_V4) || defined(FORMAT_PER_TENSOR)
#define FORMAT_FP8
#if !defined(WIDE_PRODUCTS)
#define PRODUCTS_IN_FP16
#endif
#endif
#include "ptx.cuh"

#if defined(FORMAT_FP8)
constexpr bool IS_FP8 = true;
#else
constexpr bool IS_FP8 = false;
#endif

// ROW_BYTES: from a row of a page to the next. TAIL_BYTES: of a token behind the rows of its page.
// STAGED_ROW: bytes from one row to the next where rows wait to be converted. It is 64 modulo 128,
// so that lanes that read two rows at once meet different banks.
#if defined(FORMAT_V32)
constexpr int ROW_BYTES = 656, STAGED_ROW = 656, LAUNCH_SHARED_BYTES = 231376;
constexpr int TAIL_BYTES = 0, COLUMN_BLOCKS = 9, SCALE_UP_LOG2 = 3;
#elif defined(FORMAT_V4)
constexpr int ROW_BYTES = 576, STAGED_ROW = 592, LAUNCH_SHARED_BYTES = 210896;
constexpr int TAIL_BYTES = 8, COLUMN_BLOCKS = 8, SCALE_UP_LOG2 = 3;
#elif defined(FORMAT_PER_TENSOR)
constexpr int ROW_BYTES = 576, STAGED_ROW = 592, LAUNCH_SHARED_BYTES = 219088;
constexpr int TAIL_BYTES = 0, COLUMN_BLOCKS = 9, SCALE_UP_LOG2 = 0;
#elif defined(FORMAT_16BIT_512)
constexpr int ROW_BYTES = 1024, STAGED_ROW = 0, LAUNCH_SHARED_BYTES = 226160;  // no staging
constexpr int TAIL_BYTES = 0, COLUMN_BLOCKS = 8, SCALE_UP_LOG2 = 0;
#else
constexpr int ROW_BYTES = 1152, STAGED_ROW = 0, LAUNCH_SHARED_BYTES = 226160;  // no staging
constexpr int TAIL_BYTES = 0, COLUMN_BLOCKS = 9, SCALE_UP_LOG2 = 0;
#endif
#if defined(WIDE_PRODUCTS)
constexpr int LATENT_UP_LOG2 = 0;
#else
constexpr int LATENT_UP_LOG2 = SCALE_UP_LOG2;
#endif
constexpr int ROTARY_BLOCK = COLUMN_BLOCKS - 1;
constexpr bool ROTARY_IN_V = COLUMN_BLOCKS == 8;
// How many column blocks of Q stay in shared memory, and registers of a thread by role. Conversion
// needs registers, and a thread block has 512 a lane: 160 are of each matrix warpgroup.
constexpr int Q_TAIL_BLOCKS = (IS_FP8 ? 3 : 2) - ROTARY_IN_V;
constexpr int SOFTMAX_REGISTERS = IS_FP8 ? 152 : 168, MATRIX_REGISTERS = 160;
constexpr int GATHER_REGISTERS = 512 - SOFTMAX_REGISTERS - 2 * MATRIX_REGISTERS;
constexpr int SCORE_REGISTERS = 136, VALUE_REGISTERS = 176;
constexpr int LOAD_REGISTERS = 512 - SCORE_REGISTERS - 2 * VALUE_REGISTERS;
constexpr float LATENT_UP = 1 << LATENT_UP_LOG2, LATENT_DOWN = 1.f / LATENT_UP;
// What the rotary columns of Q are multiplied by.
constexpr float ROTARY_Q_UP = ROTARY_IN_V ? 1.f : LATENT_UP;
