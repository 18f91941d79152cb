// The scales of V32 and V4 in sm90_few_fp8_decode.cu: each multiplies the sum of its columns in S
// and, for V, P. Of V32, the score warps make a version of P for each value warp; of V4, whose
// scales are powers of two, they leave scales in float16, by which the value warps multiply P.
//
// So that P fits float16, a power of two brings the largest scale so far to at most 2^P_UP_LOG2; O
// is in its units, and when it moves, O shrinks as for a new maximum.
#pragma once
#include "sm90_few_fp8_queries.cuh"

constexpr int P_UP_LOG2 = 7;  // P is at most 2^LAZY, and 2^15 with this

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
#elif defined(FORMAT_V4)
struct Scales {
  uint64_t of[2];
  DEVICE void load(uint32_t slot, int octet) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      of[i] = ld_shared_u64(
          token_tail(slot, warp_in_group() * WARP_TOKENS + my_token(octet, i)));
    }
  }
  // The least exponent stands for 0, and a token with NaN is bad.
  DEVICE float at(int i, int group) const {
    const uint32_t word = group < 4 ? of[i] : of[i] >> 32;
    return __uint_as_float((word >> 8 * (group & 3) & 0xff) << 23);
  }
};
#else
struct Scales {
  DEVICE void load(uint32_t, int) {}
};
#endif

// A lane looks after the groups lane % 4 and, if there are more than four, that four further.
constexpr int LANE_GROUPS = GROUPS > 4 ? 2 : 1;
using Factors = float[LANE_GROUPS];

// Whether the token of a slot counts, and is not bad.
DEVICE bool is_seen(uint32_t slot, int token) {
  const uint32_t bits = ld_shared_u32(token_bits(slot, token / WARP_TOKENS));
  return (bits >> token % WARP_TOKENS & 0x10001) == 1;
}
// What O shrinks by when an exponent grows.
DEVICE float shrinks_by(int exponent, int larger) {
  return __int_as_float(max(0, 127 - (larger - exponent)) << 23);
}

// The exponents of the largest scale of each group so far, as floats have them.
#if defined(FORMAT_V4)
struct Exponents {
  static constexpr uint32_t LEAST = P_UP_LOG2 + 1;  // so that down() is a float
  uint32_t of[2] = {LEAST * 0x01010101, LEAST * 0x00010101};  // bytes, as tails have them
  DEVICE int at(int group) const { return (group < 4 ? of[0] : of[1]) >> 8 * (group & 3) & 0xff; }

  // Looks at a slot. Returns whether one moved, and in `factors` what that does to O of this lane's
  // groups.
  DEVICE bool raise(uint32_t slot, Factors& factors) {
    bool moves = false;
#pragma unroll
    for (int half = 0; half < SLOT_TOKENS / 32; ++half) {
      const int token = half * 32 + lane_index();
      const uint64_t tail = ld_shared_u64(token_tail(slot, token)) & 0x00ffffffffffffff;
      // Bytes are compared in turns, in 16 bits each, of which the ninth stays where none borrows.
      uint32_t not_larger = ~0u;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = tail >> 32 * i;
        not_larger &= ((of[i] & 0x00ff00ff) | 0x01000100) - (word & 0x00ff00ff);
        not_larger &= ((of[i] >> 8 & 0x00ff00ff) | 0x01000100) - (word >> 8 & 0x00ff00ff);
      }
      const bool counts = is_seen(slot, token);
      if (!__any_sync(~0u, counts && (not_larger & 0x01000100) != 0x01000100)) continue;
      moves = true;  // rare after the first tokens
#pragma unroll
      for (int group = 0; group < GROUPS - 1; ++group) {
        const int mine = counts ? (int)(tail >> 8 * group & 0xff) : 0;
        const int largest = max(at(group), __reduce_max_sync(~0u, mine));
        if ((lane_index() & 3) == (group & 3)) {
          factors[group >> 2] *= shrinks_by(at(group), largest);
        }
        of[group >> 2] += (uint32_t)(largest - at(group)) << 8 * (group & 3);
      }
    }
    return moves;
  }
  DEVICE float up(int) const { return 1 << P_UP_LOG2; }
  DEVICE float down(int group) const {
    return __int_as_float(((group < GROUPS - 1 ? at(group) : 127) - P_UP_LOG2) << 23);
  }

  // Leaves the scales of this warp's tokens, by the largest, for P. Those of tokens that do not
  // count are anything finite.
  DEVICE void store(uint32_t slot) const {
    const uint32_t place = lane_index() & 15;  // [lane of a quad][octet][2]
    const int octet = place >> 1 & 1;
    const int token = product_token(octet, (place >> 2) * 2 + (place & 1));
    const uint32_t tail = token_tail(slot, warp_in_group() * WARP_TOKENS + token);
#pragma unroll
    for (int i = 0; i < GROUPS / 2; ++i) {
      const int group = (lane_index() >> 4) * 4 + i;
      const int exponent = min(15, 15 + (int)ld_shared_u8(tail + group) - at(group));
      const uint32_t half = exponent > 0 ? exponent << 10 : 0x400 >> min(31, 1 - exponent);
      st_shared_u16(p_scales(slot, group, warp_in_group()) + place * 2, half);
    }
  }
};
#else
struct Exponents {
  static constexpr int LEAST = P_UP_LOG2, LARGEST = 252;  // so that up() and down() are floats
  int of[GROUPS];
  DEVICE Exponents() {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) of[group] = LEAST;
  }
  DEVICE float limit(int group) const { return __int_as_float((of[group] + 1) << 23); }
  DEVICE bool raise(uint32_t slot, Factors& factors) {
    bool moves = false;
#if defined(FORMAT_V32)
#pragma unroll
    for (int half = 0; half < SLOT_TOKENS / 32; ++half) {
      const int token = half * 32 + lane_index();
      const float4 v = ld_shared_v4_f32(token_row(slot, token) + SCALES);
      const float scales[4] = {fabsf(v.x), fabsf(v.y), fabsf(v.z), fabsf(v.w)};
      bool is_larger = false;
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) is_larger |= scales[group] >= limit(group);
      const bool counts = is_seen(slot, token);
      if (!__any_sync(~0u, is_larger && counts)) continue;
      moves = true;  // rare after the first tokens
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const int mine = counts ? __float_as_uint(scales[group]) >> 23 : 0;
        const int largest = min(LARGEST, max(of[group], __reduce_max_sync(~0u, mine)));
        if ((lane_index() & 3) == group) factors[0] *= shrinks_by(of[group], largest);
        of[group] = largest;
      }
    }
#endif
    return moves;
  }
  // What brings a scale to at most 2^P_UP_LOG2, and what O is then to be multiplied by.
  DEVICE float up(int group) const {
    return GROUPS > 1 ? __int_as_float((253 + P_UP_LOG2 - of[group]) << 23) : 1 << P_UP_LOG2;
  }
  DEVICE float down(int group) const {
    return __int_as_float(((GROUPS > 1 ? of[group] + 1 : 127) - P_UP_LOG2) << 23);
  }
  DEVICE void store(uint32_t) const {}
};
#endif
