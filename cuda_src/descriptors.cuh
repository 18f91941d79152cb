// Shared memory descriptors of wgmma's operands ("PTX ISA", 9.7.15.5.1), from addresses in the shared
// window. Distances are in units of 16 bytes.
#pragma once
#include "ptx.cuh"

// K-major, 128-byte swizzle: groups of 8 rows of 128 bytes, 1024 bytes apart.
DEVICE uint64_t descriptor_k_major(uint32_t a) {
  return (uint64_t)((a >> 4) & 0x3FFF) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
// MN-major, 128-byte swizzle: the next 64 columns 8192 bytes on, the next 8 tokens 1024 bytes on.
DEVICE uint64_t descriptor_mn_major(uint32_t a) {
  return (uint64_t)((a >> 4) & 0x3FFF) | (uint64_t)512 << 16 | (uint64_t)64 << 32 |
         (uint64_t)1 << 62;
}
// K-major, no swizzle: core matrices of 8 rows by 16 bytes; 1024 bytes on in K, 128 in M.
DEVICE uint64_t descriptor_k_major_plain(uint32_t a) {
  return (uint64_t)((a >> 4) & 0x3FFF) | (uint64_t)64 << 16 | (uint64_t)8 << 32;
}
