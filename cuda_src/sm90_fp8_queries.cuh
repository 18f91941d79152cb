// Q of sm90_fp8_decode.cu, as B of S^T = K Q^T: TMA loads its column blocks, and the score warps
// make of them, in place, what the products want.
//
// The products are of float16. So each row of Q is scaled by the power of two that brings its
// largest value to [2^13, 2^14), which is exact for all values that matter, and the row's softmax
// scale takes that back. Columns that meet e4m3 are permuted as the fragments of K are: of every 16,
// pairs 0 2 4 6 1 3 5 7.
//
// Rows of e4m3 (QUERY_E4M3) are copied from global memory as they are.
#pragma once
#include "row_statistics.cuh"
#include "sm90_fp8_convert.cuh"
#include "sm90_gathered_tokens.cuh"

#if !defined(QUERY_E4M3)
DEVICE float2 q_pair(uint32_t x) {
#if defined(DTYPE_FP16)
  return from_half_x2(x);
#else
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
#endif
}
// The factor of a row whose largest value this is, and what its scores are to be multiplied by.
struct RowScale {
  float up, down;
};
DEVICE RowScale row_scale(float largest) {
#if defined(WIDE_PRODUCTS)
  return {1.f, 1.f};
#else
  const int exponent = max(17 + LATENT_UP_LOG2, (int)(__float_as_uint(largest) >> 23));
  return {__int_as_float((267 - exponent) << 23),
          __int_as_float((exponent - 13 - LATENT_UP_LOG2) << 23)};
#endif
}
DEVICE uint32_t largest_of(const Vector4& v, uint32_t x) {
  return max_abs_x2(max_abs_x2(x, v.x), max_abs_x2(max_abs_x2(max_abs_x2(0, v.y), v.z), v.w));
}
DEVICE uint32_t product_of_q(uint32_t x, float factor) {
#if defined(WIDE_PRODUCTS)
  return x;
#else
  const float2 v = q_pair(x);
  return half_x2(v.x * factor, v.y * factor);
#endif
}

DEVICE uint32_t rotary_product_of_q(uint32_t x, float factor) {
  if (!ROTARY_IN_BF16) return product_of_q(x, factor);
  const float2 v = q_pair(x);
  return bfloat_x2(v.x * factor, v.y * factor);
}
#endif

constexpr float LEAST_MAXIMUM = -3.402823466e38f;  // where maxima start: below any score

struct Queries {
  const TensorMap &first_map, &rest_map;
  uint32_t phase = 0;
  int asked_for = -1;  // the request whose rows are on their way, or -1

  // Of the part's first request, before anything is known of it.
  DEVICE void begin(const Params& params) { load(params, part_of(params).first_request); }
  // Asks for the rows of the next request that has tiles, if there is one, once Q is free.
  DEVICE void ask_ahead(const Params& params, int request) {
    const int last = uniform(part_of(params).last_request);
    while (++request <= last) {
      if (uniform(tokens_of(piece_of(params, request)).tiles) == 0) continue;
      load(params, request);
      break;
    }
  }
  DEVICE void load(const Params& params, int request) {
    if (QUERY_IS_E4M3 || request > part_of(params).last_request) return;
    asked_for = request;
    if (uniform(warp_in_group()) != 0 || !elect_sync()) return;
    constexpr int FIRST_BLOCKS = 4;  // of the first map, gpu/gather_launch.py
    const RowBlock block = row_block();
    // A query token that is a request of its own is a position of a request of the call.
    const int of_call = request / params.lse_group;
    const int position = block.slab + request - of_call * params.lse_group;
    const int row = block.first_head + block.first_row;
    const uint64_t policy = createpolicy_evict_first();
    mbarrier_arrive_expect_tx(q_full(), Q_BYTES);
    cp_async_bulk_tensor_5d(shared_base(), first_map, q_full(), 0, row, 0, position, of_call,
                            policy);
    cp_async_bulk_tensor_5d(shared_base() + FIRST_BLOCKS * Q_BLOCK_BYTES, rest_map, q_full(), 0,
                            row, FIRST_BLOCKS, position, of_call, policy);
  }

  // Makes Q of a request ready, and the states of its rows.
  DEVICE void take(const Params& params, int request) {
    const float scale_log2 =
        params.scale_log2 * descale(params.descale_q) * descale(params.descale_k);
#if defined(QUERY_E4M3)
    copy(params, request, scale_log2);
#else
    if (RARELY(asked_for != request)) {  // the part's first request has no tiles
      wait_for_rows();
      bar_sync(SCORE_BARRIER, GROUP_THREADS);
      load(params, request);
    }
    wait_for_rows();
    scale(scale_log2);
#endif
    fence_proxy_async();
    bar_sync(SCORE_BARRIER, GROUP_THREADS);
  }
  // Before the next load() all warps must have met.
  DEVICE void wait_for_rows() {
    if (asked_for < 0) return;
    mbarrier_wait(q_full(), phase);
    phase ^= 1;
    asked_for = -1;
  }
  // A lane has two rows of the warp's 16, and 16 columns of each block.
  DEVICE static int my_row(int h) { return warp_in_group() * 16 + h * 8 + (lane_index() >> 2); }
  DEVICE static void begin_row(int row, float scale) {
    if ((lane_index() & 3) == 0) {
      st_shared_f32(row_state(row), scale);
      st_shared_f32(row_state(row) + 4, LEAST_MAXIMUM);
    }
  }
#if defined(QUERY_E4M3)
  // 128 columns of a row become one row of 128 bytes; of every 64, a lane of a quad has 16.
  DEVICE static void copy(const Params& params, int request, float scale_log2) {
    const RowBlock block = row_block();
    const int of_call = request / params.lse_group, of_quad = lane_index() & 3;
    const int position = block.slab + request - of_call * params.lse_group;
    const uint8_t* from = params.q + of_call * params.q_batch_stride +
                          position * params.q_position_stride + of_quad * 16;
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      const int row = my_row(h);
      const bool is_there = block.first_row + row < params.slab_rows;
      const uint8_t* from_row =
          from + (block.first_head + block.first_row + row) * params.q_head_stride;
      Vector4 v[COLUMN_BLOCKS];
#pragma unroll
      for (int i = 0; i < COLUMN_BLOCKS; ++i) {
        v[i] = {0, 0, 0, 0};
        if (is_there) v[i] = ld_global_v4(from_row + i * 64);
      }
#pragma unroll
      for (int i = 0; i < COLUMN_BLOCKS; ++i) {
        st_shared_v4(shared_base() + (i >> 1) * Q_BLOCK_BYTES + row * 128 +
                         ((((i & 1) * 4 + of_quad) ^ (row & 7)) << 4),
                     v[i]);
      }
      begin_row(row, scale_log2);
    }
  }
#else
  DEVICE static uint32_t my_columns(int row) {
    return shared_base() + row * 128 + ((((lane_index() & 3) * 2) ^ (row & 7)) << 4);
  }
  // 16 columns of a row and of a block.
  DEVICE static void store_block(uint32_t row_at, int block, const Vector4& a, const Vector4& b,
                                 float up) {
    const uint32_t first = row_at + block * Q_BLOCK_BYTES, second = first ^ 16;
    if (block >= ROTARY_BLOCK) up *= ROTARY_Q_UP;
    if (block < LATENT_BLOCKS) {
      auto x = [&](uint32_t pair) { return product_of_q(pair, up); };
      st_shared_v4(first, {x(a.x), x(a.z), x(b.x), x(b.z)});
      st_shared_v4(second, {x(a.y), x(a.w), x(b.y), x(b.w)});
    } else {
      auto x = [&](uint32_t pair) { return rotary_product_of_q(pair, up); };
      st_shared_v4(first, {x(a.x), x(a.y), x(a.z), x(a.w)});
      st_shared_v4(second, {x(b.x), x(b.y), x(b.z), x(b.w)});
    }
  }
  DEVICE static void scale(float scale_log2) {
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      const int row = my_row(h);
      const uint32_t at = my_columns(row);
      RowScale by = {1.f, 1.f};
#if !defined(WIDE_PRODUCTS)
      uint32_t latent[2] = {}, rotary[2] = {};
#pragma unroll
      for (int i = 0; i < COLUMN_BLOCKS; ++i) {
        uint32_t (&largest)[2] = i < ROTARY_BLOCK ? latent : rotary;
        largest[0] = largest_of(ld_shared_v4(at + i * Q_BLOCK_BYTES), largest[0]);
        largest[1] = largest_of(ld_shared_v4((at ^ 16) + i * Q_BLOCK_BYTES), largest[1]);
      }
      const float2 x = q_pair(max_abs_x2(latent[0], latent[1]));
      const float2 y = q_pair(max_abs_x2(rotary[0], rotary[1]));
      by = row_scale(quad_max(fmaxf(fmaxf(x.x, x.y), fmaxf(y.x, y.y) * ROTARY_Q_UP)));
#endif
#pragma unroll
      for (int i = 0; i < COLUMN_BLOCKS; i += 3) {
        Vector4 v[6];  // on their way together
#pragma unroll
        for (int j = 0; j < 3 && i + j < COLUMN_BLOCKS; ++j) {
          v[2 * j] = ld_shared_v4(at + (i + j) * Q_BLOCK_BYTES);
          v[2 * j + 1] = ld_shared_v4((at ^ 16) + (i + j) * Q_BLOCK_BYTES);
        }
#pragma unroll
        for (int j = 0; j < 3 && i + j < COLUMN_BLOCKS; ++j) {
          store_block(at, i + j, v[2 * j], v[2 * j + 1], by.up);
        }
      }
      begin_row(row, scale_log2 * by.down);
    }
  }
#endif
};
