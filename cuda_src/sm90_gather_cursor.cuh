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

constexpr uint32_t CHUNK_MASK = (1 << CHUNK) - 1;

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
// Where the tail of the token is whose row pointer this is, and the copy of it.
DEVICE void copy_tail(uint32_t to, uint32_t pointer) {
  const uint8_t* tail = row_at(pointer + TAIL_POINTERS - ROW_POINTERS);
  cp_async_8(to, tail, tail ? 8 : 0);
}
// Copies 16 bytes of a row; of a null one, zeros.
DEVICE void copy_16(uint32_t to, const uint8_t* row, uint32_t offset) {
  cp_async_16(to, row + offset, row ? 16 : 0);
}

// The walk over the tiles of a part. It lies in shared memory, since a tile is looked up in a
// moment and converted in a while, for which there are few registers.
struct Walk {
  int request, token, end;  // the next tile to look up; token >= end: there is none yet
  int second;               // where the tokens of the second list begin in the request
  DEVICE static uint32_t address() { return shared_base() + CURSORS + warp_in_group() * 32; }
  DEVICE void load() {
    const Vector4 v = ld_shared_v4(address());
    request = uniform(v.x), token = uniform(v.y), end = uniform(v.z), second = uniform(v.w);
  }
  DEVICE void store() const {
    if (lane_index() != 0) return;
    st_shared_v4(address(), {(uint32_t)request, (uint32_t)token, (uint32_t)end, (uint32_t)second});
  }

  DEVICE int my_token() const {
    const int lane = lane_index();
    return token + (lane / CHUNK) * CHUNK * GROUP_WARPS + warp_in_group() * CHUNK + lane % CHUNK;
  }
  DEVICE bool has_token() const { return lane_index() < WARP_TOKENS && my_token() < end; }
  // To the first request after `request` that has something to compute.
  DEVICE void next_piece(const Params& params) {
    const int last = uniform(part_of(params).last_request);
    while (uniform(token >= end && request < last)) {
      const Piece piece = piece_of(params, ++request);
      token = uniform(piece.begin * TOKENS);
      end = uniform(min((uint32_t)piece.length, (uint32_t)piece.end * TOKENS));
    }
    if (params.extra_topk > 0) second = uniform(second_begin(params, max(request, 0)));
  }
  // Starts the copy of the entries of the next tile, as part of the group that is committed next.
  DEVICE void fetch_entries(const Params& params) const {
    if (!has_token()) return;
    int column = my_token();
    const int* list = params.block_table + request * params.table_stride;
    if (params.topk == 0) {
      column = page_of(params.page_size, params.page_shift, column);
    } else if (column >= second) {
      column -= second, list = params.extra_indices + request * params.extra_stride;
    } else if (params.extra_topk > 0) {
      column = min(column, params.topk - 1);  // what lies between the lists, row() ignores
    }
    cp_async_4(entries() + lane_index() * 4, list + column);
  }
  DEVICE static uint32_t page_of(int page_size, int shift, uint32_t token) {
    return shift >= 0 ? token >> shift : token / (uint32_t)page_size;
  }
  // Where this lane's token lies, given its entry; null: it is not to be seen. `tail`: and where
  // its tail does.
  DEVICE const uint8_t* row(const Params& params, int entry, const uint8_t*& tail,
                            bool& is_bad) const {
    const int mine = my_token();
    const bool is_second = mine >= second, is_listed = params.topk > 0;
    const uint32_t page_size = is_second ? params.extra_page_size : params.page_size;
    const uint32_t pages = is_second ? params.extra_num_pages : params.num_pages;
    const uint32_t index = is_listed ? entry : mine;
    const uint32_t page =
        page_of(page_size, is_second ? params.extra_page_shift : params.page_shift, index);
    const uint32_t in_pool = is_listed ? page : entry;
    if (params.extra_topk > 0 && !is_second && mine >= first_length(params, request)) {
      return nullptr;
    }
    if (in_pool >= pages || entry < 0) {
      is_bad = !(is_listed && (entry == -1 || params.outside_is_none));
      if (is_bad) {
        const List list = !is_listed ? TABLE : is_second ? SECOND_LIST : FIRST_LIST;
        const int place = !is_listed ? page : is_second ? mine - second : mine;
        refuse(params, request, PAGE_ID, list << LIST_SHIFT | place);
      }
      return nullptr;
    }
    const uint8_t* page_begin = (is_second ? params.extra_cache : params.cache) +
                                in_pool * (is_second ? params.extra_page_bytes : params.page_bytes);
    const int64_t in_page = index - page * page_size;
    if (TAIL_BYTES) tail = page_begin + (int64_t)page_size * ROW_BYTES + in_page * TAIL_BYTES;
    return page_begin + in_page * ROW_BYTES;
  }
};

// The tile that was looked up last. It lies behind the walk.
struct Tile {
  int request;         // -1: there is none, as at first, and in the end
  bool begins;         // it is the first of its piece
  uint32_t seen, bad;  // bits of the warp's tokens: what counts; what of it becomes NaN
  DEVICE static uint32_t address() { return Walk::address() + 16; }
  DEVICE Tile() {
    const Vector4 v = ld_shared_v4(address());
    request = uniform(v.x), begins = uniform(v.y), seen = uniform(v.z), bad = uniform(v.w);
  }
  DEVICE static bool is_there() { return uniform(ld_shared_u32(address())) >= 0; }
};

DEVICE void begin_walk(const Params& params) {
  Walk walk;
  walk.request = uniform(part_of(params).first_request) - 1;
  walk.token = walk.end = 0, walk.second = 0x7fffffff;
  walk.store();
  if (lane_index() == 0) st_shared_v4(Tile::address(), {~0u, 0, 0, 0});
  __syncwarp();
}
// Neither a tile, nor a next one.
DEVICE bool is_done(const Params& params, const Tile& tile) {
  if (tile.request >= 0) return false;
  Walk walk;
  walk.load();
  return walk.token >= walk.end && walk.request >= uniform(part_of(params).last_request);
}

// From the entries of the next tile, which have landed, to rows; and on to the tile after it. At
// first there is no next tile.
DEVICE void look_up(const Params& params) {
  Walk walk;
  walk.load();
  const int request = walk.token < walk.end ? walk.request : -1;
  const bool begins = request >= 0 && uniform(ld_shared_u32(Tile::address())) != request;
  const uint8_t *row = nullptr, *tail = nullptr;
  bool is_bad = false;
  if (walk.has_token()) {
    row = walk.row(params, ld_shared_u32(entries() + lane_index() * 4), tail, is_bad);
  }
  const uint32_t live = __ballot_sync(~0u, row != nullptr), bad = __ballot_sync(~0u, is_bad);
  if (lane_index() < WARP_TOKENS) {
    const uint32_t pointer = row_pointers() + lane_index() * 8;
    st_shared_u64(pointer, (uint64_t)row);
    if (TAIL_BYTES) st_shared_u64(pointer + TAIL_POINTERS - ROW_POINTERS, (uint64_t)tail);
  }
  if (lane_index() == 0) {
    st_shared_v4(Tile::address(), {(uint32_t)request, begins, live | bad, bad});
  }
  walk.token += TILE;
  if (uniform(walk.token >= walk.end)) walk.next_piece(params);
  walk.fetch_entries(params);
  walk.store();
  __syncwarp();
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
