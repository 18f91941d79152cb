// Where the tokens of a request lie, one by one, for load roles in which a lane has one.
//
// Rows come from a list of token indices (sparse) or from the pages of block_table (dense); that is
// all the difference there is. A request may have a second list, of tokens of another pool, behind
// the first one.
//
// In a list, -1 is no token. Any other index, and any page id, outside of the pool is never
// followed: it is refused, and its row becomes NaN, which reaches every row of the request's out;
// or, if the call says so, it is no token either.
#pragma once
#include "sm90_pieces.cuh"

// A piece in tokens [begin, end) of its request, and how many tiles they take.
struct Tokens {
  int begin, end, tiles;
};
DEVICE Tokens tokens_of(const Piece& piece) {
  if (piece.begin >= piece.end) return {0, 0, 0};
  const int begin = piece.begin * TOKENS;
  const int end = min((uint32_t)piece.length, (uint32_t)piece.end * TOKENS);
  return {begin, end, (end - begin - 1) / TOKENS + 1};
}

// One lane's token of a request, and where it lies. IsPlain: is_plain(params) says so.
template <bool IsPlain>
struct Token {
  int request, index;  // of the request's tokens
  int end;             // of the piece; from there on there is no token
  int second;          // where the second list begins

  DEVICE static uint32_t page_of(int page_size, int shift, uint32_t token) {
    return IsPlain || shift >= 0 ? token >> shift : token / (uint32_t)page_size;
  }
  DEVICE bool is_second() const { return !IsPlain && index >= second; }
  // Its entry of the list, or of the table.
  DEVICE int entry(const Params& params) const {
    if (index >= end) return -1;
    int column = index;
    const int* list = params.block_table + request * params.table_stride;
    if (params.topk == 0) {
      column = page_of(params.page_size, params.page_shift, column);
    } else if (is_second()) {
      column -= second, list = params.extra_indices + request * params.extra_stride;
    } else if (!IsPlain && params.extra_topk > 0) {
      column = min(column, params.topk - 1);  // what lies between the lists, row() ignores
    }
    return ld_global_s32(list + column);
  }
  // Its row, given the entry; null: it is not to be seen, or bad. `tail`: and its tail.
  DEVICE const uint8_t* row(const Params& params, int entry, const uint8_t*& tail,
                            bool& is_bad) const {
    is_bad = false;
    if (index >= end) return nullptr;
    const bool of_second = is_second(), is_listed = params.topk > 0;
    if (!IsPlain && params.extra_topk > 0 && !of_second && index >= first_length(params, request)) {
      return nullptr;
    }
    const uint32_t page_size = of_second ? params.extra_page_size : params.page_size;
    const uint32_t pages = of_second ? params.extra_num_pages : params.num_pages;
    const int shift = of_second ? params.extra_page_shift : params.page_shift;
    const uint32_t of_pool = is_listed ? entry : index;
    const uint32_t page = page_of(page_size, shift, of_pool);
    const uint32_t in_pool = is_listed ? page : entry;
    if (in_pool >= pages || entry < 0) {
      is_bad = !(is_listed && (entry == -1 || params.outside_is_none));
      if (is_bad) {
        const List list = !is_listed ? TABLE : of_second ? SECOND_LIST : FIRST_LIST;
        const int place = !is_listed ? page : of_second ? index - second : index;
        refuse(params, request, PAGE_ID, list << LIST_SHIFT | place);
      }
      return nullptr;
    }
    const uint8_t* page_begin = of_second ? params.extra_cache : params.cache;
    if (IsPlain) {
      page_begin += (uint64_t)in_pool * (uint32_t)params.page_bytes;
    } else {
      page_begin += in_pool * (of_second ? params.extra_page_bytes : params.page_bytes);
    }
    const uint32_t in_page = IsPlain ? of_pool & (page_size - 1) : of_pool - page * page_size;
    tail = page_begin + (uint64_t)page_size * ROW_BYTES + (uint64_t)in_page * TAIL_BYTES;
    return page_begin + (uint64_t)in_page * ROW_BYTES;
  }
};
