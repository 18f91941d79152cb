// The softmax role, of warpgroup 0: S = Q K^T, P = 2^(scale S - m), the running maximum m and the
// running sum l of each row, and lse.
//
// Q stays in 124 registers of each thread, 31 of its 36 steps in K; the other five come from shared
// memory. P of a tile goes to the rotary columns of the same tile.
#pragma once
#include "row_statistics.cuh"
#include "sm90_fragments.cuh"
#include "sm90_no_tiles.cuh"
#include "sm90_pair.cuh"
#include "sm90_results.cuh"

constexpr int Q_STEPS = 31;  // of 16 columns, kept in registers
constexpr int LAST_STEPS =
    8;  // of S that are still to be issued when P V of the tile before is released

// Makes what this thread wrote to shared memory visible to wgmma and TMA; then its warp arrives.
DEVICE void release(uint32_t barrier) {
  fence_proxy_async();
  __syncwarp();
  if (arrives()) mbarrier_arrive(barrier);
}

// Takes the rows of Q [64, 576] out of their stage, and frees it: steps 0 to 30 go to registers,
// step 31 and the rotary columns to shared memory of their own.
DEVICE void take_q(uint32_t (&q)[4 * Q_STEPS], Place place) {
  mbarrier_wait(full(0, place.stage), place.phase);
  mbarrier_wait(full(1, place.stage), place.phase);
  const uint32_t stage = stage_address(place.stage), fragment = stage + fragment_offset();
#pragma unroll
  for (int k = 0; k < Q_STEPS; ++k) {
    ldmatrix_x4((fragment ^ ((k & 3) << 5)) + (k >> 2) * BLOCK_BYTES, q[4 * k], q[4 * k + 1],
                q[4 * k + 2], q[4 * k + 3]);
  }
  const uint32_t thread = thread_in_group();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t offset = i * 2048 + thread * 16;
    st_shared_v4(shared_base() + Q_ROPE + offset,
                 ld_shared_v4(stage + ROPE * BLOCK_BYTES + offset));
  }
  const uint32_t row = thread >> 1, half = thread & 1;  // 16-byte chunks 6 and 7 of block 7
  st_shared_v4(shared_base() + Q_STEP_31 + half * 1024 + row * 16,
               ld_shared_v4(stage + 7 * BLOCK_BYTES + row * 128 + (((6 + half) ^ (row & 7)) << 4)));
  // Every use of a stage has a phase of p_ready. In that of Q the warps of this warpgroup wait for
  // each other. The matrix warpgroups may be behind by more than a round of the ring, so they must
  // not.
  release(p_ready(place.stage));
  mbarrier_wait(p_ready(place.stage), place.phase);
  if (arrives()) {
    mbarrier_arrive(empty(0, place.stage));
    mbarrier_arrive(empty(1, place.stage), 2);
  }
}

// Issues S [64, 64] = Q [64, 576] K^T for the tile at `place`. `to_release` is p_ready of the tile
// before, if it is yet to be released, or 0. Issuing is nearly synchronous, since a warp can queue
// only a few wgmmas.
DEVICE void issue_scores(float (&s)[32], const uint32_t (&q)[4 * Q_STEPS], Place place,
                         uint32_t to_release) {
  const uint64_t k_tile = descriptor_k_major(surely_uniform(stage_address(place.stage)));
  const uint64_t q_rope = descriptor_k_major(shared_base() + Q_ROPE);
  auto columns = [&](int step) {
    return k_tile + (step >> 2) * (BLOCK_BYTES >> 4) + (step & 3) * 2;
  };
  mbarrier_wait(full(0, place.stage), place.phase);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 16; ++k) wgmma_m64n64k16_rs(s, q + 4 * k, columns(k), k != 0);
  mbarrier_wait(full(1, place.stage), place.phase);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_m64n64k16_ss(s, q_rope + k * 2, columns(32 + k));
  wgmma_m64n64k16_ss(s, descriptor_k_major_plain(shared_base() + Q_STEP_31), columns(31));
#pragma unroll
  for (int k = 16; k < Q_STEPS; ++k) {
    if (k == Q_STEPS - LAST_STEPS) {
      if (to_release) release(to_release);
      wgmma_fence();
    }
    wgmma_m64n64k16_rs(s, q + 4 * k, columns(k), 1);
  }
  wgmma_commit_group();
}

// Makes S -inf for keys that a row does not see: those past the end of the request and, if causal,
// past the row's position. A live key that a row does not see but whose score is not finite makes
// the row NaN instead. So a refused page reaches every row of its request, and so does a NaN or an
// Inf that the caller left in a live key, whatever the split.
DEVICE void mask(float (&s)[32], const Params& params, int request, int first_token) {
  const int live = __ldg(params.cache_seqlens + request) - first_token - column_pair();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int seen = live;
    if (params.causal) {
      const RowBlock block = row_block();
      const int row = block.first_row + row_in_block() + 8 * h;
      if (row < params.slab_rows) seen -= params.s_q - 1 - block.slab - row / params.group;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[4 * j + 2 * h + i];
        const bool spoils = 8 * j + i < live && !(fabsf(x) < POS_INF);
        // As bits: a choice between floats costs ptxas one instruction more for each of the 32.
        if (8 * j + i >= seen) x = __int_as_float(spoils ? 0xffc00000 : 0xff800000);
      }
    }
  }
}

// How many of the last tiles of a piece may have keys that some row does not see. The others skip
// mask(), whose instructions take most of a microsecond where they are not in a cache.
DEVICE int masked_tiles(const Params& params, const Piece& piece) {
  if (!params.causal && piece.length % TOKENS == 0) return 0;
  return piece.end - (((piece.length - 1) >> 6) + 1 - params.border_tiles);
}

// S [64, 64] -> P, in the rotary columns of the stage, and the running maximum m and sum l of the
// thread's two rows (l of this thread's columns only). Leaves the factors that O has to shrink by.
DEVICE void softmax_step(float (&s)[32], float (&m)[2], float (&l)[2], uint32_t stage,
                         float scale_log2) {
  float x0 = fmaxf(s[0], s[1]), x1 = fmaxf(s[2], s[3]);
  float y0 = fmaxf(s[4], s[5]), y1 = fmaxf(s[6], s[7]);
#pragma unroll
  for (int j = 2; j < 8; j += 2) {
    x0 = fmaxf(x0, fmaxf(s[4 * j], s[4 * j + 1]));
    x1 = fmaxf(x1, fmaxf(s[4 * j + 2], s[4 * j + 3]));
    y0 = fmaxf(y0, fmaxf(s[4 * j + 4], s[4 * j + 5]));
    y1 = fmaxf(y1, fmaxf(s[4 * j + 6], s[4 * j + 7]));
  }
  const float top0 = quad_max(fmaxf(x0, y0)) * scale_log2;
  const float top1 = quad_max(fmaxf(x1, y1)) * scale_log2;
  const bool raise0 = top0 > m[0] + LAZY, raise1 = top1 > m[1] + LAZY;
  const bool any = __any_sync(~0u, raise0 || raise1);
  if (any) {  // rare after the first tiles
    const float factor0 = raise0 ? raise_maximum(m[0], l[0], top0) : 1.f;
    const float factor1 = raise1 ? raise_maximum(m[1], l[1], top1) : 1.f;
    if ((lane_index() & 3) == 0) {
      st_shared_u16(factors(stage), __float_as_uint(factor0) >> 16);
      st_shared_u16(factors(stage) + SECOND_ROW_FACTOR, __float_as_uint(factor1) >> 16);
    }
  }
  if (lane_index() == 0) st_shared_u32(rescale_flag(stage), any);

  const float minus_m0 = m[0] == NEG_INF ? 0.f : -m[0], minus_m1 = m[1] == NEG_INF ? 0.f : -m[1];
  const uint32_t p_tile = stage_address(stage) + ROPE * BLOCK_BYTES + fragment_offset();
  float a0 = 0.f, a1 = 0.f, b0 = 0.f, b1 = 0.f;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float* t = s + 8 * k;
#pragma unroll
    for (int i = 0; i < 8; ++i) t[i] = ex2(fmaf(t[i], scale_log2, i & 2 ? minus_m1 : minus_m0));
    stmatrix_x4(p_tile ^ (k << 5), cvt_x2(t[0], t[1]), cvt_x2(t[2], t[3]), cvt_x2(t[4], t[5]),
                cvt_x2(t[6], t[7]));
    a0 += t[0] + t[1], a1 += t[2] + t[3];
    b0 += t[4] + t[5], b1 += t[6] + t[7];
  }
  l[0] += a0 + b0, l[1] += a1 + b1;
}

// The end of a front, which is the last piece of its part: this warpgroup looks whether the back is
// written, and if so fetches it and weighs the two. The matrix warpgroups wait for that.
DEVICE void finish_front(const Params& params, int request, int slot, const float (&m)[2],
                         const float (&l)[2], Place last) {
  const RowBlock block = row_block();
  if (thread_index() == 0 && is_back_written(params)) {
    st_shared_u32(shared_base() + RESULT, result_word(MERGED, slot));
  }
  __syncwarp();
  bar_sync(SOFTMAX_BARRIER, GROUP_THREADS);
  const bool merged = kind_of(uniform(ld_shared_u32(shared_base() + RESULT))) == MERGED;
  if (merged && thread_index() < 32) fetch_back(params, block, slot + 1, last);
  if ((lane_index() & 3) == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = block.first_row + row_in_block() + 8 * h;
      if (row >= params.slab_rows) continue;
      const float lse = l[h] == 0.f ? NEG_INF : lg2(l[h]) + m[h];  // log2
      float* partial = params.row_partial + partial_row(params, slot, block, row) * 4;
      *partial = merged ? __uint_as_float(MERGED_LSE) : lse;
      if (merged) {
        const float back_lse = partial[params.s_q * params.h_q * 4];  // of the next slot
        const Merged both = merge_rows(lse, back_lse);
        store_lse(params, request, block, row, both.lse);
        st_shared_f32(row_floats(FRONT_WEIGHTS) + SECOND_ROW_FLOAT * h, both.front);
        st_shared_f32(row_floats(BACK_WEIGHTS) + SECOND_ROW_FLOAT * h, both.back);
      }
    }
  }
  __syncwarp();
  bar_arrive(PAIR_BARRIER, BLOCK_THREADS);
}

DEVICE void softmax_role(const Params& params) {
  uint32_t q[4 * Q_STEPS];
  float s[32];
  Place place;
  uint32_t results_phase = 1;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    int tiles_left, first_token, tiles_to_mask;
    uint32_t result;
    {
      const Piece piece = piece_of(params, request);
      tiles_left = uniform(piece.end - piece.begin), first_token = piece.begin * TOKENS;
      tiles_to_mask = uniform(masked_tiles(params, piece)),
      result = uniform(result_word(piece.kind, piece.slot));
      if (tiles_left == 0) {
        store_no_tiles(params, request, piece);
        continue;
      }
    }
    take_q(q, place);
    place.advance();
    float m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};
    uint32_t to_release = 0;
#pragma unroll 1
    for (;;) {
      issue_scores(s, q, place, to_release);
      wgmma_wait_all();
      pin(s);
      if (tiles_left <= tiles_to_mask) mask(s, params, request, first_token);
      softmax_step(s, m, l, place.stage, params.scale_log2);
      if (--tiles_left == 0) break;
      first_token += TOKENS;
      const uint32_t p_written = p_ready(place.stage);
      place.advance();
      const bool arrived = __all_sync(~0u, mbarrier_test_wait(full(0, place.stage), place.phase));
      if (!arrived) release(p_written);  // bound by memory: P V runs while K is on its way
      to_release = arrived ? p_written : 0;
    }

    release(p_ready(place.stage));  // ahead of all else: P V must not wait
    mbarrier_wait(results_free(), results_phase);
    results_phase ^= 1;
    l[0] = quad_sum(l[0]), l[1] = quad_sum(l[1]);
    if ((lane_index() & 3) == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        st_shared_f32(row_floats(INVERSE_L) + SECOND_ROW_FLOAT * h, l[h] == 0.f ? 0.f : rcp(l[h]));
      }
    }
    if (thread_index() == 0) st_shared_u32(shared_base() + RESULT, result);
    __syncwarp();
    if (arrives()) mbarrier_arrive(results_ready());
    const Kind kind = kind_of(result);
    const int slot = slot_of(result);
    if (kind == FRONT) {
      finish_front(params, request, slot, m, l, place);
      return;
    }
    place.advance();
    if ((lane_index() & 3) == 0) {
      const RowBlock block = row_block();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = block.first_row + row_in_block() + 8 * h;
        if (row >= params.slab_rows) continue;
        const float lse = lg2(l[h]) + m[h];  // log2
        if (kind == WHOLE) {
          store_lse(params, request, block, row, l[h] == 0.f ? POS_INF : lse * LN2);
        } else {
          params.row_partial[partial_row(params, slot, block, row) * 4] =
              l[h] == 0.f ? NEG_INF : lse;
        }
      }
    }
    __syncwarp();
    if (kind == BACK) bar_arrive(PAIR_BARRIER, BLOCK_THREADS);  // lse is in row_partial
  }
}
