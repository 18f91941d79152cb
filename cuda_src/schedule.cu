// Sequence lengths -> the split of a batch over parts of the GPU: tile_scheduler_metadata and
// num_splits. flashmla_cupy/schedule.py defines the result and documents the columns; this kernel
// gives the same bits.
//
// One thread block. The costs of the requests are summed into `line`, one entry in shared memory
// for every `stride` requests (1 for batches up to 16384). Every (candidate, part) pair is then
// tried by a thread of its own, and the best candidate's parts are written out.

typedef long long int64_t;

namespace {

constexpr int THREADS = 1024;
constexpr int ENTRIES = 16384;  // of the line in shared memory
constexpr int TOKENS_PER_TILE = 64;
constexpr int UNITS_PER_TILE = 8, UNITS_PER_REQUEST = 4;
// The time model, in units of 0.1 ns (see schedule.py).
constexpr int TILE = 14500, TILE_MEMORY = 178, PARTIAL = 18000, COMBINE = 40000, GAIN = 1000;
constexpr int CANDIDATES = 7;  // least pieces of 1, 2, 4 .. 64 tiles
constexpr int PARTIALS_PER_TILE = 18;

__device__ int64_t tiles_of(int length) {
  return length > 0 ? ((int64_t)length + TOKENS_PER_TILE - 1) / TOKENS_PER_TILE : 0;
}
__device__ int64_t cost_of(int64_t tiles) {
  return tiles > 0 ? tiles * UNITS_PER_TILE + UNITS_PER_REQUEST : 0;
}

// Inclusive prefix sum over the block; `total` receives the sum. Uses `room` [33].
template <typename T>
__device__ T block_scan(T x, T& total, T* room) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T y = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x += y;
  }
  __syncthreads();  // room may still be read
  if (lane == 31) room[warp] = x;
  __syncthreads();
  if (warp == 0) {
    T y = room[lane];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const T z = __shfl_up_sync(~0u, y, d);
      if (lane >= d) y += z;
    }
    room[lane] = y;
  }
  __syncthreads();
  total = room[31];
  return x + (warp ? room[warp - 1] : T(0));
}

struct Cut {
  int request;
  int64_t tile;
};

struct Line {
  const int* cache_seqlens;
  int batch, stride, entries;
  const int64_t* at;  // [entries + 1], shared

  __device__ int64_t tiles(int request) const { return tiles_of(cache_seqlens[request]); }
  // Cost of all requests before this one.
  __device__ int64_t before(int request) const {
    if (stride == 1) return at[request];
    const int entry = request / stride;
    int64_t x = at[entry];
    for (int i = entry * stride; i < request; ++i) x += cost_of(tiles(i));
    return x;
  }
  // Where part p of `used` begins, pieces of fewer than `least` tiles avoided.
  __device__ Cut cut(int p, int used, int least) const {
    if (p >= used) return {batch, 0};
    const int64_t x = p == 0 ? 0 : at[entries] * p / used;
    int low = 0, high = entries;
    while (low + 1 < high) {
      const int middle = (low + high) >> 1;
      if (at[middle] <= x) low = middle; else high = middle;
    }
    int request = low * stride;
    int64_t start = at[low];
    while (stride > 1 && request + 1 < min(batch, (low + 1) * stride)) {
      const int64_t next = start + cost_of(tiles(request));
      if (next > x) break;
      start = next;
      ++request;
    }
    if (p == 0) return {0, 0};
    int64_t tile = (x - start + (UNITS_PER_TILE - UNITS_PER_REQUEST) / 2) / UNITS_PER_TILE;
    if (tile < least) return {request, 0};
    if (tiles(request) - tile < least) return {request + 1, 0};
    return {request, tile};
  }
};

__device__ int parts_used(int64_t total, int least, int parts) {
  const int64_t most = total / least;
  return most < 1 ? 1 : most > parts ? parts : (int)most;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    schedule(const int* __restrict__ cache_seqlens,         // [batch]
             int batch, int parts, int rows, int h_kv,      // parts <= THREADS
             int* __restrict__ tile_scheduler_metadata,     // [parts, 8]
             int* __restrict__ num_splits) {                // [batch + 1]
  extern __shared__ int64_t at[];                           // [entries + 1]
  __shared__ int64_t room[33];
  __shared__ unsigned long long longest[CANDIDATES];
  __shared__ int splits[CANDIDATES];
  __shared__ int interior[THREADS];  // requests that a part begins inside, in order
  const int thread = threadIdx.x;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (thread < CANDIDATES) longest[thread] = 0, splits[thread] = 0;

  const int stride = (batch + ENTRIES - 1) / ENTRIES;
  const Line line{cache_seqlens, batch, stride, (batch + stride - 1) / stride, at};
  int64_t carry = 0, total = 0;
  for (int base = 0; base < line.entries; base += THREADS) {
    const int entry = base + thread;
    int64_t cost = 0, tiles = 0;
    for (int i = entry * stride; i < min(batch, (entry + 1) * stride); ++i) {
      const int64_t t = line.tiles(i);
      tiles += t;
      cost += cost_of(t);
    }
    int64_t sum, tile_sum;
    const int64_t end = carry + block_scan(cost, sum, room);
    block_scan(tiles, tile_sum, room);
    if (entry < line.entries) at[entry + 1] = end;
    carry += sum;
    total += tile_sum;
  }
  if (thread == 0) at[0] = 0;
  __syncthreads();

  for (int pair = thread; pair < CANDIDATES * parts; pair += THREADS) {
    const int candidate = pair / parts, p = pair - candidate * parts;
    const int least = 1 << candidate, used = parts_used(total, least, parts);
    if (p >= used) continue;
    const Cut a = line.cut(p, used, least), z = line.cut(p + 1, used, least);
    const int64_t begin = line.before(a.request) + a.tile * UNITS_PER_TILE;
    const int64_t end = line.before(z.request) +
                        (z.tile ? z.tile * UNITS_PER_TILE + UNITS_PER_REQUEST : 0);
    if (end <= begin) continue;
    const bool one_piece = a.tile > 0 && a.request == z.request;
    const int pieces = (a.tile > 0) + (z.tile > 0 && !one_piece);
    const int64_t time = (end - begin) * TILE / UNITS_PER_TILE + (int64_t)pieces * PARTIAL;
    atomicMax(&longest[candidate], (unsigned long long)time);
    if (pieces) atomicAdd(&splits[candidate], pieces);
  }
  __syncthreads();
  int least = 1;
  int64_t best = 0;
#pragma unroll
  for (int candidate = 0; candidate < CANDIDATES; ++candidate) {
    const int64_t time = longest[candidate];
    const int64_t memory =
        (total + (int64_t)splits[candidate] * rows / PARTIALS_PER_TILE) * h_kv * TILE_MEMORY;
    const int64_t tail = time - total * TILE / parts;
    const int64_t cost =
        (time > memory + tail ? time : memory + tail) + (splits[candidate] ? COMBINE : 0);
    if (candidate == 0 || cost < best - GAIN) best = cost, least = 1 << candidate;
  }

  const int used = parts_used(total, least, parts);
  int row[8] = {0, 0, -1, 0, 0, 0, 0, 0};
  int split_pieces = 0, begins_inside = 0;
  if (thread < parts) {
    const Cut a = line.cut(thread, used, least), z = line.cut(thread + 1, used, least);
    if (z.request > a.request || z.tile > a.tile) {
      const int last = z.tile ? z.request : z.request - 1;
      const int64_t last_tiles = line.tiles(last), end = z.tile ? z.tile : last_tiles;
      const bool one = a.request == last, end_split = end < last_tiles;
      split_pieces = (a.tile > 0 || (one && end_split)) + (!one && end_split);
      begins_inside = a.tile > 0;
      row[0] = a.request;
      row[1] = (int)a.tile;
      row[2] = last;
      row[3] = (int)end;
      row[5] = (int)line.tiles(a.request);
      row[6] = (int)last_tiles;
    }
  }
  int64_t sum;
  const int64_t slots = block_scan((int64_t)split_pieces, sum, room);
  const int rank = (int)block_scan((int64_t)begins_inside, sum, room);
  const int count = (int)sum;
  if (begins_inside) interior[rank - 1] = row[0];
  if (thread < parts) {
    if (row[2] >= 0) row[4] = (int)slots - split_pieces;
    int4* out = (int4*)(tile_scheduler_metadata + thread * 8);
    out[0] = make_int4(row[0], row[1], row[2], row[3]);
    out[1] = make_int4(row[4], row[5], row[6], row[7]);
  }
  __syncthreads();
  for (int request = thread; request <= batch; request += THREADS) {
    int low = 0, high = count;  // how many requests in `interior` come before this one
    while (low < high) {
      const int middle = (low + high) >> 1;
      if (interior[middle] < request) low = middle + 1; else high = middle;
    }
    num_splits[request] = request + low;
  }
}
