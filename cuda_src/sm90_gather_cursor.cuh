// Which rows of the cache a warp of the gather warpgroup copies next.
//
// Rows come from a list of token indices (sparse) or from the pages of block_table (dense); that is
// all the difference there is. Two pairs of warps take turns with the tiles, and a warp has half of
// a tile: each of 24 lanes looks after a token, whose entry of the list or table is copied ahead.
//
// A request may have a second list, of tokens of another pool, behind the first one.
//
// In a list, -1 is no token. Any other index, and any page id, outside of the pool is never
// followed: it is refused, and its row becomes NaN, which reaches every row of the request's out;
// or, if the call says so, it is no token either.
#pragma once
#include "sm90_pieces.cuh"

// The tiles of a piece, whose bounds are in tiles of the schedule.
DEVICE int piece_tiles(const Piece& piece) {
  if (piece.begin >= piece.end) return 0;
  const uint32_t end = min((uint32_t)piece.length, (uint32_t)piece.end * TOKENS);
  return (end - piece.begin * TOKENS + TILE - 1) / TILE;
}

// What each warp has in shared memory, from this address on: where the rows of its tokens begin
// that were looked up last, null for what is not to be seen; the entries of the list or table for
// those that come next; and the walk.
DEVICE uint32_t walk_address() { return shared_base() + WALKS + warp_in_group() * WALK_BYTES; }

// The walk of a warp over its halves of the pair's tiles: lane i < 24 has their token i. Between
// tiles it lies in shared memory, since the role has 24 registers a thread.
template <bool IsPlain>
struct Walk {
  uint32_t at, lane;
  uint32_t slot;        // number of the lane's token, of 24
  const int* list;      // of the request, or its row of block_table
  uint32_t begin, end;  // the first token of the next tile, and the end of the piece; 0: no tile
  DEVICE Walk(uint32_t walk, uint32_t of_lane) {
    at = walk, lane = of_lane, slot = min(lane, HALF_TILE - 1);
  }
  DEVICE void load() {
    const Vector4 v = ld_shared_v4(at + NEXT_TILE);
    list = (const int*)((uint64_t)v.y << 32 | v.x), begin = v.z, end = v.w;
  }
  DEVICE void store() const {
    if (lane != 0) return;
    st_shared_v4(at + NEXT_TILE,
                 {(uint32_t)(uint64_t)list, (uint32_t)((uint64_t)list >> 32), begin, end});
  }
  DEVICE uint32_t token() const { return begin + warp_in_group() % PAIR_WARPS * HALF_TILE + slot; }
  DEVICE uint32_t entry() const { return at + ENTRIES + slot * 4; }
  DEVICE int request() const { return ld_shared_u32(at + REQUEST); }
  DEVICE uint32_t second_list() const { return ld_shared_u32(at + SECOND_LIST_AT); }
  DEVICE bool has_token(uint32_t token) const { return lane < HALF_TILE && token < end; }

  // To the first request after this one that has something to compute.
  DEVICE void next_piece(const Params& params) {
    const int last = part_of(params).last_request;
    int next = request();
    begin = end = 0;
    while (begin >= end && next < last) {
      const Piece piece = piece_of(params, ++next);
      begin = piece.begin * TOKENS;
      end = min((uint32_t)piece.length, (uint32_t)piece.end * TOKENS);
    }
    list = params.block_table + next * params.table_stride;
    __syncwarp();
    if (lane == 0 && next >= 0) {
      st_shared_u32(at + REQUEST, next);
      if (params.extra_topk > 0) st_shared_u32(at + SECOND_LIST_AT, second_begin(params, next));
    }
    __syncwarp();
  }
  DEVICE static uint32_t page_of(int page_size, int shift, uint32_t token) {
    return IsPlain || shift >= 0 ? token >> shift : token / (uint32_t)page_size;
  }
  DEVICE bool is_second(const Params& params, uint32_t token) const {
    return !IsPlain && params.extra_topk > 0 && token >= second_list();
  }
  // Starts the copy of the entry of the lane's token.
  DEVICE void fetch_entry(const Params& params, uint32_t column) const {
    if (!has_token(column)) return;
    const int* from = list;
    if (params.topk == 0) {
      column = page_of(params.page_size, params.page_shift, column);
    } else if (!IsPlain && params.extra_topk > 0) {
      if (is_second(params, column)) {
        column -= second_list();
        from = params.extra_indices + request() * params.extra_stride;
      } else {
        column = min(column, params.topk - 1);  // what lies between the lists, row() ignores
      }
    }
    cp_async_4(entry(), from + column);
  }

  struct Row {
    const uint8_t* at;  // null: not to be seen
    bool is_seen;       // a token counts, be it there or not
  };
  // Where a token lies, given its entry.
  DEVICE Row row(const Params& params, uint32_t token, uint32_t entry) const {
    const bool second = is_second(params, token), is_listed = params.topk > 0;
    const uint32_t page_size = second ? params.extra_page_size : params.page_size;
    const uint32_t pages = second ? params.extra_num_pages : params.num_pages;
    const uint32_t index = is_listed ? entry : token;
    const uint32_t page =
        page_of(page_size, second ? params.extra_page_shift : params.page_shift, index);
    const uint32_t in_pool = is_listed ? page : entry;
    const uint32_t in_page = IsPlain ? index & (page_size - 1) : index - page * page_size;
    bool is_seen = has_token(token);
    if (!IsPlain && params.extra_topk > 0 && !second) {
      is_seen &= (int)token < first_length(params, request());
    }
    const uint8_t* page_begin = (second ? params.extra_cache : params.cache);
    if (IsPlain) {
      page_begin += (uint64_t)in_pool * (uint32_t)params.page_bytes;
    } else {
      page_begin += in_pool * (second ? params.extra_page_bytes : params.page_bytes);
    }
    const bool is_there = is_seen && in_pool < pages;  // an entry below 0 lies beyond any pool
    const uint8_t* row = page_begin + in_page * (uint64_t)ROW_BYTES;
    return {is_there ? row : nullptr, is_seen};
  }
  // Whether the entry of a token that counts and is not there is a bad one, which is reported.
  DEVICE bool is_bad(const Params& params, uint32_t token, uint32_t entry) const {
    const bool is_listed = params.topk > 0, second = is_second(params, token);
    if (is_listed && (entry == ~0u || params.outside_is_none)) return false;
    const List list = !is_listed ? TABLE : second ? SECOND_LIST : FIRST_LIST;
    const int place = !is_listed ? page_of(params.page_size, params.page_shift, token)
                      : second   ? token - second_list()
                                 : token;
    refuse(params, request(), PAGE_ID, list << LIST_SHIFT | place);
    return true;
  }

  // Begins at the part's tile of this number. False: there is none.
  DEVICE bool begin_at(const Params& params, uint32_t tile) {
    if (lane == 0) st_shared_u32(at + REQUEST, part_of(params).first_request - 1);
    __syncwarp();
    begin = tile * TILE, end = 0;
    return settle(params);
  }
  // To the tile that begins at token `begin` of the piece, or behind it in a later one. Starts the
  // copy of its entries. False: there is none.
  DEVICE bool settle(const Params& params) {
    while (begin >= end) {
      const uint32_t tiles_behind = (begin - end) / TILE;
      next_piece(params);
      if (end == 0) break;
      begin += tiles_behind * TILE;
    }
    fetch_entry(params, token());
    store();
    __syncwarp();
    return end > 0;
  }
  // From the entries of the tile, which have landed, to its rows, to SEEN, the tokens that count,
  // and to BAD, those of them that become NaN. Then on to the next tile. False: there is no tile.
  DEVICE bool look_up(const Params& params) {
    load();
    if (RARELY(begin >= end)) return false;
    const uint32_t of_token = ld_shared_u32(entry()), now = token();
    const Row found = row(params, now, of_token);
    const bool missing = found.is_seen && found.at == nullptr;
    uint32_t seen = __ballot_sync(~0u, found.at != nullptr), bad = 0;
    if (RARELY(__any_sync(~0u, missing))) {
      bad = __ballot_sync(~0u, missing && is_bad(params, now, of_token));
      seen |= bad;
    }
    if (lane < HALF_TILE) st_shared_u64(at + ROW_POINTERS + lane * 8, (uint64_t)found.at);
    if (lane == 0) {
      st_shared_u32(at + SEEN, seen);
      st_shared_u32(at + BAD, bad);
    }
    __syncwarp();
    begin += PAIRS * TILE;
    settle(params);
    return true;
  }
};

DEVICE bool look_up(const Params& params, uint32_t walk, uint32_t lane) {
  if (RARELY(!is_plain(params))) return Walk<false>(walk, lane).look_up(params);
  return Walk<true>(walk, lane).look_up(params);
}
