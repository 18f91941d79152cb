// The score role, of four warps: S [16, 32] = Q K^T of a slot, P = 2^(scale S - m), the running
// maximum m and the running sum l of each row, and lse.
//
// A warp has all of Q in 144 registers, as fragments, and eight tokens of a slot. So S needs no sum
// over warps; only the maximum of a row is exchanged, which takes one barrier a slot.
#pragma once
#include "merge.cuh"
#include "row_statistics.cuh"
#include "sm90_few_rows_loader.cuh"
#include "sm90_no_tiles.cuh"
#include "sm90_pair_words.cuh"
#include "sm90_row_exchange.cuh"

constexpr int K_STEPS = 36;  // of 16 columns
constexpr int CHAINS = 4;    // sums of S that do not wait for one another

// A thread has, of S and P, columns 2 (lane % 4) and the next one of the warp's eight, in two rows:
// [0] and [1] of this row, [2] and [3] of the row eight further.
DEVICE int first_row() { return lane_index() >> 2; }
DEVICE int first_column() { return warp_in_group() * 8 + (lane_index() & 3) * 2; }

DEVICE uint32_t maxima(uint32_t buffer) { return MAXIMA + buffer * ROWS * GROUP_WARPS * 4; }

// Takes Q [16, 576] out of its slot, which is free then. Rows past the last are whatever lies
// there, and are not stored.
DEVICE void take_q(uint32_t (&q)[4 * K_STEPS], Place place) {
  mbarrier_wait(full(place.slot), place.phase);
  const uint32_t lane = lane_index(), row = lane & 15;
  const uint32_t from = slot_address(place.slot) + row * 128 + (((lane >> 4) ^ (row & 7)) << 4);
#pragma unroll
  for (int k = 0; k < K_STEPS; ++k) {
    ldmatrix_x4((from ^ ((k & 3) << 5)) + (k >> 2) * Q_BLOCK_BYTES, q[4 * k], q[4 * k + 1],
                q[4 * k + 2], q[4 * k + 3]);
  }
  arrive(empty(place.slot), 2);
  arrive(p_ready(place.slot));  // every use of a slot has a phase of p_ready
}

// S of the warp's tokens.
DEVICE void scores(float (&s)[4], const uint32_t (&q)[4 * K_STEPS], uint32_t slot) {
  const uint32_t lane = lane_index();
  const uint32_t from =
      token_row(slot, warp_in_group() * 8 + (lane & 7)) + (((lane >> 3) ^ (lane & 7)) << 4);
  float chains[CHAINS][4] = {};
#pragma unroll
  for (int k = 0; k < K_STEPS; k += 2) {
    uint32_t x, y, z, w;
    ldmatrix_x4((from ^ ((k & 2) << 5)) + (k >> 2) * BLOCK_BYTES, x, y, z, w);
    mma_m16n8k16(chains[k % CHAINS], q + 4 * k, x, y);
    mma_m16n8k16(chains[(k + 1) % CHAINS], q + 4 * k + 4, z, w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s[i] = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
  }
}

// Makes S -inf for keys that a row does not see, or NaN, as sm90_softmax.cuh says. `first_token` is
// that of the slot.
DEVICE void mask(float (&s)[4], const Params& params, int length, int first_token) {
  const int live = length - first_token - first_column();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int seen = live;
    if (params.causal) {
      const RowBlock block = row_block();
      const int row = block.first_row + first_row() + 8 * h;
      if (row < params.slab_rows) seen -= params.s_q - 1 - block.slab - row / params.group;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = s[2 * h + i];
      const bool spoils = i < live && !(fabsf(x) < POS_INF);
      if (i >= seen) x = spoils ? QUIET_NAN : NEG_INF;
    }
  }
}

// S -> P, as fragments of A for P V, and m and l (l of this thread's columns only). Leaves the
// factors that O has to shrink by.
DEVICE void softmax_step(float (&s)[4], float (&m)[2], float (&l)[2], uint32_t slot,
                         uint32_t buffer, float scale_log2) {
  const int row = first_row();
  float top[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    scatter(maxima(buffer), row + 8 * h, quad_max(fmaxf(s[2 * h], s[2 * h + 1])));
  }
  bar_sync(SCORE_BARRIER, GROUP_THREADS);
  arrive(empty(slot));  // S is made of it
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 all = gather(maxima(buffer), row + 8 * h);
    top[h] = fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)) * scale_log2;
  }
  // From here on all warps do the same with m.
  const bool raise0 = top[0] > m[0] + LAZY, raise1 = top[1] > m[1] + LAZY;
  const bool any = __any_sync(~0u, raise0 || raise1);
  const bool writes = warp_in_group() == 0;
  if (any) {  // rare after the first tokens
    const float factor0 = raise0 ? raise_maximum(m[0], l[0], top[0]) : 1.f;
    const float factor1 = raise1 ? raise_maximum(m[1], l[1], top[1]) : 1.f;
    if (writes && (lane_index() & 3) == 0) {
      st_shared_f32(row_float(FACTORS, slot * ROWS + row), factor0);
      st_shared_f32(row_float(FACTORS, slot * ROWS + row + 8), factor1);
    }
  }
  if (writes && lane_index() == 0) st_shared_u32(shared_base() + RESCALE + slot * 4, any);

  const float minus_m0 = m[0] == NEG_INF ? 0.f : -m[0], minus_m1 = m[1] == NEG_INF ? 0.f : -m[1];
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = ex2(fmaf(s[i], scale_log2, i & 2 ? minus_m1 : minus_m0));
  l[0] += s[0] + s[1], l[1] += s[2] + s[3];
  // [step of 16 tokens][lane] 16 bytes, of which eight tokens are a half.
  const uint32_t to = p_tile(slot) + ((warp_in_group() >> 1) * 32 + lane_index()) * 16;
  st_shared_v2(to + (warp_in_group() & 1) * 8, cvt_x2(s[0], s[1]), cvt_x2(s[2], s[3]));
  arrive(p_ready(slot));
}

// The end of a piece, by warp 0: what the value warps need of its rows, and lse. The front of a
// pair looks whether the back is written, and weighs the two.
DEVICE void finish_rows(const Params& params, int request, const Piece& piece,
                        const float (&m)[2]) {
  const RowBlock block = row_block();
  Kind kind = piece.kind;
  if (kind == FRONT) {
    bool written = false;
    if (lane_index() == 0) written = is_back_written(params);
    if (uniform(written)) kind = MERGED;
    __syncwarp();
  }
  if (lane_index() == 0) st_shared_u32(shared_base() + RESULT, kind);
  if ((lane_index() & 3) == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int in_block = first_row() + 8 * h, row = block.first_row + in_block;
      const float4 sums = gather(SUMS, in_block);
      const float l = (sums.x + sums.y) + (sums.z + sums.w);
      st_shared_f32(row_float(INVERSE_L, in_block), l == 0.f ? 0.f : rcp(l));
      if (row >= params.slab_rows) continue;
      const float lse = l == 0.f ? NEG_INF : lg2(l) + m[h];  // log2
      if (kind == WHOLE) {
        store_lse(params, request, block, row, l == 0.f ? POS_INF : lse * LN2);
        continue;
      }
      float* partial = params.row_partial + partial_row(params, piece.slot, block, row) * 4;
      *partial = kind == MERGED ? __uint_as_float(MERGED_LSE) : lse;
      if (kind == MERGED) {  // the back has the next slot
        const float back = ld_global_f32(partial + params.s_q * params.h_q * 4);
        const Merged both = merge_rows(lse, back);
        store_lse(params, request, block, row, both.lse);
        st_shared_f32(row_float(FRONT_WEIGHTS, in_block), both.front);
        st_shared_f32(row_float(BACK_WEIGHTS, in_block), both.back);
      }
    }
  }
  arrive(results_ready());
}

DEVICE void score_role(const Params& params) {
  uint32_t q[4 * K_STEPS];
  Place place;
  uint32_t results_phase = 1, buffer = 0;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    const Piece piece = piece_of(params, request);
    const Tokens tokens = tokens_of(piece);
    const int slots = uniform(tokens.slots);
    if (slots == 0) {
      store_no_tiles(params, request, piece);
      continue;
    }
    take_q(q, place);
    place.advance();
    // From this token on, a slot has a key that some row does not see.
    const int border = piece.length - (params.causal ? params.s_q - 1 : 0) - SLOT_TOKENS + 1;
    float m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};
    int first_token = tokens.begin;
#pragma unroll 1
    for (int i = 0; i < slots; ++i, first_token += SLOT_TOKENS) {
      float s[4];
      mbarrier_wait(full(place.slot), place.phase);
      scores(s, q, place.slot);
      if (first_token >= border) mask(s, params, piece.length, first_token);
      softmax_step(s, m, l, place.slot, buffer, params.scale_log2);
      buffer ^= 1;
      place.advance();
    }
    scatter(SUMS, first_row(), quad_sum(l[0]));
    scatter(SUMS, first_row() + 8, quad_sum(l[1]));
    bar_sync(SCORE_BARRIER, GROUP_THREADS);
    if (uniform(warp_in_group()) == 0) {
      mbarrier_wait(results_free(), results_phase);
      finish_rows(params, request, piece, m);
      if (piece.kind == BACK) bar_arrive(BACK_BARRIER, BACK_BARRIER_THREADS);
    }
    results_phase ^= 1;
  }
}
