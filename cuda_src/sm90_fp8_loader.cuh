// The load role, of warpgroup 3: as soon as a stage is empty, the rows of its 64 tokens are copied
// there, a quarter by each warp.
//
// A lane copies the row of its token, by a bulk copy. A row that is not there becomes zeros, since
// wgmma multiplies it all the same; a bad one becomes NaN, which reaches every row of its request.
#pragma once
#include "sm90_fp8_shared.cuh"
#include "sm90_gathered_tokens.cuh"

constexpr int TILES_AT_ONCE = 2;  // whose tokens the lanes of a warp look up
static_assert(TILES_AT_ONCE * WARP_TOKENS == 32, "a lane has one token");

// The warp's rows that are not copied: zeros, or NaN in the latent columns of bad ones.
DEVICE void clear_rows(uint32_t rows, uint32_t missing, uint32_t bad) {
  const int lane = lane_index();
  for (; missing; missing &= missing - 1) {
    const int i = __ffs(missing) - 1;
    const uint32_t to = rows + i * STAGED_ROW + lane * 16, x = bad >> i & 1 ? 0x7f7f7f7f : 0;
    st_shared_v4(to, {x, x, x, x});
    if (lane < (ROW_BYTES - 512) / 16) st_shared_v4(to + 512, {0, 0, 0, 0});
  }
  fence_proxy_async();  // the next copy to these rows must not come before
}

template <bool IsPlain>
DEVICE void load_role(const Params& params) {
  const int lane = lane_index(), warp = uniform(warp_in_group());
  const int last = uniform(part_of(params).last_request);
  Place place;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request); request <= last; ++request) {
    const Tokens tokens = tokens_of(piece_of(params, request));
    const int tiles = uniform(tokens.tiles);
    if (tiles == 0) continue;
    Token<IsPlain> token = {
        request,
        tokens.begin + lane / WARP_TOKENS * TOKENS + warp * WARP_TOKENS + lane % WARP_TOKENS,
        tokens.end, !IsPlain && params.extra_topk > 0 ? second_begin(params, request) : 0x7fffffff};
    int entry = token.entry(params);
#pragma unroll 1
    for (int i = 0; i < tiles; i += TILES_AT_ONCE) {
      bool is_bad;
      const uint8_t* tail = nullptr;
      const uint8_t* row = token.row(params, entry, tail, is_bad);
      const uint32_t there = __ballot_sync(~0u, row != nullptr), bad = __ballot_sync(~0u, is_bad);
#if defined(FORMAT_V4)
      uint64_t scales = 0;
      if (row) scales = __ldg((const uint64_t*)tail);
#endif
      token.index += TILES_AT_ONCE * TOKENS;
      entry = token.entry(params);  // on its way
#pragma unroll 1
      for (int j = 0; j < min(tiles - i, TILES_AT_ONCE); ++j) {
        mbarrier_wait(empty(place.stage), place.phase ^ 1);
        __syncwarp();  // once it is filled, its next phase may end before a lane has looked
        const uint32_t rows = staged_rows(place.stage) + warp * WARP_TOKENS * STAGED_ROW;
        const uint32_t mine = there >> j * WARP_TOKENS & ALL_TOKENS;
        const uint32_t bads = bad >> j * WARP_TOKENS & ALL_TOKENS;
        if (lane == 0) {
          mbarrier_expect_tx(full(place.stage), __popc(mine) * ROW_BYTES);
          st_shared_u32(token_bits(place.stage, warp), mine | bads);
        }
        if (RARELY(mine != ALL_TOKENS)) clear_rows(rows, ~mine & ALL_TOKENS, bads);
        __syncwarp();  // bytes are expected before they come
        if (lane / WARP_TOKENS == j) {
          const uint32_t to = rows + lane % WARP_TOKENS * STAGED_ROW;
          if (row) cp_async_bulk(to, row, ROW_BYTES, full(place.stage));
#if defined(FORMAT_V4)
          st_shared_u64(to + SCALES, scales);
#endif
        }
        arrive(full(place.stage));
        place.advance();
      }
    }
  }
}
