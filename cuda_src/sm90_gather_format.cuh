// The formats of a cache whose rows are gathered one by one. One macro says which it is:
//
//   FORMAT_V32         656 bytes: 512 e4m3, 4 float scales of 128 columns, 64 bfloat16 (rotary)
//   FORMAT_PER_TENSOR  576 bytes: 512 + 64 e4m3 of one scale, which is no part of the cache
//   neither            1152 bytes: 576 values of the type of q
//
// FP8 is converted to float16, which is exact, and multiplied in float16. To keep the scales of V32
// out of float16's subnormals, its latent columns are multiplied by 8 on the way, and its rotary
// columns have 8 in Q; the softmax scale and 1 / l take it back.
#pragma once

#if defined(FORMAT_V32) || defined(FORMAT_PER_TENSOR)
#define PRODUCTS_IN_FP16
#endif
#include "ptx.cuh"

#if defined(PRODUCTS_IN_FP16)
constexpr bool IS_FP8 = true;
#else
constexpr bool IS_FP8 = false;
#endif

// STAGED_ROW: bytes from one row to the next where rows wait to be converted. It is 64 modulo 128,
// so that lanes that read two rows at once meet different banks.
#if defined(FORMAT_V32)
constexpr int ROW_BYTES = 656, STAGED_ROW = 704, LAUNCH_SHARED_BYTES = 225808;
constexpr int LATENT_UP_LOG2 = 3;
#elif defined(FORMAT_PER_TENSOR)
constexpr int ROW_BYTES = 576, STAGED_ROW = 576, LAUNCH_SHARED_BYTES = 219664;
constexpr int LATENT_UP_LOG2 = 0;
#else
constexpr int ROW_BYTES = 1152, STAGED_ROW = 0, LAUNCH_SHARED_BYTES = 183824;  // no staging
constexpr int LATENT_UP_LOG2 = 0;
#endif
// How many column blocks of Q stay in shared memory, and registers of a thread by role. Conversion
// needs registers, and a thread block has 512 a lane: 160 are of each matrix warpgroup.
constexpr int Q_TAIL_BLOCKS = IS_FP8 ? 3 : 2;
constexpr int SOFTMAX_REGISTERS = IS_FP8 ? 152 : 168, MATRIX_REGISTERS = 160;
constexpr int GATHER_REGISTERS = 512 - SOFTMAX_REGISTERS - 2 * MATRIX_REGISTERS;
constexpr float LATENT_UP = 1 << LATENT_UP_LOG2, LATENT_DOWN = 1.f / LATENT_UP;
