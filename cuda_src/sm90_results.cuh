// The results of a row block: where O goes in the end. Of the decode kernels by wgmma, whose
// accumulators are spread over threads alike (sm90_fragments.cuh).
#pragma once
#include "merge.cuh"
#include "sm90_fragments.cuh"

// O * inverse -> out, by 16 bytes a lane.
DEVICE void store_out(const float (&o)[128], int half, const Params& params, int request,
                      float inverse0, float inverse1) {
  const RowBlock block = row_block();
  const int row = block.first_row + row_in_block();
  uint16_t* to =
      params.out + out_row(params, request, block, row) * 512 + half * 256 + (lane_index() & 3) * 8;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float x = h ? inverse1 : inverse0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* t = o + 16 * i + 2 * h;
      const Vector4 columns =
          transpose_quads({cvt_x2(t[0] * x, t[1] * x), cvt_x2(t[4] * x, t[5] * x),
                           cvt_x2(t[8] * x, t[9] * x), cvt_x2(t[12] * x, t[13] * x)});
      if (row + 8 * h < params.slab_rows) st_global_v4(to + h * 8 * 512 + i * 32, columns);
    }
  }
}

// O * inverse -> the partial result in a slot as floats, by 16 bytes a lane.
DEVICE void store_floats(const float (&o)[128], int half, const Params& params, int slot,
                         float inverse0, float inverse1) {
  const RowBlock block = row_block();
  const int row = block.first_row + row_in_block();
  float* to = params.out_partial + partial_row(params, slot, block, row) * 512 + half * 256 +
              (lane_index() & 3) * 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float x = h ? inverse1 : inverse0;
    if (row + 8 * h >= params.slab_rows) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float* t = o + 8 * i + 2 * h;
      st_global_v4_f32(to + h * 8 * 512 + i * 16, t[0] * x, t[1] * x, t[4] * x, t[5] * x);
    }
  }
}

// O * inverse -> the partial result in a slot as scaled halves (merge.cuh), and their scales.
DEVICE void store_halves(const float (&o)[128], int half, const Params& params, int slot,
                         float inverse0, float inverse1) {
  const RowBlock block = row_block();
  const int lane = lane_index() & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest[4] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float* t = o + 4 * i + 2 * h;
      largest[i & 3] = fmaxf(fmaxf(largest[i & 3], fabsf(t[0])), fabsf(t[1]));
    }
    const float inverse = h ? inverse1 : inverse0;
    const Scale scale = scale_of(
        quad_max(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]))) * inverse);
    const int row = block.first_row + row_in_block() + 8 * h;
    if (row >= params.slab_rows) continue;
    const float x = inverse * scale.up;
    const int64_t at = partial_row(params, slot, block, row);
    uint16_t* to = (uint16_t*)(params.out_partial + at * 512) + half * 256 + lane * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* t = o + 16 * i + 2 * h;
      st_global_v4(to + i * 32, {half_x2(t[0] * x, t[1] * x), half_x2(t[4] * x, t[5] * x),
                                 half_x2(t[8] * x, t[9] * x), half_x2(t[12] * x, t[13] * x)});
    }
    float* scales = params.row_partial + at * 4;
    if (lane == 0 && half == 0) scales[1] = scale.down;
    if (lane == 0 && half == 1) scales[2] = scale.down;  // scales[3] is the softmax warpgroup's
  }
}
