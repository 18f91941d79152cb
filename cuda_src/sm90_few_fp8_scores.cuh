// The score role, of four warps: S [16, 64] = Q K^T of a slot, P = 2^(scale S - m), the running
// maximum m and the running sum l of each row, and lse.
//
// A warp has all of Q in registers, as fragments, and 16 tokens of a slot, two octets. So S needs
// no sum over warps; only the maximum of a row is exchanged. The order of columns in a product is
// free: a lane loads 16 bytes of its token at once, which are columns of four products (of two, in
// 16 bits), and the fragments of Q are made in the same order.
#pragma once
#include "sm90_few_fp8_scales.cuh"
#include "sm90_no_tiles.cuh"
#include "sm90_row_exchange.cuh"

// Sums of S that do not wait for one another, four at a time: of V32 and V4, of their groups.
constexpr int CHAINS = COLUMN_BLOCKS == 8 ? 7 : 4;
// Column blocks of 64 are multiplied in two turns: the chain of number i, and its block.
DEVICE int chain_of(int turn, int i) { return CHAINS == 7 ? 4 * turn + i : i; }
DEVICE int block_of(int turn, int i) { return CHAINS == 7 ? 4 * turn + i : 2 * i + turn; }

DEVICE uint32_t maxima(uint32_t slot) { return MAXIMA + slot * ROWS * GROUP_WARPS * 4; }

// ---- S --------------------------------------------------------------------------------------

// Four columns of a lane's token to a fragment of B.
DEVICE void add_latent(float (&s)[4], const uint32_t* q, uint32_t k) {
  mma_f16_m16n8k16(s, q, half_x2_from_e4m3(k), half_x2_from_e4m3_high(k));
}
DEVICE void add_latents(float (&s)[4], const uint32_t* q, const Vector4& k, int step) {
  add_latent(s, q + 4 * step, step == 0 ? k.x : step == 1 ? k.y : step == 2 ? k.z : k.w);
}

// S of an octet.
DEVICE void scores(float (&s)[4], const Queries& q, uint32_t slot, int octet) {
  const uint32_t lane = lane_index();
  Scales scales;
  scales.load(slot, octet);
  const uint32_t from =
      warp_token_row(slot, product_token(octet, lane >> 2)) + (lane & 3) * 16;
  float chains[CHAINS][4] = {}, rotary[4] = {};
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    const int blocks = CHAINS == 7 && turn ? 3 : 4;
    Vector4 k[4];
#pragma unroll
    for (int i = 0; i < blocks; ++i) k[i] = ld_shared_v4(from + block_of(turn, i) * 64);
#if defined(ROTARY_IN_BF16)
    const Vector4 r = ld_shared_v4(from + ROTARY + turn * 64);
#else
    const Vector4 last = ld_shared_v4(from + 512);
#endif
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
        add_latents(chains[chain_of(turn, i)], q.latent + 16 * block_of(turn, i), k[i], step);
      }
#if defined(ROTARY_IN_BF16)
      if (step % 2 == 0) {
#pragma unroll
        for (int part = 0; part < ROTARY_PARTS; ++part) {
          mma_bf16_m16n8k16(rotary, q.rotary + 16 * part + 4 * (2 * turn + step / 2),
                            step ? r.z : r.x, step ? r.w : r.y);
        }
      }
#else
      if (step / 2 == turn) add_latents(rotary, q.latent + 128, last, step);
#endif
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if defined(ROTARY_IN_BF16)
    float sum = chains[0][i] * scales.at(i & 1, 0);
#pragma unroll
    for (int group = 1; group < CHAINS; ++group) {
      sum = fmaf(chains[group][i], scales.at(i & 1, group), sum);
    }
    s[i] = fmaf(sum, q.down[i >> 1], rotary[i]);
#else
    s[i] = ((chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]) + rotary[i]) *
           q.down[i >> 1];
#endif
  }
}

// Makes S NaN for bad tokens, and -inf for those that are not to be seen. `bits` has both, of the
// warp's tokens; `border`: from this token of the warp on, some row does not see all (causal). A
// token that a row does not see but whose score is not finite makes the row NaN instead (x - x is 0
// or NaN). So a bad row of the cache reaches every row of its request.
DEVICE void mask(float (&s)[OCTETS][4], const Params& params, uint32_t bits, int border) {
  int seen[2] = {WARP_TOKENS, WARP_TOKENS};
  if (border < WARP_TOKENS) {
    const RowBlock block = row_block();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = block.first_row + first_row() + 8 * h;
      if (row < params.slab_rows) seen[h] = border + block.slab + row / params.group;
    }
  }
#pragma unroll
  for (int octet = 0; octet < OCTETS; ++octet) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = my_token(octet, i & 1);
      float x = bits >> (16 + token) & 1 ? QUIET_NAN : s[octet][i];
      if (token >= seen[i >> 1]) x = NEG_INF + (x - x);
      s[octet][i] = bits >> token & 1 ? x : NEG_INF;
    }
  }
}

// ---- softmax --------------------------------------------------------------------------------

struct Rows {
  float m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};  // l: of this thread's columns only
  float largest[2] = {NEG_INF, NEG_INF};  // logits; m may be less by LAZY
  Exponents exponents;
};

// Tells the other warps of the maxima of S.
DEVICE void show_maxima(const float (&s)[OCTETS][4], uint32_t slot) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
    for (int octet = 1; octet < OCTETS; ++octet) {
      largest = fmaxf(largest, fmaxf(s[octet][2 * h], s[octet][2 * h + 1]));
    }
    scatter(maxima(slot), first_row() + 8 * h, quad_max(largest));
  }
  arrive(maxima_ready(slot));
}

// S -> P, as fragments of A for P V. Leaves the factors that O has to shrink by.
DEVICE void softmax_step(float (&s)[OCTETS][4], Rows& rows, uint32_t bits, Place place,
                         float scale_log2) {
  const int row = first_row();
  const uint32_t slot = place.slot;
#if defined(FORMAT_V32)
  Scales scales[OCTETS];
#pragma unroll
  for (int octet = 0; octet < OCTETS; ++octet) scales[octet].load(slot, octet);
#endif
  Factors group_factors;
#pragma unroll
  for (int i = 0; i < LANE_GROUPS; ++i) group_factors[i] = 1.f;
  const bool moves = rows.exponents.raise(slot, group_factors);
  rows.exponents.store(slot);
  if (GROUPS > 1) arrive(empty(slot));
  mbarrier_wait(maxima_ready(slot), place.phase);
  float top[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 all = gather(maxima(slot), row + 8 * h);
    top[h] = fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)) * scale_log2;
    rows.largest[h] = fmaxf(rows.largest[h], top[h]);
  }
  // From here on all warps do the same with m.
  float (&m)[2] = rows.m, (&l)[2] = rows.l;
  const bool raise0 = top[0] > m[0] + LAZY, raise1 = top[1] > m[1] + LAZY;
  const bool any = __any_sync(~0u, raise0 || raise1 || moves);
  const bool writes = uniform(warp_in_group()) == 0;
  if (any) {  // rare after the first tokens
    const float factor0 = raise0 ? raise_maximum(m[0], l[0], top[0]) : 1.f;
    const float factor1 = raise1 ? raise_maximum(m[1], l[1], top[1]) : 1.f;
#pragma unroll
    for (int i = 0; i < LANE_GROUPS; ++i) {
      const int group = (lane_index() & 3) + 4 * i;
      if (!writes || group >= GROUPS) continue;
      st_shared_f32(factors(slot, group, row), factor0 * group_factors[i]);
      st_shared_f32(factors(slot, group, row + 8), factor1 * group_factors[i]);
    }
  }
  if (writes && lane_index() == 0) st_shared_u32(rescale_flag(slot), any);

  const float minus_m0 = m[0] == NEG_INF ? 0.f : -m[0], minus_m1 = m[1] == NEG_INF ? 0.f : -m[1];
#pragma unroll
  for (int octet = 0; octet < OCTETS; ++octet) {
    float (&p)[4] = s[octet];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = ex2(fmaf(p[i], scale_log2, i & 2 ? minus_m1 : minus_m0));
    l[0] += p[0] + p[1], l[1] += p[2] + p[3];
  }
#pragma unroll
  for (int version = 0; version < P_VERSIONS; ++version) {
    const float up = rows.exponents.up(version);
    uint32_t fragments[OCTETS][2];
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      const float (&p)[4] = s[octet];
      float x = up, y = up;
#if defined(FORMAT_V32)
      // A token that does not count has anything as its scale.
      x = bits >> my_token(octet, 0) & 1 ? up * scales[octet].at(0, version) : 0.f;
      y = bits >> my_token(octet, 1) & 1 ? up * scales[octet].at(1, version) : 0.f;
#endif
      fragments[octet][0] = half_x2(p[0] * x, p[1] * y);
      fragments[octet][1] = half_x2(p[2] * x, p[3] * y);
    }
    // [warp][lane]
    st_shared_v4(p_tile(slot, version) + thread_in_group() * 16,
                 {fragments[0][0], fragments[0][1], fragments[1][0], fragments[1][1]});
  }
  arrive(p_ready(slot));
}

// ---- results --------------------------------------------------------------------------------

// The end of a piece, by warp 0: what the value warps need of its rows, and lse.
DEVICE void finish_rows(const Params& params, int request, const Piece& piece, const Rows& rows) {
  const RowBlock block = row_block();
  const int quad_lane = lane_index() & 3;
  Factors down;  // of this lane's groups
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    if (group % 4 == 0 || group % 4 == quad_lane) down[group / 4] = rows.exponents.down(group);
  }
  if (lane_index() == 0) {
    st_shared_u32(shared_base() + RESULT, result_word(piece.kind, piece.slot));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int in_block = first_row() + 8 * h, row = block.first_row + in_block;
    const float4 sums = gather(SUMS, in_block);
    const float l = (sums.x + sums.y) + (sums.z + sums.w);
    float sum = l;
    if (params.attn_sink && piece.kind == WHOLE && row < params.slab_rows) {
      const int head = block.first_head + row % params.group;
      sum += ex2(__ldg(params.attn_sink + head) * LOG2E - rows.m[h]);
    }
#pragma unroll
    for (int i = 0; i < LANE_GROUPS; ++i) {
      const int group = quad_lane + 4 * i;
      const float inverse = rcp(sum) * descale(params.descale_k) * down[i];
      if (group < GROUPS) st_shared_f32(inverse_l(group, in_block), l == 0.f ? 0.f : inverse);
    }
    if (quad_lane != 0 || row >= params.slab_rows) continue;
    const float lse = lg2(l) + rows.m[h];  // log2
    if (piece.kind == WHOLE) {
      store_lse(params, request, block, row, l == 0.f ? POS_INF : lse * LN2);
      if (params.max_logits) store_max_logit(params, request, block, row, rows.largest[h] * LN2);
    } else {
      float* partial = params.row_partial + partial_row(params, piece.slot, block, row) * 4;
      partial[0] = l == 0.f ? NEG_INF : lse;
      partial[3] = rows.largest[h];
    }
  }
  arrive(results_ready());
}

DEVICE void score_role(const Params& params) {
  Queries q;
  Place place;
  uint32_t q_phase = 0, results_phase = 1;
  const float scale_log2 =
      params.scale_log2 * descale(params.descale_q) * descale(params.descale_k);
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    const Piece piece = piece_of(params, request);
    const Tokens tokens = tokens_of(piece);
    const int slots = uniform(tokens.tiles);
    if (slots == 0) {
      store_no_tiles(params, request, piece);
      continue;
    }
    q.take(params, request, q_phase);
    q_phase ^= 1;
    // From this token of the warp on, counted from that of the slot, some row does not see all.
    int border = params.causal ? piece.length - params.s_q + 1 - tokens.begin -
                                     (int)warp_in_group() * WARP_TOKENS
                               : 0x7fffffff;
    Rows rows;
    // S of a slot is made before P of the one ahead, so that no warp waits for the others' maxima.
    float s[OCTETS][4];
    uint32_t bits = 0;
    Place before;
#pragma unroll 1
    for (int i = 0; i <= slots; ++i) {
      float next[OCTETS][4] = {};
      uint32_t next_bits = 0;
      if (i < slots) {
        mbarrier_wait(full(place.slot), place.phase);
        next_bits = ld_shared_u32(token_bits(place.slot, warp_in_group()));
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) scores(next[octet], q, place.slot, octet);
        if (GROUPS == 1) arrive(empty(place.slot));  // scales are looked at again
        if (uniform(next_bits != ALL_SEEN || border < WARP_TOKENS)) {
          mask(next, params, next_bits, border);
        }
        show_maxima(next, place.slot);
      }
      if (i > 0) softmax_step(s, rows, bits, before, scale_log2);
#pragma unroll
      for (int j = 0; j < 4 * OCTETS; ++j) s[j / 4][j % 4] = next[j / 4][j % 4];
      bits = next_bits, before = place;
      if (params.causal) border -= SLOT_TOKENS;
      if (i < slots) place.advance();
    }
    scatter(SUMS, first_row(), quad_sum(rows.l[0]));
    scatter(SUMS, first_row() + 8, quad_sum(rows.l[1]));
    bar_sync(SCORE_BARRIER, GROUP_THREADS);
    if (uniform(warp_in_group()) == 0) {
      mbarrier_wait(results_free(), results_phase);
      finish_rows(params, request, piece, rows);
    }
    results_phase ^= 1;
  }
}
