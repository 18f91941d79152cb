// MLA attention over lists of tokens (sparse) of a 16-bit cache, whose rows are gathered one by
// one, for SM90a.
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// One thread block computes 64 query rows over one part of the schedule, in tiles of 48 tokens.
// Four warpgroups:
//
//   sm90_gather_softmax.cuh     S [64, 48] = Q K^T, then P; sm90_gather_queries.cuh loads Q
//   sm90_gather_accumulate.cuh  O[:, :256] += P V[:, :256], and in another warpgroup the rest
//   sm90_gather_loader.cuh      copies rows into the ring; sm90_gather_cursor.cuh finds them
//
// The schedule counts in tiles of 64 tokens, so pieces begin at multiples of 64. A query token with
// a list of its own is a request of its own.
#include "sm90_gather_accumulate.cuh"
#include "sm90_gather_loader.cuh"
#include "sm90_gather_softmax.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    GATHER(const __grid_constant__ TensorMap q_map_0, const __grid_constant__ TensorMap q_map_1,
           const __grid_constant__ Params params) {
  fetch_params(params);
  if (thread_index() == 0) {
    prefetch_tensormap(q_map_0);
    prefetch_tensormap(q_map_1);
    init_mbarriers();
  }
  const bool begins = thread_index() >> 5 == 1;
  if (begins) init_row_block(params);
  griddepcontrol_wait();
  if (begins) init_part_row(params);
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, thread_index() >> 7, 0);
  if (warpgroup == 0) {
    setmaxnreg_inc<SOFTMAX_REGISTERS>();
    softmax_role(params, q_map_0, q_map_1);
    if (thread_index() >> 5 == 1) check_part_row(params);
  } else if (warpgroup == 3) {
    setmaxnreg_dec<GATHER_REGISTERS>();
    gather_role(params);
  } else {
    setmaxnreg_inc<MATRIX_REGISTERS>();
    matrix_role(params, warpgroup - 1);
  }
  griddepcontrol_launch_dependents();
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: the setting, then each choice with its time, the one taken first. Microseconds of
// a call on an H200, L2 cold, in a CUDA graph; in brackets the kernels in the wheel of vllm 0.33.0
// in the same run. Lists are of 2048 tokens, unless said.
//
// States of the gather role. In all, entries of lists are copied ahead, and copies of no bytes make
// zeros of rows that are not there. In A rows are looked up behind copies; nothing is loaded past a
// copy into shared memory, so each load waited. In B the loads are ahead of copies, and every lane
// walks by itself: 135 instructions with many branches, which C makes 90 with few. Up to C, Q comes
// by way of two stages of the ring; since then it has room of its own. In D a warp fills a stage of
// its own with whole tiles, and the fourth warp loads Q. In E, the present state, two pairs of
// warps take turns, the softmax warpgroup loads Q, and its chain is shorter: no shuffles where no
// maximum is raised, and what can be is asked before S is there.
//
// C, prompts of 4096 tokens, keys 8192 | 32768 | 65536:
//   128 heads  3762 | 4171 | 4383  (3747 | 4146 | 4456)
//   64 heads   2029 | 1978 | 2211  (2008 | 1965 | 2223)
//   16 heads   - | 1944 | -        (- | 2713 | -)
//   A, B                    128 heads 4198, 4144 (3731, 3906); 64 heads, keys 32768 2172, 2192
//                           (1985, 2082): a warp has 24 registers, and half its time went there
//   C and B taking turns    128 heads 3803 | 3986 (3743); 64 heads, keys 32768, 2004 | 2149 (2073)
//   P in registers for P V  16 tokens at a time: in B 4261 for 4144
//   tiles looked up at once in C, 64 heads, keys 32768, and 128 heads, keys 8192: two 2274, 4321
//                           (2304, 4154) | one 2337, 4408
//   with 24 steps of Q in registers instead of 28: 128 heads 3896, 64 heads 2125
// C, D and E, taking turns, the same prompts:
//   64 heads, keys 8192, 32768                    E 2092, 2268 | C 2149, 2285 | D 2079, 2240
//                                                 (2140, 2292)
//   128 heads, 2048 tokens, keys 8192, 32768      E 2114, 2183 | C 2180, 2234 | D 2086, 2194
//                                                 (2092, 2217)
//   128 heads, 512 tokens, keys 32768             E 559 | C 567 | D 562 (567)
//   64 heads, 8192 tokens, lists of 512           E 1327 | C 1339 | D 1293 (1273)
//   16 heads, keys 32768                          E 1997 | C 2034 | D 1977
//   512 columns, 128 heads, lists of 1024, in runs of their own, of the wheel's time
//                                                 E 1.050 | C 1.066 | D 1.006
//                           So a warp for Q alone is worth a try in E
//   clocks of a tile        C 2530, of which S and P V are 1632 of the tensor cores; with marks,
//                           its gather warps never waited. D 2330, with marks of some 40 each: a
//                           warp starts a copy in 16 clocks, so a tile of one warp takes 1900 to
//                           ask for, and each third one is late. E 2250, with the same marks: K is
//                           there 1200 ahead of S; S 1160, softmax 860 beside P V and 570 alone, to
//                           the next S 180, P V 1030
//   power                   C is at the limit of 700 W, at 1536 MHz of 64 heads and 1589 of 128;
//                           with zeros for q and keys at 1811 and 1815, where a tile takes as many
//                           clocks and the wheel's ratio is 1.00 and 1.01. D and E take 7 and 11 %
//                           fewer clocks a tile than C, with their marks, but up to 4 % less time,
//                           and D once 1 % more
//   parts of C left out     of its time, 64 heads, keys 32768 | 128 heads, keys 8192: without
//                           copies 0.86 | 0.90, without P V 0.78 | 0.79, with 8 of 36 steps of S
//                           0.78 | 0.77, without exponentials 1.00 | 1.02, without copies and P V
//                           0.67 | 0.71, without copies and those steps 0.62 | 0.64
//   length of a list        C, as many tokens in all, 64 heads, lists of 512 to 8192: 2616, 2438,
//                           2158, 2104, 2029 (2489, 2298, 2160, 2169, 2073)
//   room for Q alone        in C 2179 for 2191, 2264 for 2287 | and most of it taken ahead of the
//                           last softmax of a piece, 2222, 2336; in D 2121 for 2136, 2317 for 2294
//   P V is released         in C, 4, 12, 20 steps before the end of S for 8: within 2 %; in D, 12
//                           and 20: within 1 %; as soon as P is written 1.08 to 1.13
//   out stored evict-first  in C, 64 heads, keys 65536, 2405 for 2449 (2470); in C and D elsewhere
//                           within 1.5 %, either way
//   keys evict-last         in C 1.00 to 1.03; L2 prefetch of 256 bytes 1.01 to 1.07, of none 1.01
//                           to 1.06
//   around the kernel       list_lengths and schedule 0.8 and 4 for 512 tokens of 128 heads, 0.9
//                           and 13 for 4096 of 64, ahead of 499 and 1976
// Decoding, 128 requests with lists of 2048 of 8192 tokens: 16 heads 83 (3.7 TB/s), 64 heads 87,
// 128 heads and s_q 2 273 (24 steps).
//
// Of ptxas (NVRTC 12.9), with 512 threads: m64n256 wants 154 registers at launch, where there are
// 128; so P V is two m64n128. wgmma is serialised with 152 registers for the matrix warpgroups,
// with 144 for softmax and 24 steps, with 160 and 28. 28 steps fit 168, then 24 are left to gather.
