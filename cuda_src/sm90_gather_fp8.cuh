// The gather role over an FP8 cache, of warpgroup 3: rows are copied to the warp's staging memory
// as they are, 16 bytes a lane, and converted in the ring. As soon as a chunk is in
// registers, the same chunk of the next tile is on its way to where it was, be it of the next
// piece.
//
// One warp a scheduler does this, next to others that mostly wait. So what it takes is its number
// of instructions, and their latency: addresses are computed once, loads come first.
#pragma once
#include "sm90_gather_convert.cuh"

constexpr int STAGED_CHUNK = CHUNK * STAGED_ROW;
constexpr int CHUNK_PITCH = CHUNK * GROUP_WARPS * 128;  // in a stage, to the next of the warp

// What a lane reads and writes, in each chunk of the warp: bytes from the warp's first row of
// staging, and from the beginning of a stage.
//
// Latent columns: a lane has 16 of two tokens at a time, in each half. Every fourth lane is at the
// next token: the swizzle puts what eight lanes write into eight different places then.
struct Lane {
  uint32_t index;
  uint32_t staging, pointers;  // addresses of the warp's first row, and of its first row pointer
  uint32_t latent, latent_to;  // with the token
  uint32_t rotary, rotary_to;  // with the token
  DEVICE Lane() {
    index = lane_index();
    const uint32_t warp = warp_in_group(), first_row = warp * CHUNK;
    staging = shared_base() + STAGING + warp * WARP_TOKENS * STAGED_ROW;
    pointers = row_pointers();
    const uint32_t odd = index >> 2 & 1, block = index >> 3;
    latent = staging + odd * STAGED_ROW + (block * 4 + (index & 3)) * 16;
    latent_to = block * BLOCK_BYTES + (first_row + odd) * 128 +
                ((((index & 3) * 2) ^ (first_row & 4) ^ odd) << 4);
    const uint32_t column = rotary_column() / (IS_E4M3_ROTARY ? 8 : 16);
    rotary = staging + rotary_token() * STAGED_ROW + ROTARY + rotary_column();
    rotary_to = ROTARY_BLOCK * BLOCK_BYTES + (first_row + rotary_token()) * 128 +
                ((column ^ ((first_row + rotary_token()) & 7)) << 4);
  }
  DEVICE uint32_t rotary_token() const { return IS_E4M3_ROTARY ? index >> 2 & 3 : index >> 3; }
  // In bytes of a row of the cache.
  DEVICE uint32_t rotary_column() const { return (index & (IS_E4M3_ROTARY ? 3 : 7)) * 16; }
};

// Starts the copy of a chunk of the tile that was looked up.
DEVICE void copy_chunk(const Lane& lane, int chunk) {
  const uint32_t from = lane.pointers + chunk * CHUNK * 8;
  const uint32_t to = lane.staging + chunk * STAGED_CHUNK;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    if (LATENT_LANES < 32 && lane.index >= LATENT_LANES) continue;
    copy_16(to + i * STAGED_ROW + lane.index * 16, row_at(from + i * 8), lane.index * 16);
  }
  if (!IS_E4M3_ROTARY || lane.index < 16) {
    copy_16(lane.rotary + chunk * STAGED_CHUNK, row_at(from + lane.rotary_token() * 8),
            ROTARY + lane.rotary_column());
  }
  if (HAS_SCALES && lane.index < CHUNK) {
    const uint32_t scales = to + lane.index * STAGED_ROW + SCALES, row = from + lane.index * 8;
    if (TAIL_BYTES) {
      copy_tail(scales, row);
    } else {
      copy_16(scales, row_at(row), SCALES);
    }
  }
}

// The latent columns of four rows, in registers.
struct Latent {
  Vector4 v[4];
  ColumnScale scale;
  DEVICE Latent(const Lane& lane, int chunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = ld_shared_v4(lane.latent + chunk * STAGED_CHUNK + (i >> 1) * 2 * STAGED_ROW +
                          (i & 1) * 256);
    }
    scale = load_scale(lane.staging + chunk * STAGED_CHUNK, lane.index);
  }
  // Converts them into a stage.
  DEVICE void store(const Lane& lane, uint32_t stage, int chunk) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t block = (i & 1) * 4 + (lane.index >> 3);
      const ColumnScale of_block =
          scale_of_block(scale, (i >> 1) * 2 + (lane.index >> 2 & 1), block);
      if (ROTARY_IN_V && block == ROTARY_BLOCK) continue;
      const uint32_t to = stage + chunk * CHUNK_PITCH + (lane.latent_to ^ (i >> 1) << 5) +
                          (i >> 1) * 256 + (i & 1) * 4 * BLOCK_BYTES;
      convert(to, v[i].x, v[i].y, of_block);
      convert(to ^ 16, v[i].z, v[i].w, of_block);
    }
  }
};

// Converts the rotary columns of a chunk, 16 bytes of them a lane, into a stage.
DEVICE void store_rotary(const Lane& lane, const Vector4& x, uint32_t stage, int chunk) {
  const uint32_t to = stage + chunk * CHUNK_PITCH + lane.rotary_to;
  if (!IS_E4M3_ROTARY) {
    st_shared_v4(to, {product_from_bf16(x.x), product_from_bf16(x.y), product_from_bf16(x.z),
                      product_from_bf16(x.w)});
  } else if (lane.index < 16) {
    convert(to, x.x, x.y, 0);
    convert(to ^ 16, x.z, x.w, 0);
  }
}

// The latent columns of bad tokens, bits of the warp's twelve, become NaN in a stage.
DEVICE void poison(uint32_t stage, uint32_t bad) {
  __syncwarp();
  for (; bad; bad &= bad - 1) {
    const uint32_t bit = __ffs(bad) - 1, lane = lane_index();
    const uint32_t row = (bit / CHUNK * GROUP_WARPS + warp_in_group()) * CHUNK + bit % CHUNK;
    const uint32_t to = stage + (lane >> 3) * BLOCK_BYTES + row * 128 + (lane & 7) * 16;
    st_shared_v4(to, {0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff});
    st_shared_v4(to + 4 * BLOCK_BYTES, {0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff});
  }
}

DEVICE void gather_role(const Params& params, const TensorMap& q_map_0, const TensorMap& q_map_1) {
  begin_walk(params);
  const Lane lane;
  Place place;
  // The first two rounds have no tile to convert: they only look up, and copy.
#pragma unroll 1
  for (;;) {
    const Tile tile;
    const bool has_tile = tile.request >= 0;
    if (is_done(params, tile)) break;
    if (has_tile) {
      if (tile.begins) load_q(params, q_map_0, q_map_1, tile.request, place);
      mbarrier_wait(empty(place.stage), place.phase ^ 1);
      if (lane.index == 0) {
        st_shared_u16(live_tokens(place.stage) + warp_in_group() * 2, tile.seen);
      }
    }
    const uint32_t stage = stage_address(place.stage);
#pragma unroll
    for (int chunk = 0; chunk < TILE_CHUNKS; ++chunk) {
      cp_async_wait_group<TILE_CHUNKS - 1>();
      __syncwarp();
      if (chunk == 0) look_up(params);  // the next tile
      const Vector4 rotary = ld_shared_v4(lane.rotary + chunk * STAGED_CHUNK);
      const Latent latent(lane, chunk);
      if (has_tile) store_rotary(lane, rotary, stage, chunk);
      __syncwarp();  // all have read the chunk
      if (Tile::is_there()) copy_chunk(lane, chunk);
      cp_async_commit_group();
      if (has_tile) latent.store(lane, stage, chunk);
    }
    if (has_tile) {
      if (tile.bad) poison(stage, tile.bad);
      release(full(place.stage));
      place.advance();
    }
  }
  cp_async_wait_group<0>();
}
