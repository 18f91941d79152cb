// The work of one thread block of a decode kernel: the kernel's parameters, the piece of each
// request that the block's part has, its query rows, and what becomes of a request that cannot be
// computed. metadata.cuh explains the words.
//
// Grid (row blocks, h_kv, parts). Row r of a slab (geometry.py) is query position slab + r / group
// and query head kv_head * group + r % group.
#pragma once
#include "merge.cuh"
#include "metadata.cuh"
#if defined(MAP_COMES_FIRST)  // the kernel's own
#elif defined(GATHERED)  // of sm90_gather_decode.cu
#include "sm90_gather_shared.cuh"
#else
#include "sm90_shared.cuh"
#endif

// The host packs the same fields in the same order.
struct Params {
  const int* tile_scheduler_metadata;  // [parts, 8]; schedule.py documents the columns
  const int* cache_seqlens;            // [batch]
  const int* block_table;              // [batch, max_pages], rows table_stride apart
  uint16_t* out;                       // [batch, s_q, h_q, 512]
  float* lse;                          // [batch, h_q, s_q], natural logarithm
  float* out_partial;                  // [slots, s_q * h_q, 512], floats or halves: merge.cuh
  float* row_partial;                  // [slots, s_q * h_q, 4]: lse in log2, two scales,
                                       // the largest logit in log2
  uint64_t* pairs;                     // [parts, h_kv * row blocks]: sm90_pair.cuh
  uint64_t epoch;                      // the number of this launch, or of all replays of a graph
  uint64_t* refusal;                   // the least key of refuse() so far
  uint32_t* refused;                   // in host memory, so that a call sees it without a wait
  int64_t table_stride;
  int batch, s_q, h_q, group;
  int slab_rows, blocks;  // rows of a slab, and row blocks of a slab
  int num_pages, page_tiles_log2;
  int max_length;            // tokens that a row of block_table can hold
  int slots;                 // of out_partial and row_partial
  int causal, border_tiles;  // the last `border_tiles` tiles of a request may have masked keys
  float scale_log2;          // softmax_scale * log2(e)
#if defined(GATHERED)
  // Rows are gathered from up to two pools of pages. Without lists, block_table has the pages of
  // the first. With lists, each query token is a request of its own, and block_table has the
  // indices of its tokens, page * page_size + offset, of which topk_length count; then come those
  // of the second pool, from the next multiple of 64 on.
  const uint8_t* cache;
  const uint8_t* extra_cache;
  const int* extra_indices;      // [batch, extra_topk]
  const int* topk_length;        // of each group of query tokens, or null: all of the list
  const int* extra_topk_length;  // the same of the second list
  const float* attn_sink;        // [h_q], natural logarithms, or null
  const float* descale_q;        // [1] each, or null for 1
  const float* descale_k;
  float* max_logits;  // [batch, h_q], or null
  const uint8_t* q;   // of e4m3, and its strides; other rows of q are read by way of tensor maps
  int64_t q_batch_stride, q_position_stride, q_head_stride;
  int64_t page_bytes, extra_page_bytes, extra_stride;
  uint64_t length_group;  // 2^40 / query tokens that share a length, rounded up
  int page_size, extra_page_size, extra_num_pages;
  int page_shift, extra_page_shift;  // log2 of the page sizes; -1: no power of two
  int topk, extra_topk;        // 0: no such list
  int lse_group;               // query tokens that share an lse [h_q, lse_group]
  int outside_is_none;         // an index outside of its pool is no token, as -1 is
#endif
};

// ---- requests -------------------------------------------------------------------------------

enum Reason { FOREIGN_METADATA, LENGTH, STALE_METADATA, PAGE_ID };  // gpu/reports.py names them
#if defined(GATHERED)
#define RARELY(condition) __builtin_expect(condition, 0)

// What a column says of a length or an index of a list: which one, in the upper bits, and its
// place.
constexpr int LIST_SHIFT = 28;
enum List { TABLE, FIRST_LIST, SECOND_LIST, PREFILL_LIST };
#endif

// Remembers why a request is refused, and tells the host. The least key wins: the first request,
// and of that the first reason. Foreign metadata, of request 0, hides all others, since it may
// leave rows of any request as they are.
DEVICE void refuse(const Params& params, int request, Reason reason, int column) {
#if defined(GATHERED)
  request /= params.lse_group;  // of the call, not that of a query token
#endif
  const uint64_t key = (uint64_t)request << 34 | (uint64_t)reason << 32 | (uint32_t)column;
  atomicMin(params.refusal, key);
  __threadfence_system();
  *(volatile uint32_t*)params.refused = 1;
}

// The part's row of tile_scheduler_metadata lies in shared memory, where the kernel's beginning has
// put it. It is read again wherever it is needed: the matrix roles have no register to spare.
struct Part {
  int first_request, begin_tile, last_request, end_tile;
};
DEVICE Part part_of(const Params& params) {
  const Vector4 row = ld_shared_v4(part_row());
  return {max((int)row.x, 0), (int)row.y, min((int)row.z, params.batch - 1), (int)row.w};
}

#if defined(GATHERED)
// How much of a list counts; -1 if that cannot be. (The product is exact: a request has 20 bits.)
DEVICE int list_length(const Params& params, const int* lengths, int request, int topk) {
  const int length = lengths ? __ldg(lengths + (request * params.length_group >> 40)) : topk;
  return (uint32_t)length <= (uint32_t)topk ? length : -1;
}
DEVICE int first_length(const Params& params, int request) {
  return list_length(params, params.topk_length, request, params.topk);
}
// Where the second list of a request begins.
DEVICE int second_begin(const Params& params, int request) {
  return (first_length(params, request) + TOKENS - 1) / TOKENS * TOKENS;
}
DEVICE int request_length(const Params& params, int request) {
  if (params.topk == 0) return __ldg(params.cache_seqlens + request);
  int length = first_length(params, request);
  if (params.extra_topk > 0 && length >= 0) {
    const int extra = list_length(params, params.extra_topk_length, request, params.extra_topk);
    length = extra < 0 ? -1 : (length + TOKENS - 1) / TOKENS * TOKENS + extra;
  }
  return length;
}
// Whose length makes request_length() -1.
DEVICE List list_of_length(const Params& params, int request) {
  if (params.topk == 0) return TABLE;
  if (first_length(params, request) >= 0) return SECOND_LIST;
  return params.outside_is_none ? PREFILL_LIST : FIRST_LIST;
}
// Whether there is one pool, of pages whose size is a power of two, less than 4 GB apart.
DEVICE bool is_plain(const Params& params) {
  return params.page_shift >= 0 && params.extra_topk == 0 && params.page_bytes >> 32 == 0;
}
DEVICE int lse_group(const Params& params) { return params.lse_group; }
DEVICE float descale(const float* factor) { return factor ? __ldg(factor) : 1.f; }
#else
DEVICE int request_length(const Params& params, int request) {
  return __ldg(params.cache_seqlens + request);
}
DEVICE int lse_group(const Params&) { return 1; }
#endif

// What a piece is: all of its request; one of three or more; the back or the front of a pair; or a
// front whose back has been merged into it (sm90_pair.cuh).
enum Kind { WHOLE, SPLIT, BACK, FRONT, MERGED };

struct Piece {
  int begin, end;  // tiles of the request; equal: nothing to compute
  int length;      // tokens of the request
  int slot;        // -1 if the piece is all of its request
  Kind kind;       // never MERGED
  bool refused;    // its rows become NaN
  Reason reason;
};
DEVICE Piece piece_of(const Params& params, int request) {
  const Part part = part_of(params);
  const Vector4 more = ld_shared_v4(part_row() + 16);
  const int slot = more.x & 0xffff, first_tiles = more.y, last_tiles = more.z;
  const int length = request_length(params, request);
  const int tiles = ((length - 1) >> 6) + 1;  // length + 63 could overflow
  const bool is_first = request == part.first_request, is_last = request == part.last_request;
  const bool from_inside = part.begin_tile > 0;

  Piece piece = {is_first ? part.begin_tile : 0, is_last ? part.end_tile : tiles, length, -1,
                 WHOLE};
  if (is_first && from_inside) {
    piece.slot = slot;
    piece.kind = more.x & BEGINS_IN_PAIR ? BACK : SPLIT;
  } else if (is_last && part.end_tile < last_tiles) {
    piece.slot = slot + (!is_first && from_inside);
    piece.kind = more.x & ENDS_IN_PAIR ? FRONT : SPLIT;
  }
  // Metadata of other lengths does not fit; garbage must not lead out of bounds.
  bool stale = (is_first && first_tiles != tiles) || (is_last && last_tiles != tiles) ||
               piece.begin < 0 || piece.begin > piece.end || piece.end > tiles;
  if (piece.slot >= params.slots) {
    piece.slot = -1;
    piece.kind = WHOLE;
    stale = true;
  }
  const bool bad_length = (uint32_t)length > (uint32_t)params.max_length;
  piece.refused = bad_length || stale;
  piece.reason = bad_length ? LENGTH : STALE_METADATA;
  if (piece.refused) piece.begin = piece.end = 0;
  return piece;
}

// The RESULT word, which tells the matrix warpgroups what to do with O of a piece: its kind, and
// below it its slot.
DEVICE uint32_t result_word(Kind kind, int slot) { return kind << 16 | (slot & 0xffff); }
DEVICE Kind kind_of(uint32_t result) { return (Kind)(result >> 16); }
DEVICE int slot_of(uint32_t result) { return result & 0xffff; }

// ---- rows -----------------------------------------------------------------------------------

struct RowBlock {
  int slab, first_row;  // row of the slab
  int first_head;       // of the kv head
};
// From shared memory, where the kernel's beginning has put it: the division is slow.
DEVICE RowBlock row_block() {
  const Vector4 v = ld_shared_v4(row_block_address());
  return {(int)v.x, (int)v.y, (int)v.z};
}
// The row of out [batch * s_q * h_q]. The heads of a slab are neighbours there, and so are the
// positions of a slab that holds several.
DEVICE int64_t out_row(const Params& params, int request, const RowBlock& block, int row) {
  return ((int64_t)request * params.s_q + block.slab) * params.h_q + block.first_head + row;
}
// The row of out_partial and row_partial [slots * s_q * h_q], which lie kv head by kv head.
DEVICE int64_t partial_row(const Params& params, int slot, const RowBlock& block, int row) {
  return ((int64_t)slot * params.h_q + block.first_head) * params.s_q +
         block.slab * params.slab_rows + row;
}
DEVICE void store_lse(const Params& params, int request, const RowBlock& block, int row,
                      float lse) {
  const int position = row / params.group, head = block.first_head + row - position * params.group;
  params.lse[lse_index(request, block.slab + position, head, params.s_q, params.h_q,
                       lse_group(params))] = lse;
}

#if defined(GATHERED)
DEVICE void store_max_logit(const Params& params, int request, const RowBlock& block, int row,
                            float logit) {
  params.max_logits[(int64_t)request * params.h_q + block.first_head + row] = logit;
}
#endif

// The results of a request without keys, out 0 and lse +inf, or NaN if it is refused. By `threads`
// threads, of which this is number `thread`.
DEVICE void store_no_keys(const Params& params, int request, bool refused, int thread,
                          int threads) {
  const RowBlock block = row_block();
  const int rows = min(ROWS, params.slab_rows - block.first_row);
#pragma unroll 1
  for (int row = thread; row < rows; row += threads) {
    store_lse(params, request, block, block.first_row + row, refused ? QUIET_NAN : POS_INF);
#if defined(GATHERED)
    if (params.max_logits) {
      store_max_logit(params, request, block, block.first_row + row, refused ? QUIET_NAN : NEG_INF);
    }
#endif
  }
  const uint32_t pair = refused ? 0x7fff7fffu : 0;
  uint16_t* to = params.out + out_row(params, request, block, block.first_row) * 512;
#pragma unroll 1
  for (int i = thread; i < rows * 64; i += threads) {
    st_global_v4(to + i * 8, {pair, pair, pair, pair});
  }
}

// ---- the beginning --------------------------------------------------------------------------

// Parameters lie in constant memory, and each line of it is fetched when something there is first
// looked at, which takes up to a microsecond, role by role and line by line. So a lane of each warp,
// except those that have more to do now, asks for one line: all come at once. What it reads goes
// where the factors will be, only so that it is read.
constexpr int PARAM_WORDS = sizeof(Params) / 4, LINE_WORDS = 16, FIRST_FREE_WARP = 3;
DEVICE void fetch_params(const Params& params) {
  const int word = ((int)(thread_index() >> 5) - FIRST_FREE_WARP) * LINE_WORDS;
  if (word < 0 || word >= PARAM_WORDS + LINE_WORDS || lane_index() != 0) return;
  st_shared_u32(shared_base() + FACTORS + word / LINE_WORDS * 4,
                param_word(&params, min(word, PARAM_WORDS - 1)));
}

// By one warp: all roles wait for it, so it does the least that lets them begin.

// Before the wait for the kernel ahead: what follows from the launch alone.
DEVICE void init_row_block(const Params& params) {
  const int lane = lane_index();
  if (lane == 0) {
    const uint32_t slab = blockIdx.x / params.blocks;
    st_shared_v4(row_block_address(),
                 {slab, (blockIdx.x - slab * params.blocks) * ROWS, blockIdx.y * params.group, 0});
  }
  // What it holds by now does not matter: it is the way there that takes long.
  if (lane == 1) prefetch_l2(params.tile_scheduler_metadata + blockIdx.z * 8);
}
// After the wait: fills what part_of() reads.
DEVICE void init_part_row(const Params& params) {
  const int lane = lane_index();
  if (lane < 8) {
    st_shared_u32(part_row() + lane * 4,
                  __ldg(params.tile_scheduler_metadata + blockIdx.z * 8 + lane));
  }
}

// ---- the end, by one warp -------------------------------------------------------------------
// Not at the beginning, where other roles would wait for it, or for its instructions.

// Metadata may have been made for fewer requests than the batch has, as when a serving engine fills
// up the batch of a captured graph. The requests after those must have length 0; this part stores
// its share of their results. `requests`: how many the metadata was made for.
DEVICE void store_padding(const Params& params, int requests) {
#pragma unroll 1
  for (int request = requests + blockIdx.z; request < params.batch; request += gridDim.z) {
    const int length = request_length(params, request);
    if (length != 0 && lane_index() == 0) {
      const bool bad_length = (uint32_t)length > (uint32_t)params.max_length;
      refuse(params, request, bad_length ? LENGTH : STALE_METADATA, 0);
    }
    store_no_keys(params, request, length != 0, lane_index(), 32);
  }
}

constexpr uint32_t BATCH_FACTOR = check_term(9, 1);  // what a request more adds to the sum

// Looks whether schedule.cu made the metadata for this part of such a batch, or of fewer requests:
// those up to the last one that any part has. Any other metadata is reported, since it may leave
// rows of out as they are.
DEVICE void check_part_row(const Params& params) {
  const int lane = lane_index();
  uint32_t check = 0, value = lane < 8 ? ld_shared_u32(part_row() + lane * 4) : 0;
  if (lane == 4) check = value >> CHECK_SHIFT, value &= UNCHECKED;
  if (lane == 8) value = blockIdx.z;
  if (lane == 9) value = params.batch;
  const uint32_t sum = __reduce_add_sync(~0u, check_term(lane, value));
  auto passes = [&](uint32_t sum) {
    return !__any_sync(~0u, lane == 4 && sum >> CHECK_SHIFT != check);
  };
  if (passes(sum)) return;
  int requests = 0;
#pragma unroll 1
  for (int part = lane; part < gridDim.z; part += 32) {
    requests = max(requests, __ldg(params.tile_scheduler_metadata + part * 8 + 2) + 1);
  }
  requests = __reduce_max_sync(~0u, requests);
  const int padding = params.batch - requests;
  if (padding > 0 && passes(sum - BATCH_FACTOR * padding)) {
    store_padding(params, requests);
  } else if (lane == 0) {
    refuse(params, 0, FOREIGN_METADATA, 0);
  }
}
