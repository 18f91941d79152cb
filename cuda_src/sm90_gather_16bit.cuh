// The gather role over a cache of 16-bit rows, of warpgroup 3: rows are copied into the ring, 16
// bytes a lane, to where the swizzle wants them.
//
// Two pairs of warps take turns with the tiles: while one looks up where rows lie, or waits until
// they have landed, the other copies. A warp copies half of a tile; it can start no more than one
// copy in 16 clocks, 512 bytes, which is why it has no tile to itself.
#pragma once
#include "sm90_gather_cursor.cuh"

constexpr int PAIRS = GROUP_WARPS / FILLING_WARPS, HALF_TILE = TILE / FILLING_WARPS;
static_assert(HALF_TILE == 2 * WARP_TOKENS, "as many lanes have tokens as over FP8");
constexpr int SEEN = TAIL_POINTERS, BAD = SEEN + 4;  // uint32 each, bits of tokens
// Of a warp's wait at `empty` there is only a parity. That suffices, since P V of the tiles is in
// their order: what freed the stage of a pair's last tile came behind what freed, before the other
// pair filled it, the stage that it waits for now.
static_assert(PAIRS < STAGES, "a wait at `empty` is for what comes next there");

// The walk of a warp, over its halves of the pair's tiles: lane i < 24 has their token i.
template <bool IsPlain>
struct PairWalk : Walk<IsPlain> {
  using Base = Walk<IsPlain>;
  using Base::at, Base::begin, Base::end, Base::lane;
  DEVICE PairWalk(uint32_t walk, uint32_t of_lane) : Base(walk, of_lane) {}
  DEVICE uint32_t token() const {
    return begin + warp_in_group() % FILLING_WARPS * HALF_TILE + Base::slot;
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
      Base::next_piece(params);
      if (end == 0) break;
      begin += tiles_behind * TILE;
    }
    Base::fetch_entry(params, token());
    Base::store();
    __syncwarp();
    return end > 0;
  }
  // From the entries of the tile, which have landed, to its rows, to SEEN, the tokens that count,
  // and to BAD, those of them that become NaN. Then on to the next tile. False: there is no tile.
  DEVICE bool look_up(const Params& params) {
    Base::load();
    if (RARELY(begin >= end)) return false;
    const uint32_t of_token = ld_shared_u32(Base::entry()), now = token();
    const auto found = Base::row(params, now, of_token);
    const bool missing = found.is_seen && found.row == nullptr;
    uint32_t seen = __ballot_sync(~0u, found.row != nullptr), bad = 0;
    if (RARELY(__any_sync(~0u, missing))) {
      bad = __ballot_sync(~0u, missing && Base::is_bad(params, now, of_token));
      seen |= bad;
    }
    if (lane < HALF_TILE) st_shared_u64(at + ROW_POINTERS + lane * 8, (uint64_t)found.row);
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
  if (RARELY(!is_plain(params))) return PairWalk<false>(walk, lane).look_up(params);
  return PairWalk<true>(walk, lane).look_up(params);
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

DEVICE void gather_role(const Params& params, const TensorMap&, const TensorMap&) {
  uint32_t lane = lane_index(), walk = walk_address();
  const uint32_t pair = warp_in_group() / FILLING_WARPS, half = warp_in_group() % FILLING_WARPS;
  Place place;
  for (uint32_t i = 0; i < pair; ++i) place.advance();
  if (!PairWalk<false>(walk, lane).begin_at(params, pair)) return;
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
