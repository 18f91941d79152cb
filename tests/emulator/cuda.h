// What CUDA C++ offers beyond C++, as far as cuda_src uses it, on machine.h.
#pragma once

#include <cmath>
#include <type_traits>

#include "machine.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct int3 {
  int x, y, z;
};
struct int4 {
  int x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned z = 0;
  for (int i = 0; i < 4; ++i) z |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return z;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void atomicMin(uint64_t* p, uint64_t x) { *p = min(*p, x); }
inline void atomicMax(int* p, int x) { *p = max(*p, x); }
inline void atomicAdd(int* p, int x) { *p += x; }
inline void __threadfence() { machine::fence_gpu(); }
inline void __threadfence_system() { machine::fence_gpu(); }

// ---- warps ----------------------------------------------------------------------------------

inline const uint64_t* all_lanes(unsigned mask, uint64_t value, const char* what) {
  if (mask != ~0u) machine::fail("a warp instruction for part of a warp");
  return machine::exchange(value, what);
}
template <class T>
uint64_t packed(T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
template <class T>
T lane_value(unsigned mask, T x, int lane) {
  const uint64_t bits = all_lanes(mask, packed(x), "shuffle")[lane & 31];
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int this_lane() { return threadIdx.x & 31; }
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return lane_value(mask, x, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return lane_value(mask, x, this_lane() ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int lanes) {
  return lane_value(mask, x, this_lane() < lanes ? this_lane() : this_lane() - lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int lanes) {
  return lane_value(mask, x, this_lane() + lanes < 32 ? this_lane() + lanes : this_lane());
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  const uint64_t* values = all_lanes(mask, x, "ballot");
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)values[lane] << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x); }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == ~0u; }
template <class T>
T reduced(unsigned mask, T x, T (*of)(T, T)) {
  const uint64_t* values = all_lanes(mask, packed(x), "reduce");
  x = (T)values[0];
  for (int lane = 1; lane < 32; ++lane) x = of(x, (T)values[lane]);
  return x;
}
inline int __reduce_add_sync(unsigned mask, int x) {
  return reduced<int>(mask, x, [](int a, int b) { return a + b; });
}
inline int __reduce_max_sync(unsigned mask, int x) { return reduced<int>(mask, x, max<int, int>); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) {
  return reduced<unsigned>(mask, x, min<unsigned, unsigned>);
}
inline void __syncwarp() { all_lanes(~0u, 0, "__syncwarp"); }

// ---- thread blocks --------------------------------------------------------------------------

inline void __syncthreads() { machine::barrier_arrive(0, machine::block->alive, true); }
inline int __syncthreads_count(bool x) {
  return machine::barrier_arrive(0, machine::block->alive, true, x);
}
