// Writes new latent rows into the pages of a cache, where a slot mapping says.
//
// Token i of a layer, whose rows lie at rows + layer, batch and token strides, goes to
// slot_mapping[i] = page * page_size + slot; a negative one is skipped, and so is one beyond the
// pool. One launch writes one layer, or all: blockIdx.y.
//
// A row moves as 16-byte vectors, a thread each, up to four at a time so that their loads are in
// flight together. With tables of cosines and sines the last 64 columns are rotated on their way:
//
//     (a, b) -> (a cos - b sin, a sin + b cos)      float32, each product and each sum rounded
//
// where a pair is columns (2j, 2j + 1), or (j, j + 32) if the halves are split, and cos and sin are
// row positions[i] of the tables, column j. A position outside of the tables gives NaN.
// flashmla_cupy/append.py has the definition in NumPy, with the same bits.
#include "ptx.cuh"

constexpr int THREADS = 256, MOST_VECTORS = 4;  // of a block; of a thread
constexpr int ROTARY_PAIRS = 32, ROTARY_VECTORS = 8;
constexpr uint32_t NAN_X2 = 0x7fff7fff;

// Two values of the kernel's 16-bit type.
DEVICE float2 from_x2(uint32_t x) {
#if defined(DTYPE_FP16)
  return from_half_x2(x);
#else
  float2 y;
  y.x = __uint_as_float(x << 16), y.y = __uint_as_float(x & 0xffff0000u);
  return y;
#endif
}
DEVICE float first_of_pair(float a, float b, float cosine, float sine) {
  return __fadd_rn(__fmul_rn(a, cosine), -__fmul_rn(b, sine));
}
DEVICE float second_of_pair(float a, float b, float cosine, float sine) {
  return __fadd_rn(__fmul_rn(a, sine), __fmul_rn(b, cosine));
}

// Four pairs, side by side.
DEVICE Vector4 rotate_interleaved(Vector4 v, const float* cos, const float* sin) {
  const float4 c = *(const float4*)cos, s = *(const float4*)sin;
  const float cosines[4] = {c.x, c.y, c.z, c.w}, sines[4] = {s.x, s.y, s.z, s.w};
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = from_x2(words[i]);
    words[i] = cvt_x2(first_of_pair(x.x, x.y, cosines[i], sines[i]),
                      second_of_pair(x.x, x.y, cosines[i], sines[i]));
  }
  return {words[0], words[1], words[2], words[3]};
}
// One half of eight pairs: `v`, and `other` is the vector with the other half.
DEVICE Vector4 rotate_halves(Vector4 v, Vector4 other, bool is_second, const float* cos,
                             const float* sin) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const uint32_t others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 own = from_x2(words[i]), far = from_x2(others[i]);
    const float c0 = cos[2 * i], c1 = cos[2 * i + 1], s0 = sin[2 * i], s1 = sin[2 * i + 1];
    words[i] = is_second ? cvt_x2(second_of_pair(far.x, own.x, c0, s0),
                                  second_of_pair(far.y, own.y, c1, s1))
                         : cvt_x2(first_of_pair(own.x, far.x, c0, s0),
                                  first_of_pair(own.y, far.y, c1, s1));
  }
  return {words[0], words[1], words[2], words[3]};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    append(const uint8_t* rows, const int64_t* __restrict__ slot_mapping, uint8_t* pool,
           const float* __restrict__ cos, const float* __restrict__ sin,  // 0: no rotation
           const int64_t* __restrict__ positions,
           int64_t layer_stride, int64_t batch_stride, int64_t token_stride,  // bytes, of the rows
           int64_t head_stride,
           int64_t pool_layer_stride, int64_t page_stride, int64_t slot_stride,  // of the pool
           int64_t pool_head_stride,
           int64_t slots,  // of the pool
           int64_t num_positions,
           int vectors,  // of a row of one head
           int heads, int tokens,  // of each of the batch
           int total,              // vectors of a layer
           int page_size_log2, int interleaved) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  rows += blockIdx.y * layer_stride;
  pool += blockIdx.y * pool_layer_stride;
  const int step = gridDim.x * THREADS;
  Vector4 loaded[MOST_VECTORS];
  const uint8_t* from[MOST_VECTORS];
  uint8_t* to[MOST_VECTORS];
  int token[MOST_VECTORS], column[MOST_VECTORS];
#pragma unroll
  for (int u = 0; u < MOST_VECTORS; ++u) {
    const int i = blockIdx.x * THREADS + threadIdx.x + u * step;
    to[u] = nullptr;
    if (i >= total) continue;
    const int row = i / vectors;
    column[u] = i - row * vectors;
    token[u] = row;
    int head = 0;
    if (heads > 1) token[u] = row / heads, head = row - token[u] * heads;
    const int request = token[u] / tokens, in_request = token[u] - request * tokens;
    from[u] = rows + request * batch_stride + in_request * token_stride + head * head_stride +
              column[u] * 16;
    loaded[u] = ld_global_v4(from[u]);
    const int64_t slot = slot_mapping[token[u]];
    if (slot < 0 || slot >= slots) continue;
    const int64_t page = slot >> page_size_log2, in_page = slot - (page << page_size_log2);
    to[u] = pool + page * page_stride + in_page * slot_stride + head * pool_head_stride +
            column[u] * 16;
  }
#pragma unroll
  for (int u = 0; u < MOST_VECTORS; ++u) {
    if (!to[u]) continue;
    const int v = column[u] - (vectors - ROTARY_VECTORS);  // of the rotary columns
    if (cos && v >= 0) {
      const int64_t position = positions[token[u]];
      const bool is_second = !interleaved && v >= ROTARY_VECTORS / 2;
      const int pair = interleaved ? 4 * v : 8 * (v % (ROTARY_VECTORS / 2));
      if (position < 0 || position >= num_positions) {
        loaded[u] = {NAN_X2, NAN_X2, NAN_X2, NAN_X2};
      } else if (interleaved) {
        loaded[u] = rotate_interleaved(loaded[u], cos + position * ROTARY_PAIRS + pair,
                                       sin + position * ROTARY_PAIRS + pair);
      } else {
        const int away = ROTARY_VECTORS / 2 * 16;
        const Vector4 other = ld_global_v4(from[u] + (is_second ? -away : away));
        loaded[u] = rotate_halves(loaded[u], other, is_second,
                                  cos + position * ROTARY_PAIRS + pair,
                                  sin + position * ROTARY_PAIRS + pair);
      }
    }
    st_global_v4(to[u], loaded[u]);
  }
}
