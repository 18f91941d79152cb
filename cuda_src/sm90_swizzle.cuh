// Operands of wgmma in shared memory, swizzled as TMA does it: rows of 128 bytes, a column block of 64
// numbers, whose chunks of 16 bytes change places with the row. Of all kernels by wgmma.
#pragma once
#include "ptx.cuh"

// A descriptor ("PTX ISA", 9.7.15.5.1), from an address in the shared window; distances are in units
// of 16 bytes.
// K-major, 128-byte swizzle: groups of 8 rows of 128 bytes, 1024 bytes apart.
DEVICE uint64_t descriptor_k_major(uint32_t a) {
  return (uint64_t)((a >> 4) & 0x3FFF) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

// Byte offset in a swizzled column block for ldmatrix and stmatrix; ^ (step << 5) for step 1..3.
DEVICE uint32_t fragment_offset() {
  const uint32_t lane = lane_index(), row = warp_in_group() * 16 + (lane & 15);
  return row * 128 + ((((lane >> 4) ^ row) & 7) << 4);
}
