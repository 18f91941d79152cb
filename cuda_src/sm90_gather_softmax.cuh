// The softmax role, of warpgroup 0: S = Q K^T, P = 2^(scale S - m), the running maximum m and the
// running sum l of each row, and lse.
//
// Most of Q stays in registers, 28 of its 32 or 36 steps in K; the others come from shared memory.
// P of a tile goes to the stage of the tile. Between S of two tiles the tensor cores have but P V
// to do, so what can be asked early is: which tokens count, and whether the next tile is there.
#pragma once
#include "sm90_gather_queries.cuh"
#include "sm90_no_tiles.cuh"
#include "sm90_results.cuh"

constexpr int LAST_STEPS = 8;  // of S, still to be issued when P V of the tile before is released
constexpr int SCORES = TILE / 2;  // of a thread: two rows by a quarter of the tokens

// ---- scores ---------------------------------------------------------------------------------

// Issues S [64, 48] = Q [64, d_qk] K^T for the tile at `place`. `to_release` is p_ready of the tile
// before, if it is yet to be released, or 0. Issuing is nearly synchronous, since a warp can queue
// only a few wgmmas.
DEVICE void issue_scores(float (&s)[SCORES], const uint32_t (&q)[4 * Q_STEPS], Place place,
                         uint32_t to_release) {
  const uint64_t k_tile = descriptor_k_major(stage_address(place.stage));
  const uint64_t q_tail = descriptor_k_major(shared_base() + Q_TAIL);
  auto columns = [&](int step) {
    return k_tile + (step >> 2) * (BLOCK_BYTES >> 4) + (step & 3) * 2;
  };
  if (!to_release) mbarrier_wait(full(place.stage), place.phase);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Q_STEPS - LAST_STEPS; ++k) {
    wgmma_m64n48k16_rs(s, q + 4 * k, columns(k), k != 0);
  }
#pragma unroll
  for (int k = Q_STEPS; k < STEPS; ++k) {
    const uint64_t q_columns =
        q_tail + ((k >> 2) - Q_STEPS / 4) * (Q_BLOCK_BYTES >> 4) + (k & 3) * 2;
    wgmma_m64n48k16_ss(s, q_columns, columns(k));
  }
  if (to_release) release(to_release);
  wgmma_fence();
#pragma unroll
  for (int k = Q_STEPS - LAST_STEPS; k < Q_STEPS; ++k) {
    wgmma_m64n48k16_rs(s, q + 4 * k, columns(k), 1);
  }
  wgmma_commit_group();
}

// Whether all tokens of a stage are to be seen.
DEVICE bool all_live(uint32_t stage) {
  const uint32_t x = ld_shared_u32(live_tokens(stage)), y = ld_shared_u32(live_tokens(stage) + 4);
  return (x & y) == (1u << HALF_TILE) - 1;
}

// Makes S -inf for tokens that are not to be seen, and for those from `seen` on of each row. A live
// token that a row does not see but whose score is not finite makes the row NaN instead (x - x is 0
// or NaN). So a bad row of the cache reaches every row of its request.
DEVICE void mask(float (&s)[SCORES], uint32_t stage, const int (&seen)[2]) {
  const uint32_t live[2] = {ld_shared_u32(live_tokens(stage)) >> column_pair(),
                            ld_shared_u32(live_tokens(stage) + 4) >> column_pair()};
#pragma unroll
  for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * j + i;  // and column_pair()
      const bool is_live = live[token / HALF_TILE] >> token % HALF_TILE & 1;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& x = s[4 * j + 2 * h + i];
        const float y = token >= seen[h] ? NEG_INF + (x - x) : x;
        x = is_live ? y : NEG_INF;
      }
    }
  }
}

// Scores -> P in the stage, and the running maximum m and sum l of the thread's two rows. l and
// `largest`, the largest logit, are of this thread's columns only; m may be less than that of all
// by LAZY. `scale` is that of the softmax, for exponents of 2.
DEVICE void softmax_step(float (&s)[SCORES], float (&m)[2], float (&l)[2], float (&largest)[2],
                         uint32_t stage, float scale) {
  float x0 = fmaxf(s[0], s[1]), x1 = fmaxf(s[2], s[3]);
  float y0 = fmaxf(s[4], s[5]), y1 = fmaxf(s[6], s[7]);
#pragma unroll
  for (int j = 2; j < TILE / 8; j += 2) {
    x0 = fmaxf(x0, fmaxf(s[4 * j], s[4 * j + 1]));
    x1 = fmaxf(x1, fmaxf(s[4 * j + 2], s[4 * j + 3]));
    y0 = fmaxf(y0, fmaxf(s[4 * j + 4], s[4 * j + 5]));
    y1 = fmaxf(y1, fmaxf(s[4 * j + 6], s[4 * j + 7]));
  }
  float top0 = fmaxf(x0, y0) * scale;
  float top1 = fmaxf(x1, y1) * scale;
  largest[0] = fmaxf(largest[0], top0), largest[1] = fmaxf(largest[1], top1);
  const bool any = __any_sync(~0u, top0 > m[0] + LAZY || top1 > m[1] + LAZY);
  if (any) {  // rare after the first tiles
    top0 = quad_max(top0), top1 = quad_max(top1);
    const bool raise0 = top0 > m[0] + LAZY, raise1 = top1 > m[1] + LAZY;
    const float factor0 = raise0 ? raise_maximum(m[0], l[0], top0) : 1.f;
    const float factor1 = raise1 ? raise_maximum(m[1], l[1], top1) : 1.f;
    if ((lane_index() & 3) == 0) {
      st_shared_u16(factors(stage), __float_as_uint(factor0) >> 16);
      st_shared_u16(factors(stage) + SECOND_ROW_FACTOR, __float_as_uint(factor1) >> 16);
    }
  }
  if (lane_index() == 0) st_shared_u32(rescale_flag(stage), any);

  const float minus_m0 = m[0] == NEG_INF ? 0.f : -m[0], minus_m1 = m[1] == NEG_INF ? 0.f : -m[1];
  const uint32_t p_tile = stage_address(stage) + P_BLOCK * BLOCK_BYTES + plain_fragment_offset();
  float a0 = 0.f, a1 = 0.f, b0 = 0.f, b1 = 0.f;
#pragma unroll
  for (int k = 0; k < TILE / 16; ++k) {
    float* t = s + 8 * k;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      t[i] = ex2(fmaf(t[i], scale, i & 2 ? minus_m1 : minus_m0));
    }
    stmatrix_x4(p_tile + k * P_STEP_BYTES, cvt_x2(t[0], t[1]), cvt_x2(t[2], t[3]),
                cvt_x2(t[4], t[5]), cvt_x2(t[6], t[7]));
    a0 += t[0] + t[1], a1 += t[2] + t[3];
    b0 += t[4] + t[5], b1 += t[6] + t[7];
  }
  l[0] += a0 + b0, l[1] += a1 + b1;
}

// ---- the role -------------------------------------------------------------------------------

// The query head of a row of the block.
DEVICE int head_of(const Params& params, const RowBlock& block, int row) {
  return block.first_head + row % params.group;
}
// What a sink adds to l of a row, given its running maximum.
DEVICE float sink_of(const Params& params, int head, float m) {
  return ex2(__ldg(params.attn_sink + head) * LOG2E - m);
}

DEVICE void softmax_role(const Params& params, const TensorMap& q_map_0, const TensorMap& q_map_1) {
  uint32_t q[4 * Q_STEPS];
  float s[SCORES];
  Place place;
  uint32_t results_phase = 1;
  Queries queries = {q_map_0, q_map_1};
  queries.begin(params);
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    int tiles_left, border;  // border: the token from which on some row does not see all
    uint32_t result;
    int first_token;
    {
      const Piece piece = piece_of(params, request);
      tiles_left = uniform(piece_tiles(piece)), first_token = piece.begin * TOKENS;
      border = uniform(params.causal ? piece.length - params.s_q + 1 : 0x7fffffff);
      result = uniform(result_word(piece.kind, piece.slot));
      if (tiles_left == 0) {
        store_no_tiles(params, request, piece);
        continue;
      }
    }
    queries.take(params, request, q);
    float m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f}, largest[2] = {NEG_INF, NEG_INF};
    uint32_t to_release = 0;
#pragma unroll 1
    for (;;) {
      issue_scores(s, q, place, to_release);
      queries.scores_are_issued(params, request);
      const bool sees_all = all_live(place.stage) && first_token + TILE <= border;
      wgmma_wait_all();
      pin(s);
      bool arrived = false;  // the next tile
      if (tiles_left > 1) arrived = is_full(place.next());
      if (uniform(!sees_all)) {
        int seen[2] = {TILE, TILE};
        if (first_token + TILE > border) {  // causal
          const RowBlock block = row_block();
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = block.first_row + row_in_block() + 8 * h;
            const int position = block.slab + row / params.group;
            if (row < params.slab_rows) seen[h] = border + position - first_token - column_pair();
          }
        }
        mask(s, place.stage, seen);
      }
      softmax_step(s, m, l, largest, place.stage, params.scale_log2);
      if (--tiles_left == 0) break;
      first_token += TILE;
      const uint32_t p_written = p_ready(place.stage);
      place.advance();
      arrived = __all_sync(~0u, arrived);
      if (!arrived) arrived = __all_sync(~0u, is_full(place));
      if (!arrived) release(p_written);  // memory-bound: P V runs while K is on its way
      to_release = arrived ? p_written : 0;
    }

    release(p_ready(place.stage));  // ahead of all else: P V must not wait
    place.advance();
    mbarrier_wait(results_free(), results_phase);
    results_phase ^= 1;
    const Kind kind = kind_of(result);
    const int slot = slot_of(result);
    const float down = descale(params.descale_k);
    l[0] = quad_sum(l[0]), l[1] = quad_sum(l[1]);
    largest[0] = quad_max(largest[0]), largest[1] = quad_max(largest[1]);
    if ((lane_index() & 3) == 0) {
      const RowBlock block = row_block();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = block.first_row + row_in_block() + 8 * h;
        float sum = l[h];
        if (params.attn_sink && kind == WHOLE && row < params.slab_rows) {
          sum += sink_of(params, head_of(params, block, row), m[h]);
        }
        st_shared_f32(row_floats(INVERSE_L) + SECOND_ROW_FLOAT * h,
                      l[h] == 0.f ? 0.f : rcp(sum) * down);
      }
    }
    if (thread_index() == 0) st_shared_u32(shared_base() + RESULT, result);
    __syncwarp();
    if (arrives()) mbarrier_arrive(results_ready());
    if ((lane_index() & 3) == 0) {
      const RowBlock block = row_block();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = block.first_row + row_in_block() + 8 * h;
        if (row >= params.slab_rows) continue;
        const float lse = lg2(l[h]) + m[h];  // log2
        if (kind == WHOLE) {
          store_lse(params, request, block, row, l[h] == 0.f ? POS_INF : lse * LN2);
          if (params.max_logits) {
            store_max_logit(params, request, block, row, largest[h] * LN2);
          }
        } else {
          float* partial = params.row_partial + partial_row(params, slot, block, row) * 4;
          partial[0] = l[h] == 0.f ? NEG_INF : lse;
          partial[3] = largest[h];
        }
      }
    }
    __syncwarp();
  }
}
