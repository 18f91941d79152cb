// The results of a row block: where O goes in the end, of as many rows of a slab as there are. Of none,
// the code is only walked through, so that it is there when it is needed (sm90_fp8_values.cuh).
//
// A thread has, of O^T [512 columns, 64 query rows], o[32 i + 4 k + 2 r + n]: column 64 block + 16 i +
// 2 g + r, where g = lane / 4, and query row 8 k + 2 t + n, where t = lane % 4. So two columns that
// are neighbours are the thread's, and eight lanes have 16 of a row.
#pragma once
#include "merge.cuh"
#include "sm90_fp8_fragments.cuh"

// What a thread has of two query rows, 8 k + 2 t and the next: values[n][i][r].
struct TwoRows {
  float values[2][4][2];
};
// Calls `store` for each of the eight k, four in a pass of a loop: the code for all would take longer
// to fetch, the first time, than to execute. O is used up.
template <class Store>
DEVICE void store_rows(float (&o)[128], int rows_of_slab, Store store) {
#pragma unroll 1
  for (int first = 0; first < (WALKS && rows_of_slab == 0 ? 4 : 8); first += 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      TwoRows rows;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) rows.values[j & 1][i][j >> 1] = o[32 * i + 4 * k + j];
      }
      store(first + k, rows);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) o[32 * i + j] = o[32 * i + j + 16];
    }
  }
}

// 1 / l of the two query rows.
DEVICE float2 inverse_l(int k) { return ld_shared_v2_f32(row_float(INVERSE_L, my_column(2 * k))); }
// Whether row n of them is one of the first `rows` of the slab.
DEVICE bool has_row(const RowBlock& block, int rows, int k, int n) {
  return block.first_row + my_column(2 * k) + n < rows;
}

// O / l, by pairs of columns: `to` is where the thread's first pair goes, and store(is_there, to, x, y)
// stores one.
template <class T, class Store>
DEVICE void store_pairs(float (&o)[128], int rows_of_slab, const RowBlock& block, T* to,
                        Store store) {
  store_rows(o, rows_of_slab, [&](int k, const TwoRows& rows) {
    const float2 inverse = inverse_l(k);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float x = n ? inverse.y : inverse.x;
      const bool is_there = has_row(block, rows_of_slab, k, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* t = rows.values[n][i];
        store(is_there, to + n * 512 + i * 16, t[0] * x, t[1] * x);
      }
    }
    to += 8 * 512;
  });
}

// O / l -> out.
DEVICE void store_out(float (&o)[128], int block_of_columns, const Params& params, int request,
                      int rows_of_slab) {
  const RowBlock block = row_block();
  uint16_t* to = params.out +
                 out_row(params, request, block, block.first_row + my_column(0)) * 512 +
                 block_of_columns * 64 + (lane_index() >> 2) * 2;
  store_pairs(o, rows_of_slab, block, to, [](bool is_there, uint16_t* at, float x, float y) {
    st_global_u32_if(is_there, at, cvt_x2(x, y));
  });
}

// O / l -> the partial result in a slot as floats, in the order of merge.cuh.
DEVICE void store_floats(float (&o)[128], int block_of_columns, const Params& params, int slot,
                         int rows_of_slab) {
  const RowBlock block = row_block();
  const uint32_t g = lane_index() >> 2;
  float* to = params.out_partial +
              partial_row(params, slot, block, block.first_row + my_column(0)) * 512 +
              block_of_columns * 64 + (g & 3) * 4 + (g >> 2) * 2;
  store_pairs(o, rows_of_slab, block, to, [](bool is_there, float* at, float x, float y) {
    st_global_v2_f32_if(is_there, at, x, y);
  });
}

// Each warp tells the others of its half the largest value of each query row in its 64 columns. They
// have read those of the piece before: its results are stored before those of this one are ready.
DEVICE void tell_largest_values(const float (&o)[128], uint32_t of_half) {
  float largest[16] = {};
#pragma unroll
  for (int c = 0; c < 16; ++c) {
    const float* t = o + 4 * (c >> 1) + (c & 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest[c] = fmaxf(largest[c], fmaxf(fabsf(t[32 * i]), fabsf(t[32 * i + 2])));
    }
  }
  const int row = max_of_columns(largest);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    st_shared_f32(row_float(of_half, (row + n) * GROUP_WARPS + warp_in_group()), largest[n]);
  }
}

// O / l -> the partial result in a slot as scaled halves (merge.cuh), by 16 bytes a lane, and their
// scales. Of two lanes that have pairs of the same 16 columns of a row, each takes 32 columns, so that
// eight lanes store 128 bytes of a row at once.
DEVICE void store_halves(float (&o)[128], int half, int block_of_columns, const Params& params,
                         int slot, int rows_of_slab) {
  const RowBlock block = row_block();
  const int lane = lane_index(), upper = lane >> 4;
  const uint32_t of_half = LARGEST + half * GROUP_WARPS * ROWS * 4;
  const bool walks = WALKS && rows_of_slab == 0;  // in each half through half of the code
  if (!walks || half == 0) tell_largest_values(o, of_half);
  if (walks && half == 0) return;
  if (!walks) bar_sync(VALUE_BARRIERS + half, GROUP_THREADS);
  const int64_t first = partial_row(params, slot, block, block.first_row);
  float factors_of_rows[2];  // of O, for rows 2 lane and 2 lane + 1
  const float2 inverse = ld_shared_v2_f32(row_float(INVERSE_L, 2 * lane));
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int row = 2 * lane + n;
    const float4 v = ld_shared_v4_f32(row_float(of_half, row * GROUP_WARPS));
    const float x = n ? inverse.y : inverse.x;
    const Scale scale = scale_of(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)) * x);
    factors_of_rows[n] = x * scale.up;
    if (warp_in_group() == 0 && block.first_row + row < rows_of_slab) {
      params.row_partial[(first + row) * 4 + 1 + half] = scale.down;
    }
  }
  uint16_t* to = (uint16_t*)(params.out_partial + (first + my_column(0)) * 512) +
                 block_of_columns * 64 + upper * 32 + (lane >> 2 & 3) * 8;
  store_rows(o, rows_of_slab, [&](int k, const TwoRows& rows) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float x = __shfl_sync(~0u, factors_of_rows[n], 4 * k + (lane & 3));
      uint32_t v[4];  // of 16 columns each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* t = rows.values[n][i];
        v[i] = half_x2(t[0] * x, t[1] * x);
      }
      const uint32_t a = __shfl_xor_sync(~0u, upper ? v[0] : v[2], 16);
      const uint32_t b = __shfl_xor_sync(~0u, upper ? v[1] : v[3], 16);
      const Vector4 columns = {upper ? a : v[0], upper ? v[2] : a, upper ? b : v[1],
                               upper ? v[3] : b};
      st_global_v4_if(has_row(block, rows_of_slab, k, n), to + n * 1024, columns);
    }
    to += 8 * 1024;
  });
}
