// Which rows of an FP8 cache a warp of the gather warpgroup copies next: its 12 tokens of a tile,
// and of the tile after it. Two tiles of a piece are looked up at once, so half as often.
#pragma once
#include "sm90_gather_cursor.cuh"

// A word about a tile that was looked up: bits of the warp's tokens that are there, and above them
// bits of those that become NaN. 0: there is no tile.
constexpr uint32_t TILE_IS_THERE = 1u << 31, TILE_BEGINS = 1u << 30;  // a piece
constexpr uint32_t NEXT_BEGINS = 1 << 29;                             // the next tile does
constexpr uint32_t IS_SECOND = 3 << 27, SECOND_FOLLOWS = 1 << 26;     // of two, looked up at once
constexpr uint32_t TILE_TOKENS = (1 << WARP_TOKENS) - 1;
DEVICE uint32_t bad_tokens(uint32_t tile) { return tile >> WARP_TOKENS & TILE_TOKENS; }
DEVICE uint32_t seen_tokens(uint32_t tile) { return (tile & TILE_TOKENS) | bad_tokens(tile); }
// Bytes from the pointers of the first of the two tiles to those of this one.
DEVICE uint32_t pointers_at(uint32_t tile) { return tile >> 22 & TILE_POINTERS; }
static_assert(IS_SECOND >> 22 == TILE_POINTERS, "the bits of IS_SECOND are a distance");
// The request of the piece that was begun last by a tile that was looked up.
DEVICE int begun_request(uint32_t walk) { return ld_shared_u32(walk + BEGUN); }

// The walk of a warp: lane i < 12 has its token i of the first of two tiles, lane 12 + i that of
// the second.
template <bool IsPlain>
struct TwoTileWalk : Walk<IsPlain> {
  using Base = Walk<IsPlain>;
  using Base::at, Base::begin, Base::end, Base::lane, Base::slot;
  DEVICE TwoTileWalk(uint32_t walk, uint32_t of_lane) : Base(walk, of_lane) {}
  DEVICE uint32_t token() const {
    static_assert(WARP_TOKENS / CHUNK * CHUNK * GROUP_WARPS == TILE, "tiles follow each other");
    return begin + warp_in_group() * CHUNK + slot + slot / CHUNK * (CHUNK * (GROUP_WARPS - 1));
  }
  // From the entries of the next two tiles, which have landed, to the rows of their tokens; and on
  // to those after them. Returns a word about the first; `before` is the one about the tile before
  // it. That about the second is kept.
  DEVICE uint32_t look_up(const Params& params, uint32_t before) {
    Base::load();
    const uint32_t of_token = ld_shared_u32(Base::entry()), now = token();
    if (RARELY(begin >= end)) {  // there is none
      if (lane < WARP_TOKENS) st_shared_u64(at + ROW_POINTERS + lane * 8, 0);
      __syncwarp();
      return 0;
    }
    const auto found = Base::row(params, now, of_token);
    const uint32_t live = __ballot_sync(~0u, found.row != nullptr);
    const uint32_t missing = __ballot_sync(~0u, found.is_seen && found.row == nullptr);
    if (lane < 2 * WARP_TOKENS) {
      st_shared_u64(at + ROW_POINTERS + lane * 8, (uint64_t)found.row);
      if (TAIL_BYTES) st_shared_u64(at + TAIL_POINTERS + lane * 8, (uint64_t)found.tail);
    }
    uint32_t tile = TILE_IS_THERE | (live & TILE_TOKENS);
    uint32_t second = TILE_IS_THERE | IS_SECOND | live >> WARP_TOKENS;
    if (RARELY(missing != 0)) {
      const bool is_bad_one = missing >> lane & 1 && Base::is_bad(params, now, of_token);
      const uint32_t bad = __ballot_sync(~0u, is_bad_one);
      tile |= (bad & TILE_TOKENS) << WARP_TOKENS;
      second |= bad >> WARP_TOKENS << WARP_TOKENS;
    }
    if (RARELY(before & NEXT_BEGINS)) {
      tile |= TILE_BEGINS;
      if (lane == 0) st_shared_u32(at + BEGUN, Base::request());
    }
    if (begin + TILE < end) tile |= SECOND_FOLLOWS;
    begin += 2 * TILE;
    if (RARELY(begin >= end)) {
      Base::next_piece(params);
      (tile & SECOND_FOLLOWS ? second : tile) |= NEXT_BEGINS;
    }
    if (!IsPlain) __syncwarp();  // all have loaded the walk
    if (lane == 0) st_shared_u32(at + SECOND_TILE, second);
    Base::fetch_entry(params, token());
    Base::store();
    __syncwarp();
    return tile;
  }
};

// Begins at the part's first tile, whose entries are copied, as part of the group that is committed
// next. Returns what look_up() would of a tile before; 0: there is no tile.
DEVICE uint32_t begin_walk(const Params& params, uint32_t at, uint32_t lane) {
  TwoTileWalk<false> walk(at, lane);
  if (lane == 0) st_shared_u32(at + REQUEST, part_of(params).first_request - 1);
  __syncwarp();
  walk.next_piece(params);
  walk.fetch_entry(params, walk.token());
  walk.store();
  return walk.begin < walk.end ? NEXT_BEGINS : 0;
}
// Two tiles of a piece are looked up at once, where it has them.
DEVICE uint32_t look_up(const Params& params, uint32_t at, uint32_t lane, uint32_t before) {
  if (before & SECOND_FOLLOWS) return ld_shared_u32(at + SECOND_TILE);
  if (RARELY(!is_plain(params))) return TwoTileWalk<false>(at, lane).look_up(params, before);
  return TwoTileWalk<true>(at, lane).look_up(params, before);
}
