// The gather role over a cache of 16-bit rows, of warpgroup 3: rows are copied into the ring, 16
// bytes a lane, to where the swizzle wants them. Two tiles are on their way at a time, where there
// is room.
#pragma once
#include "sm90_gather_cursor.cuh"

// Starts the copies of the tile that was looked up into a stage.
DEVICE void copy_tile(uint32_t walk, uint32_t lane, uint32_t stage, uint32_t tile) {
  const uint32_t i = lane >> 3, column = lane & 7;
  const uint32_t to = stage_address(stage) + (warp_in_group() * CHUNK + i) * 128 +
                      ((column ^ (warp_in_group() * CHUNK & 4) ^ i) << 4);
  const uint32_t from = walk + pointers_at(tile) + ROW_POINTERS + i * 8;
  tile >>= i;
#pragma unroll 1
  for (int chunk = 0; chunk < TILE_CHUNKS; ++chunk) {
    const uint8_t* row = row_at(from + chunk * CHUNK * 8);
    const uint32_t at = to + chunk * CHUNK * GROUP_WARPS * 128;
#pragma unroll
    for (int block = 0; block < COLUMN_BLOCKS; ++block) {
      copy_16(at + block * BLOCK_BYTES, row, block * 128 + column * 16, tile & 1);
    }
    tile >>= CHUNK;
  }
}

// The warp's rows of a stage have landed: bad ones become NaN, and all may read.
DEVICE void release_tile(uint32_t stage, uint32_t bad) {
  __syncwarp();
  for (; bad; bad &= bad - 1) {  // rare
    const uint32_t bit = __ffs(bad) - 1;
    const uint32_t row = (bit / CHUNK * GROUP_WARPS + warp_in_group()) * CHUNK + bit % CHUNK;
#pragma unroll 1
    for (int i = lane_index(); i < COLUMN_BLOCKS * 8; i += 32) {
      st_shared_v4(stage_address(stage) + (i >> 3) * BLOCK_BYTES + row * 128 + (i & 7) * 16,
                   {0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff});
    }
  }
  release(full(stage));
}

DEVICE void gather_role(const Params& params, const TensorMap& q_map_0, const TensorMap& q_map_1) {
  uint32_t lane = lane_index(), walk = walk_address();
  uint32_t tile = begin_walk(params, walk, lane);
  cp_async_commit_group();
  Place place;
  if (!tile) return;
  load_q(params, q_map_0, q_map_1, ld_shared_u32(walk + REQUEST), place);
  bool begun = true;  // the first piece: its Q is on the way
  uint32_t bad = 0, stage = STAGES;  // of the tile on its way; STAGES: none
  auto release_it = [&] {
    if (stage < STAGES) release_tile(stage, bad);
    stage = STAGES;
  };
  // Groups: the entries of a tile, the rows of the tile before, the entries of the next one, ...
#pragma unroll 1
  for (;;) {
    pin(lane), pin(walk);
    if (stage < STAGES) {
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    __syncwarp();
    tile = look_up(params, walk, lane, tile);
    cp_async_commit_group();
    if (!tile) break;
    if (RARELY(tile & TILE_BEGINS)) {
      if (!begun) load_q(params, q_map_0, q_map_1, begun_request(walk), place);
      begun = false;
    }
    // Where there is no room yet, the tile before is told of first, and else behind the next
    // copies.
    if (!__all_sync(~0u, mbarrier_test_wait(empty(place.stage), place.phase ^ 1))) {
      cp_async_wait_group<0>();
      release_it();
      mbarrier_wait(empty(place.stage), place.phase ^ 1);
    }
    pin(lane), pin(walk);
    copy_tile(walk, lane, place.stage, tile);
    cp_async_commit_group();
    if (lane == 0) {
      st_shared_u16(live_tokens(place.stage) + warp_in_group() * 2, seen_tokens(tile));
    }
    cp_async_wait_group<2>();
    release_it();
    bad = bad_tokens(tile), stage = place.stage;
    place.advance();
  }
  cp_async_wait_group<0>();
  release_it();
}
