// Merges the partial results of split requests, by the arithmetic of merge.cuh.
//
// Column 7 of the metadata lists the split requests and where their slots begin (metadata.cuh
// explains the words). The blocks of the grid are shared out to these requests in proportion to
// their slots. A unit of work is half of the columns of a row, or a quarter where rows are few. W
// warps share a unit, round-robin over its splits; W is the smallest power of two with every load
// in flight. Where units outnumber the warps, the blocks of a request go round; if its pieces are
// few, a unit would leave most of a warp's loads unused, so a warp takes whole rows.
//
//   time ->   metadata, addresses | wait for dense_decode | all loads | weights | sums | out, lse
//
// What this kernel takes is latency: that of its loads, and that of its instructions. So it is
// launched programmatically, and what it can find out by itself comes before the wait; then all
// loads are issued at once, those of out before the weights are known. They are volatile, or ptxas
// moves them behind the arithmetic of the weights.
#include "merge.cuh"
#include "metadata.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int MAX_SPLITS = 160;  // parts at most (geometry.py)

// A unit of work: some columns of a row, of which each lane of a team has eight. Of halves it is
// 256 columns, which have one scale. Of floats, which is how few rows are kept, it is 128 columns,
// so that there are enough units; half a warp is a team then.
template <bool HALVES>
struct Unit {
  static constexpr int COLUMNS = HALVES ? 256 : 128, IN_ROW = 512 / COLUMNS;
  static constexpr int LANES = COLUMNS / 8, TEAMS = 32 / LANES;  // lanes of a team, teams of a warp
  static constexpr int IN_FLIGHT = HALVES ? 10 : 5;              // splits that a team loads at once
};

struct Arrays {
  const float* out_partial;  // [slots, s_q * h_q, 512], or halves: merge.cuh
  const float* row_partial;  // [slots, s_q * h_q, 4]: lse in log2, two scales, largest logit
  uint16_t* out;             // [batch, s_q, h_q, 512]
  float* lse;                // [batch, h_q, s_q]
  int s_q, h_q, group;
#if defined(GATHERED)  // behind the kernels over rows that are gathered one by one
  const float* attn_sink;  // [h_q], natural logarithms, or null
  float* max_logits;       // [batch, h_q], or null; row_partial has those of the pieces, in log2
  int lse_group;           // lse_index
#else
  static constexpr const float* attn_sink = nullptr;
  static constexpr float* max_logits = nullptr;
  static constexpr int lse_group = 1;
#endif
};
struct Request {
  int index, first_slot, splits;
};
// Column 7 of the metadata. A lane holds the entries lane, lane + 32, ..., by one load each.
struct List {
  uint32_t entries[MAX_SPLITS / 32];
  DEVICE void load(const int* tile_scheduler_metadata, int parts) {
#pragma unroll
    for (int k = 0; k < MAX_SPLITS / 32; ++k) {
      const int i = k * 32 + lane_index();
      entries[k] = NO_REQUEST;
      if (i < parts) entries[k] = __ldg(tile_scheduler_metadata + i * 8 + 7);
    }
  }
  DEVICE uint32_t operator[](int i) const {
    uint32_t entry = entries[0];
#pragma unroll
    for (int k = 1; k < MAX_SPLITS / 32; ++k) {
      if (i >> 5 == k) entry = entries[k];
    }
    return __shfl_sync(~0u, entry, i & 31);
  }
  // How many entries satisfy a condition.
  template <class Condition>
  DEVICE int count(Condition condition) const {
    int sum = 0;
#pragma unroll
    for (int k = 0; k < MAX_SPLITS / 32; ++k) {
      sum += __popc(__ballot_sync(~0u, condition(entries[k])));
    }
    return sum;
  }
};
// Shared memory of a warp: first what the splits of its unit weigh, then the sums of its teams.
union Shared {
  float weights[MAX_SPLITS];
  float sums[Unit<true>::COLUMNS];
};

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

// Where a row of the partial results belongs. They lie kv head by kv head, each with s_q * group
// rows.
struct Row {
  int64_t out, lse;  // rows of out, elements of lse
  int head;
  DEVICE Row(const Arrays& a, const Request& request, int row) {
    const int kv_head = row / (a.s_q * a.group), rest = row - kv_head * a.s_q * a.group;
    const int position = rest / a.group;
    head = kv_head * a.group + rest - position * a.group;
    out = ((int64_t)request.index * a.s_q + position) * a.h_q + head;
    lse = lse_index(request.index, position, head, a.s_q, a.h_q, a.lse_group);
  }
};

// The sink of a row, in log2; -inf if there is none.
DEVICE float sink_of(const Arrays& a, const Row& row) {
  return a.attn_sink ? __ldg(a.attn_sink + row.head) * LOG2E : NEG_INF;
}
// Writes the largest logit of a row, that of its splits, by a warp.
DEVICE void merge_max_logits(const Arrays& a, const Request& request, int row, const Row& to) {
  const int64_t pitch = (int64_t)a.s_q * a.h_q * 4;
  const float* from = a.row_partial + request.first_slot * pitch + row * 4 + 3;
  float largest = NEG_INF;
  for (int split = lane_index(); split < request.splits; split += 32) {
    largest = fmaxf(largest, ld_global_f32(from + split * pitch));
  }
  largest = warp_max(largest);
  if (lane_index() == 0) a.max_logits[to.out] = largest * LN2;
}

// Merges a row of a pair (sm90_pair.cuh), by a warp.
DEVICE void merge_pair(const Arrays& a, const Request& request, int row) {
  const int64_t rows = a.s_q * a.h_q, first_row = request.first_slot * rows + row;
  const float* lse = a.row_partial + first_row * 4;
  const float* from = a.out_partial + first_row * 512 + lane_index() * 4;
  const float front_lse = ld_global_f32(lse), back_lse = ld_global_f32(lse + rows * 4);
  float4 front[4], back[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    front[i] = ld_global_v4_f32(from + i * 128);
    back[i] = ld_global_v4_f32(from + rows * 512 + i * 128);
  }
  const Row to(a, request, row);
  const Merged both = merge_rows(front_lse, back_lse, sink_of(a, to));
  auto merge = [&](float x, float y) { return merge_two(both.front, x, both.back, y); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint16_t* out = a.out + to.out * 512 + column_of_float(i * 128 + lane_index() * 4);
    const float4 x = front[i], y = back[i];
    *(uint32_t*)out = cvt_x2(merge(x.x, y.x), merge(x.y, y.y));
    *(uint32_t*)(out + 8) = cvt_x2(merge(x.z, y.z), merge(x.w, y.w));
  }
  if (lane_index() == 0) a.lse[to.lse] = both.lse;
  if (a.max_logits) merge_max_logits(a, request, row, to);
}
// Merges rows first, first + step, ... of a pair, except those that dense_decode has merged. Most
// often that is all of them, so a warp looks at 32 rows at once.
DEVICE void merge_pairs(const Arrays& a, const Request& request, int first, int step) {
  const int rows = a.s_q * a.h_q;
  const float* lse = a.row_partial + (int64_t)request.first_slot * rows * 4;
  griddepcontrol_wait();
#pragma unroll 1
  for (int begin = first; begin < rows; begin += 32 * step) {
    const int row = begin + lane_index() * step;
    bool is_left = row < rows;
    if (is_left) is_left = __float_as_uint(ld_global_f32(lse + row * 4)) != MERGED_LSE;
    uint32_t left = __ballot_sync(~0u, is_left);
#pragma unroll 1
    for (; left; left &= left - 1) merge_pair(a, request, begin + (__ffs(left) - 1) * step);
  }
}

// lse and, for halves, the scales of a row. A lane holds those of splits lane, lane + 32, ...
template <bool HALVES>
struct Splits {
  float4 rows[MAX_SPLITS / 32];
  DEVICE void load(const float* from, int64_t pitch, int splits) {
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; ++i) {
      if (i == 1 && splits <= 32) return;
      const int split = i * 32 + lane_index();
      rows[i] = make_float4(NEG_INF, 1.f, 1.f, 0.f);
      if (split >= splits) continue;
      if (HALVES) {
        rows[i] = ld_global_v4_f32(from + split * pitch);
      } else {
        rows[i].x = ld_global_f32(from + split * pitch);
      }
    }
  }
  // Writes the weights; returns lse, a natural logarithm.
  DEVICE float weigh(float* weights, int splits, bool second_half, float sink) {
    float top = fmaxf(LEAST_LSE, rows[0].x), sum;
    if (splits > 32) {
#pragma unroll
      for (int i = 1; i < MAX_SPLITS / 32; ++i) top = fmaxf(top, rows[i].x);
    }
    top = warp_max(top);
    sum = rows[0].x = weight_of(rows[0].x, top);
    if (splits > 32) {
#pragma unroll
      for (int i = 1; i < MAX_SPLITS / 32; ++i) sum += rows[i].x = weight_of(rows[i].x, top);
    }
    sum = warp_sum(sum);
    const float inverse = inverse_of(sum, sink, top);
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; ++i) {
      if (i == 1 && splits <= 32) break;
      weights[i * 32 + lane_index()] = rows[i].x * inverse * (second_half ? rows[i].z : rows[i].y);
    }
    __syncwarp();
    return merged_lse(sum, top);
  }
};

// o += weight * eight halves
DEVICE void add_halves(float (&o)[8], float weight, const Vector4& halves) {
  const uint32_t v[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = from_half_x2(v[i]);
    o[2 * i] = fmaf(weight, x.x, o[2 * i]);
    o[2 * i + 1] = fmaf(weight, x.y, o[2 * i + 1]);
  }
}
// o[:4] += weight * four floats
DEVICE void add_floats(float* o, float weight, const Vector4& floats) {
  const uint32_t v[4] = {floats.x, floats.y, floats.z, floats.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) o[i] = fmaf(weight, __uint_as_float(v[i]), o[i]);
}
// Eight columns for each lane, of the splits that are in flight. Floats lie in groups of 16
// columns, but a lane of a quad has the same eight as with halves.
template <bool HALVES>
struct Columns {
  static constexpr int IN_FLIGHT = Unit<HALVES>::IN_FLIGHT;
  Vector4 loaded[IN_FLIGHT][HALVES ? 1 : 2];
  // Where the columns of a lane lie in a row.
  DEVICE static int offset(int lane) {
    return HALVES ? lane * 4 : (lane >> 2) * 32 + (lane & 3) * 4;
  }
  DEVICE void load(const float* from, int64_t pitch, int first, int teams, int splits) {
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      if (first + u * teams >= splits) continue;
      loaded[u][0] = ld_global_v4(from + u * teams * pitch);
      if (!HALVES) loaded[u][1] = ld_global_v4(from + u * teams * pitch + 16);
    }
  }
  DEVICE void add(float (&o)[8], const float* weights, int first, int teams, int splits) const {
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      const float weight = first + u * teams < splits ? weights[first + u * teams] : 0.f;
      if (weight == 0.f) continue;  // a piece without a key of this row: out_i may be NaN from V
      if constexpr (HALVES) {
        add_halves(o, weight, loaded[u][0]);
      } else {
        add_floats(o, weight, loaded[u][0]);
        add_floats(o + 4, weight, loaded[u][1]);
      }
    }
  }
};

// Merges a unit of a request in three or more pieces, by 2^warps_log2 warps.
template <bool HALVES>
DEVICE void merge_unit(const Arrays& a, const Request& request, int unit, int warps_log2,
                       Shared* shared) {
  using U = Unit<HALVES>;
  const int warp = uniform(threadIdx.x >> 5), lane = lane_index(), warps = 1 << warps_log2;
  const int rows = a.s_q * a.h_q, row = unit / U::IN_ROW, at = unit % U::IN_ROW * U::COLUMNS;
  const int teams = warps * U::TEAMS, splits = request.splits;
  int first_of_warp = (warp & (warps - 1)) * U::TEAMS, first = first_of_warp + lane / U::LANES;
  const int64_t first_row = (int64_t)request.first_slot * rows + row, pitch = (int64_t)rows * 512;
  const float* rows_from = a.row_partial + first_row * 4;
  const float* from = a.out_partial + first_row * 512 + first * pitch + (HALVES ? at / 2 : at) +
                      Columns<HALVES>::offset(lane % U::LANES);
  pin(rows_from), pin(from);
  griddepcontrol_wait();

  Splits<HALVES> all;
  all.load(rows_from, (int64_t)rows * 4, splits);
  Columns<HALVES> columns;
  columns.load(from, pitch, first, teams, splits);
  const Row to(a, request, row);
  __syncwarp();  // all have read the weights of the unit before
  float* weights = shared[warp].weights;
  const float row_lse = all.weigh(weights, splits, at >= 256, sink_of(a, to));
  float o[8] = {};
  for (;;) {
    columns.add(o, weights, first, teams, splits);
    first_of_warp += U::IN_FLIGHT * teams, first += U::IN_FLIGHT * teams;
    if (first_of_warp >= splits) break;
    from += U::IN_FLIGHT * teams * pitch;
    columns.load(from, pitch, first, teams, splits);
  }
  if (U::TEAMS == 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] += __shfl_xor_sync(~0u, o[i], U::LANES);
  }
  uint16_t* out = a.out + to.out * 512 + at;
  if (warps == 1) {
    const Vector4 packed = transpose_quads(
        {cvt_x2(o[0], o[1]), cvt_x2(o[2], o[3]), cvt_x2(o[4], o[5]), cvt_x2(o[6], o[7])});
    if (lane < U::LANES) st_global_v4(out + lane * 8, packed);
  } else {
    const int first_warp = warp & -warps, thread = (warp - first_warp) * 32 + lane;
    __syncwarp();  // all have read the weights
    if (lane < U::LANES) {
      float4* to_sums = (float4*)(shared[warp].sums + lane * 8);
      to_sums[0] = make_float4(o[0], o[1], o[2], o[3]);
      to_sums[1] = make_float4(o[4], o[5], o[6], o[7]);
    }
    bar_sync(1 + (warp >> warps_log2), 32 * warps);
#pragma unroll 1
    for (int column = thread * 2; column < U::COLUMNS; column += 64 * warps) {
      float x = 0.f, y = 0.f;
#pragma unroll 2
      for (int w = 0; w < warps; ++w) {
        const float2 v = *(const float2*)(shared[first_warp + w].sums + column);
        x += v.x, y += v.y;
      }
      *(uint32_t*)(out + column_of_half(column)) = cvt_x2(x, y);
    }
  }
  if (at == 0 && (warp & (warps - 1)) == 0) {
    if (lane == 0) a.lse[to.lse] = row_lse;
    if (a.max_logits) merge_max_logits(a, request, row, to);
  }
}

// Merges rows first, first + step, ... of a request in few pieces, halves: all columns of a row at
// once, by a warp.
constexpr int FEW_SPLITS = Unit<true>::IN_FLIGHT / 2;
DEVICE void merge_whole_rows(const Arrays& a, const Request& request, int first, int step,
                             float* weights) {
  const int lane = lane_index(), rows = a.s_q * a.h_q, splits = request.splits;
  griddepcontrol_wait();
#pragma unroll 1
  for (int row = first; row < rows; row += step) {
    const int64_t at = (int64_t)request.first_slot * rows + row, pitch = (int64_t)rows * 512;
    float4 own = make_float4(NEG_INF, 1.f, 1.f, 0.f);  // lse and scales of this lane's split
    if (lane < splits) own = ld_global_v4_f32(a.row_partial + (at + lane * rows) * 4);
    const float* from = a.out_partial + at * 512 + lane * 4;
    Vector4 loaded[FEW_SPLITS][2];
#pragma unroll
    for (int u = 0; u < FEW_SPLITS; ++u) {
      if (u >= splits) continue;
      loaded[u][0] = ld_global_v4(from + u * pitch);
      loaded[u][1] = ld_global_v4(from + u * pitch + 128);
    }
    const Row to(a, request, row);
    const float top = warp_max(fmaxf(LEAST_LSE, own.x)), x = weight_of(own.x, top);
    const float sum = warp_sum(x), inverse = inverse_of(sum, sink_of(a, to), top);
    __syncwarp();  // all have read the weights of the row before
    weights[lane] = x * inverse * own.y;
    weights[32 + lane] = x * inverse * own.z;
    __syncwarp();
    uint16_t* out = a.out + to.out * 512 + lane * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float o[8] = {};
#pragma unroll
      for (int u = 0; u < FEW_SPLITS; ++u) {
        const float weight = u < splits ? weights[half * 32 + u] : 0.f;
        if (weight != 0.f) add_halves(o, weight, loaded[u][half]);
      }
      st_global_v4(out + half * 256,
                   transpose_quads({cvt_x2(o[0], o[1]), cvt_x2(o[2], o[3]), cvt_x2(o[4], o[5]),
                                    cvt_x2(o[6], o[7])}));
    }
    if (lane == 0) a.lse[to.lse] = merged_lse(sum, top);
    if (a.max_logits) merge_max_logits(a, request, row, to);
  }
}

// Merges a request in three or more pieces, by `mine` blocks, of which this is number `block`.
template <bool HALVES>
DEVICE void merge_units(const Arrays& a, const Request& request, int block, int mine,
                        Shared* shared) {
  using U = Unit<HALVES>;
  const int units = a.s_q * a.h_q * U::IN_ROW, warp = uniform(threadIdx.x >> 5);
  if (HALVES && request.splits <= FEW_SPLITS && units > mine * WARPS) {
    merge_whole_rows(a, request, block + mine * warp, mine * WARPS, shared[warp].weights);
    return;
  }
  int warps_log2 = 0;  // of W: all loads in flight at once, if there are so many warps
  while (WARPS >> warps_log2 > 1 && request.splits > U::IN_FLIGHT * U::TEAMS << warps_log2 &&
         units << (warps_log2 + 1) <= mine * WARPS) {
    ++warps_log2;
  }
  const int step = mine * (WARPS >> warps_log2);
#pragma unroll 1
  for (int unit = block + mine * (warp >> warps_log2); unit < units; unit += step) {
    merge_unit<HALVES>(a, request, unit, warps_log2, shared);
  }
}

#if defined(GATHERED)
#define COMBINE combine_gathered
#else
#define COMBINE combine
#endif
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    COMBINE(const int* __restrict__ tile_scheduler_metadata,  // [parts, 8]
            const float* out_partial, const float* row_partial, uint16_t* out, float* lse,
            uint64_t* pairs,  // [words]: sm90_pair.cuh
            int words, int batch, int s_q, int h_q, int group, int slots, int parts,
            int slab_rows
#if defined(GATHERED)
            , const float* attn_sink, float* max_logits, int lse_group
#endif
    ) {
  __shared__ Shared shared[WARPS];
  const Arrays a = {out_partial, row_partial, out, lse, s_q, h_q, group
#if defined(GATHERED)
                    , attn_sink, max_logits, lse_group
#endif
  };
  // dense_decode refuses metadata that does not fit; here it must only do no harm.
  List list;
  list.load(tile_scheduler_metadata, parts);
  const int blocks = gridDim.x, block = blockIdx.x, used = list[parts - 1] >> REQUEST_BITS;
  if (used >= 2 && used <= slots) {
    // The last request whose slots begin, in proportion, at this block or before.
    const int i = list.count([&](uint32_t entry) {
      return (entry & NO_REQUEST) < batch && (int)(entry >> REQUEST_BITS) * blocks <= block * used;
    });
    const uint32_t this_one = list[max(i - 1, 0)], next_one = list[max(i, 1)];
    Request request = {(int)(this_one & NO_REQUEST), (int)(this_one >> REQUEST_BITS), 0};
    const int end_slot = next_one >> REQUEST_BITS;
    request.splits = end_slot - request.first_slot;
    const int first_block = (request.first_slot * blocks + used - 1) / used;
    const int mine = (end_slot * blocks + used - 1) / used - first_block;
    if (request.index < batch && request.splits >= 2 && request.splits <= MAX_SPLITS &&
        end_slot <= slots && block >= first_block && block < first_block + mine) {
      const int number = block - first_block;
      if (request.splits == 2) {
        merge_pairs(a, request, number + mine * uniform(threadIdx.x >> 5), mine * WARPS);
      } else if (slab_rows > FEW_ROWS) {
        merge_units<true>(a, request, number, mine, shared);
      } else {
        merge_units<false>(a, request, number, mine, shared);
      }
    }
  }
  if (block == 0) {  // clears the pairs' words for the next replay, if this is in a graph
    griddepcontrol_wait();
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += THREADS) pairs[i] = 0;
  }
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: the setting, then each choice with its time, the one taken first. On an H200,
// microseconds of a whole call; `h`, `b` and `s` are query heads, requests, and tokens of each. As
// it is: h128 b1 s512 8.6, h128 b1 s8192 15.0, h16 b1 s8192 12.3, h128 b8 s4096 27.8; without this
// kernel the same take 7.2, 12.6, 9.7 and 25.3.
//   who merges       this kernel | the blocks of dense_decode, a slice each as they end, told by
//                    words in global memory: h128 b1 s512 1.4 times as long, h16 b1 s32768 1.04
//   partial results  scaled halves, h128 b1 s8192 16 | floats 17.6
//                    of few rows: floats, h16 b1 s8192 12.9 | halves 13.2
//                    of 32 rows: halves, 64 requests of about 16384 285.0 | floats 290.7
//   code             one path for all, nothing split, h32 b64 s512 23.1 | a path for each number of
//                    slices and splits, 44 KB more 24.9: with dense_decode it must fit the
//                    instruction cache, 120 KB it seems
//   warps a row      by what is split, one long request among 64, h16 79 | by the number of
//                    requests 91
//   blocks           as many as there is work for, h128 b1 s512 9.3 | always 264 10.5: launching
//                    132 takes a microsecond
//   a unit           half a row, ten splits at a time, h128 b8 s4096 27.8, 128 of about 4096 275 |
//                    a quarter, two splits a warp at a time, in rounds of five 31.5, 281
//   occupancy        two blocks a multiprocessor, h128 b1 s512 9.3 | 528 blocks of 64 registers a
//                    thread 11.7, b8 s4096 30
//   threads          256 | 512: the same | 1024 of 64 registers, h16 b1 s8192 15.6, h128 b1 s32768
//                    28.9 where it was 26
//   rows of a pair   looked at 32 at once, all merged 1 | one load after another 3 to 6
//   triggered        at the end of dense_decode | ahead of its epilogue: the same
//   instructions     as they are needed, h16 b1 s8192 11.3, b8 s4096 17.9 | rehearsed before the
//                    wait, by a round without loads and stores 12.1, 18.9
//   few pieces       of 64 requests in 3.7 each, whole rows: h64 301.9, h32 282.0, b8 s4096 24.3 |
//                    units of half a row 318.7, 285.0, 26.0 | nothing merged 295.8, 281.2
//                    two rows at once, and at most 200, 160, 132 or 100 blocks instead of 264, so
//                    that all wait for dense_decode where it has ended: 0.99 to 1.02
//   arithmetic       as it is | the largest lse by an integer reduction; fewer steps for few
//                    splits; quotients by a reciprocal: all the same
