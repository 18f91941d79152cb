// The gather role over an FP8 cache, of warpgroup 3: rows are copied to the warp's staging memory
// as they are, 16 bytes a lane, and converted in the ring. As soon as two rows are in registers,
// the same rows of the next tile are on their way to where they were, be it of the next piece.
//
// One warp a scheduler does this, next to others that mostly wait. So what it takes is its number
// of instructions, and their latency. Loads come first, and nothing is kept that is computed again
// in an instruction or two: there are 40 registers.
#pragma once
#include "sm90_gather_convert.cuh"
#include "sm90_gather_walk_fp8.cuh"

constexpr int STAGED_CHUNK = CHUNK * STAGED_ROW;
constexpr int CHUNK_PITCH = CHUNK * GROUP_WARPS * 128;  // in a stage, to the next of the warp

// What a lane copies, reads and writes, in each chunk of the warp: addresses in the warp's first
// row of staging, and bytes from the beginning of a stage.
//
// Latent columns: of two tokens at a time, a lane has 16 in each of two column blocks, that of its
// `pair` and the next. Every fourth lane is at the next token: the swizzle puts what eight lanes
// write into eight different places then. A lane reads what it copied itself, but for scales.
struct Lane {
  uint32_t index;
  uint32_t walk;               // walk_address()
  uint32_t latent, latent_to;  // with the token
  uint32_t scales;             // with the token, of its first column block
  uint32_t rotary_at, rotary_at_to;  // with the token, where they are no e4m3
  DEVICE Lane() {
    index = lane_index();
    const uint32_t warp = warp_in_group(), first_row = warp * CHUNK;
    const uint32_t staging = shared_base() + STAGING + warp * WARP_TOKENS * STAGED_ROW;
    walk = walk_address();
    latent = staging + odd() * STAGED_ROW + latent_column();
    latent_to = pair() * 2 * BLOCK_BYTES + (first_row + odd()) * 128 +
                ((((index & 3) * 2) ^ (first_row & 4) ^ odd()) << 4);
    scales = staging + odd() * STAGED_ROW + SCALES + pair() * 2 / SCALE_BLOCKS * SCALE_BYTES;
    rotary_at = staging + rotary_token() * STAGED_ROW + ROTARY + rotary_column();
    rotary_at_to = ROTARY_BLOCK * BLOCK_BYTES + (first_row + rotary_token()) * 128 +
                   (((index & 7) ^ ((first_row + rotary_token()) & 7)) << 4);
  }
  // At the beginning of a chunk: what follows from these numbers is computed again.
  DEVICE void forget() { pin(index), pin(walk), pin(latent), pin(latent_to); }

  DEVICE uint32_t odd() const { return index >> 2 & 1; }
  DEVICE uint32_t pair() const { return index >> 3; }  // of column blocks
  DEVICE uint32_t latent_column() const { return pair() * 128 + (index & 3) * 16; }  // in a row
  // Whether its 16 bytes of one of its column blocks are latent columns.
  DEVICE bool has_latent(int block) const { return !ROTARY_IN_V || block == 0 || index < 24; }

  // Rotary columns: 16 bytes of one token. Those of e4m3 are 16 lanes', of tokens odd() and
  // odd() + 2.
  DEVICE bool has_rotary() const { return !IS_E4M3_ROTARY || index < 16; }
  DEVICE uint32_t rotary_token() const { return IS_E4M3_ROTARY ? index >> 2 & 3 : index >> 3; }
  DEVICE uint32_t rotary_column() const { return (index & (IS_E4M3_ROTARY ? 3 : 7)) * 16; }
  DEVICE uint32_t rotary() const {
    if (!IS_E4M3_ROTARY) return rotary_at;
    return latent + ROTARY + pair() * (2 * STAGED_ROW - 128);
  }
  DEVICE uint32_t rotary_to(uint32_t stage) const {
    if (!IS_E4M3_ROTARY) return stage + rotary_at_to;
    return ((stage + latent_to) ^ pair() << 5) + ROTARY_BLOCK * BLOCK_BYTES -
           pair() * (2 * BLOCK_BYTES - 2 * 128);
  }
};

// The copy of rows of the tile that was looked up: `row` and `row` + 1 of a chunk, or the rest of
// all four. It takes two steps, with other work between them: the second one waits for the load of
// where rows begin.
struct Copy {
  const uint8_t* from;
  DEVICE void look(const Lane& lane, uint32_t tile, int chunk, int row) {
    from = row_at(lane.walk + pointers_at(tile) + ROW_POINTERS +
                  (chunk * CHUNK + row + lane.odd()) * 8);
  }
  DEVICE void start(const Lane& lane, uint32_t tile, int chunk, int row) const {
    const uint32_t to = lane.latent + chunk * STAGED_CHUNK + row * STAGED_ROW;
    const bool is_there = tile >> (chunk * CHUNK + row) >> lane.odd() & 1;
    copy_16(to, from, lane.latent_column(), is_there);
    if (lane.has_latent(1)) copy_16(to + 64, from, lane.latent_column() + 64, is_there);
  }
  // Rotary columns and scales.
  DEVICE void look_rest(const Lane& lane, uint32_t tile, int chunk) {
    from = row_at(lane.walk + pointers_at(tile) + ROW_POINTERS +
                  (chunk * CHUNK + lane.rotary_token()) * 8);
  }
  DEVICE void start_rest(const Lane& lane, uint32_t tile, int chunk) const {
    const uint32_t to = lane.rotary() + chunk * STAGED_CHUNK;
    const bool is_there = tile >> (chunk * CHUNK) >> lane.rotary_token() & 1;
    if (lane.has_rotary()) copy_16(to, from, ROTARY + lane.rotary_column(), is_there);
    if (HAS_SCALES && lane.rotary_column() == 0) {
      const uint32_t scales = to - ROTARY + SCALES;
      if (TAIL_BYTES) {
        const uint32_t tail = (chunk * CHUNK + lane.rotary_token()) * 8;
        cp_async_8(scales, row_at(lane.walk + pointers_at(tile) + TAIL_POINTERS + tail),
                   is_there ? 8 : 0);
      } else {
        copy_16(scales, from, SCALES, is_there);
      }
    }
  }
};

// Latent columns of two tokens, tokens `row` and `row` + 1 of a chunk, in registers: of one of the
// two column blocks of a lane.
struct Latent {
  Vector4 v;
  DEVICE Latent(const Lane& lane, int chunk, int row, int block) {
    v = ld_shared_v4(lane.latent + chunk * STAGED_CHUNK + row * STAGED_ROW + block * 64);
  }
  // Converts them into a stage.
  DEVICE void store(const Lane& lane, uint32_t stage, int chunk, int row, int block,
                    ColumnScale scale) const {
    const uint32_t to = ((stage + lane.latent_to) ^ (row & 2) << 4);
    const int further = chunk * CHUNK_PITCH + row * 128 + block * BLOCK_BYTES;
    const bool wanted = lane.has_latent(block);
    convert(to + further, v.x, v.y, scale, wanted);
    convert((to ^ 16) + further, v.z, v.w, scale, wanted);
  }
};
// Their scales.
struct Scales {
  StagedScales of_both;
  DEVICE Scales(const Lane& lane, int chunk, int row) {
    of_both = load_scales(lane.scales + chunk * STAGED_CHUNK + row * STAGED_ROW);
  }
  DEVICE ColumnScale operator[](int block) const { return scale_of(of_both, block); }
};

// Converts the rotary columns of a chunk, 16 bytes of them a lane, into a stage.
DEVICE void store_rotary(const Lane& lane, const Vector4& x, uint32_t stage, int chunk) {
  const uint32_t to = lane.rotary_to(stage) + chunk * CHUNK_PITCH;
  if (!IS_E4M3_ROTARY) {
    st_shared_v4(to, {product_from_bf16(x.x), product_from_bf16(x.y), product_from_bf16(x.z),
                      product_from_bf16(x.w)});
  } else {
    convert(to, x.x, x.y, 0, lane.has_rotary());
    convert(to ^ 16, x.z, x.w, 0, lane.has_rotary());
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

// Starts the copies of a tile that was looked up, a group for each chunk.
DEVICE void copy_tile(const Lane& lane, uint32_t tile) {
  Copy copy;
#pragma unroll 1
  for (int chunk = 0; chunk < TILE_CHUNKS; ++chunk) {
#pragma unroll
    for (int row = 0; row < CHUNK; row += 2) {
      copy.look(lane, tile, chunk, row);
      copy.start(lane, tile, chunk, row);
    }
    copy.look_rest(lane, tile, chunk);
    copy.start_rest(lane, tile, chunk);
    cp_async_commit_group();
  }
}

// Loads the rows of Q for a request into the next two stages, as they become empty. Rows of e4m3 the
// softmax warpgroup takes itself.
DEVICE void load_q(const Params& params, const TensorMap& q_map_0, const TensorMap& q_map_1,
                   int request, Place& place) {
#pragma unroll 1
  for (int i = 0; i < Q_STAGES; ++i) {
    mbarrier_wait(empty(place.stage), place.phase ^ 1);
    if (!QUERY_IS_E4M3 && uniform(warp_in_group()) == 0 && elect_sync()) {
      const QRows at(params, request);
      const int blocks = i ? COLUMN_BLOCKS - Q_FIRST_BLOCKS : Q_FIRST_BLOCKS;
      mbarrier_expect_tx(full(place.stage), blocks * Q_BLOCK_BYTES);
      cp_async_bulk_tensor_5d(stage_address(place.stage), i ? q_map_1 : q_map_0, full(place.stage),
                              0, at.first, i * Q_FIRST_BLOCKS, at.position, at.of_call,
                              createpolicy_evict_first());
    }
    __syncwarp();
    if (arrives()) mbarrier_arrive(full(place.stage));
    place.advance();
  }
}

DEVICE void gather_role(const Params& params, const TensorMap& q_map_0, const TensorMap& q_map_1) {
  Lane lane;
  Place place;
  uint32_t next = begin_walk(params, lane.walk, lane.index);
  cp_async_commit_group();
  if (!next) return;
  load_q(params, q_map_0, q_map_1, ld_shared_u32(lane.walk + REQUEST), place);
  cp_async_wait_group<0>();
  __syncwarp();
  next = look_up(params, lane.walk, lane.index, next) & ~TILE_BEGINS;  // its Q is on the way
  // Groups: the chunks of a tile; the entries of the tile after it are in that of the first.
  copy_tile(lane, next);
#pragma unroll 1
  while (next) {
    const uint32_t tile = next;
    if (RARELY(tile & TILE_BEGINS)) {
      load_q(params, q_map_0, q_map_1, begun_request(lane.walk), place);
    }
    uint32_t stage = stage_address(place.stage);
#pragma unroll
    for (int chunk = 0; chunk < TILE_CHUNKS; ++chunk) {
      Copy copy;
      lane.forget(), pin(stage);
      cp_async_wait_group<TILE_CHUNKS - 1>();
      __syncwarp();
      if (chunk == 0) {
        // After the release of the tile before: nobody waits for this.
        next = look_up(params, lane.walk, lane.index, tile);
        mbarrier_wait(empty(place.stage), place.phase ^ 1);
        if (lane.index == 0) {
          st_shared_u16(live_tokens(place.stage) + warp_in_group() * 2, seen_tokens(tile));
        }
      }
      copy.look(lane, next, chunk, 0);
      const Scales front(lane, chunk, 0);
      const Latent a(lane, chunk, 0, 0), b(lane, chunk, 0, 1);
      copy.start(lane, next, chunk, 0);
      const Latent c(lane, chunk, 2, 0);
      a.store(lane, stage, chunk, 0, 0, front[0]);
      copy.look(lane, next, chunk, 2);
      const Latent d(lane, chunk, 2, 1);
      const Scales back(lane, chunk, 2);
      b.store(lane, stage, chunk, 0, 1, front[1]);
      copy.start(lane, next, chunk, 2);
      Vector4 rotary = {0, 0, 0, 0};
      if (lane.has_rotary()) rotary = ld_shared_v4(lane.rotary() + chunk * STAGED_CHUNK);
      c.store(lane, stage, chunk, 2, 0, back[0]);
      copy.look_rest(lane, next, chunk);
      d.store(lane, stage, chunk, 2, 1, back[1]);
      __syncwarp();  // all have read their scales
      copy.start_rest(lane, next, chunk);
      cp_async_commit_group();
      store_rotary(lane, rotary, stage, chunk);
    }
    if (RARELY(bad_tokens(tile) != 0)) poison(stage, bad_tokens(tile));
    release(full(place.stage));
    place.advance();
  }
  cp_async_wait_group<0>();
}
