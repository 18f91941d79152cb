// Merges the partial results of split requests:
//
//     lse = log2 sum_i 2^lse_i        out = sum_i 2^(lse_i - lse) out_i
//
// Grid (row groups, at most so many split requests). Block row i takes the i-th split request, if
// there is one, from column 7 of the metadata (schedule.py). `warps_per_row` warps (1 or 8) share a
// row: 8 where there are few rows and many splits.
// Launched programmatically behind dense_decode: metadata is older than that kernel, so reading it
// need not wait.
#include "ptx.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, MAX_SPLITS = 256;
constexpr int REQUEST_BITS = 20, REQUEST_MASK = (1 << REQUEST_BITS) - 1;
constexpr float LN2 = 0.69314718056f;

extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const int* __restrict__ tile_scheduler_metadata,  // [parts, 8]
            const float* __restrict__ out_partial,            // [slots, s_q * h_q, 512]
            const float* __restrict__ lse_partial,            // [slots, s_q * h_q], log2
            uint16_t* __restrict__ out,                       // [batch, s_q, h_q, 512]
            float* __restrict__ lse,                          // [batch, h_q, s_q]
            int batch, int s_q, int h_q, int group, int slots, int warps_per_row) {
  __shared__ float weights[WARPS][MAX_SPLITS];
  __shared__ float sums[WARPS][512];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int* entry = tile_scheduler_metadata + blockIdx.y * 8 + 7;
  const uint32_t this_one = entry[0], next_one = entry[8];
  const int request = this_one & REQUEST_MASK;
  if (request >= batch) return;
  const int first_slot = this_one >> REQUEST_BITS;
  const int splits = (int)(next_one >> REQUEST_BITS) - first_slot;
  // Metadata that does not fit is refused by dense_decode; here it must only do no harm.
  if (splits < 2 || splits > MAX_SPLITS || first_slot + splits > slots) return;

  const int rows = s_q * h_q, row = blockIdx.x * (WARPS / warps_per_row) + warp / warps_per_row;
  griddepcontrol_wait();
  const bool active = row < rows;
  float max_lse = -1e38f, sum = 0.f;
  if (active) {
    const float* mine = lse_partial + (int64_t)first_slot * rows + row;
    for (int i = lane; i < splits; i += 32) max_lse = fmaxf(max_lse, mine[(int64_t)i * rows]);
#pragma unroll
    for (int d = 16; d; d /= 2) max_lse = fmaxf(max_lse, __shfl_xor_sync(~0u, max_lse, d));
    for (int i = lane; i < splits; i += 32) {
      const float weight = ex2(mine[(int64_t)i * rows] - max_lse);  // NaN stays NaN
      weights[warp][i] = weight;
      sum += weight;
    }
#pragma unroll
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  }
  __syncwarp();
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;
  float4 o[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) o[c] = make_float4(0.f, 0.f, 0.f, 0.f);
  if (active) {
    const float4* source =
        (const float4*)(out_partial + ((int64_t)first_slot * rows + row) * 512) + lane;
#pragma unroll 4
    for (int i = warp % warps_per_row; i < splits; i += warps_per_row) {
      const float weight = weights[warp][i] * inverse;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float4 v = source[(int64_t)i * rows * 128 + c * 32];
        if (weight == 0.f) v = make_float4(0.f, 0.f, 0.f, 0.f);  // no key of this row: V may be NaN
        o[c].x = fmaf(weight, v.x, o[c].x);
        o[c].y = fmaf(weight, v.y, o[c].y);
        o[c].z = fmaf(weight, v.z, o[c].z);
        o[c].w = fmaf(weight, v.w, o[c].w);
      }
    }
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
    lse[((int64_t)request * h_q + head) * s_q + position] =
        sum == 0.f ? __int_as_float(0x7f800000) : (lg2(sum) + max_lse) * LN2;
  }
}
