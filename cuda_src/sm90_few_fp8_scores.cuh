// The score role, of four warps: S [16, 64] = Q K^T of a slot, P = 2^(scale S - m), the running
// maximum m and the running sum l of each row, and lse.
//
// A warp has all of Q in registers, as fragments, and 16 tokens of a slot, two octets. So S needs
// no sum over warps; only the maximum of a row is exchanged. The order of columns in a product is
// free: a lane loads 16 bytes of its token at once, which are columns of four products (of two, in
// 16 bits), and the fragments of Q are made in the same order.
//
// V32: each group of 128 columns has a sum of its own, which its scale multiplies. Rotary columns
// are multiplied in bfloat16, as they are; those of a float16 Q are two bfloat16, whose sum is
// exact.
// The scales of V multiply P, of which each value warp has a version of its own. So that it fits
// float16, a power of two brings the largest scale so far to at most 2^7; O is in its units, and
// when it moves, O shrinks as for a new maximum.
#pragma once
#include "row_statistics.cuh"
#include "sm90_few_fp8_loader.cuh"
#include "sm90_no_tiles.cuh"

constexpr int P_UP_LOG2 = 7;  // P is at most 2^LAZY, and 2^15 with this
#if defined(FORMAT_V32)
constexpr int LATENT_STEPS = 32;  // of 16 columns, in float16
#if defined(DTYPE_FP16)
constexpr int ROTARY_PARTS = 2;
#else
constexpr int ROTARY_PARTS = 1;
#endif
constexpr int ROTARY_STEPS = 4;  // of bfloat16, each with so many parts of Q
#else
constexpr int LATENT_STEPS = 36, ROTARY_PARTS = 0, ROTARY_STEPS = 0;  // all columns are alike
#endif
constexpr int CHAINS = 4;  // sums of S that do not wait for one another; of V32: its groups

// A thread has, of S and P, two tokens of each octet of the warp, my_token(octet, 0) and
// my_token(octet, 1), in two rows: [0] and [1] of this row, [2] and [3] of the row eight further.
DEVICE int first_row() { return lane_index() >> 2; }
DEVICE int my_token(int octet, int i) { return product_token(octet, 2 * (lane_index() & 3) + i); }
DEVICE uint32_t warp_token_row(uint32_t slot, int token) {
  return token_row(slot, warp_in_group() * WARP_TOKENS + token);
}

// A value of each warp for a row: one lane of a quad writes it, and all warps read all of them.
DEVICE void scatter(uint32_t offset, int row, float x) {
  if ((lane_index() & 3) == 0) {
    st_shared_f32(row_float(offset, row * GROUP_WARPS + warp_in_group()), x);
  }
}
DEVICE float4 gather(uint32_t offset, int row) {
  return ld_shared_v4_f32(row_float(offset, row * GROUP_WARPS));
}
DEVICE uint32_t maxima(uint32_t slot) { return MAXIMA + slot * ROWS * GROUP_WARPS * 4; }

// ---- Q --------------------------------------------------------------------------------------

DEVICE float2 q_pair(uint32_t x) {
#if defined(DTYPE_FP16)
  return from_half_x2(x);
#else
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
#endif
}

// As fragments of A. A row of a bfloat16 Q is scaled by the power of two that brings its largest
// value to [2^13, 2^14), which is exact for all values that matter; `down` takes that back.
struct Queries {
  uint32_t latent[4 * LATENT_STEPS];
  uint32_t rotary[4 * ROTARY_STEPS * ROTARY_PARTS + 1];  // one part behind the other
  float down[2];

  // 16 bytes of each of the thread's rows, of column block `block`: two products.
  DEVICE static void load(uint32_t (&to)[8], int block, uint32_t chunk) {
    const uint32_t row = first_row();
    const uint32_t from = shared_base() + block * Q_BLOCK_BYTES + row * 128 + ((chunk ^ row) << 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Vector4 v = ld_shared_v4(from + h * 8 * 128);
      to[h] = v.x, to[2 + h] = v.y, to[4 + h] = v.z, to[6 + h] = v.w;
    }
  }
  DEVICE void take(uint32_t phase) {
    mbarrier_wait(q_full(), phase);
    const uint32_t c = lane_index() & 3;
#pragma unroll
    for (int i = 0; i < LATENT_STEPS / 2; ++i) {
      uint32_t x[8];
      load(x, i >> 1, 2 * c + (i & 1));
#pragma unroll
      for (int j = 0; j < 8; ++j) latent[8 * i + j] = x[j];
    }
#if defined(FORMAT_V32)
#pragma unroll
    for (int i = 0; i < ROTARY_STEPS / 2; ++i) {
      uint32_t x[8];
      load(x, COLUMN_BLOCKS - 1, 4 * i + c);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#if defined(DTYPE_FP16)
        const float2 v = from_half_x2(x[j]);
        const uint32_t high = bfloat_x2(v.x, v.y);
        rotary[8 * i + j] = high;
        rotary[8 * i + j + 4 * ROTARY_STEPS] = bfloat_x2(
            v.x - __uint_as_float(high << 16), v.y - __uint_as_float(high & 0xffff0000));
#else
        rotary[8 * i + j] = x[j];
#endif
      }
    }
#endif
    arrive(q_empty());
    down[0] = down[1] = 1.f;
#if !defined(DTYPE_FP16)
    float up[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = h; i < 4 * LATENT_STEPS; i += 2) largest = max_abs_x2(largest, latent[i]);
      const float2 pair = q_pair(largest);
      const uint32_t bits = __float_as_uint(quad_max(fmaxf(pair.x, pair.y)));
      const int exponent = max(17, (int)(bits >> 23));
      up[h] = __int_as_float((267 - exponent) << 23);
      down[h] = __int_as_float((exponent - 13) << 23);
    }
#pragma unroll
    for (int i = 0; i < 4 * LATENT_STEPS; ++i) {
      const float2 v = q_pair(latent[i]);
      latent[i] = half_x2(v.x * up[i & 1], v.y * up[i & 1]);
    }
#endif
  }
};

// ---- S --------------------------------------------------------------------------------------

// Four columns of a lane's token to a fragment of B.
DEVICE void add_latent(float (&s)[4], const uint32_t* q, uint32_t k) {
  mma_f16_m16n8k16(s, q, half_x2_from_e4m3(k), half_x2_from_e4m3_high(k));
}
DEVICE void add_latents(float (&s)[4], const uint32_t* q, const Vector4& k, int step) {
  add_latent(s, q + 4 * step, step == 0 ? k.x : step == 1 ? k.y : step == 2 ? k.z : k.w);
}

#if defined(FORMAT_V32)
// The scales of the thread's two tokens of an octet.
struct Scales {
  float4 of[2];
  DEVICE void load(uint32_t slot, int octet) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      of[i] = ld_shared_v4_f32(warp_token_row(slot, my_token(octet, i)) + SCALES);
    }
  }
  DEVICE float at(int i, int group) const {
    const float4& v = of[i];
    return group == 0 ? v.x : group == 1 ? v.y : group == 2 ? v.z : v.w;
  }
};
#else
struct Scales {
  DEVICE void load(uint32_t, int) {}
};
#endif

// S of an octet.
DEVICE void scores(float (&s)[4], const Queries& q, uint32_t slot, int octet) {
  const uint32_t lane = lane_index();
  Scales scales;
  scales.load(slot, octet);
  const uint32_t from =
      warp_token_row(slot, product_token(octet, lane >> 2)) + (lane & 3) * 16;
  float chains[CHAINS][4] = {}, rotary[4] = {};
  // Column blocks of 64, four at a time: those of V32 are of four groups.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector4 k[CHAINS];
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) k[i] = ld_shared_v4(from + (2 * i + half) * 64);
#if defined(FORMAT_V32)
    const Vector4 r = ld_shared_v4(from + ROTARY + half * 64);
#else
    const Vector4 last = ld_shared_v4(from + 512);
#endif
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < CHAINS; ++i) {
        add_latents(chains[i], q.latent + 16 * (2 * i + half), k[i], step);
      }
#if defined(FORMAT_V32)
      if (step % 2 == 0) {
#pragma unroll
        for (int part = 0; part < ROTARY_PARTS; ++part) {
          mma_bf16_m16n8k16(rotary, q.rotary + 16 * part + 4 * (2 * half + step / 2),
                            step ? r.z : r.x, step ? r.w : r.y);
        }
      }
#else
      if (step / 2 == half) add_latents(rotary, q.latent + 128, last, step);
#endif
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if defined(FORMAT_V32)
    float sum = chains[0][i] * scales.at(i & 1, 0);
#pragma unroll
    for (int group = 1; group < GROUPS; ++group) {
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

// The exponents of the largest scale of each group so far, as floats have them.
struct Exponents {
  static constexpr int LEAST = P_UP_LOG2, LARGEST = 252;  // so that up() and down() are floats
  int of[GROUPS];
  DEVICE Exponents() {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) of[group] = LEAST;
  }
  DEVICE float limit(int group) const { return __int_as_float((of[group] + 1) << 23); }
  // Looks at a slot. Returns whether one moved, and in `factor` what that does to O of this lane's
  // group, lane % 4.
  DEVICE bool raise(uint32_t slot, float& factor) {
    factor = 1.f;
#if defined(FORMAT_V32)
    bool moves = false;
#pragma unroll
    for (int half = 0; half < SLOT_TOKENS / 32; ++half) {
      const int token = half * 32 + lane_index();
      const uint32_t bits =
          ld_shared_u32(token_bits(slot, token / WARP_TOKENS)) >> token % WARP_TOKENS;
      const float4 v = ld_shared_v4_f32(token_row(slot, token) + SCALES);
      const float scales[4] = {fabsf(v.x), fabsf(v.y), fabsf(v.z), fabsf(v.w)};
      bool is_larger = false;
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) is_larger |= scales[group] >= limit(group);
      const bool counts = (bits & 0x10001) == 1;
      if (!__any_sync(~0u, is_larger && counts)) continue;
      moves = true;  // rare after the first tokens
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const int mine = counts ? __float_as_uint(scales[group]) >> 23 : 0;
        const int largest = min(LARGEST, max(of[group], __reduce_max_sync(~0u, mine)));
        const float by = __int_as_float(max(0, 127 - (largest - of[group])) << 23);
        if ((lane_index() & 3) == group) factor *= by;
        of[group] = largest;
      }
    }
    return moves;
#else
    return false;
#endif
  }
  // What brings a scale to at most 2^P_UP_LOG2, and what O is then to be multiplied by.
  DEVICE float up(int group) const {
    return GROUPS > 1 ? __int_as_float((253 + P_UP_LOG2 - of[group]) << 23) : 1 << P_UP_LOG2;
  }
  DEVICE float down(int group) const {
    return __int_as_float(((GROUPS > 1 ? of[group] + 1 : 127) - P_UP_LOG2) << 23);
  }
};

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
  Scales scales[OCTETS];
#pragma unroll
  for (int octet = 0; octet < OCTETS; ++octet) scales[octet].load(slot, octet);
  float group_factor;
  const bool moves = rows.exponents.raise(slot, group_factor);
  arrive(empty(slot));  // S is made of it
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
    const int group = lane_index() & 3;
    if (writes && group < GROUPS) {
      st_shared_f32(factors(slot, group, row), factor0 * group_factor);
      st_shared_f32(factors(slot, group, row + 8), factor1 * group_factor);
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
  for (int group = 0; group < GROUPS; ++group) {
    const float up = rows.exponents.up(group);
    uint32_t fragments[OCTETS][2];
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      const float (&p)[4] = s[octet];
      float x = up, y = up;
#if defined(FORMAT_V32)
      // A token that does not count has anything as its scale.
      x = bits >> my_token(octet, 0) & 1 ? up * scales[octet].at(0, group) : 0.f;
      y = bits >> my_token(octet, 1) & 1 ? up * scales[octet].at(1, group) : 0.f;
#endif
      fragments[octet][0] = half_x2(p[0] * x, p[1] * y);
      fragments[octet][1] = half_x2(p[2] * x, p[3] * y);
    }
    // [warp][lane]
    st_shared_v4(p_tile(slot, group) + thread_in_group() * 16,
                 {fragments[0][0], fragments[0][1], fragments[1][0], fragments[1][1]});
  }
  arrive(p_ready(slot));
}

// ---- results --------------------------------------------------------------------------------

DEVICE float descale(const float* factor) { return factor ? __ldg(factor) : 1.f; }

// The end of a piece, by warp 0: what the value warps need of its rows, and lse.
DEVICE void finish_rows(const Params& params, int request, const Piece& piece, const Rows& rows) {
  const RowBlock block = row_block();
  const int group = lane_index() & 3;
  float down = rows.exponents.down(0);
#pragma unroll
  for (int i = 1; i < GROUPS; ++i) down = group == i ? rows.exponents.down(i) : down;
  down *= descale(params.descale_k);
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
    if (group < GROUPS) st_shared_f32(inverse_l(group, in_block), l == 0.f ? 0.f : rcp(sum) * down);
    if (group != 0 || row >= params.slab_rows) continue;
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
    const int slots = uniform(tokens.slots);
    if (slots == 0) {
      store_no_tiles(params, request, piece);
      continue;
    }
    q.take(q_phase);
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
