// What wgmma wants to know of shared memory, and which part of a tile a thread holds.
//
// Operands in shared memory are named by descriptors. Accumulators are spread over the threads of a
// warpgroup as fragments: warp w has rows 16 w to 16 w + 15, a thread the rows row_in_block() and
// row_in_block() + 8 and, of every eight columns, column_pair() and the next one.
#pragma once
#include "row_statistics.cuh"
#include "sm90_pieces.cuh"
#include "sm90_swizzle.cuh"
#include "wgmma.cuh"

// ---- descriptors ("PTX ISA", 9.7.15.5.1) ----------------------------------------------------
// From addresses in the shared window. Distances are in units of 16 bytes.

// MN-major, 128-byte swizzle: the next 64 columns lie a column block on, the next 8 tokens 1024
// bytes.
DEVICE uint64_t descriptor_mn_major(uint32_t a) {
  return (uint64_t)((a >> 4) & 0x3FFF) | (uint64_t)(BLOCK_BYTES >> 4) << 16 | (uint64_t)64 << 32 |
         (uint64_t)1 << 62;
}
// K-major, no swizzle: core matrices of 8 rows by 16 bytes, 1024 bytes apart in K, 128 in M.
DEVICE uint64_t descriptor_k_major_plain(uint32_t a) {
  return (uint64_t)((a >> 4) & 0x3FFF) | (uint64_t)64 << 16 | (uint64_t)8 << 32;
}

// ---- fragments ------------------------------------------------------------------------------

DEVICE int row_in_block() { return warp_in_group() * 16 + (lane_index() >> 2); }
DEVICE int column_pair() { return (lane_index() & 3) * 2; }
// Byte offset for stmatrix in 16 columns without a swizzle: core matrices of 8 rows by 16 bytes.
DEVICE uint32_t plain_fragment_offset() {
  const uint32_t lane = lane_index(), row = warp_in_group() * 16 + (lane & 15);
  return (lane >> 4) * 1024 + row * 16;
}

// Shared-memory addresses for this thread's first row: its entry of the float [64] at `offset`, its
// rescale factor of O for the tile in `stage`, and its warp's flag that some factor is not 1. The
// second row, eight further, has its entries 8 floats and 8 factors on.
DEVICE uint32_t row_floats(uint32_t offset) { return shared_base() + offset + row_in_block() * 4; }
DEVICE uint32_t factors(uint32_t stage) {
  return shared_base() + FACTORS + stage * ROWS * 2 + row_in_block() * 2;
}
DEVICE uint32_t rescale_flag(uint32_t stage) {
  return shared_base() + RESCALE + stage * 16 + warp_in_group() * 4;
}
constexpr int SECOND_ROW_FLOAT = 8 * 4, SECOND_ROW_FACTOR = 8 * 2;  // bytes on
