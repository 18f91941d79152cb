// Stands in for cuda_src/ptx.cuh: the same functions, on machine.h.
#pragma once
#include "cuda.h"

// As on a GPU, where each place that calls a function has its own copy: machine::issue() tells places
// apart.
#define DEVICE inline __attribute__((always_inline))

// device.py encodes these 128 bytes, dimensions innermost first.
struct alignas(128) TensorMap {
  uint8_t* address;
  uint32_t dims[5];
  uint32_t nan_outside;
  uint64_t strides[4];  // bytes
  uint32_t box[5];
};

// ---- special registers ----------------------------------------------------------------------

DEVICE uint32_t thread_index() { return threadIdx.x; }
DEVICE uint32_t lane_index() { return thread_index() & 31; }
DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }
DEVICE uint32_t param_word(const void* params, int i) {
  uint32_t word;
  memcpy(&word, (const char*)params + i * 4, 4);
  return word;
}
DEVICE uint32_t clock_now() { return machine::draw(10000); }
DEVICE uint32_t surely_uniform(uint32_t x) { return x; }
DEVICE uint32_t warp_in_group() { return (thread_index() >> 5) & 3; }
DEVICE bool elect_sync() {
  all_lanes(~0u, 0, "elect.sync");
  return lane_index() == 13;
}

// ---- mbarrier -------------------------------------------------------------------------------

DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  machine::mbarrier(barrier) = {0, count, count, 0};
}
DEVICE void fence_mbarrier_init() {}
DEVICE void mbarrier_arrive(uint32_t barrier, uint32_t count = 1) {
  machine::arrive(barrier, count);
  machine::maybe_yield();
}
DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  machine::arrive(barrier, 1, bytes);
  machine::maybe_yield();
}
DEVICE void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  machine::mbarrier(barrier).bytes += bytes;
  machine::maybe_yield();
}
DEVICE bool mbarrier_test_wait(uint32_t barrier, uint32_t phase) {
  machine::maybe_yield();
  return machine::mbarrier(barrier).phase != phase;
}
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t phase) {
  machine::wait_for_phase(barrier, phase, "mbarrier_wait");
}

// ---- ordering -------------------------------------------------------------------------------

DEVICE void fence_proxy_async() { machine::fence(); }
DEVICE void fence_proxy_async_of_others() { machine::fence_all(); }
DEVICE void fence_proxy_async_all() {
  machine::fence();
  machine::fence_global_proxy();
}
DEVICE void bar_sync(int barrier, int threads) {
  machine::barrier_arrive(barrier, threads, true);
}
DEVICE bool bar_or(int barrier, int threads, bool wanted) {
  return machine::barrier_arrive(barrier, threads, true, wanted) > 0;
}
DEVICE void bar_arrive(int barrier, int threads) {
  machine::barrier_arrive(barrier, threads, false);
}
DEVICE uint64_t ld_acquire(const uint64_t* p) {
  machine::maybe_yield();
  machine::acquired();
  return *p;
}
DEVICE void st_relaxed(uint64_t* p, uint64_t x) {
  *p = x;
  machine::maybe_yield();
}
DEVICE void fence_acq_rel_gpu() { machine::fence_gpu(); }
DEVICE void griddepcontrol_wait() { machine::wait_for_kernels_ahead(); }
DEVICE void griddepcontrol_launch_dependents() { machine::trigger(*machine::block); }
template <int Registers>
DEVICE void setmaxnreg_inc() {}
template <int Registers>
DEVICE void setmaxnreg_dec() {}

// ---- bulk copies ----------------------------------------------------------------------------

DEVICE void prefetch_tensormap(const TensorMap&) {}
DEVICE void prefetch_l2(const void*) {}
DEVICE void prefetch_bulk_tensor_5d(const TensorMap&, int, int, int, int, int) {}
DEVICE uint64_t createpolicy_evict_first() { return 0; }

// One row of a box, 128 bytes swizzled.
DEVICE void copy_row(uint32_t to, const TensorMap& map, const int (&at)[5]) {
  bool inside = true;
  const uint8_t* from = map.address + at[0] * 2;
  for (int i = 0; i < 5; ++i) {
    inside &= (uint32_t)at[i] < map.dims[i];
    if (i > 0) from += at[i] * map.strides[i - 1];
  }
  for (int chunk = 0; chunk < 8; ++chunk) {
    uint8_t* chunk_to = machine::at_async(machine::swizzle_128b(to + chunk * 16), 16);
    if (inside) {
      memcpy(chunk_to, from + chunk * 16, 16);
    } else {
      for (int i = 0; i < 8; ++i) ((uint16_t*)chunk_to)[i] = map.nan_outside ? 0x7fff : 0;
    }
  }
}
DEVICE void cp_async_bulk_tensor_5d(uint32_t to, const TensorMap& map, uint32_t barrier, int c0,
                                    int c1, int c2, int c3, int c4, uint64_t) {
  machine::block->copies.push_back([=] {
    uint32_t row = to;
    int at[5] = {c0};
    for (at[4] = c4; at[4] < c4 + (int)map.box[4]; ++at[4]) {
      for (at[3] = c3; at[3] < c3 + (int)map.box[3]; ++at[3]) {
        for (at[2] = c2; at[2] < c2 + (int)map.box[2]; ++at[2]) {
          for (at[1] = c1; at[1] < c1 + (int)map.box[1]; ++at[1], row += 128) {
            copy_row(row, map, at);
          }
        }
      }
    }
    machine::complete_bytes(barrier, row - to);
  });
}
DEVICE void cp_async_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  machine::require_global_fences(from, bytes);
  machine::block->copies.push_back([=] {
    for (uint32_t i = 0; i < bytes; i += 16) {
      memcpy(machine::at_async(to + i, 16), (const uint8_t*)from + i, 16);
    }
    machine::complete_bytes(barrier, bytes);
  });
}

DEVICE void cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t of) {
  uint8_t* const room = machine::at(to, of);
  machine::copy_later(
      [=] {
        memset(room, 0, of);
        memcpy(room, from, bytes);
      },
      to);
  machine::maybe_yield();
}
DEVICE void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  cp_async(to, from, bytes, 16);
}
DEVICE void cp_async_4(uint32_t to, const void* from) { cp_async(to, from, 4, 4); }
DEVICE void cp_async_commit_group() { machine::commit_copies(); }
template <int Newest>
DEVICE void cp_async_wait_group() {
  machine::wait_for_copies(Newest);
}

// ---- shared and global memory ---------------------------------------------------------------

DEVICE uint32_t shared_address(const void* pointer) { return (const uint8_t*)pointer - shared; }
template <class T>
T ld_shared(uint32_t a) {
  return *(const T*)machine::at(a, sizeof(T));
}
template <class T>
void st_shared(uint32_t a, T x) {
  *(T*)machine::at(a, sizeof(T)) = x;
  machine::wrote(a);
}
struct Vector4 {
  uint32_t x, y, z, w;
};
DEVICE Vector4 ld_shared_v4(uint32_t a) { return ld_shared<Vector4>(a); }
DEVICE void st_shared_v4(uint32_t a, Vector4 v) { st_shared(a, v); }
struct Vector2 {
  uint32_t x, y;
};
DEVICE void st_shared_v2(uint32_t a, uint32_t x, uint32_t y) { st_shared(a, Vector2{x, y}); }
DEVICE float2 ld_shared_v2_f32(uint32_t a) { return ld_shared<float2>(a); }
DEVICE float ld_shared_f32(uint32_t a) { return ld_shared<float>(a); }
DEVICE float4 ld_shared_v4_f32(uint32_t a) { return ld_shared<float4>(a); }
DEVICE void st_shared_f32(uint32_t a, float x) { st_shared(a, x); }
DEVICE uint32_t ld_shared_u32(uint32_t a) { return ld_shared<uint32_t>(a); }
DEVICE void st_shared_u32(uint32_t a, uint32_t x) { st_shared(a, x); }
DEVICE uint64_t ld_shared_u64(uint32_t a) { return ld_shared<uint64_t>(a); }
DEVICE void st_shared_u64(uint32_t a, uint64_t x) { st_shared(a, x); }
DEVICE uint16_t ld_shared_u16(uint32_t a) { return ld_shared<uint16_t>(a); }
DEVICE uint32_t ld_shared_u8(uint32_t a) { return ld_shared<uint8_t>(a); }
DEVICE void st_shared_u16(uint32_t a, uint16_t x) { st_shared(a, x); }
DEVICE int ld_global_s32(const int* p) { return *p; }
DEVICE float ld_global_f32(const float* p) { return *p; }
DEVICE float4 ld_global_v4_f32(const float* p) { return *(const float4*)p; }
DEVICE Vector4 ld_global_v4(const void* p) { return *(const Vector4*)p; }
DEVICE void st_global_v4(void* p, Vector4 v) { machine::store(p, &v, sizeof(v)); }
DEVICE void st_global_v4_f32(float* p, float x, float y, float z, float w) {
  const float4 v = {x, y, z, w};
  machine::store(p, &v, sizeof(v));
}

DEVICE void st_global_v4_if(bool condition, void* p, Vector4 v) {
  if (condition) st_global_v4(p, v);
}
DEVICE void st_global_v2_f32_if(bool condition, float* p, float x, float y) {
  const float2 v = {x, y};
  if (condition) machine::store(p, &v, sizeof(v));
}
DEVICE void st_global_u32_if(bool condition, void* p, uint32_t x) {
  if (condition) machine::store(p, &x, sizeof(x));
}

// Lane i has the address of row i % 8 of matrix i / 8; register r of a lane is two elements of row
// lane / 4 of matrix r.
DEVICE void ldmatrix_x4(uint32_t a, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
  const uint64_t* rows = all_lanes(~0u, a, "ldmatrix");
  uint32_t loaded[4];
  for (int r = 0; r < 4; ++r) {
    loaded[r] = ld_shared<uint32_t>(rows[r * 8 + lane_index() / 4] + lane_index() % 4 * 4);
  }
  x = loaded[0], y = loaded[1], z = loaded[2], w = loaded[3];
}
// The same of the transposed matrices: two elements of column lane / 4 of matrix r.
DEVICE void ldmatrix_x4_trans(uint32_t a, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
  const uint64_t* rows = all_lanes(~0u, a, "ldmatrix");
  uint32_t loaded[4];
  for (int r = 0; r < 4; ++r) {
    const uint64_t* from = rows + r * 8 + lane_index() % 4 * 2;
    const uint32_t low = ld_shared<uint16_t>(from[0] + lane_index() / 4 * 2);
    loaded[r] = low | (uint32_t)ld_shared<uint16_t>(from[1] + lane_index() / 4 * 2) << 16;
  }
  x = loaded[0], y = loaded[1], z = loaded[2], w = loaded[3];
}
DEVICE void stmatrix_x4(uint32_t a, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  const uint32_t stored[4] = {x, y, z, w};
  const uint32_t matrix = lane_index() / 8, row = lane_index() % 8;
  for (uint32_t r = 0; r < 4; ++r) {
    const uint64_t* values = all_lanes(~0u, stored[r], "stmatrix");
    if (r != matrix) continue;
    for (int i = 0; i < 4; ++i) st_shared(a + i * 4, (uint32_t)values[row * 4 + i]);
  }
}

// ---- arithmetic -----------------------------------------------------------------------------

DEVICE float ex2(float x) { return exp2f(x); }
DEVICE float rcp(float x) { return 1.f / x; }
DEVICE float lg2(float x) { return log2f(x); }
DEVICE float from_half(uint16_t x) { return (float)same_bits<_Float16>(x); }
DEVICE float from_bfloat16(uint16_t x) { return same_bits<float>((uint32_t)x << 16); }
DEVICE uint16_t to_bfloat16(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#if defined(DTYPE_FP16)
DEVICE uint16_t from_float(float x) {
  return x != x ? 0x7fff : same_bits<uint16_t>((_Float16)x);
}
DEVICE float from_dtype(uint16_t x) { return from_half(x); }
#else
DEVICE float from_dtype(uint16_t x) { return from_bfloat16(x); }
DEVICE uint16_t from_float(float x) { return to_bfloat16(x); }
#endif
// Of the operands of wgmma.
inline float machine::to_float(uint16_t x) {
#if defined(PRODUCTS_IN_FP16)
  return from_half(x);
#else
  return from_dtype(x);
#endif
}
DEVICE uint32_t cvt_x2(float low, float high) {
  return (uint32_t)from_float(high) << 16 | from_float(low);
}
DEVICE uint32_t bfloat_x2(float low, float high) {
  return (uint32_t)to_bfloat16(high) << 16 | to_bfloat16(low);
}
DEVICE uint32_t half_x2(float low, float high) {
  return same_bits<uint16_t>((_Float16)low) | (uint32_t)same_bits<uint16_t>((_Float16)high) << 16;
}
DEVICE float2 from_half_x2(uint32_t x) {
  return {(float)same_bits<_Float16>((uint16_t)x), (float)same_bits<_Float16>((uint16_t)(x >> 16))};
}

DEVICE float from_e4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  const float size = exponent == 15 && mantissa == 7 ? same_bits<float>(0x7fffffff)
                     : exponent                      ? ldexpf(8 + mantissa, exponent - 10)
                                                     : ldexpf(mantissa, -9);
  return x & 0x80 ? -size : size;
}
DEVICE uint32_t half_x2_from_e4m3(uint32_t x) { return half_x2(from_e4m3(x), from_e4m3(x >> 8)); }
DEVICE uint32_t half_x2_from_e4m3_high(uint32_t x) { return half_x2_from_e4m3(x >> 16); }
DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  uint32_t z = 0;
  for (int i = 0; i < 4; ++i) z |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return z;
}
DEVICE uint32_t mul_half_x2(uint32_t x, uint32_t y) {
  return half_x2(from_half(x) * from_half(y), from_half(x >> 16) * from_half(y >> 16));
}
DEVICE uint32_t mul_bfloat_x2(uint32_t x, uint32_t y) {
  auto product = [](uint32_t a, uint32_t b) {
    return same_bits<float>(a << 16) * same_bits<float>(b << 16);
  };
  return bfloat_x2(product(x, y), product(x >> 16, y >> 16));
}
DEVICE uint32_t max_abs_x2(uint32_t x, uint32_t y) {
  auto larger = [](uint16_t a, uint16_t b) {
#if defined(QUERY_E4M3)
    return half_x2(fmaxf(from_half(a), fabsf(from_half(b))), 0);
#else
    return (uint32_t)from_float(fmaxf(from_dtype(a), fabsf(from_dtype(b))));
#endif
  };
  return larger(x, y) | larger(x >> 16, y >> 16) << 16;
}

DEVICE uint32_t max_half_x2(uint32_t x, uint32_t y) {
  return half_x2(fmaxf(from_half(x), from_half(y)), fmaxf(from_half(x >> 16), from_half(y >> 16)));
}
DEVICE uint32_t max_bfloat_x2(uint32_t x, uint32_t y) {
  auto larger = [](uint32_t a, uint32_t b) {
    return fmaxf(same_bits<float>(a << 16), same_bits<float>(b << 16));
  };
  return bfloat_x2(larger(x, y), larger(x >> 16, y >> 16));
}

template <class T>
DEVICE void pin(T*&) {}
DEVICE void pin(uint32_t&) {}

// ---- mma ------------------------------------------------------------------------------------

DEVICE void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1,
                float (*to_float)(uint16_t)) {
  uint64_t lanes[3][32];  // of all lanes: a[0] and a[1], a[2] and a[3], b
  const uint64_t mine[3] = {a[0] | (uint64_t)a[1] << 32, a[2] | (uint64_t)a[3] << 32,
                            b0 | (uint64_t)b1 << 32};
  for (int i = 0; i < 3; ++i) memcpy(lanes[i], all_lanes(~0u, mine[i], "mma"), sizeof(lanes[i]));
  auto element = [&](const uint64_t* of, int lane, int half, int i) {
    return to_float(of[lane] >> (32 * half + 16 * i) & 0xffff);
  };
  const int row = lane_index() / 4, column = lane_index() % 4 * 2;
  for (int k = 0; k < 16; ++k) {
    const int of_k = k % 8 / 2;
    for (int i = 0; i < 4; ++i) {
      const float x = element(lanes[k / 8], row * 4 + of_k, i / 2, k % 2);
      const float y = element(lanes[2], (column + i % 2) * 4 + of_k, k / 8, k % 2);
      d[i] += x * y;
    }
  }
}
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, from_dtype);
}
DEVICE void mma_f16_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, from_half);
}
DEVICE void mma_bf16_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, from_bfloat16);
}
