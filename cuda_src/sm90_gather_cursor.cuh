// Which rows of the cache a warp of the gather warpgroup copies next.
//
// Rows come from a list of token indices (sparse) or from the pages of block_table (dense); that is
// all the difference there is. Lane i < 12 of a warp looks after token i of the warp's 12 in a
// tile. Its entry of the list or the table is copied a tile ahead.
//
// A request may have a second list, of tokens of another pool, behind the first one.
//
// In a list, -1 is no token. Any other index, and any page id, outside of the pool is never
// followed: it is refused, and its row becomes NaN, which reaches every row of the request's out;
// or, if the call says so, it is no token either.
#pragma once
#include "sm90_gather_q_e4m3.cuh"

// The tiles of a piece, whose bounds are in tiles of the schedule.
DEVICE int piece_tiles(const Piece& piece) {
  if (piece.begin >= piece.end) return 0;
  const uint32_t end = min((uint32_t)piece.length, (uint32_t)piece.end * TOKENS);
  return (end - piece.begin * TOKENS + TILE - 1) / TILE;
}

// Of each warp, in shared memory: where the rows of its tokens begin in the tile that was looked up
// last, null for what is not to be seen; and the entries of the list or table for the next tile.
DEVICE uint32_t row_pointers() {
  return shared_base() + ROW_POINTERS + warp_in_group() * WARP_TOKENS * 8;
}
DEVICE uint32_t entries() { return shared_base() + ENTRIES + warp_in_group() * WARP_TOKENS * 4; }
DEVICE const uint8_t* row_at(uint32_t pointer) { return (const uint8_t*)ld_shared_u64(pointer); }
// Where the tail of the token is whose row pointer this is.
DEVICE const uint8_t* tail_at(uint32_t pointer) {
  return row_at(pointer + TAIL_POINTERS - ROW_POINTERS);
}
// Copies 16 bytes of a row; of one that is not there, zeros.
DEVICE void copy_16(uint32_t to, const uint8_t* row, uint32_t offset, bool is_there) {
  cp_async_16(to, row + offset, is_there ? 16 : 0);
}

// A word about a tile that was looked up: bits of the warp's tokens that are there, and above them
// bits of those that become NaN. 0: there is no tile.
constexpr uint32_t TILE_IS_THERE = 1u << 31, TILE_BEGINS = 1u << 30, NEXT_BEGINS = 1 << 29;  // a piece
constexpr uint32_t TILE_TOKENS = (1 << WARP_TOKENS) - 1;
DEVICE uint32_t bad_tokens(uint32_t tile) { return tile >> WARP_TOKENS & TILE_TOKENS; }
DEVICE uint32_t seen_tokens(uint32_t tile) { return (tile & TILE_TOKENS) | bad_tokens(tile); }

// Of each warp, in shared memory: the request of the next tile, that of the tile that was looked up
// last, and where the tokens of the second list begin in the first of these.
DEVICE uint32_t walk_request() { return shared_base() + WALKS + warp_in_group() * 16; }
DEVICE uint32_t looked_up_request() { return walk_request() + 4; }
DEVICE uint32_t second_list() { return walk_request() + 8; }

// A lane's walk over its tokens of the tiles of a part. Between tiles it lies in shared memory: a
// tile is looked up in a moment and converted in a while, for which there are few registers.
struct Walk {
  const int* list;  // of the request, or its row of block_table
  uint32_t token;   // of the next tile
  uint32_t end;     // of the piece; 0: there is none
  uint32_t slot;    // number of the lane's token
  DEVICE Walk(uint32_t lane) { slot = min(lane, WARP_TOKENS - 1); }
  DEVICE uint32_t address() const {
    return shared_base() + CURSORS + (warp_in_group() * WARP_TOKENS + slot) * 16;
  }
  DEVICE void load() {
    const Vector4 v = ld_shared_v4(address());
    list = (const int*)((uint64_t)v.y << 32 | v.x), token = v.z, end = v.w;
  }
  DEVICE void store() const {
    st_shared_v4(address(), {(uint32_t)(uint64_t)list, (uint32_t)((uint64_t)list >> 32), token, end});
  }
  // Of the token, from the beginning of its tile.
  DEVICE uint32_t in_tile() const {
    return slot / CHUNK * CHUNK * GROUP_WARPS + warp_in_group() * CHUNK + slot % CHUNK;
  }
  DEVICE bool has_tile() const { return token - in_tile() < end; }
  // To the first request after this one that has something to compute.
  DEVICE void next_piece(const Params& params) {
    const int last = part_of(params).last_request;
    int request = ld_shared_u32(walk_request());
    uint32_t begin = 0;
    end = 0;
    while (begin >= end && request < last) {
      const Piece piece = piece_of(params, ++request);
      begin = piece.begin * TOKENS;
      end = min((uint32_t)piece.length, (uint32_t)piece.end * TOKENS);
    }
    list = params.block_table + request * params.table_stride, token = begin + in_tile();
    __syncwarp();
    if (lane_index() == 0 && request >= 0) {
      st_shared_u32(walk_request(), request);
      if (params.extra_topk > 0) st_shared_u32(second_list(), second_begin(params, request));
    }
    __syncwarp();
  }
  DEVICE static uint32_t page_of(int page_size, int shift, uint32_t token) {
    return shift >= 0 ? token >> shift : token / (uint32_t)page_size;
  }
  DEVICE bool is_second(const Params& params) const {
    return params.extra_topk > 0 && token >= ld_shared_u32(second_list());
  }
  // Starts the copy of the token's entry, as part of the group that is committed next.
  DEVICE void fetch_entry(const Params& params, uint32_t lane) const {
    uint32_t column = token;
    const int* from = list;
    if (params.topk == 0) {
      column = page_of(params.page_size, params.page_shift, column);
    } else if (params.extra_topk > 0) {
      if (is_second(params)) {
        column -= ld_shared_u32(second_list());
        from = params.extra_indices +
               (int)ld_shared_u32(walk_request()) * params.extra_stride;
      } else {
        column = min(column, params.topk - 1);  // what lies between the lists, row() ignores
      }
    }
    if (lane < WARP_TOKENS && token < end) cp_async_4(entries() + slot * 4, from + column);
  }
  // Where the token lies, given its entry; null: it is not to be seen. `tail`: and where its tail
  // does.
  DEVICE const uint8_t* row(const Params& params, uint32_t entry, const uint8_t*& tail,
                            bool& is_bad) const {
    const bool second = is_second(params), is_listed = params.topk > 0;
    const uint32_t page_size = second ? params.extra_page_size : params.page_size;
    const uint32_t pages = second ? params.extra_num_pages : params.num_pages;
    const uint32_t index = is_listed ? entry : token;
    const uint32_t page =
        page_of(page_size, second ? params.extra_page_shift : params.page_shift, index);
    const uint32_t in_pool = is_listed ? page : entry;
    bool is_seen = token < end;
    if (params.extra_topk > 0 && !second) {
      is_seen &= (int)token < first_length(params, ld_shared_u32(walk_request()));
    }
    const bool is_there = in_pool < pages;  // an entry below 0 lies beyond any pool
    is_bad = is_seen && !is_there && !(is_listed && (entry == ~0u || params.outside_is_none));
    const uint8_t* page_begin = (second ? params.extra_cache : params.cache) +
                                in_pool * (second ? params.extra_page_bytes : params.page_bytes);
    const int64_t in_page = index - page * page_size;
    const bool is_read = is_seen && is_there;
    if (TAIL_BYTES) {
      tail = is_read ? page_begin + (int64_t)page_size * ROW_BYTES + in_page * TAIL_BYTES : nullptr;
    }
    return is_read ? page_begin + in_page * ROW_BYTES : nullptr;
  }
  // Reports a token whose entry is bad.
  DEVICE void refuse_token(const Params& params) const {
    const bool second = is_second(params), is_listed = params.topk > 0;
    const List list = !is_listed ? TABLE : second ? SECOND_LIST : FIRST_LIST;
    const int place = !is_listed ? page_of(params.page_size, params.page_shift, token)
                      : second   ? token - ld_shared_u32(second_list())
                                 : token;
    refuse(params, ld_shared_u32(walk_request()), PAGE_ID, list << LIST_SHIFT | place);
  }
};

// Begins at the part's first tile, whose entries are copied. Returns what look_up() returns of a
// tile before.
DEVICE uint32_t begin_walk(const Params& params, uint32_t lane) {
  Walk walk(lane);
  if (lane == 0) st_shared_u32(walk_request(), part_of(params).first_request - 1);
  __syncwarp();
  walk.next_piece(params);
  walk.fetch_entry(params, lane);
  if (lane < WARP_TOKENS) walk.store();
  cp_async_commit_group();
  return NEXT_BEGINS;
}

// From the entries of the next tile, which have landed, to the rows of its tokens; and on to the
// tile after it. Returns a word about it; `before` is the one about the tile before it.
DEVICE uint32_t look_up(const Params& params, uint32_t lane, uint32_t before) {
  Walk walk(lane);
  walk.load();
  const uint32_t entry = ld_shared_u32(entries() + walk.slot * 4);
  if (!walk.has_tile()) {  // and there is none behind it
    if (lane < WARP_TOKENS) st_shared_u64(row_pointers() + lane * 8, 0);
    __syncwarp();
    return 0;
  }
  const uint8_t* tail = nullptr;
  bool is_bad;
  const uint8_t* row = walk.row(params, entry, tail, is_bad);
  is_bad &= lane < WARP_TOKENS;
  const uint32_t live = __ballot_sync(~0u, row != nullptr) & TILE_TOKENS;
  const uint32_t bad = __ballot_sync(~0u, is_bad);
  if (bad && is_bad) walk.refuse_token(params);
  if (lane < WARP_TOKENS) {
    const uint32_t pointer = row_pointers() + lane * 8;
    st_shared_u64(pointer, (uint64_t)row);
    if (TAIL_BYTES) st_shared_u64(pointer + TAIL_POINTERS - ROW_POINTERS, (uint64_t)tail);
  }
  uint32_t tile = TILE_IS_THERE | bad << WARP_TOKENS | live;
  if (before & NEXT_BEGINS) {
    tile |= TILE_BEGINS;
    if (lane == 0) st_shared_u32(looked_up_request(), ld_shared_u32(walk_request()));
  }
  walk.token += TILE;
  if (!walk.has_tile()) {
    walk.next_piece(params);
    tile |= NEXT_BEGINS;
  }
  walk.fetch_entry(params, lane);
  if (lane < WARP_TOKENS) walk.store();
  __syncwarp();
  return tile;
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
