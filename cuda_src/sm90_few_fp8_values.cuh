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

// V4: a warp's columns are of two groups. A lane loads 8 bytes of each, so tiles 0 to 7 are of the
// first, columns 16 c + n, and 16 c + 8 + n in [1] and [3]. The second group of the last warp is
// the rotary columns, in bfloat16, for which P becomes two bfloat16 whose sum is exact.
constexpr int WARP_GROUPS = GROUPS == 8 ? 2 : 1, GROUP_TILES = V_TILES / WARP_GROUPS;
DEVICE int group_of(int i) { return GROUPS == 1 ? 0 : warp_in_group() * WARP_GROUPS + i; }

// Zeroes the warp's columns of tokens that do not count: what lies there may be NaN, and 0 * NaN is
// NaN. Not while the score warps read it, although what they read of such tokens does not matter.
template <bool HAS_ROTARY>
DEVICE void clear_rows(Place place) {
  const uint32_t slot = place.slot;
  const Vector4 bits = ld_shared_v4(token_bits(slot, 0));
  const uint32_t of[4] = {bits.x, bits.y, bits.z, bits.w}, lane = lane_index();
  if (uniform((bits.x & bits.y & bits.z & bits.w & ALL_SEEN) == ALL_SEEN)) return;
  mbarrier_wait(maxima_ready(slot), place.phase);
#pragma unroll 1
  for (int token = lane >> 3; token < SLOT_TOKENS; token += 4) {
    const int warp = token / WARP_TOKENS;
    const uint32_t mine = warp == 0 ? of[0] : warp == 1 ? of[1] : warp == 2 ? of[2] : of[3];
    if (mine >> token % WARP_TOKENS & 1) continue;
    const uint32_t to = token_row(slot, token) + warp_in_group() * V_COLUMNS + (lane & 7) * 16;
    st_shared_v4(to, {0, 0, 0, 0});
    if (HAS_ROTARY && (lane & 7) < 4) st_shared_v4(to + V_COLUMNS, {0, 0, 0, 0});
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

DEVICE void split(uint64_t x, uint32_t (&words)[2]) { words[0] = x, words[1] = x >> 32; }

// P of the tokens of a score warp, as a fragment of A, and of V4 the scales of its columns.
struct Weights {
  uint32_t a[4];
#if defined(FORMAT_V4)
  uint32_t scales[WARP_GROUPS][OCTETS];  // each of two tokens
#endif
  DEVICE void load(uint32_t slot, int step) {
    const int version = P_VERSIONS > 1 ? warp_in_group() : 0;
    const Vector4 p = ld_shared_v4(p_tile(slot, version) + (step * 32 + lane_index()) * 16);
    a[0] = p.x, a[1] = p.y, a[2] = p.z, a[3] = p.w;
#if defined(FORMAT_V4)
#pragma unroll
    for (int i = 0; i < WARP_GROUPS; ++i) {
      split(ld_shared_u64(p_scales(slot, group_of(i), step) + (lane_index() & 3) * 8), scales[i]);
    }
#endif
  }
};

#if defined(FORMAT_V4)
struct Values {
  uint32_t x[V_TILES][OCTETS];
  template <bool HAS_ROTARY>
  DEVICE void load(uint32_t slot, int step) {
    const uint32_t lane = lane_index(), of_lane = lane >> 2;
    const uint32_t from = token_row(slot, step * WARP_TOKENS) + warp_in_group() * V_COLUMNS;
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      const uint32_t first = from + product_token(octet, 2 * (lane & 3)) * ROW_BYTES;
      const uint32_t second = from + product_token(octet, 2 * (lane & 3) + 1) * ROW_BYTES;
#pragma unroll
      for (int group = 0; group < WARP_GROUPS; ++group) {
        if (group == 1 && HAS_ROTARY) {
          const Vector4 v = ld_shared_v4(first + 64 + of_lane * 16);
          const Vector4 w = ld_shared_v4(second + 64 + of_lane * 16);
          const uint32_t a[4] = {v.x, v.y, v.z, v.w}, b[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[GROUP_TILES + 2 * i][octet] = __byte_perm(a[i], b[i], 0x5410);
            x[GROUP_TILES + 2 * i + 1][octet] = __byte_perm(a[i], b[i], 0x7632);
          }
          continue;
        }
        uint32_t a[2], b[2];
        split(ld_shared_u64(first + group * 64 + of_lane * 8), a);
        split(ld_shared_u64(second + group * 64 + of_lane * 8), b);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t pairs[4];
          convert(a[i], b[i], pairs);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[group * GROUP_TILES + 4 * i + j][octet] = pairs[j];
        }
      }
    }
  }
};

template <bool HAS_ROTARY>
DEVICE void add_values(Accumulators& o, const Values& v, const Weights& p) {
  const uint32_t (&a)[4] = p.a;
#pragma unroll
  for (int group = 0; group < WARP_GROUPS; ++group) {
    const int first = group * GROUP_TILES;
    if (group == 1 && HAS_ROTARY) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = from_half_x2(a[i]);
        high[i] = bfloat_x2(x.x, x.y);
        low[i] = bfloat_x2(x.x - __uint_as_float(high[i] << 16),
                           x.y - __uint_as_float(high[i] & 0xffff0000));
      }
#pragma unroll
      for (int n = first; n < first + GROUP_TILES; ++n) {
        mma_bf16_m16n8k16(o[n], high, v.x[n][0], v.x[n][1]);
        mma_bf16_m16n8k16(o[n], low, v.x[n][0], v.x[n][1]);
      }
      continue;
    }
    const uint32_t (&scales)[2] = p.scales[group];
    const uint32_t scaled[4] = {mul_half_x2(a[0], scales[0]), mul_half_x2(a[1], scales[0]),
                                mul_half_x2(a[2], scales[1]), mul_half_x2(a[3], scales[1])};
#pragma unroll
    for (int n = first; n < first + GROUP_TILES; ++n) {
      mma_f16_m16n8k16(o[n], scaled, v.x[n][0], v.x[n][1]);
    }
  }
}
#else
// V of the tokens of a score warp and of this warp's columns, as fragments of B.
struct Values {
  uint32_t x[V_TILES][OCTETS];
  template <bool HAS_ROTARY>
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

template <bool HAS_ROTARY>
DEVICE void add_values(Accumulators& o, const Values& v, const Weights& p) {
#pragma unroll
  for (int n = 0; n < V_TILES; ++n) mma_f16_m16n8k16(o[n], p.a, v.x[n][0], v.x[n][1]);
}
#endif

DEVICE void rescale(Accumulators& o, uint32_t slot) {
  if (!uniform(ld_shared_u32(rescale_flag(slot)))) return;
#pragma unroll
  for (int i = 0; i < WARP_GROUPS; ++i) {
    const uint32_t from = factors(slot, group_of(i), lane_index() >> 2);
    const float a = ld_shared_f32(from), b = ld_shared_f32(from + 8 * 4);
#pragma unroll
    for (int n = i * GROUP_TILES; n < (i + 1) * GROUP_TILES; ++n) {
      o[n][0] *= a, o[n][1] *= a;
      o[n][2] *= b, o[n][3] *= b;
    }
  }
}

// 16 columns of a row to a partial result, as floats in the order of column_of_float() (merge.cuh).
// Lane c of a quad has columns that begin `pitch` behind those of lane c - 1, and stores every
// fourth vector of all four lanes, so that a quad stores 64 bytes at once.
template <class Columns>
DEVICE void store_floats(float* to, int pitch, const Columns& column, bool live) {
  Vector4 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto bits = [&](int vector) {
      return __float_as_uint(column(column_of_float(4 * vector + (i & 2)) + (i & 1)));
    };
    words[i] = transpose_quads({bits(0), bits(1), bits(2), bits(3)});
  }
  if (!live) return;
  to += (lane_index() & 3) * 4;
  st_global_v4(to, {words[0].x, words[1].x, words[2].x, words[3].x});
  st_global_v4(to + pitch, {words[0].y, words[1].y, words[2].y, words[3].y});
  st_global_v4(to + 2 * pitch, {words[0].z, words[1].z, words[2].z, words[3].z});
  st_global_v4(to + 3 * pitch, {words[0].w, words[1].w, words[2].w, words[3].w});
}

DEVICE void store_rows(const Accumulators& o, const Params& params, int request) {
  const RowBlock block = row_block();
  const uint32_t result = uniform(ld_shared_u32(shared_base() + RESULT));
  const bool is_whole = kind_of(result) == WHOLE;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int in_block = (lane_index() >> 2) + 8 * h, row = block.first_row + in_block;
    const bool live = row < params.slab_rows;
    uint16_t* out = params.out + out_row(params, request, block, row) * 512;
    float* partial = params.out_partial;
    if (!is_whole) partial += partial_row(params, slot_of(result), block, row) * 512;
#pragma unroll
    for (int group = 0; group < WARP_GROUPS; ++group) {
      // The tiles of a group have so many columns of a lane, behind one another.
      constexpr int LANE_COLUMNS = 2 * GROUP_TILES;
      const float x = ld_shared_f32(inverse_l(group_of(group), in_block));
      const int first_column = warp_in_group() * V_COLUMNS + group * 64;
      auto at = [&](int column) {
        return o[group * GROUP_TILES + column % GROUP_TILES][2 * h + column / GROUP_TILES] * x;
      };
#pragma unroll
      for (int i = 0; i < LANE_COLUMNS; i += 16) {
        if (!is_whole) {
          auto from = [&](int column) { return at(i + column); };
          store_floats(partial + first_column + i, LANE_COLUMNS, from, live);
          continue;
        }
        uint32_t pairs[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) pairs[j] = cvt_x2(at(i + 2 * j), at(i + 2 * j + 1));
        uint16_t* to = out + first_column + (lane_index() & 3) * LANE_COLUMNS + i;
        if (!live) continue;
        st_global_v4(to, {pairs[0], pairs[1], pairs[2], pairs[3]});
        st_global_v4(to + 8, {pairs[4], pairs[5], pairs[6], pairs[7]});
      }
    }
  }
}

// HAS_ROTARY: of the warp with the rotary columns of V4.
template <bool HAS_ROTARY>
DEVICE void value_role(const Params& params) {
  Place place;
  uint32_t results_phase = 0;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    const int slots = uniform(tokens_of(piece_of(params, request)).tiles);
    if (slots == 0) continue;  // store_no_tiles
    Accumulators o = {};
#pragma unroll 1
    for (int i = 0; i < slots; ++i) {
      mbarrier_wait(full(place.slot), place.phase);
      clear_rows<HAS_ROTARY>(place);
      Values v[2];  // the first are there before P is
      v[0].load<HAS_ROTARY>(place.slot, 0);
      v[1].load<HAS_ROTARY>(place.slot, 1);
      mbarrier_wait(p_ready(place.slot), place.phase);
      if (i > 0) rescale(o, place.slot);
      Weights p[V_STEPS];
#pragma unroll
      for (int step = 0; step < V_STEPS; ++step) p[step].load(place.slot, step);
#pragma unroll
      for (int step = 0; step < V_STEPS; ++step) {
        if (step + 2 == V_STEPS) arrive(empty(place.slot));  // all of it is in registers
        add_values<HAS_ROTARY>(o, v[step & 1], p[step]);
        if (step + 2 < V_STEPS) v[step & 1].load<HAS_ROTARY>(place.slot, step + 2);
      }
      place.advance();
    }
    mbarrier_wait(results_ready(), results_phase);
    results_phase ^= 1;
    store_rows(o, params, request);
    arrive(results_free());
  }
}
