// PTX instructions as inline functions, one each, named after the instruction. Section numbers are
// those of NVIDIA's "PTX ISA" (9.7: instructions). NVRTC ships no headers and needs none here.
//
// Kernels for all GPUs use what sm_80 has, and griddepcontrol, which does nothing before sm_90.
// mbarriers with bytes, TMA, setmaxnreg, elect.sync and stmatrix are sm_90's; wgmma.cuh has the
// rest.
//
// Addresses of shared memory are uint32_t in the shared window; mbarrier phases are parities.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

#define DEVICE __device__ __forceinline__

// A CUtensorMap, by value as a __grid_constant__ parameter.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// ---- special registers (9.7, "Special Registers") -------------------------------------------
// Read again instead of kept alive: the matrix roles have no register to spare.

DEVICE uint32_t thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
DEVICE uint32_t lane_index() { return thread_index() & 31; }
// The same in all lanes of the warp, and known to be by the compiler.
DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Of the parameters of a kernel.
DEVICE uint32_t param_word(const void* params, int i) { return ((const uint32_t*)params)[i]; }

// Clocks of the multiprocessor, of which only differences mean anything.
DEVICE uint32_t clock_now() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(x)::"memory");
  return x;
}

// For what the compiler finds to be uniform by itself, except for NVRTC 12.5 and 12.6: these take a
// descriptor that is added to for one that differs between lanes, and move both halves of it to
// uniform registers (R2UR) ahead of every wgmma.
DEVICE uint32_t surely_uniform(uint32_t x) {
#if __CUDACC_VER_MAJOR__ == 12 && (__CUDACC_VER_MINOR__ == 5 || __CUDACC_VER_MINOR__ == 6)
  return uniform(x);
#else
  return x;
#endif
}
DEVICE uint32_t warp_in_group() { return (thread_index() >> 5) & 3; }  // of a warpgroup

// elect.sync (9.7.13): one lane of a converged warp, always the same.
DEVICE bool elect_sync() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected;
}

// ---- mbarrier (9.7.13.15) -------------------------------------------------------------------

DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void mbarrier_arrive(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count)
               : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Bytes that are still to come, by a thread that arrives later.
DEVICE void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
DEVICE bool mbarrier_test_wait(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;"
      " selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done;
}
DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
      " selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done;
}
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t phase) {
  while (!mbarrier_try_wait(barrier, phase)) {
  }
}

// ---- ordering (9.7.13) ----------------------------------------------------------------------

// Makes this thread's ordinary writes to shared memory visible to TMA and wgmma.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of what others wrote before this thread met them at a barrier.
DEVICE void fence_proxy_async_of_others() { fence_proxy_async(); }
// A named barrier and how many threads take part in it; bar_arrive() does not wait.
DEVICE void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Waits, and says whether any of the threads wants it.
DEVICE bool bar_or(int barrier, int threads, bool wanted) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %3, 0; barrier.cta.red.or.pred.aligned q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"((uint32_t)wanted)
      : "memory");
  return any;
}
// The same for global memory, too: TMA may read what other threads wrote.
DEVICE void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }
DEVICE uint64_t ld_acquire(const uint64_t* p) {
  uint64_t x;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
DEVICE void st_relaxed(uint64_t* p, uint64_t x) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
// Cheaper than __threadfence(), which is sequentially consistent.
DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Programmatic dependent launch: the first waits until the kernels ahead have ended and their
// writes are visible; the second lets the next kernel begin, which may be long before this one
// ends. Without them, before sm_90, kernels follow one another anyway.
DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
template <int Registers>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- cp.async.bulk.tensor (9.7.9.27): the tensor memory accelerator -------------------------

DEVICE void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// One box at coordinates (c0 .. c4) into shared memory; `barrier` counts the bytes that arrive.
DEVICE void cp_async_bulk_tensor_5d(uint32_t to, const TensorMap& map, uint32_t barrier, int c0,
                                    int c1, int c2, int c3, int c4, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

// One box into the L2 cache.
DEVICE void prefetch_bulk_tensor_5d(const TensorMap& map, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(
                   &map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// cp.async.bulk (9.7.9.25): contiguous bytes from global to shared memory.
DEVICE void cp_async_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// cp.async (9.7.9.25): 16 bytes from global to shared memory, zeros if `bytes` is 0; 4 bytes.
// Copies since the last commit are a group; the wait is for all groups but the newest `Newest`.
DEVICE void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
DEVICE void cp_async_4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Newest>
DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newest) : "memory");
}

// ---- shared and global memory (9.7.9) -------------------------------------------------------

DEVICE uint32_t shared_address(const void* pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}
struct Vector4 {
  uint32_t x, y, z, w;
};
DEVICE Vector4 ld_shared_v4(uint32_t a) {
  Vector4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a)
               : "memory");
  return v;
}
DEVICE void st_shared_v4(uint32_t a, Vector4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DEVICE void st_shared_v2(uint32_t a, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(a), "r"(x), "r"(y) : "memory");
}
DEVICE float2 ld_shared_v2_f32(uint32_t a) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(a) : "memory");
  return v;
}
DEVICE float ld_shared_f32(uint32_t a) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(a) : "memory");
  return x;
}
DEVICE void st_shared_f32(uint32_t a, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(x) : "memory");
}
DEVICE uint32_t ld_shared_u32(uint32_t a) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
  return x;
}
DEVICE void st_shared_u32(uint32_t a, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(x) : "memory");
}
DEVICE uint64_t ld_shared_u64(uint32_t a) {
  uint64_t x;
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(a) : "memory");
  return x;
}
DEVICE void st_shared_u64(uint32_t a, uint64_t x) {
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(a), "l"(x) : "memory");
}
DEVICE float4 ld_shared_v4_f32(uint32_t a) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(a)
               : "memory");
  return v;
}
DEVICE uint16_t ld_shared_u16(uint32_t a) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(a) : "memory");
  return x;
}
DEVICE uint32_t ld_shared_u8(uint32_t a) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
  return x;
}
DEVICE void st_shared_u16(uint32_t a, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(x) : "memory");
}
// Volatile, so that they are issued where they stand.
DEVICE float ld_global_f32(const float* p) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
}
DEVICE int ld_global_s32(const int* p) {
  int x;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DEVICE float4 ld_global_v4_f32(const float* p) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
DEVICE Vector4 ld_global_v4(const void* p) {
  Vector4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
DEVICE void st_global_v4(void* p, Vector4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DEVICE void st_global_v4_f32(float* p, float x, float y, float z, float w) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}
DEVICE void st_global_v4_if(bool condition, void* p, Vector4 v) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(p),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"((uint32_t)condition)
      : "memory");
}
DEVICE void st_global_v2_f32_if(bool condition, float* p, float x, float y) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.f32 [%0], {%1, %2}; }" ::"l"(
                   p),
               "f"(x), "f"(y), "r"((uint32_t)condition)
               : "memory");
}
DEVICE void st_global_u32_if(bool condition, void* p, uint32_t x) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(p),
               "r"(x), "r"((uint32_t)condition)
               : "memory");
}
// ldmatrix, stmatrix (9.7.14.5): four 8x8 matrices of 16-bit elements, fragments of wgmma.
DEVICE void ldmatrix_x4(uint32_t a, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
               : "r"(a)
               : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t a, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
               : "r"(a)
               : "memory");
}
DEVICE void stmatrix_x4(uint32_t a, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(x),
               "r"(y), "r"(z), "r"(w)
               : "memory");
}

// ---- mma (9.7.14): D[16, 8] += A[16, 16] B[16, 8], by one warp -------------------------------

#if defined(DTYPE_FP16)
#define MMA_TYPES "f32.f16.f16.f32"
#else
#define MMA_TYPES "f32.bf16.bf16.f32"
#endif
#define MMA_M16N8K16(types)                                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col." types                                      \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  MMA_M16N8K16(MMA_TYPES);
}
DEVICE void mma_f16_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  MMA_M16N8K16("f32.f16.f16.f32");
}
DEVICE void mma_bf16_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  MMA_M16N8K16("f32.bf16.bf16.f32");
}

// ---- arithmetic (9.7.3, 9.7.9) --------------------------------------------------------------

DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float rcp(float x) {  // to one unit in the last place
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two floats <-> two float16, whatever the type of out.
DEVICE uint32_t half_x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE float2 from_half_x2(uint32_t x) {
  float2 y;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n}"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}
// Of pairs of Q's 16-bit type, float16 for e4m3: max(x, |y|). NaN counts for nothing.
DEVICE uint32_t max_abs_x2(uint32_t x, uint32_t y) {
  uint32_t z;
#if defined(DTYPE_FP16) || defined(QUERY_E4M3)
  asm("{\n.reg .b32 t;\nabs.f16x2 t, %2;\nmax.f16x2 %0, %1, t;\n}" : "=r"(z) : "r"(x), "r"(y));
#else
  asm("{\n.reg .b32 t;\nabs.bf16x2 t, %2;\nmax.bf16x2 %0, %1, t;\n}" : "=r"(z) : "r"(x), "r"(y));
#endif
  return z;
}
// The larger numbers of two pairs. NaN counts for nothing.
DEVICE uint32_t max_half_x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
DEVICE uint32_t max_bfloat_x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
// Two e4m3, in the low half of x, to two float16; exact.
DEVICE uint32_t half_x2_from_e4m3(uint32_t x) {
  uint32_t y;
  asm("{\n.reg .b16 pair;\ncvt.u16.u32 pair, %1;\ncvt.rn.f16x2.e4m3x2 %0, pair;\n}"
      : "=r"(y)
      : "r"(x));
  return y;
}
// The same of those in the high half.
DEVICE uint32_t half_x2_from_e4m3_high(uint32_t x) {
  uint32_t y;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}"
      : "=r"(y)
      : "r"(x));
  return y;
}
// Bytes of two registers, by the four digits of `selector`: 0 to 3 of x, 4 to 7 of y.
DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  return __byte_perm(x, y, selector);
}
DEVICE uint32_t mul_half_x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
DEVICE uint32_t mul_bfloat_x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
DEVICE uint32_t bfloat_x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// Two floats to one register of the kernel's 16-bit type, rounded to nearest even.
DEVICE uint32_t cvt_x2(float low, float high) {
#if defined(DTYPE_FP16)
  return half_x2(low, high);
#else
  return bfloat_x2(low, high);
#endif
}

// Hides from the compiler where a number or a pointer comes from. Otherwise it would keep what is
// computed from a number in registers that there are not.
DEVICE void pin(uint32_t& number) { asm volatile("" : "+r"(number)); }
template <class T>
DEVICE void pin(T*& pointer) {
  asm volatile("" : "+l"(pointer)::"memory");
}
