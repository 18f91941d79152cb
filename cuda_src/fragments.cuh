// Which part of a tile a thread holds, as wgmma lays out its accumulators: warp w of a warpgroup has
// rows 16 w .. 16 w + 15, a thread the rows row_in_block() and + 8 and, of every 8 columns, two.
#pragma once
#include "descriptors.cuh"
#include "ring.cuh"

DEVICE int row_in_block() { return warp_in_group() * 16 + (lane_index() >> 2); }
DEVICE int column_pair() { return (lane_index() & 3) * 2; }
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
// Byte offset in a swizzled column block for ldmatrix and stmatrix; ^ (step << 5) for step 1..3.
DEVICE uint32_t fragment_offset() {
  const uint32_t lane = lane_index(), row = warp_in_group() * 16 + (lane & 15);
  return row * 128 + ((((lane >> 4) ^ row) & 7) << 4);
}
// Of the thread's first row: a float [64], the factors of O, and the warp's flag that there are any.
DEVICE uint32_t row_floats(uint32_t offset) { return shared_base() + offset + row_in_block() * 4; }
DEVICE uint32_t factors(uint32_t stage) {
  return shared_base() + FACTORS + stage * ROWS * 2 + row_in_block() * 2;
}
DEVICE uint32_t rescale_flag(uint32_t stage) {
  return shared_base() + RESCALE + stage * 16 + warp_in_group() * 4;
}
