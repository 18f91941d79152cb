// The gather role, of warpgroup 3: rows are copied into the ring, 16 bytes a lane, to where the
// swizzle wants them.
//
// Two pairs of warps take turns with the tiles: while one looks up where rows lie, or waits until
// they have landed, the other copies. A warp copies half of a tile; it can start no more than one
// copy in 16 clocks, 512 bytes, which is why it has no tile to itself.
#pragma once
#include "sm90_gather_cursor.cuh"

// Of a warp's wait at `empty` there is only a parity. That suffices, since P V of the tiles is in
// their order: what freed the stage of a pair's last tile came behind what freed, before the other
// pair filled it, the stage that it waits for now.
static_assert(PAIRS < STAGES, "a wait at `empty` is for what comes next there");

DEVICE const uint8_t* row_at(uint32_t pointer) { return (const uint8_t*)ld_shared_u64(pointer); }
// Copies 16 bytes of a row; of one that is not there, zeros.
DEVICE void copy_16(uint32_t to, const uint8_t* row, uint32_t offset, bool is_there) {
  cp_async_16(to, row + offset, is_there ? 16 : 0);
}

// Starts the copies of the warp's rows that were looked up, eight at a time.
DEVICE void copy_rows(uint32_t walk, uint32_t lane, uint32_t to) {
  const uint32_t i = lane >> 3, column = lane & 7;
  to += i * 128 + ((column ^ i) << 4);
  uint32_t from = walk + ROW_POINTERS + i * 8;
#pragma unroll 1
  for (int rows = 0; rows < HALF_TILE; rows += 8) {
    const uint8_t *row = row_at(from), *later = row_at(from + 4 * 8);
#pragma unroll
    for (int block = 0; block < COLUMN_BLOCKS; ++block) {
      copy_16(to + block * BLOCK_BYTES, row, block * 128 + column * 16, row != nullptr);
    }
#pragma unroll
    for (int block = 0; block < COLUMN_BLOCKS; ++block) {
      copy_16((to ^ 64) + 512 + block * BLOCK_BYTES, later, block * 128 + column * 16,
              later != nullptr);
    }
    to += 8 * 128, from += 8 * 8;
  }
}

// The warp's bad rows become NaN.
DEVICE void spoil_rows(uint32_t first_row, uint32_t bad) {
  for (; bad; bad &= bad - 1) {
    const uint32_t row = first_row + (__ffs(bad) - 1) * 128;
#pragma unroll 1
    for (int i = lane_index(); i < COLUMN_BLOCKS * 8; i += 32) {
      st_shared_v4(row + (i >> 3) * BLOCK_BYTES + (i & 7) * 16,
                   {0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff});
    }
  }
}

DEVICE void gather_role(const Params& params) {
  uint32_t lane = lane_index(), walk = walk_address();
  const uint32_t pair = warp_in_group() / PAIR_WARPS, half = warp_in_group() % PAIR_WARPS;
  Place place;
  for (uint32_t i = 0; i < pair; ++i) place.advance();
  if (!Walk<false>(walk, lane).begin_at(params, pair)) return;
#pragma unroll 1
  for (;;) {
    pin(lane), pin(walk);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncwarp();
    if (!look_up(params, walk, lane)) break;
    mbarrier_wait(empty(place.stage), place.phase ^ 1);
    pin(lane), pin(walk);
    const uint32_t rows = stage_address(place.stage) + half * (HALF_TILE * 128);
    copy_rows(walk, lane, rows);
    cp_async_commit_group();
    if (lane == 0) st_shared_u32(live_tokens(place.stage) + half * 4, ld_shared_u32(walk + SEEN));
    const uint32_t bad = ld_shared_u32(walk + BAD);
    cp_async_wait_group<0>();
    __syncwarp();
    if (RARELY(bad != 0)) spoil_rows(rows, bad);
    release(full(place.stage));
    for (int i = 0; i < PAIRS; ++i) place.advance();
  }
}
