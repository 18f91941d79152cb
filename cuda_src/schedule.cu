// Sequence lengths -> tile_scheduler_metadata and num_splits, by one block: of 1024 threads for large
// batches, else of 256 (schedule.threads), since most of the time goes to issuing instructions.
//
// The algorithm, the columns and the constants are those of flashmla_cupy/schedule.py, which is
// the oracle: every integer is equal. It runs once for each decoding step, so it is written for
// latency: few barriers, few instructions, no 64-bit division.
//
//   1. prefix  each warp scans a contiguous run of requests; one barrier; offsets of the warps are
//              added. Above PREFIX_ENTRIES requests only every 2^k-th entry is kept, and a cut
//              walks over the lengths between two entries.
//   2. cut     thread p finds cut p of every candidate, by a binary search for those that cut alike.
//   3. rate    warp c estimates the time of candidate c; every thread picks the same best.
//   4. record  thread p writes row p; then all write num_splits, from the cuts.
//
// Dynamic shared memory (schedule.shared_bytes):
//   Cut cuts[CANDIDATES][parts + 1]     16 bytes each
//   long long prefix[entries + 1]       cost of all requests before an entry
//
// Costs are 64-bit: lengths are whatever the caller's buffer holds, up to 2^31 - 1.

#include "metadata.cuh"
#include "ptx.cuh"

constexpr int MOST_THREADS = 1024;
constexpr int PREFIX_ENTRIES = 8192;

// The tuning constants of schedule.py.
constexpr int UNIT = 8;
constexpr int C_REQ = 4;
constexpr int CANDIDATES = 7;
constexpr int T_TILE = 14500;
constexpr int T_TILE_MEM = 178;
constexpr int T_SPLIT = 15000;
constexpr int T_PAIR = 25000;
constexpr int T_COMB = 20000;
constexpr int T_GAIN = 1000;
constexpr int PARTIAL_ROWS = 36;

constexpr int WHOLE = 1 << 30;
constexpr int MOST_WARPS = MOST_THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;
static_assert(MOST_WARPS == 32, "the totals of the warps are scanned by one warp");
static_assert(CANDIDATES <= 8, "a warp rates a candidate");

struct alignas(16) Cut {
  int request, tile;
  long long at;  // cost of everything before it; the part that ends inside pays C_REQ more
};

DEVICE int tiles_of(int length) {
  return length > 0 ? ((length - 1) >> 6) + 1 : 0;  // length + 63 could overflow
}

DEVICE int cost_of(int tiles) {
  return tiles ? UNIT * tiles + C_REQ : 0;
}

// x * factor / divisor, rounded down, where divisor * factor fits 32 bits and x is usually as small.
DEVICE long long scaled(long long x, unsigned factor, unsigned divisor) {
  long long quotient = (unsigned)x / divisor;
  if (x >> 32) quotient = (unsigned long long)x / divisor;
  const unsigned rest = (unsigned)x - (unsigned)quotient * divisor;
  return quotient * factor + rest * factor / divisor;
}

DEVICE bool is_busy(Cut a, Cut b) {
  return a.request < b.request || (a.request == b.request && a.tile < b.tile);
}

// Of the part between two cuts: whether its first piece is a later one of a split request, and whether
// its last one is the first of a split request. A piece cut at both ends is the former alone.
DEVICE bool begins_inside(Cut a, Cut b) { return is_busy(a, b) && a.tile > 0; }
DEVICE bool starts_split(Cut a, Cut b) {
  return is_busy(a, b) && b.tile > 0 && !(a.tile > 0 && a.request == b.request);
}

// Whether cut i is the only one of its request, between neighbouring parts.
DEVICE bool is_pair(const Cut* cuts, int i, int parts) {
  if (i <= 0 || i >= parts) return false;
  const Cut before = cuts[i - 1], cut = cuts[i];
  return cut.tile > 0 && (before.request < cut.request || before.tile == 0) &&
         cuts[i + 1].request > cut.request;
}

extern "C" __global__ __launch_bounds__(MOST_THREADS, 1) void schedule(
  const int* __restrict__ cache_seqlens,      // [batch], batch > 0
  int batch,
  int parts,                                  // <= blockDim.x
  int rows,                                   // query rows of one kv head
  int h_kv,
  int* __restrict__ tile_scheduler_metadata,  // [parts, 8], 16-byte aligned
  int* __restrict__ num_splits) {             // [batch + 1]
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ long long warp_tiles[MOST_WARPS];
  __shared__ int warp_requests[MOST_WARPS];
  __shared__ long long times[CANDIDATES];
  __shared__ int warp_counts[MOST_WARPS];
  __shared__ int inside[MOST_THREADS];
  __shared__ int list[MOST_THREADS];  // column 7

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int threads = blockDim.x, warps = threads / 32;
  int shift = 0;
  while (((batch - 1) >> shift) >= PREFIX_ENTRIES) ++shift;
  const int entries = ((batch - 1) >> shift) + 1, spacing = (1 << shift) - 1;
  Cut* cuts = reinterpret_cast<Cut*>(shared);
  long long* prefix = reinterpret_cast<long long*>(cuts + CANDIDATES * (parts + 1));

  griddepcontrol_wait();  // the lengths may be the work of a kernel

  // ---- 1. prefix ---------------------------------------------------------------------------

  // Whole groups of 32 requests, and of 2^shift where that is more, for each warp.
  const int grain = shift > 5 ? 1 << shift : 32;
  const int run = (batch + warps * grain - 1) / (warps * grain) * grain;
  const int run_begin = warp * run, run_end = min(run_begin + run, batch);
  long long tiles_sum = 0;  // of this warp's requests so far
  int requests_sum = 0;     // those that have tiles
  #pragma unroll 4
  for (int base = run_begin; base < run_end; base += 32) {
    const int request = base + lane;
    const int tiles = request < batch ? tiles_of(cache_seqlens[request]) : 0;
    const unsigned present = __ballot_sync(ALL, tiles > 0);
    int sum = tiles;  // of 32 requests: at most 2^30
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(ALL, sum, d);
      if (lane >= d) sum += below;
    }
    if (request < batch && (request & spacing) == 0)
      prefix[request >> shift] =
        UNIT * (tiles_sum + sum - tiles) +
        C_REQ * (requests_sum + __popc(present & ((1u << lane) - 1)));
    tiles_sum += __shfl_sync(ALL, sum, 31);
    requests_sum += __popc(present);
  }
  if (lane == 0) {
    warp_tiles[warp] = tiles_sum;
    warp_requests[warp] = requests_sum;
  }
  __syncthreads();

  long long total_tiles = lane < warps ? warp_tiles[lane] : 0;
  int total_requests = lane < warps ? warp_requests[lane] : 0;
  #pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const long long tiles = __shfl_up_sync(ALL, total_tiles, d);
    const int requests = __shfl_up_sync(ALL, total_requests, d);
    if (lane >= d) {
      total_tiles += tiles;
      total_requests += requests;
    }
  }
  const long long up_to_here = UNIT * total_tiles + C_REQ * (long long)total_requests;
  const long long offset =
    __shfl_sync(ALL, up_to_here, warp) - (UNIT * tiles_sum + C_REQ * (long long)requests_sum);
  total_tiles = __shfl_sync(ALL, total_tiles, 31);
  const long long total_cost = __shfl_sync(ALL, up_to_here, 31);

  if (run_begin < run_end) {
    const int entry_end = ((run_end - 1) >> shift) + 1;
    for (int i = (run_begin >> shift) + lane; i < entry_end; i += 32) prefix[i] += offset;
  }
  if (tid == 0) prefix[entries] = total_cost;
  __syncthreads();

  // ---- 2. cut ------------------------------------------------------------------------------

  for (int p = tid; p <= parts; p += threads) {
    // Where the line is cut into `located` parts: tile `tile` of `tiles` of a request.
    int located = 0, request = 0, tiles = 0, tile = 0;
    long long start = 0;
    #pragma unroll 1
    for (int k = 0; k < CANDIDATES; ++k) {
      const int candidate = k ? k - 1 : CANDIDATES - 1;  // first and last often cut at the same
      const bool splits = candidate < CANDIDATES - 1;
      const int limit = splits ? 1 << candidate : WHOLE;
      const long long share = total_tiles >> (splits ? candidate : 0);
      const int used = share < 1 ? 1 : share < parts ? (int)share : parts;
      Cut cut = {0, 0, 0};
      if (p >= used) {
        cut.request = batch;
        cut.at = total_cost;
      } else if (p > 0) {
        if (used != located) {
          located = used;
          const long long x = scaled(total_cost, p, used);
          int low = 0, high = entries;  // prefix[low] <= x < prefix[high]
          while (low + 1 < high) {
            const int middle = (low + high) >> 1;
            if (prefix[middle] <= x) low = middle;
            else high = middle;
          }
          request = low << shift;
          start = prefix[low];
          if (shift == 0) {
            tiles = (int)((prefix[low + 1] - start - C_REQ) / UNIT);
          } else {
            for (;;) {
              tiles = tiles_of(cache_seqlens[request]);
              if (start + cost_of(tiles) > x) break;
              start += cost_of(tiles);
              ++request;
            }
          }
          tile = ((int)(x - start) - C_REQ / 2 + UNIT / 2) / UNIT;
        }
        if (tile < limit) {
          cut = {request, 0, start};
        } else if (tiles - tile < limit) {
          cut = {request + 1, 0, start + cost_of(tiles)};
        } else {
          cut = {request, tile, start + UNIT * (long long)tile};
        }
      }
      cuts[candidate * (parts + 1) + p] = cut;
    }
  }
  __syncthreads();

  // ---- 3. rate -----------------------------------------------------------------------------

  if (warp < CANDIDATES) {
    const Cut* mine = cuts + warp * (parts + 1);
    long long longest = 0;
    int split = 0;
    for (int p = lane; p < parts; p += 32) {
      const Cut a = mine[p], b = mine[p + 1];
      const int pieces = begins_inside(a, b) + starts_split(a, b);
      const long long load = is_busy(a, b) ? b.at + (b.tile > 0 ? C_REQ : 0) - a.at : 0;
      const int paired = is_pair(mine, p, parts) + is_pair(mine, p + 1, parts);
      const long long time = load * T_TILE / UNIT + pieces * T_SPLIT + paired * T_PAIR;
      longest = time > longest ? time : longest;
      split += pieces;
    }
    split = __reduce_add_sync(ALL, split);
    #pragma unroll
    for (int d = 16; d; d /= 2) {
      const long long other = __shfl_xor_sync(ALL, longest, d);
      longest = other > longest ? other : longest;
    }
    const long long partials = (long long)split * rows * h_kv * T_TILE_MEM / PARTIAL_ROWS;
    const long long memory = total_tiles * h_kv * T_TILE_MEM + partials;
    const long long mean = scaled(total_tiles, T_TILE, parts);
    long long time = memory > mean ? longest + memory - mean : longest;
    if (split) time += T_COMB + partials;
    if (lane == 0) times[warp] = time;
  }
  __syncthreads();

  int chosen = 0;
  long long best = times[0];
  #pragma unroll
  for (int candidate = 1; candidate < CANDIDATES; ++candidate) {
    const long long time = times[candidate];
    if (time < best - T_GAIN) {
      best = time;
      chosen = candidate;
    }
  }

  // ---- 4. record ---------------------------------------------------------------------------

  const Cut* mine = cuts + chosen * (parts + 1);
  Cut a = {0, 0, 0}, b = {0, 0, 0};
  if (tid < parts) {
    a = mine[tid];
    b = mine[tid + 1];
  }
  const bool busy = is_busy(a, b);
  // Pieces of split requests that begin inside a request, and at its first tile: two sums in one
  // scan, each up to 1024. Their total is the slot.
  const bool from_inside = begins_inside(a, b), is_split = starts_split(a, b);
  const int count = is_split << 16 | from_inside;
  int sum = count;
  #pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(ALL, sum, d);
    if (lane >= d) sum += below;
  }
  if (lane == 31) warp_counts[warp] = sum;
  __syncthreads();
  sum += __reduce_add_sync(ALL, lane < warp ? warp_counts[lane] : 0);
  const int total = __reduce_add_sync(ALL, lane < warps ? warp_counts[lane] : 0);

  inside[tid] = sum & 0xffff;
  int4 range = {0, 0, -1, 0}, rest = {0, 0, 0, 0};
  if (tid < parts) {
    const int before = sum - count, slot = (before >> 16) + (before & 0xffff);
    if (busy) {
      const int last = b.tile > 0 ? b.request : b.request - 1;
      const int first_tiles = tiles_of(cache_seqlens[a.request]);
      const int last_tiles = tiles_of(cache_seqlens[last]);
      range = {a.request, a.tile, last, b.tile > 0 ? b.tile : last_tiles};
      const int flags = (is_pair(mine, tid, parts) ? BEGINS_IN_PAIR : 0) |
                        (is_pair(mine, tid + 1, parts) ? ENDS_IN_PAIR : 0);
      rest = {slot | flags, first_tiles, last_tiles, 0};
    }
    // The list of split requests: part by part, or what follows its end.
    if (is_split) {
      const int first_slot = slot + from_inside;
      list[before >> 16] = first_slot << REQUEST_BITS | b.request;
    }
    if (tid >= total >> 16) {
      const int slots = (total >> 16) + (total & 0xffff);
      list[tid] = slots << REQUEST_BITS | NO_REQUEST;
    }
  }
  __syncthreads();

  if (tid < parts) {
    rest.w = list[tid];
    const uint32_t sum_of_row =
      check_term(0, range.x) + check_term(1, range.y) + check_term(2, range.z) +
      check_term(3, range.w) + check_term(4, rest.x) + check_term(5, rest.y) +
      check_term(6, rest.z) + check_term(7, rest.w) + check_term(8, tid) + check_term(9, batch);
    rest.x |= sum_of_row >> CHECK_SHIFT << CHECK_SHIFT;
    int4* row = reinterpret_cast<int4*>(tile_scheduler_metadata + 8 * tid);
    row[0] = range;
    row[1] = rest;
  }

  // Before request r lie r requests, and the parts that begin inside one of them.
  for (int request = tid; request <= batch; request += threads) {
    int pieces = 0;
    if (request > 0) {
      int low = 0, high = parts;  // the last part that begins in an earlier request
      while (low + 1 < high) {
        const int middle = (low + high) >> 1;
        if (mine[middle].request < request) low = middle;
        else high = middle;
      }
      pieces = request + inside[low];
    }
    num_splits[request] = pieces;
  }
}
