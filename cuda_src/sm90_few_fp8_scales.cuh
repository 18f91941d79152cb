// The scales of V32 in sm90_few_fp8_decode.cu: each multiplies the sum of its 128 columns in S and,
// for V, P, of which each value warp has a version of its own.
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
#else
struct Scales {
  DEVICE void load(uint32_t, int) {}
};
#endif

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
