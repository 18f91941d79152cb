// The score role, of warpgroup 0: S^T [64 tokens, 64 query rows] = K Q^T, P^T = 2^(scale S^T - m),
// the running maximum m and the running sum l of each query row, and lse.
//
// A warp has 16 of the tokens, and all query rows: so maxima and sums go across warps. A maximum is
// lazy (row_statistics.cuh): only where one rises do the warps tell one another theirs, and sums
// wait for the end of a piece. In each tile they agree whether one rises.
#pragma once
#if defined(QUERY_E4M3)
#include "sm90_fp8_e4m3_keys.cuh"
#else
#include "sm90_fp8_keys.cuh"
#endif
#include "sm90_fp8_queries.cuh"
#include "sm90_no_tiles.cuh"

// Of P, in the type of the products, two numbers to a register: rounded from floats, the larger ones
// of two pairs, and 2^LAZY.
#if defined(PRODUCTS_IN_FP16)
DEVICE uint32_t product_x2(float low, float high) { return half_x2(low, high); }
DEVICE uint32_t larger_x2(uint32_t x, uint32_t y) { return max_half_x2(x, y); }
constexpr uint32_t LAZY_P = (15 + (int)LAZY) << 10;
#else
DEVICE uint32_t product_x2(float low, float high) { return cvt_x2(low, high); }
DEVICE uint32_t larger_x2(uint32_t x, uint32_t y) { return max_bfloat_x2(x, y); }
constexpr uint32_t LAZY_P = (127 + (int)LAZY) << 7;
#endif

// Makes S^T -inf for tokens that are not to be seen. A live token that a row does not see but whose
// score is not finite makes the row NaN instead (x - x is 0 or NaN). So a bad row of the cache
// reaches every row of its request. `to_border`: tokens of the tile up to the first one that some row
// does not see because of a causal mask.
DEVICE void mask(float (&s)[SCORES], uint32_t bits, int to_border) {
  const int of_warp = lane_index() >> 2, token = warp_in_group() * WARP_TOKENS + of_warp;
#pragma unroll
  for (int c = 0; c < 16; ++c) {
    int seen = 0x7fffffff;  // the first token that the row does not see
    if (to_border < TOKENS) {
      seen = to_border + (int)ld_shared_u32(row_float(POSITIONS, my_column(c)));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& x = s[4 * (c >> 1) + 2 * h + (c & 1)];
      const float y = token + 8 * h >= seen ? NEG_INF + (x - x) : x;
      x = bits >> (of_warp + 8 * h) & 1 ? y : NEG_INF;
    }
  }
}
// What mask() needs of the rows, after the warps have met, as they do when Q is ready. Rows past the
// slab see what the first one sees.
DEVICE void init_positions(const Params& params) {
  const int of_block = thread_in_group();
  if (of_block < ROWS) {
    const RowBlock block = row_block();
    const int row = block.first_row + of_block;
    st_shared_u32(row_float(POSITIONS, of_block),
                  block.slab + (row < params.slab_rows ? row / params.group : 0));
  }
}

// ---- maxima and sums ------------------------------------------------------------------------

// The larger logit of the thread's two tokens, in log2, of its column c.
DEVICE float top_of(const float (&s)[SCORES], const RowStates& states, int c) {
  const float* t = s + 4 * (c >> 1) + (c & 1);
  const float4 state = states.of_pair[c >> 1];
  return fmaxf(t[0], t[2]) * (c & 1 ? state.z : state.x);
}

// Each warp tells the others the largest logits of its tokens, in log2: of this tile, or also of
// those before.
DEVICE void tell_largest(const float (&s)[SCORES], const RowStates& states, uint32_t offset,
                         bool of_this_tile) {
  float top[16];
#pragma unroll
  for (int c = 0; c < 16; ++c) top[c] = top_of(s, states, c);
  const int row = max_of_columns(top);
  const uint32_t to = row_float(offset, warp_in_group() * ROWS + row);
  if (!of_this_tile) {
    const float2 before = ld_shared_v2_f32(to);
    top[0] = fmaxf(top[0], before.x), top[1] = fmaxf(top[1], before.y);
  }
  st_shared_v2(to, __float_as_uint(top[0]), __float_as_uint(top[1]));
}
DEVICE float largest_of_row(int row, uint32_t offset) {
  float x = ld_shared_f32(row_float(offset, row));
#pragma unroll
  for (int warp = 1; warp < GROUP_WARPS; ++warp) {
    x = fmaxf(x, ld_shared_f32(row_float(offset, warp * ROWS + row)));
  }
  return x;
}

// Raises the maxima that scores of this tile exceed by more than LAZY.
DEVICE void raise_maxima(const float (&s)[SCORES], float (&l)[16], RowStates& states,
                         uint32_t stage) {
  states.load();
  tell_largest(s, states, WARP_MAXIMA, true);
  bar_sync(SCORE_BARRIER, GROUP_THREADS);
  const int row = thread_in_group();
  if (row < ROWS) {
    const float top = largest_of_row(row, WARP_MAXIMA);
    float m = ld_shared_f32(row_state(row) + 4), none = 0.f, factor = 1.f;
    if (top > m + LAZY) factor = raise_maximum(m, none, top);
    st_shared_f32(row_state(row) + 4, m);
    st_shared_f32(row_float(factors(stage), row), factor);
  }
  bar_sync(SCORE_BARRIER, GROUP_THREADS);
#pragma unroll
  for (int c = 0; c < 16; c += 2) {
    const float2 factor = ld_shared_v2_f32(row_float(factors(stage), my_column(c)));
    l[c] *= factor.x, l[c + 1] *= factor.y;
  }
  states.load();
}

// P^T of scores, in the stage, and its sums over the thread's tokens. Returns whether a score
// exceeds the maximum of its row by more than LAZY.
DEVICE bool store_p(const float (&s)[SCORES], float (&sums)[16], const RowStates& states,
                    uint32_t stage) {
  const uint32_t to = p_tile(stage) + fragment_offset();
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t p[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int c = 4 * i + 2 * j;
      const float4 state = states.of_pair[c >> 1];
      const float* t = s + 2 * c;
      float y[4];
      y[0] = fmaf(t[0], state.x, -state.y), y[2] = fmaf(t[2], state.x, -state.y);
      y[1] = fmaf(t[1], state.z, -state.w), y[3] = fmaf(t[3], state.z, -state.w);
#pragma unroll
      for (int n = 0; n < 4; ++n) y[n] = ex2(y[n]);
      sums[c] = y[0] + y[2], sums[c + 1] = y[1] + y[3];
      p[2 * j] = product_x2(y[0], y[1]), p[2 * j + 1] = product_x2(y[2], y[3]);
      largest = larger_x2(largest, larger_x2(p[2 * j], p[2 * j + 1]));
    }
    stmatrix_x4(to ^ (i << 5), p[0], p[1], p[2], p[3]);
  }
  return (largest & 0xffff) > LAZY_P || largest >> 16 > LAZY_P;
}

// ---- the role -------------------------------------------------------------------------------

// What a sink adds to l of a row, given its running maximum.
DEVICE float sink_of(const Params& params, const RowBlock& block, int row, float m) {
  const int head = block.first_head + row % params.group;
  return ex2(__ldg(params.attn_sink + head) * LOG2E - m);
}

// The end of a piece: what the value warps need of each row, and lse.
DEVICE void finish(const Params& params, int request, uint32_t result, float (&l_of_tokens)[16],
                   uint32_t results_phase) {
  const int first = sum_of_columns(l_of_tokens);
  st_shared_v2(row_float(WARP_SUMS, warp_in_group() * ROWS + first),
               __float_as_uint(l_of_tokens[0]), __float_as_uint(l_of_tokens[1]));
  mbarrier_wait(results_free(), results_phase);
  const int of_block = thread_in_group();
  float l = 0.f, m = 0.f;
  if (of_block < ROWS) m = ld_shared_f32(row_state(of_block) + 4);
  bar_sync(SCORE_BARRIER, GROUP_THREADS);
  const Kind kind = kind_of(result);
  const RowBlock block = row_block();
  const int row = block.first_row + of_block;
  if (of_block < ROWS) {
#pragma unroll
    for (int warp = 0; warp < GROUP_WARPS; ++warp) {
      l += ld_shared_f32(row_float(WARP_SUMS, warp * ROWS + of_block));
    }
    float sum = l;
    if (params.attn_sink && kind == WHOLE && row < params.slab_rows) {
      sum += sink_of(params, block, row, m);
    }
    const float down = LATENT_DOWN * descale(params.descale_k);
    st_shared_f32(row_float(INVERSE_L, of_block), l == 0.f ? 0.f : rcp(sum) * down);
  }
  if (of_block == 0) st_shared_u32(shared_base() + RESULT, result);
  arrive(results_ready());
  if (of_block >= ROWS || row >= params.slab_rows) return;
  const float largest = params.max_logits ? largest_of_row(of_block, LARGEST_LOGITS) : NEG_INF;
  const float lse = lg2(l) + m;  // log2
  if (kind == WHOLE) {
    store_lse(params, request, block, row, l == 0.f ? POS_INF : lse * LN2);
    if (params.max_logits) store_max_logit(params, request, block, row, largest * LN2);
  } else {
    float* partial = params.row_partial + partial_row(params, slot_of(result), block, row) * 4;
    partial[0] = l == 0.f ? NEG_INF : lse;
    partial[3] = largest;
  }
}

DEVICE void score_role(const Params& params, const TensorMap& q_map_0, const TensorMap& q_map_1) {
  float s[SCORES];
  Place place;
  uint32_t results_phase = 1;
  Queries queries = {q_map_0, q_map_1};
  queries.begin(params);
  if (params.causal) init_positions(params);
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    // Tokens from the border of a causal mask on to the end of the last tile, if there is one.
    int tiles_left, behind_border = 0;
    uint32_t result;
    {
      const Piece piece = piece_of(params, request);
      tiles_left = uniform(tokens_of(piece).tiles);
      if (params.causal) {
        behind_border =
            uniform((piece.begin + tiles_left) * TOKENS - (piece.length - params.s_q + 1));
      }
      result = uniform(result_word(piece.kind, piece.slot));
      if (tiles_left == 0) {
        store_no_tiles(params, request, piece);
        continue;
      }
    }
    queries.take(params, request);
    float l[16] = {};
    bool is_first = true;
    Keys keys;
    uint32_t to_release = 0;
    bool arrived = false;  // the rows of the next tile
#pragma unroll 1
    for (;;) {
      if (!arrived) {
        mbarrier_wait(full(place.stage), place.phase);
        keys.begin(place.stage);
      }
      RowStates states;
      uint32_t bits;
      keys.compute(s, states, bits, place.stage, to_release);
      // What is rare lies together, behind one branch: code that is jumped over costs a fetch, too.
      const int to_border = tiles_left * TOKENS - behind_border;
      const bool masks = bits != ALL_TOKENS || to_border < TOKENS;
      if (RARELY(masks || is_first || params.max_logits)) {
        if (masks) mask(s, bits, to_border);
        states.load();  // once more, so that they need no registers in mask()
        if (params.max_logits) tell_largest(s, states, LARGEST_LOGITS, is_first);
        // P is computed before all warps know whether a maximum rises, which is rare after the first
        // tile: then once more.
        if (is_first) raise_maxima(s, l, states, place.stage);
      }
      float sums[16];
      const bool exceeds = store_p(s, sums, states, place.stage);
      const Place behind = place.next();
      arrive(empty(place.stage));
      arrived = __all_sync(~0u, tiles_left > 1 && is_full(behind));
      if (arrived) keys.begin(behind.stage);
      bool rises = is_first;
      if (!is_first) {
        rises = bar_or(SCORE_BARRIER, GROUP_THREADS, exceeds);
        if (RARELY(rises)) {
          raise_maxima(s, l, states, place.stage);
          store_p(s, sums, states, place.stage);
        }
      }
      is_first = false;
      if (thread_in_group() == 0) st_shared_u32(rescale_flag(place.stage), rises);
#pragma unroll
      for (int c = 0; c < 16; ++c) l[c] += sums[c];
      if (--tiles_left == 0) break;
      to_release = p_ready(place.stage);
      if (!arrived) {  // memory-bound: P V runs while K is on its way
        arrive(to_release);
        to_release = 0;
      }
      place = behind;
    }
    arrive(p_ready(place.stage));  // ahead of all else: P V must not wait
    place.advance();
    queries.ask_ahead(params, request);  // all warps have met since S of the last tile
    finish(params, request, result, l, results_phase);
    results_phase ^= 1;
    __syncwarp();
  }
  queries.wait_for_rows();  // which nobody takes if no request has tiles
}
