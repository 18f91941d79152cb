// The matrix role, of warpgroups 1 and 2: O += P V for one half of the 512 columns of V, and where
// O goes in the end. O takes 128 of the 160 registers of a thread. Warp 0 of each is also the
// producer of that half of Q and K (sm90_tma_producer.cuh).
#pragma once
#include "sm90_fragments.cuh"
#include "sm90_pair.cuh"
#include "sm90_results.cuh"
#include "sm90_tma_producer.cuh"

// Zeroes this half of V for tokens past the end of the request: unused memory may hold NaN, and
// 0 * NaN is NaN.
DEVICE void clear_tokens(int half, uint32_t stage, int tokens_used) {
  const uint32_t thread = thread_in_group();
  const uint32_t column =
      stage_address(stage) + (half * 4 + ((thread & 31) >> 3)) * BLOCK_BYTES + (thread & 7) * 16;
#pragma unroll 1
  for (int token = tokens_used + (thread >> 5); token < TOKENS; token += 4) {
    st_shared_v4(column + token * 128, {0, 0, 0, 0});
  }
  fence_proxy_async();
  bar_sync(MATRIX_BARRIER + half, GROUP_THREADS);
}

// O of the front, in registers, becomes out of both pieces. `after` is the place after the last
// tile.
DEVICE void merge_back(float (&o)[128], int half, Place after, float inverse0, float inverse1) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_in_block() + 8 * h;
    const float inverse = h ? inverse1 : inverse0;
    const float front = ld_shared_f32(shared_base() + FRONT_WEIGHTS + row * 4);
    const float back = ld_shared_f32(shared_base() + BACK_WEIGHTS + row * 4);
    const uint32_t from = back_row(after.stage, row) + half * 1024 + (lane_index() & 3) * 16;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float4 other = ld_shared_v4_f32(from + i * 64);
      float* x = o + 8 * i + 2 * h;
      x[0] = merge_two(front, x[0] * inverse, back, other.x);
      x[1] = merge_two(front, x[1] * inverse, back, other.y);
      x[4] = merge_two(front, x[4] * inverse, back, other.z);
      x[5] = merge_two(front, x[5] * inverse, back, other.w);
    }
  }
}

// This warp has read INVERSE_L and RESULT, and is done with the piece.
DEVICE void free_results() {
  __syncwarp();
  if (arrives()) mbarrier_arrive(results_free());
}
// The last thread of matrix half 0 announces a back. It is in no producer's warp, since the fences
// of that take microseconds.
constexpr uint32_t ANNOUNCER = 2 * GROUP_THREADS - 1;
DEVICE bool is_producer() { return uniform(warp_in_group()) == 0; }

DEVICE void matrix_role(const Params& params, int half, const TensorMap& q_map,
                        const TensorMap& k_map) {
  Cursor cursor;
  cursor.tile = Cursor::DONE;
  if (is_producer()) {
    cursor.request = part_of(params).first_request - 1;
    next_piece(params, cursor);
#pragma unroll 1
    for (uint32_t i = 0; i <= STAGES; ++i) {  // the last one goes where Q was, once that is taken
      produce(params, half, q_map, k_map, cursor, {i % STAGES, 0}, i == STAGES);
    }
  }
  float o[128];
  Place place;
  uint32_t results_phase = 0;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    int tiles, last_tokens;  // tiles of the piece; tokens of the request in the last of them
    {
      const Piece piece = piece_of(params, request);
      tiles = uniform(piece.end - piece.begin);
      last_tokens = uniform(piece.length - (piece.end - 1) * TOKENS);
      if (tiles == 0) continue;  // the softmax warpgroup stores the results of no keys
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0.f;
    place.advance();  // past Q
#pragma unroll 1
    for (int i = 0;; ++i) {
      // The last round only loads, where the next piece's Q was: the softmax warpgroup frees that.
      if (i < tiles) {
        mbarrier_wait(p_ready(place.stage), place.phase);
        if (i + 1 == tiles && last_tokens < TOKENS) clear_tokens(half, place.stage, last_tokens);
        if (i > 0 && uniform(ld_shared_u32(rescale_flag(place.stage)))) {
          const float a = __uint_as_float(ld_shared_u16(factors(place.stage)) << 16);
          const float b =
              __uint_as_float(ld_shared_u16(factors(place.stage) + SECOND_ROW_FACTOR) << 16);
#pragma unroll
          for (int j = 0; j < 32; ++j) {
            o[4 * j] *= a, o[4 * j + 1] *= a;
            o[4 * j + 2] *= b, o[4 * j + 3] *= b;
          }
        }
        {
          const uint32_t stage = stage_address(place.stage);
          const uint64_t p_tile = descriptor_k_major(stage + ROPE * BLOCK_BYTES);
          const uint64_t v_tile = descriptor_mn_major(stage + half * 4 * BLOCK_BYTES);
          pin(o);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) wgmma_m64n256k16_ss(o, p_tile + k * 2, v_tile + k * 128);
          wgmma_commit_group();
          wgmma_wait_all();
          pin(o);
        }
        __syncwarp();
        if (arrives()) {
          if (half == 0) mbarrier_arrive(empty(0, place.stage));
          mbarrier_arrive(empty(1, place.stage));  // P lies in half 1
        }
      }
      if (is_producer()) produce(params, half, q_map, k_map, cursor, place, true);
      if (i == tiles) break;
      place.advance();
    }
    mbarrier_wait(results_ready(), results_phase);
    results_phase ^= 1;
    float inverse0 = ld_shared_f32(row_floats(INVERSE_L));
    float inverse1 = ld_shared_f32(row_floats(INVERSE_L) + SECOND_ROW_FLOAT);
    uint32_t result = uniform(ld_shared_u32(shared_base() + RESULT));
    const bool is_front = kind_of(result) >= FRONT;  // or MERGED already
    if (is_front) {
      bar_sync(PAIR_BARRIER, BLOCK_THREADS);  // the softmax warpgroup has looked for the back
      result = uniform(ld_shared_u32(shared_base() + RESULT));
      if (kind_of(result) == MERGED) {
        mbarrier_wait(back_full(), 0);
        merge_back(o, half, place, inverse0, inverse1);
        inverse0 = inverse1 = 1.f;
      }
    }
    const Kind kind = kind_of(result);
    if (kind <= SPLIT) free_results();
    if (kind == WHOLE || kind == MERGED) {
      store_out(o, half, params, request, inverse0, inverse1);
    } else if (kind == SPLIT && params.slab_rows > FEW_ROWS) {
      store_halves(o, half, params, slot_of(result), inverse0, inverse1);
    } else {
      store_floats(o, half, params, slot_of(result), inverse0, inverse1);
    }
    if (is_front) return;
    if (kind == BACK) {
      __syncwarp();
      bar_sync(PAIR_BARRIER, BLOCK_THREADS);  // all of O and lse are stored
      if (thread_index() == ANNOUNCER) announce_back_for_tma(params);
      free_results();
    }
  }
}
