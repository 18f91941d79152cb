// Writes new latent rows into the pages of a cache, where a slot mapping says.
//
// Token i of a layer, whose rows lie at rows + layer, batch and token strides, goes to
// slot_mapping[i] = page * page_size + slot; a negative one is skipped, and so is one beyond the
// pool. One launch writes one layer, or all: blockIdx.y.
//
// A row moves as 16-byte vectors, up to four by a thread, so that their loads are in flight
// together. With tables of cosines and sines the last 64 columns are rotated on their way:
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

// Where rows come from and go to; strides in bytes.
struct Layout {
  const uint8_t* rows;
  uint8_t* pool;
  const int64_t* slot_mapping;
  int64_t batch_stride, token_stride, head_stride, page_stride, slot_stride, pool_head_stride;
  int64_t slots;
  int heads, tokens, page_size_log2;

  // A row of one head: its token, its bytes, and where they go, nullptr for nowhere.
  DEVICE int locate(int row, const uint8_t*& from, uint8_t*& to) const {
    int token = row, head = 0;
    if (heads > 1) token = row / heads, head = row - token * heads;
    const int request = token / tokens, in_request = token - request * tokens;
    from = rows + request * batch_stride + in_request * token_stride + head * head_stride;
    const int64_t slot = slot_mapping[token];
    const int64_t page = slot >> page_size_log2, in_page = slot - (page << page_size_log2);
    to = pool + page * page_stride + in_page * slot_stride + head * pool_head_stride;
    if (slot < 0 || slot >= slots) to = nullptr;
    return token;
  }
};
struct Angles {
  const float *cos, *sin;
  const int64_t* positions;
  int64_t num_positions;
  bool interleaved;
};

// Vector i of the rotary ones: they need more loads, one behind another, than the others do, so
// they have blocks of their own, which the launch begins with.
DEVICE void rotate(const Layout& layout, const Angles& angles, int i, int vectors) {
  const int row = i / ROTARY_VECTORS, v = i % ROTARY_VECTORS;
  const uint8_t* from;
  uint8_t* to;
  const int token = layout.locate(row, from, to);
  const int64_t position = angles.positions[token];
  from += (vectors - ROTARY_VECTORS + v) * 16;
  Vector4 x = ld_global_v4(from);
  if (!to) return;
  const bool is_known = position >= 0 && position < angles.num_positions;
  const int64_t at = (is_known ? position : 0) * ROTARY_PAIRS;
  if (angles.interleaved) {
    x = rotate_interleaved(x, angles.cos + at + 4 * v, angles.sin + at + 4 * v);
  } else {
    const bool is_second = v >= ROTARY_VECTORS / 2;
    const int64_t pair = at + 8 * (v % (ROTARY_VECTORS / 2));
    const int away = ROTARY_VECTORS / 2 * 16;
    const Vector4 other = ld_global_v4(from + (is_second ? -away : away));
    x = rotate_halves(x, other, is_second, angles.cos + pair, angles.sin + pair);
  }
  if (!is_known) x = {NAN_X2, NAN_X2, NAN_X2, NAN_X2};
  st_global_v4(to + (vectors - ROTARY_VECTORS + v) * 16, x);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    append(const uint8_t* rows, const int64_t* __restrict__ slot_mapping, uint8_t* pool,
           const float* __restrict__ cos, const float* __restrict__ sin,
           const int64_t* __restrict__ positions,
           int64_t layer_stride, int64_t batch_stride, int64_t token_stride,  // bytes, of the rows
           int64_t head_stride,
           int64_t pool_layer_stride, int64_t page_stride, int64_t slot_stride,  // of the pool
           int64_t pool_head_stride,
           int64_t slots,  // of the pool
           int64_t num_positions,
           int vectors,  // of a row of one head
           int heads, int tokens,  // of each of the batch
           int total,              // rows of a layer, of one head
           int page_size_log2, int interleaved,
           int rotary_blocks) {  // of the grid, the first ones; 0: no rotation
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const Layout layout = {rows + blockIdx.y * layer_stride, pool + blockIdx.y * pool_layer_stride,
                         slot_mapping, batch_stride, token_stride, head_stride, page_stride,
                         slot_stride, pool_head_stride, slots, heads, tokens, page_size_log2};
  if ((int)blockIdx.x < rotary_blocks) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    const Angles angles = {cos, sin, positions, num_positions, interleaved != 0};
    if (i < total * ROTARY_VECTORS) rotate(layout, angles, i, vectors);
    return;
  }
  const int copied = rotary_blocks ? vectors - ROTARY_VECTORS : vectors;  // of a row
  const int first = (blockIdx.x - rotary_blocks) * THREADS + threadIdx.x;
  const int step = (gridDim.x - rotary_blocks) * THREADS;
  Vector4 loaded[MOST_VECTORS];
  uint8_t* to[MOST_VECTORS];
#pragma unroll
  for (int u = 0; u < MOST_VECTORS; ++u) {
    const int i = first + u * step, row = i / copied, column = i - row * copied;
    to[u] = nullptr;
    if (row >= total) continue;
    const uint8_t* from;
    layout.locate(row, from, to[u]);
    loaded[u] = ld_global_v4(from + column * 16);
    if (to[u]) to[u] += column * 16;
  }
#pragma unroll
  for (int u = 0; u < MOST_VECTORS; ++u) {
    if (to[u]) st_global_v4(to[u], loaded[u]);
  }
}
