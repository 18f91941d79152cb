// The value role, of four warps: O [16, 512] += P V, 128 columns each, and where O goes in the end.
#pragma once
#include "merge.cuh"
#include "sm90_few_rows_loader.cuh"
#include "sm90_pair_words.cuh"

constexpr int V_COLUMNS = 128, V_TILES = V_COLUMNS / 8;  // of a warp
constexpr int V_STEPS = SLOT_TOKENS / 16;
// [n]: columns 8 n + 2 (lane % 4) and the next one, in rows lane / 4, [0] and [1], and eight
// further, [2] and [3].
using Accumulators = float[V_TILES][4];

// Zeroes the warp's columns of the rows past the end of the request: unused memory may hold NaN,
// and 0 * NaN is NaN.
DEVICE void clear_rows(uint32_t slot, int rows_used) {
  const uint32_t lane = lane_index();
  const uint32_t column = (warp_in_group() * 2 + (lane >> 3 & 1)) * BLOCK_BYTES + (lane & 7) * 16;
#pragma unroll 1
  for (int row = rows_used + (lane >> 4); row < SLOT_TOKENS; row += 2) {
    st_shared_v4(token_row(slot, row) + column, {0, 0, 0, 0});
  }
  fence_proxy_async();  // TMA will write there
  __syncwarp();
}

// V of 16 tokens and the warp's columns, as fragments of B.
struct Values {
  uint32_t x[V_TILES / 2][4];  // two n-tiles each
  DEVICE void load(uint32_t slot, int step) {
    const uint32_t lane = lane_index();
    const uint32_t from = token_row(slot, step * 16 + (lane & 15)) +
                          warp_in_group() * 2 * BLOCK_BYTES + (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
    for (int i = 0; i < V_TILES / 2; ++i) {
      ldmatrix_x4_trans((from ^ ((i & 3) << 5)) + (i >> 2) * BLOCK_BYTES, x[i][0], x[i][1],
                        x[i][2], x[i][3]);
    }
  }
};

DEVICE void rescale(Accumulators& o, uint32_t slot) {
  if (!uniform(ld_shared_u32(shared_base() + RESCALE + slot * 4))) return;
  const uint32_t from = row_float(FACTORS, slot * ROWS + (lane_index() >> 2));
  const float a = ld_shared_f32(from), b = ld_shared_f32(from + 8 * 4);
#pragma unroll
  for (int n = 0; n < V_TILES; ++n) {
    o[n][0] *= a, o[n][1] *= a;
    o[n][2] *= b, o[n][3] *= b;
  }
}

DEVICE void add_values(Accumulators& o, const Values& v, uint32_t slot, int step) {
  const Vector4 p = ld_shared_v4(p_tile(slot) + (step * 32 + lane_index()) * 16);
  const uint32_t a[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int i = 0; i < V_TILES / 2; ++i) {
    mma_m16n8k16(o[2 * i], a, v.x[i][0], v.x[i][1]);
    mma_m16n8k16(o[2 * i + 1], a, v.x[i][2], v.x[i][3]);
  }
}

// A row of the thread, the first or the other (h), to out: 16 bytes a lane.
DEVICE void store_out(const Accumulators& o, int h, float x, uint16_t* to, bool live) {
#pragma unroll
  for (int n = 0; n < V_TILES; n += 4) {
    const float *a = o[n] + 2 * h, *b = o[n + 1] + 2 * h;
    const float *c = o[n + 2] + 2 * h, *d = o[n + 3] + 2 * h;
    const Vector4 columns =
        transpose_quads({cvt_x2(a[0] * x, a[1] * x), cvt_x2(b[0] * x, b[1] * x),
                         cvt_x2(c[0] * x, c[1] * x), cvt_x2(d[0] * x, d[1] * x)});
    if (live) st_global_v4(to + n * 8, columns);
  }
}
// The same to a partial result, as floats: such rows are few (merge.cuh).
DEVICE void store_floats(const Accumulators& o, int h, float x, float* to) {
#pragma unroll
  for (int n = 0; n < V_TILES; n += 2) {
    const float *a = o[n] + 2 * h, *b = o[n + 1] + 2 * h;
    st_global_v4_f32(to + n * 8, a[0] * x, a[1] * x, b[0] * x, b[1] * x);
  }
}
// A row of the front -> that of both pieces, whose partial results lie alike.
DEVICE void merge_back(Accumulators& o, int h, float inverse, float front, float back,
                       const float* from) {
#pragma unroll
  for (int n = 0; n < V_TILES; n += 2) {
    const float4 other = ld_global_v4_f32(from + n * 8);
    float *a = o[n] + 2 * h, *b = o[n + 1] + 2 * h;
    a[0] = merge_two(front, a[0] * inverse, back, other.x);
    a[1] = merge_two(front, a[1] * inverse, back, other.y);
    b[0] = merge_two(front, b[0] * inverse, back, other.z);
    b[1] = merge_two(front, b[1] * inverse, back, other.w);
  }
}

DEVICE void store_rows(Accumulators& o, const Params& params, int request, int slot) {
  const RowBlock block = row_block();
  const int first_column = warp_in_group() * V_COLUMNS, lane = lane_index() & 3;
  const Kind kind = (Kind)uniform(ld_shared_u32(shared_base() + RESULT));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int in_block = (lane_index() >> 2) + 8 * h, row = block.first_row + in_block;
    const bool live = row < params.slab_rows;
    float inverse = ld_shared_f32(row_float(INVERSE_L, in_block));
    float* partial = params.out_partial + first_column + lane * 4;
    if (kind != WHOLE) partial += partial_row(params, slot, block, row) * 512;
    if (kind == MERGED) {
      const float front = ld_shared_f32(row_float(FRONT_WEIGHTS, in_block));
      const float back = ld_shared_f32(row_float(BACK_WEIGHTS, in_block));
      const float* from = partial + (int64_t)params.s_q * params.h_q * 512;  // the next slot
      if (live) merge_back(o, h, inverse, front, back, from);
      inverse = 1.f;
    }
    if (kind == WHOLE || kind == MERGED) {
      uint16_t* to = params.out + out_row(params, request, block, row) * 512;
      store_out(o, h, inverse, to + first_column + lane * 8, live);
    } else if (live) {
      store_floats(o, h, inverse, partial);
    }
  }
}

DEVICE void value_role(const Params& params) {
  Place place;
  uint32_t results_phase = 0;
#pragma unroll 1
  for (int request = uniform(part_of(params).first_request);
       request <= uniform(part_of(params).last_request); ++request) {
    const Piece piece = piece_of(params, request);
    const Tokens tokens = tokens_of(piece);
    const int slots = uniform(tokens.slots);
    if (slots == 0) continue;  // store_no_tiles
    Accumulators o = {};
    place.advance();  // past Q
    int left = tokens.end - tokens.begin;
#pragma unroll 1
    for (int i = 0; i < slots; ++i, left -= SLOT_TOKENS) {
      mbarrier_wait(full(place.slot), place.phase);
      if (left < SLOT_TOKENS) clear_rows(place.slot, left);
      Values v[V_STEPS];  // which are there before P is
#pragma unroll
      for (int step = 0; step < V_STEPS; ++step) v[step].load(place.slot, step);
      mbarrier_wait(p_ready(place.slot), place.phase);
      if (i > 0) rescale(o, place.slot);
#pragma unroll
      for (int step = 0; step < V_STEPS; ++step) add_values(o, v[step], place.slot, step);
      arrive(empty(place.slot));
      place.advance();
    }
    mbarrier_wait(results_ready(), results_phase);
    results_phase ^= 1;
    store_rows(o, params, request, piece.slot);
    arrive(results_free());
    if (piece.kind == BACK) {
      bar_sync(BACK_BARRIER, BACK_BARRIER_THREADS);
      if (thread_in_group() == 0) announce_back(params);
    }
  }
}
