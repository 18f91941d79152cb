// The value role, of four warps: O [16, 512] += P V, 128 columns each, and where O goes in the end.
//
// A lane loads 16 bytes of a token at once: 16 columns, of as many tiles of O. Bytes of two tokens
// are paired, and converted to a fragment of B.
#pragma once
#include "merge.cuh"
#include "sm90_few_fp8_loader.cuh"

constexpr int V_COLUMNS = 128, V_TILES = V_COLUMNS / 8;  // of a warp
constexpr int V_STEPS = GROUP_WARPS;                     // of the tokens of a score warp
// [n]: columns 32 c + n and, in [1] and [3], 32 c + 16 + n, where c is lane % 4; in rows lane / 4,
// [0] and [1], and eight further.
using Accumulators = float[V_TILES][4];

// Zeroes the warp's columns of tokens that do not count: what lies there may be NaN, and 0 * NaN is
// NaN.
DEVICE void clear_rows(uint32_t slot) {
  const Vector4 bits = ld_shared_v4(token_bits(slot, 0));
  const uint32_t of[4] = {bits.x, bits.y, bits.z, bits.w}, lane = lane_index();
  if (uniform((bits.x & bits.y & bits.z & bits.w & ALL_SEEN) == ALL_SEEN)) return;
#pragma unroll 1
  for (int token = lane >> 3; token < SLOT_TOKENS; token += 4) {
    const int warp = token / WARP_TOKENS;
    const uint32_t mine = warp == 0 ? of[0] : warp == 1 ? of[1] : warp == 2 ? of[2] : of[3];
    if (mine >> token % WARP_TOKENS & 1) continue;
    st_shared_v4(token_row(slot, token) + warp_in_group() * V_COLUMNS + (lane & 7) * 16,
                 {0, 0, 0, 0});
  }
  fence_proxy_async();  // the next rows are copied there
  __syncwarp();
}

// Four columns of two tokens, to four pairs of float16.
DEVICE void convert(uint32_t first, uint32_t second, uint32_t (&pairs)[4]) {
  const uint32_t low = __byte_perm(first, second, 0x5140);
  const uint32_t high = __byte_perm(first, second, 0x7362);
  pairs[0] = half_x2_from_e4m3(low), pairs[1] = half_x2_from_e4m3_high(low);
  pairs[2] = half_x2_from_e4m3(high), pairs[3] = half_x2_from_e4m3_high(high);
}

// V of the tokens of a score warp and of this warp's columns, as fragments of B.
struct Values {
  uint32_t x[V_TILES][OCTETS];
  DEVICE void load(uint32_t slot, int step) {
    const uint32_t lane = lane_index();
    const uint32_t from = token_row(slot, step * WARP_TOKENS) + warp_in_group() * V_COLUMNS +
                          (lane >> 2) * 16;
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      const int n = 2 * (lane & 3);
      const Vector4 first = ld_shared_v4(from + product_token(octet, n) * ROW_BYTES);
      const Vector4 second = ld_shared_v4(from + product_token(octet, n + 1) * ROW_BYTES);
      const uint32_t a[4] = {first.x, first.y, first.z, first.w};
      const uint32_t b[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t pairs[4];
        convert(a[i], b[i], pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * i + j][octet] = pairs[j];
      }
    }
  }
};

DEVICE void rescale(Accumulators& o, uint32_t slot, int group) {
  if (!uniform(ld_shared_u32(rescale_flag(slot)))) return;
  const uint32_t from = factors(slot, group, lane_index() >> 2);
  const float a = ld_shared_f32(from), b = ld_shared_f32(from + 8 * 4);
#pragma unroll
  for (int n = 0; n < V_TILES; ++n) {
    o[n][0] *= a, o[n][1] *= a;
    o[n][2] *= b, o[n][3] *= b;
  }
}

DEVICE void add_values(Accumulators& o, const Values& v, uint32_t slot, int group, int step) {
  const Vector4 p = ld_shared_v4(p_tile(slot, group) + (step * 32 + lane_index()) * 16);
  const uint32_t a[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int n = 0; n < V_TILES; ++n) mma_f16_m16n8k16(o[n], a, v.x[n][0], v.x[n][1]);
}

DEVICE void store_rows(const Accumulators& o, const Params& params, int request, int group) {
  const RowBlock block = row_block();
  const int first_column = warp_in_group() * V_COLUMNS + (lane_index() & 3) * 32;
  const uint32_t result = uniform(ld_shared_u32(shared_base() + RESULT));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int in_block = (lane_index() >> 2) + 8 * h, row = block.first_row + in_block;
    if (row >= params.slab_rows) continue;
    const float x = ld_shared_f32(inverse_l(group, in_block));
    if (kind_of(result) == WHOLE) {
      uint16_t* to = params.out + out_row(params, request, block, row) * 512 + first_column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(*t)[4] = o + (i & 1) * 8;
        const int k = 2 * h + (i >> 1);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = cvt_x2(t[2 * j][k] * x, t[2 * j + 1][k] * x);
        st_global_v4(to + i * 8, {pairs[0], pairs[1], pairs[2], pairs[3]});
      }
    } else {  // as floats, in the order of column_of_float() (merge.cuh)
      float* to = params.out_partial + partial_row(params, slot_of(result), block, row) * 512 +
                  first_column;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float(*t)[4] = o + (i & 3) * 2;
        const int k = 2 * h + (i >> 2);
        st_global_v4_f32(to + i * 4, t[0][k] * x, t[1][k] * x, t[8][k] * x, t[9][k] * x);
      }
    }
  }
}

DEVICE void value_role(const Params& params) {
  Place place;
  uint32_t results_phase = 0;
  const int group = GROUPS > 1 ? uniform(warp_in_group()) : 0;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    const int slots = uniform(tokens_of(piece_of(params, request)).slots);
    if (slots == 0) continue;  // store_no_tiles
    Accumulators o = {};
#pragma unroll 1
    for (int i = 0; i < slots; ++i) {
      mbarrier_wait(full(place.slot), place.phase);
      clear_rows(place.slot);
      Values v[2];  // the first are there before P is
      v[0].load(place.slot, 0);
      v[1].load(place.slot, 1);
      mbarrier_wait(p_ready(place.slot), place.phase);
      if (i > 0) rescale(o, place.slot, group);
#pragma unroll
      for (int step = 0; step < V_STEPS; ++step) {
        add_values(o, v[step & 1], place.slot, group, step);
        if (step + 2 < V_STEPS) v[step & 1].load(place.slot, step + 2);
      }
      arrive(empty(place.slot));
      place.advance();
    }
    mbarrier_wait(results_ready(), results_phase);
    results_phase ^= 1;
    store_rows(o, params, request, group);
    arrive(results_free());
  }
}
