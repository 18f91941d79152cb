// Sequence lengths -> tile_scheduler_metadata and num_splits, by one thread block.
//
// The algorithm, the columns and the constants are those of flashmla_cupy/schedule/split.py, which
// is the oracle: every integer is equal. metadata.cuh explains the words. The kernel runs once for
// each decoding step, and its latency is all that counts: it is a straight line of few instructions
// and six barriers, with all candidates side by side.
//
//   1. prefix  One warp sums up the costs of the requests, four a lane, and finds what the parts of
//              each candidate have in common. Of a large batch (split.PREFIX_ENTRIES) only every
//              2^k-th sum is kept, and step 2 walks from there.
//   2. cut     Each candidate has a group of warps, and a thread finds where a cut lies. Candidates
//              with as many parts cut at the same places: the first of them finds these for all. Of
//              the candidate that cuts by size, each lane tries a size; then a thread finds which
//              piece its part is.
//   3. rate    Each candidate moves its cuts out of the reach of its limit. Rating a part takes
//              four cuts, so neighbouring warps share three: lane i of warp w has cut 29 w - 1 + i,
//              and the warp rates parts 29 w to 29 w + 28. One warp picks the best candidate.
//   4. record  The warps of that candidate write their rows, the others num_splits.
//
// Dynamic shared memory (split.launch_sizes): int starts[4 step + 1], the cost of the requests
// before an entry, then that of all, then BEYOND.
#include "metadata.cuh"

constexpr int WARP_PARTS = 29;
constexpr int MAX_PARTS = 174;

// The constants of split.py, which explains them.
constexpr int UNIT = 16;
constexpr int C_REQ = 8;
constexpr int CANDIDATES = 5;
constexpr int UNSPLIT = 3;
constexpr int BY_SIZE = 4;
constexpr int LEAST_SIZE = 8;
constexpr int SIZES = 32;
constexpr int T_COMB = 22;
constexpr int T_MOST = (1 << 28) - 1;

constexpr int WHOLE = 1 << 30;
constexpr int GROUP = MAX_PARTS / WARP_PARTS;  // warps of a candidate, at most
constexpr int MOST_THREADS = 32 * CANDIDATES * GROUP;
constexpr int PARTS_STEP = 64, BEYOND = 0x7fffffff;
static_assert(MAX_PARTS < 4 * PARTS_STEP - 1, "of count_to");
constexpr unsigned ALL = 0xffffffffu;
static_assert(CANDIDATES <= 8, "a time has three bits for its candidate");

DEVICE int tiles_of(int length) {
  return length > 0 ? ((length - 1) >> 6) + 1 : 0;  // length + 63 could overflow
}
DEVICE int cost_of(int tiles) { return tiles ? UNIT * tiles + C_REQ : 0; }

// The parts of a request of BY_SIZE; `inverse` of the size.
DEVICE int pieces_of(int tiles, int size, float inverse) {
  return tiles ? max((int)__fmul_rn((float)(tiles + size - 1), inverse), 1) : 0;
}

// How many of `numbers`, which ascend, are at most x. There are 4 step - 1 of them, and `step` is a
// power of four.
DEVICE int count_to(const int* numbers, int step, int x) {
  int count = 0;
#pragma unroll 1
  for (; step; step >>= 2) {
    const int* from = numbers + (count + step - 1);
    count += step * ((from[0] <= x) + (from[step] <= x) + (from[2 * step] <= x));
  }
  return count;
}

// What all parts of a candidate have in common.
struct alignas(16) Use {
  int parts;    // that get work
  float share;  // of the cost, for each of them
  int finder;   // the first candidate with as many parts: it finds the places of the cuts
};
// Where a cut lies: in a request that begins at `start`, with tiles on both sides.
struct alignas(16) Place {
  int request, start, before, behind;
};
// What all candidates have in common: the cost of all requests, by how much memory alone takes
// longer than a mean part, and the tiles of all requests.
struct Common {
  int total, longer, tiles;
};
// Of a candidate: the time of its longest part; and how many split pieces begin inside a request
// and, from bit 16 on, how many begin at its first tile.
struct Rating {
  int longest, pieces;
};

extern "C" __global__ __launch_bounds__(MOST_THREADS, 1) void schedule(
    const int* __restrict__ cache_seqlens,      // [batch], batch > 0
    int batch, int parts,                       // parts <= MAX_PARTS
    int most_tiles,                             // of a request: longer ones count as that
    int shift, int step,                        // k of step 1; the first step of count_to
    float tile_longer, int piece_memory,        // split.Costs
    int split_time, int pair_time,              // its other two
    int* __restrict__ tile_scheduler_metadata,  // [parts, 8], 16-byte aligned
    int* __restrict__ num_splits) {             // [batch + 1]
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float inverses[MAX_PARTS + 1];  // 1 / i
  __shared__ int evens[MAX_PARTS + 1];       // parts, less those that i requests cannot share out
  __shared__ int needs[SIZES];               // of BY_SIZE: parts, if they have such a size
  __shared__ int last_ends[GROUP];           // pieces of 32 requests
  __shared__ int ends[4 * PARTS_STEP];       // pieces of the requests up to this one
  __shared__ Use uses[CANDIDATES];
  __shared__ Common common;
  __shared__ Place places[CANDIDATES][MAX_PARTS];
  __shared__ int best;
  __shared__ Rating ratings[CANDIDATES];
  __shared__ int warp_pieces[CANDIDATES][GROUP];        // the same as in Rating
  __shared__ int requests[CANDIDATES][4 * PARTS_STEP];  // of the cuts
  __shared__ int inside[MAX_PARTS];  // parts up to this one that begin inside a request
  __shared__ int list[MAX_PARTS];    // column 7

  int* starts = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x, warp_in_group = threadIdx.y, group = blockDim.y;
  const int candidate = threadIdx.z, warp = candidate * group + warp_in_group;
  const int cut = warp_in_group * WARP_PARTS - 1 + lane;  // that of this lane, and its part
  const bool owns = lane >= 1 && lane <= WARP_PARTS && cut < parts;

  griddepcontrol_launch_dependents();
  griddepcontrol_wait();  // the lengths may be the work of a kernel

  // ---- 1. prefix ---------------------------------------------------------------------------

  int total = 0, with_tiles = 0;  // cost of the requests; those that have tiles
  if (warp > 0) {
    const int thread = warp * 32 + lane - 32, threads = 32 * CANDIDATES * group - 32;
#pragma unroll 1
    for (int i = thread + 1; i <= parts; i += threads) {
      inverses[i] = __fdiv_rn(1.f, (float)i);
      evens[i] = parts / i * i;
    }
#pragma unroll 1
    for (int i = ((batch - 1) >> shift) + 2 + thread; i < 4 * step; i += threads)
      starts[i] = BEYOND;
#pragma unroll 1
    for (int i = parts + 1 + thread; i < 4 * PARTS_STEP; i += threads) {
#pragma unroll
      for (int k = 0; k < CANDIDATES; ++k) requests[k][i] = BEYOND;
    }
#pragma unroll 1
    for (int i = thread; i < 4 * PARTS_STEP; i += threads) ends[i] = BEYOND;
    if (thread < SIZES) needs[thread] = 0;
    if (thread == 0) starts[0] = 0;
    if (thread < CANDIDATES) ratings[thread] = {0, 0};
  } else {
    const int spacing = (1 << shift) - 1;
    int lengths[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int request = 4 * lane + k;
      lengths[k] = request < batch ? cache_seqlens[request] : 0;
    }
#pragma unroll 1
    for (int first = 4 * lane; first - 4 * lane < batch; first += 128) {
      int costs[4], sum = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int tiles = min(tiles_of(lengths[k]), most_tiles);
        with_tiles += tiles > 0;
        costs[k] = sum += cost_of(tiles);
        lengths[k] = first + 128 + k < batch ? cache_seqlens[first + 128 + k] : 0;  // the next ones
      }
      const int own = sum;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int below = __shfl_up_sync(ALL, sum, d);
        if (lane >= d) sum += below;
      }
      const int before = total + sum - own;
      total += __shfl_sync(ALL, sum, 31);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int request = first + k;
        if (request == batch - 1 || (request < batch && (request & spacing) == spacing)) {
          starts[(request >> shift) + 1] = before + costs[k];
        }
      }
    }
    with_tiles = __reduce_add_sync(ALL, with_tiles);
  }
  __syncthreads();
  if (warp == 0) {
    const int total_tiles = (uint32_t)(total - C_REQ * with_tiles) / UNIT;
    if (lane < CANDIDATES) {
      int most = parts;
      if (lane == BY_SIZE && with_tiles > 0 && with_tiles <= parts) most = evens[with_tiles];
      const int limit = lane == UNSPLIT ? 1 : lane == BY_SIZE ? LEAST_SIZE : 1 << lane;
      const int used = max(1, min(total_tiles / limit, most));
      const int finder = used == max(1, min(total_tiles, parts)) ? 0 : lane;
      uses[lane] = {used, __fmul_rn((float)total, inverses[used]), finder};
    } else if (lane == CANDIDATES) {
      common = {total, (int)__fmul_rn((float)total_tiles, tile_longer), total_tiles};
    }
  }
  __syncthreads();

  // ---- 2. cut ------------------------------------------------------------------------------

  Use use = uses[candidate];
  const int found = warp_in_group * 32 + lane;
  bool by_size = candidate == BY_SIZE && batch > 1 && batch <= parts && common.tiles > 0;
  if (by_size) {
    // Whole warps of this candidate come here. A lane tries a size, a warp some of the requests.
    const int threads = 32 * group, least = max(LEAST_SIZE, (common.tiles + parts - 1) / parts);
    auto tiles_at = [&](int request) {
      return (uint32_t)(starts[request + 1] - starts[request]) / UNIT;
    };
    int size = least + (least * lane >> 4), need = 0;
    float inverse = __fdiv_rn(1.f, (float)size);
#pragma unroll 1
    for (int i = warp_in_group; i < batch; i += group) {
      need += pieces_of(tiles_at(i), size, inverse);
    }
    atomicAdd(&needs[lane], need);
    bar_sync(1, threads);
    const uint32_t suffices = __ballot_sync(ALL, needs[lane] <= parts);
    by_size = suffices != 0;
    if (by_size) {
      const int chosen = __ffs(suffices) - 1;
      size = __shfl_sync(ALL, size, chosen), inverse = __shfl_sync(ALL, inverse, chosen);
      use.parts = needs[chosen], use.finder = BY_SIZE;
      const int pieces = found < batch ? pieces_of(tiles_at(found), size, inverse) : 0;
      int end = pieces;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int below = __shfl_up_sync(ALL, end, d);
        if (lane >= d) end += below;
      }
      if (lane == 31) last_ends[warp_in_group] = end;
      bar_sync(1, threads);
      end += __reduce_add_sync(ALL, lane < warp_in_group ? last_ends[lane] : 0);
      if (found < batch) ends[found] = end;
      bar_sync(1, threads);
      if (found > 0 && found < use.parts) {
        const int request = count_to(ends, PARTS_STEP, found), tiles = tiles_at(request);
        const int first = request > 0 ? ends[request - 1] : 0, of = ends[request] - first;
        const int number = found - first, each = tiles / of;
        const int before = each * number + (tiles - each * of) * number / of;
        places[BY_SIZE][found] = {request, starts[request], before, tiles - before};
      }
    }
  }
  if (!by_size && use.finder == candidate && found > 0 && found < use.parts) {
    const int x = (int)__fmul_rn((float)found, use.share);
    const int entry = count_to(starts + 1, step, x);
    int request = entry << shift, start = starts[entry], cost = starts[entry + 1] - start;
    while (shift > 0) {
      cost = cost_of(min(tiles_of(cache_seqlens[request]), most_tiles));
      if (start + cost > x) break;
      start += cost, ++request;
    }
    const int before = (uint32_t)(x - start - C_REQ / 2 + UNIT / 2) / UNIT;
    places[candidate][found] = {request, start, before, (int)((uint32_t)cost / UNIT) - before};
  }
  __syncthreads();

  // ---- 3. rate -----------------------------------------------------------------------------

  // Where the cut of this lane lies, and the cost before it, `at`. A cut inside a request, which is
  // not at its first tile, has `start`, the cost before that request; any other has -1.
  int request = 0, tile = 0, start = -1, at = 0;
  if (cut >= use.parts) {
    request = batch, at = common.total;
  } else if (cut > 0) {
    const Place place = places[use.finder][cut];
    int limit = candidate == UNSPLIT ? WHOLE : 1 << candidate;
    if (candidate == BY_SIZE) limit = by_size ? 1 : LEAST_SIZE;
    request = place.request, at = place.start;
    if (min(place.before, place.behind) >= limit) {
      tile = place.before, start = at, at += UNIT * tile;
    } else if (place.behind < place.before) {
      ++request, at += UNIT * (place.before + place.behind) + C_REQ;
    }
  }
  if (owns || cut == parts) requests[candidate][cut] = request;

  const int next_at = __shfl_down_sync(ALL, at, 1), next_start = __shfl_down_sync(ALL, start, 1);
  const int start_before = __shfl_up_sync(ALL, start, 1);
  const bool is_inside = start >= 0, next_is_inside = next_start >= 0, moves = next_at != at;
  // Bits of all lanes. A cut makes a pair if it is the only one inside its request.
  const uint32_t pairs =
      __ballot_sync(ALL, is_inside && start_before != start && next_start != start);
  const bool begins_inside = owns && is_inside && moves;
  const bool starts_split = owns && next_is_inside && next_start != start;
  const uint32_t inside_bits = __ballot_sync(ALL, begins_inside);
  const uint32_t split_bits = __ballot_sync(ALL, starts_split);
  const int my_pairs = pairs >> lane & 3;  // bit 0: of this cut, bit 1: of the next
  {
    int time = next_at - at;
    if (next_is_inside && moves) time += C_REQ;
    if (begins_inside) time += split_time;
    if (starts_split) time += split_time;
    if (my_pairs & 1) time += pair_time;
    if (my_pairs & 2) time += pair_time;
    const int longest = __reduce_max_sync(ALL, owns ? time : 0);
    if (lane == 0) {
      const int pieces = __popc(split_bits) << 16 | __popc(inside_bits);
      atomicMax(&ratings[candidate].longest, longest);
      atomicAdd(&ratings[candidate].pieces, pieces);
      warp_pieces[candidate][warp_in_group] = pieces;
    }
  }
  __syncthreads();

  if (warp == 0) {
    uint32_t key = ~0u;
    if (lane < CANDIDATES) {
      const Rating rating = ratings[lane];
      const int split = (rating.pieces >> 16) + (rating.pieces & 0xffff);
      const int partials = split * piece_memory >> 8;
      uint32_t time = (uint32_t)rating.longest + max(0, common.longer + partials);
      if (split > 0) time += T_COMB + partials;
      key = min(time, (uint32_t)T_MOST) << 3 | lane;
    }
    const uint32_t least = __reduce_min_sync(ALL, key);
    if (lane == 0) best = least & 7;
  }
  __syncthreads();

  // ---- 4. record ---------------------------------------------------------------------------

  const int chosen = best;
  const bool records = candidate == chosen;
  // num_splits[r] counts the r requests before r, and the parts that begin inside one of them.
  auto last_part_before = [&](int r) { return count_to(requests[chosen], PARTS_STEP, r - 1) - 1; };
  const int first_r = (warp < chosen * group ? warp : warp - group) * 32 + lane;
  int last_part = 0;
  int4 range = {0, 0, -1, 0}, rest = {0, 0, 0, 0};
  uint32_t check = 0;
  if (records) {
    const int pieces = ratings[chosen].pieces;
    const int before = __reduce_add_sync(ALL, lane < warp_in_group ? warp_pieces[chosen][lane] : 0);
    const uint32_t below = (1u << lane) - 1;
    const int inside_before = (before & 0xffff) + __popc(inside_bits & below);
    const int split_before = (before >> 16) + __popc(split_bits & below);
    const int slot = inside_before + split_before;
    const int next_request = __shfl_down_sync(ALL, request, 1);
    const int next_tile = __shfl_down_sync(ALL, tile, 1);
    if (owns) {
      if (request < next_request || tile < next_tile) {
        const int last = next_is_inside ? next_request : next_request - 1;
        const int first_tiles = tiles_of(cache_seqlens[request]);
        const int last_tiles = tiles_of(cache_seqlens[last]);
        range = {request, tile, last, next_is_inside ? next_tile : last_tiles};
        rest = {my_pairs * BEGINS_IN_PAIR | slot, first_tiles, last_tiles, 0};
        static_assert(ENDS_IN_PAIR == 2 * BEGINS_IN_PAIR, "");
      }
      inside[cut] = inside_before + begins_inside;
      // The list of split requests, part by part, and what follows its end.
      if (starts_split) list[split_before] = slot + begins_inside << REQUEST_BITS | next_request;
      if (cut >= pieces >> 16) {
        list[cut] = (pieces >> 16) + (pieces & 0xffff) << REQUEST_BITS | NO_REQUEST;
      }
      check = check_term(0, range.x) + check_term(1, range.y) + check_term(2, range.z) +
              check_term(3, range.w) + check_term(4, rest.x) + check_term(5, rest.y) +
              check_term(6, rest.z) + check_term(8, cut) + check_term(9, batch);
    }
  } else if (first_r <= batch) {
    last_part = last_part_before(first_r);
  }
  __syncthreads();

  if (records) {
    if (owns) {
      rest.w = list[cut];
      check += check_term(7, rest.w);
      rest.x |= check >> CHECK_SHIFT << CHECK_SHIFT;
      int4* row = reinterpret_cast<int4*>(tile_scheduler_metadata + 8 * cut);
      row[0] = range;
      row[1] = rest;
    }
  } else {
#pragma unroll 1
    for (int r = first_r; r <= batch;) {
      num_splits[r] = r > 0 ? r + inside[last_part] : 0;
      r += 32 * (CANDIDATES - 1) * group;
      if (r <= batch) last_part = last_part_before(r);
    }
  }
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: the setting, then each choice with its time, in the order of history; the last is
// the one taken. On an H100, microseconds for 128 requests and 132 | 66 parts, where a kernel that
// does nothing takes 0.9:
//   a warp a candidate    cuts in shared memory, 64-bit costs, seven candidates  6.0  | 5.5
//   25 warps              each adds up the runs of eight scanning warps, divides 3.85 | 3.2
//   equal cuts            one candidate finds them for all                       3.5  | 2.9
//   what is common        found by one warp, float32 shares                      3.35 | 3.0
//   the scan              by one warp, four requests a lane: as it is            3.15 | 2.85
// and what was not taken, since it made no difference:
//   columns 4 to 7        written by another group of warps
//   count_to              odd steps, against bank conflicts
//   num_splits            written by the parts, each for the requests that begin in it
// What bounds it is the chain: launch 0.9, lengths and scan 0.6, then 15 or 25 warps that take
// turns at four schedulers, two cycles an integer instruction, 35 cycles for each look at shared
// memory and 45 for each reduction. dense_decode starts meanwhile, so before it this takes 1.9 to
// 2.5, where the first one, without launch_dependents, took 6.
