// How sm90_fp8_decode.cu multiplies the rows of a format. GATHER is the name of the kernel.
//
// FP8 is converted to float16, which is exact, and multiplied in float16; with WIDE_PRODUCTS, in
// bfloat16, for values beyond float16's range (sm90_fp8_convert.cuh). To keep scales out of float16's
// subnormals, what has scales is multiplied by 8 on the way, and so are the rotary columns: of a key,
// by way of Q where they are no part of V. The softmax scale and 1 / l take it back.
//
// QUERY_E4M3 says that q is in e4m3, and out in bfloat16: then S is a product of e4m3.
#pragma once

#if !defined(WIDE_PRODUCTS)
#define PRODUCTS_IN_FP16
#endif
#include "ptx.cuh"
#include "sm90_fp8_rows.cuh"

#if defined(QUERY_E4M3)
constexpr bool QUERY_IS_E4M3 = true;
#else
constexpr bool QUERY_IS_E4M3 = false;
#endif

// STAGED_ROW: bytes from one row of a stage to the next. It is an odd multiple of 16, so that the eight
// rows that ldmatrix reads together lie in different banks. SCALES: byte offset in a staged row,
// behind which lies a tail.
#if defined(FORMAT_V32)
constexpr int STAGED_ROW = 656, SCALES = 512, SCALE_UP_LOG2 = 3, LAUNCH_SHARED_BYTES = 231376;
#elif defined(FORMAT_V4)
constexpr int STAGED_ROW = 592, SCALES = 576, SCALE_UP_LOG2 = 3, LAUNCH_SHARED_BYTES = 210896;
#else
constexpr int STAGED_ROW = 592, SCALES = 0, SCALE_UP_LOG2 = 0;
constexpr int LAUNCH_SHARED_BYTES = QUERY_IS_E4M3 ? 186320 : 219088;
#endif
static_assert(STAGED_ROW % 32 == 16 && STAGED_ROW >= ROW_BYTES + TAIL_BYTES, "a row, and banks");
constexpr bool HAS_SCALES = SCALES > 0;
constexpr bool IS_E4M3_ROTARY = !HAS_SCALES;
constexpr int ROTARY_BLOCK = COLUMN_BLOCKS - 1;
constexpr bool ROTARY_IN_V = COLUMN_BLOCKS == 8;
constexpr int LATENT_BLOCKS = IS_E4M3_ROTARY ? 9 : ROTARY_BLOCK;  // of e4m3

#if defined(WIDE_PRODUCTS)
constexpr int LATENT_UP_LOG2 = 0;
#else
constexpr int LATENT_UP_LOG2 = SCALE_UP_LOG2;
#endif
constexpr float LATENT_UP = 1 << LATENT_UP_LOG2, LATENT_DOWN = 1.f / LATENT_UP;
// S takes rotary columns of K in bfloat16, as they are, where those of Q are, too.
constexpr bool ROTARY_IN_BF16 =
#if defined(DTYPE_FP16)
    false;
#else
    !IS_E4M3_ROTARY;
#endif
// What rotary columns of K are multiplied by, and those of Q, for S.
constexpr float ROTARY_K_UP = ROTARY_IN_V ? LATENT_UP : 1.f;
constexpr float ROTARY_Q_UP = ROTARY_IN_BF16 || !ROTARY_IN_V ? LATENT_UP : 1.f;

// Whether idle warps walk through code that is to come (sm90_fp8_values.cuh). Where code is not in the
// caches, as between the layers of a model, short pieces gain a tenth; where it is, they lose 2 percent.
constexpr bool WALKS = ROTARY_IN_V;
// What the code that clears O does not take that is in the caches, even beside other warps.
constexpr int COLD_CLOCKS = 500;

// Registers of a thread by role: a thread block has 512 a lane.
constexpr int SCORE_REGISTERS = 136, VALUE_REGISTERS = 176;
constexpr int LOAD_REGISTERS = 512 - SCORE_REGISTERS - 2 * VALUE_REGISTERS;
