// The value role, of warpgroups 1 and 2: O^T [512 columns, 64 query rows] += V^T P^T, for one half
// of the columns, and where O goes in the end. A warp has 64 columns, a block, whose scale in a row
// is one; O takes 128 registers of a thread.
#pragma once
#include "sm90_fp8_convert.cuh"
#include "sm90_fp8_results.cuh"

// V^T is taken 16 tokens at a time, a step, in units of 16 of the warp's 64 columns: one product each.
// As many units as IN_USE have registers: one is converted while the products take the others.
constexpr int STEPS_OF_TILE = TOKENS / 16, UNITS_OF_STEP = 4, IN_USE = 3;
constexpr int STEP_BYTES = 16 * STAGED_ROW, P_STEP = 16 * ROWS * 2 >> 4;  // of a descriptor
// Loads of V that are on their way together. Over V32 a second one takes more registers than there are:
// ptxas would make every wgmma wait for the one before.
#if defined(FORMAT_V32)
constexpr int LOADS_AT_ONCE = 1;
#else
constexpr int LOADS_AT_ONCE = 2;
#endif
constexpr int FEW_TILES = 4;  // of a piece: then code that was never executed counts

// What a lane reads of V, of a step.
struct ValueRows {
  uint32_t latent;  // its row for ldmatrix
  uint32_t row;     // the first of the tokens that it has fragments of
  int block;
  DEVICE ValueRows(uint32_t stage, int of_warp) {
    const uint32_t lane = lane_index(), rows = staged_rows(stage);
    block = of_warp;
    latent = rows + (lane & 15) * STAGED_ROW + block * 64 + (lane >> 4) * 16;
    row = rows + (lane & 3) * 2 * STAGED_ROW;
  }
  DEVICE void advance(int steps) { latent += steps * STEP_BYTES, row += steps * STEP_BYTES; }
  DEVICE bool is_rotary() const { return ROTARY_IN_V && block == LATENT_BLOCKS; }
  // A load has two units, or one of rotary columns. Both are counted from the step on where the rows
  // are.
  DEVICE void load(uint32_t (&x)[4], int n) const {
    if (is_rotary()) {
      load_rotary(x, n);
    } else {
      load_latent(x, n);
    }
  }
  DEVICE void load_latent(uint32_t (&x)[4], int n) const {
    ldmatrix_x4_trans(latent + n / 2 * STEP_BYTES + n % 2 * 32, x[0], x[1], x[2], x[3]);
  }
  // Columns 2 g and 2 g + 1 of four tokens.
  DEVICE void load_rotary(uint32_t (&x)[4], int n) const {
    const uint32_t from = row + n / UNITS_OF_STEP * STEP_BYTES + ROTARY + n % UNITS_OF_STEP * 32 +
                          (lane_index() >> 2) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[j] = ld_shared_u32(from + ((j >> 1) * 8 + (j & 1)) * STAGED_ROW);
    }
  }
  // Of the tokens in fragments' first columns and of those eight further.
  DEVICE void load_factors(Factors (&factors)[2], int unit) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t token = row + unit / UNITS_OF_STEP * STEP_BYTES + i * 8 * STAGED_ROW;
      factors[i] = factors_of(scale_at(token, block), scale_at(token + STAGED_ROW, block));
    }
  }
};
struct ValueFragments {
  uint32_t a[4];
  // Of columns 2 g and 2 g + 1 of two tokens each.
  DEVICE void convert(const uint32_t* x, const Factors (&factors)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t by_column = permute_bytes(x[j], 0, 0x3120);
      a[2 * j] = product_of(half_x2_from_e4m3(by_column), factors[j]);
      a[2 * j + 1] = product_of(half_x2_from_e4m3_high(by_column), factors[j]);
    }
  }
  DEVICE void convert_rotary(const uint32_t (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      a[2 * j] = product_from_bf16(permute_bytes(x[2 * j], x[2 * j + 1], 0x5410));
      a[2 * j + 1] = product_from_bf16(permute_bytes(x[2 * j], x[2 * j + 1], 0x7632));
    }
  }
};

// O^T += V^T P^T of a tile. V may be there ahead of P. A pass of the loop takes so many steps: all at
// once are faster, and one by one is code that is fetched sooner.
template <int STEPS_AT_ONCE, class WaitForP>
DEVICE void accumulate(float (&o)[128], uint32_t stage, int block, WaitForP wait_for_p) {
  constexpr bool AT_ONCE = STEPS_AT_ONCE == STEPS_OF_TILE;
  constexpr int UNITS_AT_ONCE = STEPS_AT_ONCE * UNITS_OF_STEP, LOADS = AT_ONCE ? LOADS_AT_ONCE : 1;
  ValueRows rows(stage, block);
  uint64_t p = descriptor_mn_major(p_tile(stage));
  ValueFragments v[IN_USE];
  uint32_t loaded[LOADS][4];
  Factors factors[2] = {};
  auto begin = [&] {
#pragma unroll
    for (int n = 0; n < LOADS; ++n) rows.load(loaded[n], n);
  };
  begin();
  if (!AT_ONCE) wait_for_p();
  pin(o);
#pragma unroll 1
  for (int steps_left = STEPS_OF_TILE; steps_left > 0; steps_left -= STEPS_AT_ONCE) {
#pragma unroll
    for (int i = 0; i < UNITS_AT_ONCE; ++i) {
      ValueFragments& now = v[i % IN_USE];
      if (HAS_SCALES && i % UNITS_OF_STEP == 0 && !rows.is_rotary()) rows.load_factors(factors, i);
      if (i >= IN_USE) wgmma_wait_group<IN_USE - 1>();
      if (rows.is_rotary()) {
        uint32_t (&x)[4] = loaded[i % LOADS];
        now.convert_rotary(x);
        if (i + LOADS < UNITS_AT_ONCE) rows.load_rotary(x, i + LOADS);
      } else {
        uint32_t (&x)[4] = loaded[i / 2 % LOADS];
        now.convert(x + i % 2 * 2, factors);
        if (i % 2 == 1 && i / 2 + LOADS < UNITS_AT_ONCE / 2) rows.load_latent(x, i / 2 + LOADS);
      }
      if (i + 1 == UNITS_AT_ONCE) {
        rows.advance(STEPS_AT_ONCE);
        if (steps_left > STEPS_AT_ONCE) begin();
      }
      if (AT_ONCE && i == 0) wait_for_p();
      wgmma_fence();
      wgmma_m64n64k16_rs_mn(o + i % UNITS_OF_STEP * 32, now.a, p + i / UNITS_OF_STEP * P_STEP);
      wgmma_commit_group();
    }
    p += STEPS_AT_ONCE * P_STEP;
    wgmma_wait_group<0>();
    pin(o);
  }
}

// Multiplies what is summed so far by the factors of a tile.
DEVICE void shrink(float (&o)[128], uint32_t stage) {
#pragma unroll
  for (int c = 0; c < 16; c += 2) {
    const float2 factor = ld_shared_v2_f32(row_float(factors(stage), my_column(c)));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* t = o + 32 * j + 2 * c;
      t[0] *= factor.x, t[1] *= factor.y, t[2] *= factor.x, t[3] *= factor.y;
    }
  }
}

// O^T of a piece.
template <int STEPS_AT_ONCE>
DEVICE void accumulate_tiles(float (&o)[128], Place& place, int tiles, int block) {
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    mbarrier_wait(full(place.stage), place.phase);
    accumulate<STEPS_AT_ONCE>(o, place.stage, block, [&] {
      mbarrier_wait(p_ready(place.stage), place.phase);
      fence_proxy_async_of_others();  // of the score warps, who have other things to do
      if (RARELY(i > 0 && uniform(ld_shared_u32(rescale_flag(place.stage))))) {
        shrink(o, place.stage);
      }
    });
    arrive(empty(place.stage));
    place.advance();
  }
}

// Stores the results of a piece, of so many rows of the slab.
DEVICE void store_results(float (&o)[128], int half, int block, const Params& params, int request,
                          uint32_t result, int rows_of_slab) {
  const Kind kind = kind_of(result);
  const int slot = slot_of(result);
  if (kind == WHOLE) {
    store_out(o, block, params, request, rows_of_slab);
  } else if (kind == SPLIT && params.slab_rows > FEW_ROWS) {
    store_halves(o, half, block, params, slot, rows_of_slab);
  } else {  // also the pieces of a pair, which combine merges
    store_floats(o, block, params, slot, rows_of_slab);
  }
}

DEVICE void value_role(const Params& params, int half) {
  float o[128];
  Place place;
  uint32_t results_phase = 0;
  const int block = uniform(half * 4 + warp_in_group());
  const int first = uniform(part_of(params).first_request);
  const int last = uniform(part_of(params).last_request);
#pragma unroll 1
  for (int request = first; request <= last; ++request) {
    const Piece piece = piece_of(params, request);
    const int tiles = uniform(tokens_of(piece).tiles);
    if (tiles == 0) continue;  // the score warps store the results of no keys
    // Ahead of a short piece that is all there is to do, while its rows are on their way, one warp of
    // each half walks through the code that stores results, without a row to store, if code is not in
    // the caches: to fetch it takes longer than to execute it then.
    bool walks = WALKS && first == last && tiles <= FEW_TILES;
    uint32_t result = WALKS ? uniform(result_word(piece.kind, 0)) : 0;
#pragma unroll 1
    for (;;) {
      const uint32_t begin = WALKS ? clock_now() : 0;
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i] = 0.f;
      bool is_cold = false;
      if (WALKS) {
        pin(o);
        is_cold = uniform(clock_now() - begin) > COLD_CLOCKS;  // the code above
      }
      if (!walks) {
        if (tiles > FEW_TILES) {
          accumulate_tiles<STEPS_OF_TILE>(o, place, tiles, block);
        } else {
          accumulate_tiles<1>(o, place, tiles, block);
        }
        mbarrier_wait(results_ready(), results_phase);
        results_phase ^= 1;
        result = uniform(ld_shared_u32(shared_base() + RESULT));
      }
      if (!walks || (is_cold && block % GROUP_WARPS == 0)) {
        store_results(o, half, block, params, request, result, walks ? 0 : params.slab_rows);
      }
      if (!walks) break;
      bar_sync(VALUE_BARRIERS + half, GROUP_THREADS);  // what a walk reads is written later
      walks = false;
    }
    arrive(results_free());
  }
}
