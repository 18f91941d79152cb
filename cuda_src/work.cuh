// The work of one thread block of dense_decode: its query rows, the piece of each request that its
// part computes, and what happens to a request that cannot be computed.
//
// Grid (row blocks, h_kv, parts). A row block is 64 of the `slab_rows` query rows of a slab (see
// geometry.py); row r of a slab is query position slab + r / group, head kv_head * group + r % group.
#pragma once
#include "metadata.cuh"
#include "ptx.cuh"

constexpr int ROWS = 64;    // query rows of a thread block
constexpr int TOKENS = 64;  // tokens of a tile

// launches.py packs the same fields in the same order.
struct Params {
  const int* tile_scheduler_metadata;  // [parts, 8]; schedule.py documents the columns
  const int* cache_seqlens;            // [batch]
  const int* block_table;              // [batch, max_pages], rows table_stride apart
  uint16_t* out;                       // [batch, s_q, h_q, 512]
  float* lse;                          // [batch, h_q, s_q], natural logarithm
  float* out_partial;                  // [slots, s_q * h_q, 512], or halves: merge.cuh
  float* row_partial;                  // [slots, s_q * h_q, 4]: lse in log2, two scales, 0
  uint64_t* pairs;                     // [parts, row blocks]; pair.cuh
  uint64_t epoch;                      // of this launch, or this launch of a graph
  uint64_t* refusal;                   // the least key of `refuse` so far
  uint32_t* refused;                   // in host memory: a call need not wait to look at it
  int64_t table_stride;
  int batch, s_q, h_q, group;
  int slab_rows, blocks;  // rows of a slab, and row blocks of a slab
  int num_pages, page_tiles_log2;
  int max_length;  // tokens that a row of block_table can hold
  int slots;
  int causal, border_tiles;  // the last tiles of a request may have masked keys
  float scale_log2;          // softmax_scale * log2(e)
};

// ---- requests -------------------------------------------------------------------------------

enum Reason { LENGTH, STALE_METADATA, PAGE_ID, FOREIGN_METADATA };  // engine.py names them

// Remembers why a request is refused. The least key wins: the first request, then the first reason.
DEVICE void refuse(const Params& p, int request, Reason reason, int column) {
  const uint64_t key = (uint64_t)request << 34 | (uint64_t)reason << 32 | (uint32_t)column;
  atomicMin(p.refusal, key);
  __threadfence_system();
  *(volatile uint32_t*)p.refused = 1;
}

// The part's row of tile_scheduler_metadata in shared memory, filled as the kernel starts, and read
// again wherever it is needed: the matrix roles have no register to spare.
DEVICE uint32_t part_row();

struct Part {
  int first_request, begin_tile, last_request, end_tile;
};
DEVICE Part part_of(const Params& p) {
  const Vector4 row = ld_shared_v4(part_row());
  return {max((int)row.x, 0), (int)row.y, min((int)row.z, p.batch - 1), (int)row.w};
}

// What becomes of a piece: all of its request; one of several; or of a pair (pair.cuh).
enum Kind { WHOLE, SPLIT, TAIL, HEAD, MERGED };

struct Piece {
  int begin, end;  // tiles of the request; equal: nothing to compute
  int length;      // tokens of the request
  int slot;        // of out_partial, -1 if the piece is all of the request
  Kind kind;       // never MERGED
  bool refused;    // its rows become NaN
  Reason reason;
};
DEVICE Piece piece_of(const Params& p, int request) {
  const Part part = part_of(p);
  const Vector4 more = ld_shared_v4(part_row() + 16);
  const int slot = more.x & 0xffff, first_tiles = more.y, last_tiles = more.z;
  const int length = __ldg(p.cache_seqlens + request);
  const int tiles = ((length - 1) >> 6) + 1;  // length + 63 could overflow
  const bool is_first = request == part.first_request, is_last = request == part.last_request;
  const bool from_inside = part.begin_tile > 0;

  Piece piece = {is_first ? part.begin_tile : 0, is_last ? part.end_tile : tiles, length, -1,
                 WHOLE};
  if (is_first && from_inside) {
    piece.slot = slot;
    piece.kind = more.x & BEGINS_IN_PAIR ? TAIL : SPLIT;
  } else if (is_last && part.end_tile < last_tiles) {
    piece.slot = slot + (!is_first && from_inside);
    piece.kind = more.x & ENDS_IN_PAIR ? HEAD : SPLIT;
  }
  // Metadata of other lengths does not fit; garbage must not lead out of bounds.
  bool stale = (is_first && first_tiles != tiles) || (is_last && last_tiles != tiles) ||
               piece.begin < 0 || piece.begin > piece.end || piece.end > tiles;
  if (piece.slot >= p.slots) {
    piece.slot = -1;
    piece.kind = WHOLE;
    stale = true;
  }
  const bool bad_length = (uint32_t)length > (uint32_t)p.max_length;
  piece.refused = bad_length || stale;
  piece.reason = bad_length ? LENGTH : STALE_METADATA;
  if (piece.refused) piece.begin = piece.end = 0;
  return piece;
}

// ---- rows -----------------------------------------------------------------------------------

struct RowBlock {
  int slab, first_row;  // row of the slab
  int first_head;       // of the kv head
};
DEVICE uint32_t row_block_address();  // in shared memory: the division is slow
DEVICE RowBlock row_block() {
  const Vector4 v = ld_shared_v4(row_block_address());
  return {(int)v.x, (int)v.y, (int)v.z};
}
// Of [batch * s_q * h_q] rows of out. Heads of a slab are neighbours, and so are the positions of
// a slab that holds several.
DEVICE int64_t out_row(const Params& p, int request, const RowBlock& block, int row) {
  return ((int64_t)request * p.s_q + block.slab) * p.h_q + block.first_head + row;
}
// Of [slots * s_q * h_q] rows of out_partial and row_partial: kv head by kv head.
DEVICE int64_t partial_row(const Params& p, int slot, const RowBlock& block, int row) {
  return ((int64_t)slot * p.h_q + block.first_head) * p.s_q + block.slab * p.slab_rows + row;
}
DEVICE void store_lse(const Params& p, int request, const RowBlock& block, int row, float lse) {
  const int position = row / p.group, head = block.first_head + row - position * p.group;
  p.lse[((int64_t)request * p.h_q + head) * p.s_q + block.slab + position] = lse;
}

// ---- the beginning, by one warp -------------------------------------------------------------
// Its latency is that of the whole kernel, so it does the least that lets the roles begin.

// What follows from the launch alone.
DEVICE void init_row_block(const Params& p) {
  const int lane = lane_index();
  if (lane == 0) {
    const uint32_t slab = blockIdx.x / p.blocks;
    st_shared_v4(row_block_address(),
                 {slab, (blockIdx.x - slab * p.blocks) * ROWS, blockIdx.y * p.group, 0});
  }
  // Whatever they hold: it is the way to them that takes long.
  if (lane == 1) prefetch_l2(p.tile_scheduler_metadata + blockIdx.z * 8);
}
// Fills what part_of() reads; returns the lane's column for check_part_row().
DEVICE uint32_t init_part_row(const Params& p) {
  const int lane = lane_index();
  uint32_t value = 0;
  if (lane < 8) {
    value = __ldg(p.tile_scheduler_metadata + blockIdx.z * 8 + lane);
    st_shared_u32(part_row() + lane * 4, value);
  }
  return value;
}
// Metadata that schedule.cu did not make for this part of such a batch is reported, since it may leave
// rows of out as they are.
DEVICE void check_part_row(const Params& p, uint32_t value) {
  const int lane = lane_index();
  uint32_t check = 0;
  if (lane == 4) check = value >> CHECK_SHIFT, value &= UNCHECKED;
  if (lane == 8) value = blockIdx.z;
  if (lane == 9) value = p.batch;
  const uint32_t sum = __reduce_add_sync(~0u, check_term(lane, value));
  if (lane == 4 && sum >> CHECK_SHIFT != check) refuse(p, 0, FOREIGN_METADATA, 0);
}
