// Rows of Q over an FP8 cache, by the softmax warpgroup. They come by way of two stages of the
// ring, where the gather warps load them ahead of the first tile of a piece (load_q), or, of e4m3,
// this warpgroup does.
//
// The products are of float16. So each row of Q is scaled by the power of two that brings its
// largest value to [2^13, 2^14), which is exact for all values that matter, and the row's softmax
// scale takes that back.
#pragma once
#include "sm90_gather_cursor.cuh"

#if defined(PRODUCTS_IN_FP16)
DEVICE float2 q_pair(uint32_t x) {
#if defined(DTYPE_FP16) || defined(QUERY_E4M3)
  return from_half_x2(x);
#else
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
#endif
}
DEVICE uint32_t scaled(uint32_t x, float factor) {
  const float2 v = q_pair(x);
  return half_x2(v.x * factor, v.y * factor);
}
// The largest value of a row, given the largest of its latent and of its rotary columns, in pairs.
DEVICE float largest_of(uint32_t latent, uint32_t rotary) {
  const float2 x = q_pair(latent), y = q_pair(rotary);
  return quad_max(fmaxf(fmaxf(x.x, x.y), fmaxf(y.x, y.y) * ROTARY_Q_UP));
}
// The factor of a row whose largest value this is, and what its scores are to be multiplied by.
struct RowScale {
  float up, down;
};
DEVICE RowScale row_scale(float largest) {
  const int exponent = max(17 + LATENT_UP_LOG2, (int)(__float_as_uint(largest) >> 23));
  return {__int_as_float((267 - exponent) << 23),
          __int_as_float((exponent - 13 - LATENT_UP_LOG2) << 23)};
}
#endif

struct Queries {
  DEVICE Queries(const TensorMap&, const TensorMap&) {}
  DEVICE void begin(const Params&) const {}
  // Takes the rows of Q [64, d_qk] out of their stages, and frees these: most steps go to
  // registers, the other column blocks to shared memory of their own. Returns in `scale` what the
  // scores of the thread's two rows are to be multiplied by.
  DEVICE void take(const Params& params, int request, uint32_t (&q)[4 * Q_STEPS],
                   float (&scale)[2], Place& place) const {
    const float scale_log2 =
        params.scale_log2 * descale(params.descale_q) * descale(params.descale_k);
    const Place first = place;
    place.advance();
    mbarrier_wait(full(first.stage), first.phase);
    mbarrier_wait(full(place.stage), place.phase);
    if (QUERY_IS_E4M3) {
      convert_q(params, request, stage_address(first.stage), stage_address(place.stage));
    }
    const uint32_t fragment = fragment_offset(), tail = shared_base() + Q_TAIL + fragment;
    auto block = [&](int i) {
      return fragment + (i < Q_FIRST_BLOCKS
                             ? stage_address(first.stage) + i * Q_BLOCK_BYTES
                             : stage_address(place.stage) + (i - Q_FIRST_BLOCKS) * Q_BLOCK_BYTES);
    };
#pragma unroll
    for (int k = 0; k < Q_STEPS; ++k) {
      ldmatrix_x4(block(k >> 2) ^ ((k & 3) << 5), q[4 * k], q[4 * k + 1], q[4 * k + 2],
                  q[4 * k + 3]);
    }
    scale[0] = scale[1] = scale_log2;
#if defined(PRODUCTS_IN_FP16)
    uint32_t latent[2] = {}, rotary[2] = {};
#pragma unroll
    for (int i = 0; i < 4 * Q_STEPS; ++i) latent[i & 1] = max_abs_x2(latent[i & 1], q[i]);
#pragma unroll
    for (int k = Q_STEPS; k < STEPS; ++k) {
      uint32_t x[4];
      ldmatrix_x4(block(k >> 2) ^ ((k & 3) << 5), x[0], x[1], x[2], x[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& largest = k < 4 * ROTARY_BLOCK ? latent[i & 1] : rotary[i & 1];
        largest = max_abs_x2(largest, x[i]);
      }
    }
    const RowScale rows[2] = {row_scale(largest_of(latent[0], rotary[0])),
                              row_scale(largest_of(latent[1], rotary[1]))};
    scale[0] *= rows[0].down, scale[1] *= rows[1].down;
#pragma unroll
    for (int i = 0; i < 4 * Q_STEPS; ++i) q[i] = scaled(q[i], rows[i & 1].up);
#pragma unroll 1
    for (int k = Q_STEPS; k < STEPS; ++k) {
      const float factor = k < 4 * ROTARY_BLOCK ? 1.f : ROTARY_Q_UP;
      const uint32_t at = (k & 3) << 5;
      uint32_t x[4];
      ldmatrix_x4(block(k >> 2) ^ at, x[0], x[1], x[2], x[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = scaled(x[i], rows[i & 1].up * factor);
      stmatrix_x4((tail + ((k >> 2) - Q_STEPS / 4) * Q_BLOCK_BYTES) ^ at, x[0], x[1], x[2], x[3]);
    }
#else
    const uint32_t thread = thread_in_group() * 16;
#pragma unroll
    for (int i = 0; i < 4 * Q_TAIL_BLOCKS; ++i) {
      const uint32_t from =
          stage_address(place.stage) + (Q_STEPS / 4 - Q_FIRST_BLOCKS) * Q_BLOCK_BYTES;
      const uint32_t at = i * 2048 + thread;
      st_shared_v4(shared_base() + Q_TAIL + at, ld_shared_v4(from + at));
    }
#endif
    // Every use of a stage has a phase of p_ready. In those of Q the warps of this warpgroup wait
    // for each other. The matrix warpgroups may be behind by more than a round of the ring, so they
    // must not.
    release(p_ready(first.stage));
    release(p_ready(place.stage));
    mbarrier_wait(p_ready(place.stage), place.phase);
    mbarrier_wait(p_ready(first.stage), first.phase);  // over by then; synccheck wants it said
    if (arrives()) {
      mbarrier_arrive(empty(first.stage), 2);
      mbarrier_arrive(empty(place.stage), 2);
    }
    place.advance();
  }
  DEVICE void scores_are_issued(const Params&, int) const {}
};
