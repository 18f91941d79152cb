// Stands in for cuda_src/wgmma.cuh: the same functions, on machine.h.
#pragma once
#include "ptx.cuh"

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit_group() { machine::commit_products(); }
DEVICE void wgmma_wait_all() { machine::wait_for_products(); }
template <int Newest>
DEVICE void wgmma_wait_group() {
  machine::wait_for_products(Newest);
}
template <int N>
DEVICE void pin(float (&)[N]) {}

DEVICE void issue(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int columns,
                  bool accumulate, bool b_mn_major,
                  float (*to_float)(uint16_t) = machine::to_float) {
  machine::Product product;
  product.columns = columns, product.accumulate = accumulate, product.b_mn_major = b_mn_major;
  product.a_in_registers = a_registers, product.a = a, product.b = b;
  product.to_float = to_float;
  machine::issue(product, a_registers, d);
}
DEVICE void wgmma_e4m3_m64n64k32_rs(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
  machine::Product product;
  product.columns = 64, product.accumulate = accumulate, product.a_in_registers = true;
  product.b = b, product.of_bytes = from_e4m3;
  machine::issue(product, a, d);
}
DEVICE void wgmma_m64n48k16_rs(float (&d)[24], const uint32_t* a, uint64_t b, int accumulate) {
  issue(d, a, 0, b, 48, accumulate, false);
}
DEVICE void wgmma_m64n48k16_ss(float (&d)[24], uint64_t a, uint64_t b) {
  issue(d, nullptr, a, b, 48, true, false);
}
DEVICE void wgmma_m64n64k16_rs(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
  issue(d, a, 0, b, 64, accumulate, false);
}
DEVICE void wgmma_m64n64k16_ss(float (&d)[32], uint64_t a, uint64_t b) {
  issue(d, nullptr, a, b, 64, true, false);
}
DEVICE void wgmma_m64n128k16_ss(float* d, uint64_t a, uint64_t b) {
  issue(d, nullptr, a, b, 128, true, true);
}
DEVICE void wgmma_m64n256k16_ss(float (&d)[128], uint64_t a, uint64_t b) {
  issue(d, nullptr, a, b, 256, true, true);
}
DEVICE void wgmma_m64n64k16_rs_mn(float* d, const uint32_t* a, uint64_t b) {
  issue(d, a, 0, b, 64, true, true);
}
DEVICE void wgmma_bf16_m64n64k16_rs(float (&d)[32], const uint32_t* a, uint64_t b,
                                    int accumulate) {
  issue(d, a, 0, b, 64, accumulate, false, from_bfloat16);
}
