// Merges the partial results of split requests, by the arithmetic of merge.cuh.
//
// Grid (row groups, at most so many split requests). Block row i takes the i-th split request, if
// there is one, from column 7 of the metadata (schedule.py). `warps_per_row` warps (1 or 8) share a
// row: 8 where there are few rows and many splits.
// Launched programmatically behind dense_decode: metadata is older than that kernel, so reading it
// need not wait. What this kernel takes is the latency of its loads, so as many as fit into
// registers are in flight at once, the first of them, as written, before their weights are known;
// ptxas moves these behind the maximum of lse.
//
// What was tried instead, on an H200; microseconds of a whole call, this one first. `h`, `b` and `s`:
// query heads, requests, tokens of each.
//   no second kernel: the blocks of dense_decode merge a slice each as they end, told by words in
//   global memory that all pieces are there         h128 b1 s512 12.2 | 17.3, h16 b1 s32768 24.4 | 25.3
//   rows of all split requests counted and shared   h128 b1 s512 12.2 | 13.5, h128 b8 s4096 36.0 | 33.7
//   columns of few rows for 2 or 4 blocks, rows of few splits together in a block
//                                                   h128 b1 s512 11.9 | 12.9, h16 b1 s32768 24.0 | 22.9
// Each of them has more instructions ahead of the first load.
#include "merge.cuh"
#include "metadata.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, MAX_SPLITS = 256;
constexpr int IN_FLIGHT = 4;  // splits that a warp loads at once

DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// out_i of a row: each lane takes columns 4 lane .. + 3 of every 128.
struct Rows {
  float4 columns[IN_FLIGHT][4];
};
// Splits first, first + stride, ...; those past the last are zeros.
DEVICE void load_rows(Rows& rows, const float4* source, int64_t pitch, int first, int stride,
                      int splits) {
#pragma unroll
  for (int u = 0; u < IN_FLIGHT; ++u) {
    const int split = first + u * stride;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      rows.columns[u][c] =
          split < splits ? __ldg(source + split * pitch + c * 32) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const int* __restrict__ tile_scheduler_metadata,  // [parts, 8]
            const float* __restrict__ out_partial,            // [slots, s_q * h_q, 512]
            const float* __restrict__ lse_partial,            // [slots, s_q * h_q], log2
            uint16_t* __restrict__ out,                       // [batch, s_q, h_q, 512]
            float* __restrict__ lse,                          // [batch, h_q, s_q]
            uint64_t* __restrict__ pairs,                     // [words], see pair.cuh
            int words, int batch, int s_q, int h_q, int group, int slots, int warps_per_row) {
  __shared__ float weights[WARPS][MAX_SPLITS];
  __shared__ float sums[WARPS][512];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int* entry = tile_scheduler_metadata + blockIdx.y * 8 + 7;
  const uint32_t this_one = entry[0], next_one = entry[8];
  const int request = this_one & NO_REQUEST;
  const int first_slot = this_one >> REQUEST_BITS;
  const int splits = (int)(next_one >> REQUEST_BITS) - first_slot;
  // Metadata that does not fit is refused by dense_decode; here it must only do no harm.
  const bool fits = splits >= 2 && splits <= MAX_SPLITS && first_slot + splits <= slots;
  const bool clears = blockIdx.x + blockIdx.y == 0;
  if (!clears && (request >= batch || !fits)) return;

  const int rows = s_q * h_q;
  const int row = blockIdx.x * (WARPS / warps_per_row) + warp / warps_per_row;
  const bool active = row < rows;
  griddepcontrol_wait();
  if (clears) {  // for the next replay, if this is in a graph
    for (int i = threadIdx.x; i < words; i += THREADS) pairs[i] = 0;
    if (request >= batch || !fits) return;
  }

  const int64_t first_row = (int64_t)first_slot * rows + (active ? row : 0);
  if (splits == 2 && __float_as_uint(__ldg(lse_partial + first_row)) == MERGED_LSE) return;
  const float4* source = (const float4*)(out_partial + first_row * 512) + lane;
  const int64_t pitch = (int64_t)rows * 128;
  const int stride = warps_per_row;
  int split = warp % warps_per_row;
  Rows loaded;
  load_rows(loaded, source, pitch, split, stride, splits);

  float part_lse[MAX_SPLITS / 32];
  float max_lse = LEAST_LSE, sum = 0.f;
#pragma unroll
  for (int i = 0; i < MAX_SPLITS / 32; ++i) {
    const int at = i * 32 + lane;
    part_lse[i] = at < splits ? __ldg(lse_partial + first_row + (int64_t)at * rows)
                              : NEG_INF;
  }
#pragma unroll
  for (int i = 0; i < MAX_SPLITS / 32; ++i) max_lse = fmaxf(max_lse, part_lse[i]);
  max_lse = warp_max(max_lse);
#pragma unroll
  for (int i = 0; i < MAX_SPLITS / 32; ++i) {
    const float weight = weight_of(part_lse[i], max_lse);
    weights[warp][i * 32 + lane] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  const float inverse = inverse_of(sum);
  __syncwarp();

  float4 o[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) o[c] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (;;) {
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      if (split + u * stride >= splits) break;
      const float weight = weights[warp][split + u * stride] * inverse;
      if (weight == 0.f) continue;  // no key of this row; out_i may be NaN from V
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float4 v = loaded.columns[u][c];
        o[c].x = add_product(o[c].x, weight, v.x);
        o[c].y = add_product(o[c].y, weight, v.y);
        o[c].z = add_product(o[c].z, weight, v.z);
        o[c].w = add_product(o[c].w, weight, v.w);
      }
    }
    split += IN_FLIGHT * stride;
    if (split >= splits) break;
    load_rows(loaded, source, pitch, split, stride, splits);
  }

  // Partial row -> (query position, head): kv head by kv head, each with s_q * group rows.
  const int kv_head = row / (s_q * group), rest = row - kv_head * s_q * group;
  const int position = rest / group, head = kv_head * group + rest - position * group;
  uint16_t* out_row = out + (((int64_t)request * s_q + position) * h_q + head) * 512;
  if (warps_per_row == 1) {
    if (!active) return;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint2 packed;
      packed.x = cvt_x2(o[c].x, o[c].y);
      packed.y = cvt_x2(o[c].z, o[c].w);
      *(uint2*)(out_row + c * 128 + lane * 4) = packed;
    }
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) ((float4*)sums[warp])[c * 32 + lane] = o[c];
    __syncthreads();
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      x += sums[w][threadIdx.x * 2];
      y += sums[w][threadIdx.x * 2 + 1];
    }
    if (active) ((uint32_t*)out_row)[threadIdx.x] = cvt_x2(x, y);
  }
  if (active && lane == 0 && warp % warps_per_row == 0) {
    lse[((int64_t)request * h_q + head) * s_q + position] = merged_lse(sum, max_lse);
  }
}
