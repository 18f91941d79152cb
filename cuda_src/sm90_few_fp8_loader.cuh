// The load role, of four warps: as soon as a slot is empty, the rows of its 64 tokens are copied
// there, a quarter by each warp.
//
// A token that does not count is not copied, and neither is one that cannot be: bits tell the score
// warps of both. What is in their rows then does not matter, since the value warps clear V there.
#pragma once
#include "sm90_few_fp8_shared.cuh"
#include "sm90_gathered_tokens.cuh"

constexpr int SLOTS_AT_ONCE = 32 / WARP_TOKENS;  // whose tokens the lanes of a warp look up
constexpr uint32_t ALL_SEEN = (1 << WARP_TOKENS) - 1;

#if defined(FORMAT_V4)
// Whether one of the seven scales is NaN, 0xff.
DEVICE bool has_nan(uint64_t tail) {
  const uint64_t x = ~(tail & 0x00ffffffffffffff);
  return ((x - 0x0101010101010101) & ~x & 0x8080808080808080) != 0;
}
#endif

DEVICE void load_q(const Params& params, const TensorMap& q_map, int request, uint32_t phase) {
  mbarrier_wait(q_empty(), phase ^ 1);
  __syncwarp();  // once Q is loaded, its next phase may end before a lane has looked
  if (lane_index() == 0) {
    const RowBlock block = row_block();
    // A query token that is a request of its own is a position of a request of the call.
    const int of_call = request / params.lse_group;
    const int position = block.slab + request - of_call * params.lse_group;
    mbarrier_arrive_expect_tx(q_full(), Q_BYTES);
    cp_async_bulk_tensor_5d(shared_base(), q_map, q_full(), 0, block.first_head + block.first_row,
                            0, position, of_call, createpolicy_evict_first());
  }
  __syncwarp();
}

DEVICE void load_role(const Params& params, const TensorMap& q_map) {
  const int lane = lane_index(), warp = uniform(warp_in_group());
  const Part part = part_of(params);
  const int last = uniform(part.last_request);
  // A warp's tokens of a page lie behind one another, and in a slot they may, too. One copy takes a
  // warp 43 ns, be it large or small.
  const bool runs = params.topk == 0;
  Place place;
  uint32_t q_phase = 0;
#pragma unroll 1
  for (int request = uniform(part.first_request); request <= last; ++request) {
    const Tokens tokens = tokens_of(piece_of(params, request));
    const int slots = uniform(tokens.tiles);
    if (slots == 0) continue;
#if !defined(QUERY_E4M3)  // which the score warps read
    if (warp == 0) load_q(params, q_map, request, q_phase);
#endif
    q_phase ^= 1;
    // Lanes look up several slots at once, a part of the warp each.
    Token<false> token = {request,
                   tokens.begin + lane / WARP_TOKENS * SLOT_TOKENS + warp * WARP_TOKENS +
                       lane % WARP_TOKENS,
                   tokens.end,
                   params.extra_topk > 0 ? second_begin(params, request) : 0x7fffffff};
    int entry = token.entry(params);
#pragma unroll 1
    for (int i = 0; i < slots; i += SLOTS_AT_ONCE) {
      bool is_bad;
      const uint8_t* tail;
      const uint8_t* row = token.row(params, entry, tail, is_bad);
      const uint32_t there = __ballot_sync(~0u, row != nullptr);
      uint32_t bad = __ballot_sync(~0u, is_bad);
#if defined(FORMAT_V4)
      uint64_t scales = 0;
      if (row) scales = __ldg((const uint64_t*)tail);
#endif
      token.index += SLOTS_AT_ONCE * SLOT_TOKENS;
      entry = token.entry(params);  // on its way
#pragma unroll 1
      for (int j = 0; j < min(slots - i, SLOTS_AT_ONCE); ++j) {
        const uint32_t mine = there >> j * WARP_TOKENS & ALL_SEEN;
        const int place_in_slot = warp * WARP_TOKENS + lane % WARP_TOKENS;
        mbarrier_wait(empty(place.slot), place.phase ^ 1);
        __syncwarp();  // the same
        if (lane == 0) mbarrier_expect_tx(full(place.slot), __popc(mine) * ROW_BYTES);
        __syncwarp();  // bytes are expected before any arrive
        if (lane / WARP_TOKENS == j && row && (!runs || lane % WARP_TOKENS == 0)) {
          cp_async_bulk(token_row(place.slot, place_in_slot), row,
                        runs ? __popc(mine) * ROW_BYTES : ROW_BYTES, full(place.slot));
        }
#if defined(FORMAT_V4)
        bad |= __ballot_sync(~0u, has_nan(scales));
        if (lane / WARP_TOKENS == j) st_shared_u64(token_tail(place.slot, place_in_slot), scales);
#endif
        const uint32_t bads = bad >> j * WARP_TOKENS & ALL_SEEN;
        if (lane == 0) st_shared_u32(token_bits(place.slot, warp), mine | bads | bads << 16);
        arrive(full(place.slot));
        place.advance();
      }
    }
  }
}
