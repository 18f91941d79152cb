// How the four score warps of the kernels for few query rows tell one another a number of each row:
// its maximum of S, and its sum. `offset` is that of float [ROWS][GROUP_WARPS] in shared memory; to be
// included behind the memory map of the kernel, which has row_float().
#pragma once

// A value of each warp for a row: one lane of a quad writes it, and all warps read all of them.
DEVICE void scatter(uint32_t offset, int row, float x) {
  if ((lane_index() & 3) == 0) {
    st_shared_f32(row_float(offset, row * GROUP_WARPS + warp_in_group()), x);
  }
}
DEVICE float4 gather(uint32_t offset, int row) {
  return ld_shared_v4_f32(row_float(offset, row * GROUP_WARPS));
}
