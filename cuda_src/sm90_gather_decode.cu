// MLA attention over rows that are gathered one by one, for SM90a: an FP8 cache, whole (dense) or
// the tokens of a list (sparse), and a list of tokens of a 16-bit cache.
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// One thread block computes 64 query rows over one part of the schedule, in tiles of 48 tokens.
// Four warpgroups:
//
//   sm90_gather_softmax.cuh     S [64, 48] = Q K^T, then P; sm90_gather_q_staged.cuh takes Q
//   sm90_gather_accumulate.cuh  O[:, :256] += P V[:, :256], and in another warpgroup the rest
//   sm90_gather_fp8.cuh         copies rows and converts them to float16 in the ring; or
//   sm90_gather_16bit.cuh       copies rows into the ring; sm90_gather_q_16bit.cuh loads Q
//
// The schedule counts in tiles of 64 tokens, so pieces begin at multiples of 64. A query token with
// a list of its own is a request of its own.
#include "sm90_gather_format.cuh"
#if defined(FORMAT_FP8)
#include "sm90_gather_fp8.cuh"
#else
#include "sm90_gather_16bit.cuh"
#endif
#include "sm90_gather_accumulate.cuh"
#include "sm90_gather_softmax.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    GATHER(const __grid_constant__ TensorMap q_map_0, const __grid_constant__ TensorMap q_map_1,
           const __grid_constant__ Params params) {
  if (thread_index() == 0) {
    if (!QUERY_IS_E4M3) {
      prefetch_tensormap(q_map_0);
      prefetch_tensormap(q_map_1);
    }
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
    gather_role(params, q_map_0, q_map_1);
  } else {
    setmaxnreg_inc<MATRIX_REGISTERS>();
    matrix_role(params, warpgroup - 1);
  }
  griddepcontrol_launch_dependents();
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: the setting, then each choice with its time, the one taken first. Microseconds of
// a call on an H200, L2 cold, in a CUDA graph; in brackets the kernels in the wheel of vllm 0.33.0
// in the same run. Lists of 2048 tokens of 8192 for each of 128 requests, unless said.
//
// States of the gather role over FP8. A had 24 registers, four rows of a warp at a time, and 16
// rows on their way (and lists that all named the same 8192 tokens). B had 40 registers, all loads
// of four rows ahead of their conversion, and 12 rows on their way; what is not to be seen came
// from a row of zeros in global memory. C had copies of no bytes for that, and list entries copied
// ahead. In D the loads of where rows begin are ahead of copies (nothing is loaded past a copy into
// shared memory, so C waited for each), two rows are converted while the next are loaded, scales
// are loaded for a lane's own columns instead of shuffled, and S2R, a shift for each upper half,
// and most spills are gone. In E a lane copies what it will read itself: half of the addresses, and
// no __syncwarp; and every lane walks by itself. F looks up in 90 instructions with few branches,
// after the stores of the tile before and ahead of their fence; Q of the first piece is asked for
// ahead of its first rows, and P V takes P from registers. G, the present state, looks up where E
// did, behind the release of the tile before, and two tiles at once; over 584 bytes, scales are
// loaded in pairs, rotary columns are multiplied in bfloat16, and lanes without latent columns
// store nothing instead of branching.
//   656 bytes, 128 heads, s_q 1, 2     E 174, 330 | D 211, 409 | C 258, 502 | B 223, 416 (211, 415)
//   64 heads, s_q 1, 2                 E 94, 178 | D 112, 213 | C 135, 258 | B 124, 224  (117, 227)
//   16 heads                           E 89 | D 106 | C 131 | B 118    (115, padded to 64)
//   128 heads of 1, 8, 32 requests     E 20.0, 31.0, 62.4 | D 20.5, 32.5, 70.5 | C 22.4, 36.1, 84.7
//                                      (22.6, 34.5, 75.6)
//   64 heads of 1, 8, 32 requests      E 18.2, 27.3, 40.3 | D 18.7, 28.7, 43.7 | C 19.9, 32.5, 50.3
//                                      (22.0, 27.1, 51.8)
//   dense, 576 bytes, 132 requests of 8192 tokens, 64, 128 heads
//                           E 319, 622; D 376, 736; C 432, 849; B 341, 665 (221, 424)
//   E and F, taking turns on another board; FR: F with P V from shared memory
//                           128 heads, s_q 2, E 333 | F 341 | FR 344 (418); 64 heads, s_q 1, 2
//                           E 95, 177 | F 99, 183 | FR 100, 183 (117, 228); dense, 576 bytes, 64
//                           and 128 heads E 337, 656 | F 313, 607 | FR 317, 619 (221, 426)
//   E, F, G taking turns; GF: G, one tile looked up at a time; FP: F with what G has for 584 bytes
//                           656 bytes, 64 heads GF 90.0 | F 96.1 (114.7); with s_q 2 173 | 183
//                           (227); 128 heads 173 | 181 (215); 8 requests of 64 heads 25.1 | 29.6
//                           (27.3). 584 bytes, 64 heads GF 112 | F 133 | FP 119 (119); 128 heads
//                           203 | 232 | 211 (204); 2 requests of 64 heads 19.9 | 25.1 | 23.7
//                           (23.4). Dense, 576 bytes, 64 heads 312 | 317 (223). In another run 656
//                           bytes, 64 heads GF 90.8 | E 92.4 | F 96.9 | GF with loads of a chunk
//                           ahead of the end of the one before, which spills, 97.0 (114.9)
//   G                       656 bytes, 64 heads, s_q 1, 2 91.0, 171 (118, 228); 128 heads 167
//                           (215); 64 heads of 1, 8 requests 18.8, 25.2 (22.1, 27.2). 584 bytes,
//                           64 heads 106 (120), 2 requests 21.0 (24.4). Dense, 576 bytes, 64 heads
//                           298 (226)
//   matrix warps convert    two chunks of three of each tile, in the shadow of P V, and copy their
//                           own rows, beside G in the same run: 656 bytes, 64 heads 101, 128 heads
//                           184, 8 requests 27.2; 584 bytes, 64 heads 104; dense 332. With bulk
//                           copies of rows by each warp 107, 198, 28.0; 117; 365. Where the gather
//                           warps copy for them, when they have read, 64 heads 115
//   parts left out of F     656 bytes, 64 heads 96.9: without arithmetic of the conversion 99.6;
//                           without that and copies 82.1
//   arithmetic              clocks of an instruction, two warps a scheduler: two e4m3 to float16
//                           2.5, the same by PRMT, SHF and two LOP3 8.3; HMUL2 1.2; two floats to
//                           float16 2.2. So it is less than half of the 650 clocks of a chunk
//   copies of rows alone    clocks of a row of 656 bytes and multiprocessor, in L2, four warps:
//                           bulk 23.7 | along a row 29.6 | 64 bytes of eight rows, as it is, 34.3;
//                           rows 672 bytes apart 19.4 | 21.5 | 25.5. From memory 39 | 45 | 47
//   shared memory           wavefronts of a tile of 656 bytes, of ncu: copies of rows 1130, of them
//                           370 for scales, by 4 lanes of 32; S 620, P V 380, storing K 430,
//                           loading rows 250, P and Q 170. Were 128 bytes of rows one, 246
//   parts left out          of E, 128 heads and s_q 2, 331: without copies and conversion 230. Of
//                           D, 409: without copies 320; without conversion and its stores 303;
//                           with its stores but no conversion 410; without the proxy fence 406;
//                           with nothing but looking up 241. Dense, 64 heads, D 376: 318 without
//                           copies
//   E copying whole rows    128 heads and s_q 2, 333 for 331; 64 heads 94 for 93
//   P in registers for P V  16 tokens at a time: 328 for 331, 64 heads 175 for 176; dense, 64 and
//                           128 heads 307, 596 for 319, 622. Over 16-bit rows 4261 for 4144
//   S by turns with Q in registers and in shared memory: the same
//   clocks of a tile        of E, one block: looking up 1040, three chunks 650 each, fence 220; S
//                           1230 from when K is there, softmax 690. Of ncu's samples of the gather
//                           warps, looking up had 30 %: 135 instructions, but many branches
//   tiles looked up at once, in F, taking turns
//                           two: 656 bytes, 64 and 128 heads 96.9, 177.6 (115.0, 209.1); dense, 576
//                           bytes, 64 heads 338.4 (236.0); prompts, 64 heads, keys 32768, 2274
//                           (2304), 128 heads, keys 8192, 4321 (4154) | one: 98.2, 181.6; 355.5;
//                           2337, 4408
//   two row blocks in a cluster, of 128 heads, each of which converts half of a tile for both
//                           656 bytes 190 without. By st.async to the other block's shared memory
//                           216, by st 267, by bulk copies 233; each converting every second tile
//                           226 and, by bulk copies, 188; dense, 576 bytes 635 without, 660 to 811.
//                           Alone, such stores and copies reach 17 bytes a clock and multiprocessor
//   pieces of at least 1, 2, 4, 8 tiles   E, 64 heads of 8 requests 28.9, 24.8, 27.2, 34.1 (chosen:
//                           27.1); elsewhere what is chosen is within 3 % of the best
//   parts of B left out     128 heads 223, 16 heads 118: without the conversion 190, 102; without
//                           copies 167, 85; without looking up 196, 99. So each took time of the
//                           one warp of a scheduler: entries are copied ahead now, not loaded
//   proxy fence             by the writers | by the reader: the same
//   P V is released         8 steps before the end of S | 4 or 14: the same, in A
//   L2 prefetch of copies   128 bytes | none: the same
// Accuracy over 656 bytes, of the wheel's root mean square error: results in float16 0.15, with
// scales that are no powers of two 0.14; in bfloat16 0.89 and 0.56.
//
// Over 16-bit rows, prompts of 4096 tokens with their lists, keys 8192 | 32768 | 65536:
//   128 heads  3762 | 4171 | 4383  (3747 | 4146 | 4456)
//   64 heads   2029 | 1978 | 2211  (2008 | 1965 | 2223)
//   16 heads   - | 1944 | -        (- | 2713 | -)
//   looking up as in C, E   128 heads 4198, 4144 (3731, 3906); 64 heads, keys 32768 2172, 2192
//                           (1985, 2082): a warp has 24 registers, and half its time went there
//   looking up as in F      taking turns with E, 128 heads 3803 for 3986 (3743); 64 heads, keys
//                           32768, 2004 for 2149 (2073)
//   with 24 steps of Q in registers instead of 28: 128 heads 3896, 64 heads 2125
// States of the gather role over 16-bit rows after F, taking turns with it. In both, Q has room of
// its own. In H a warp fills a stage of its own with whole tiles, and the fourth warp loads Q. In
// I, the present state, two pairs of warps take turns, the softmax warpgroup loads Q, and its chain
// is shorter: no shuffles where no maximum is raised, and what can be is asked before S is there.
//   64 heads, keys 8192, 32768                    I 2092, 2268 | F 2149, 2285 | H 2079, 2240
//                                                 (2140, 2292)
//   128 heads, 2048 tokens, keys 8192, 32768      I 2114, 2183 | F 2180, 2234 | H 2086, 2194
//                                                 (2092, 2217)
//   128 heads, 512 tokens, keys 32768             I 559 | F 567 | H 562 (567)
//   64 heads, 8192 tokens, lists of 512           I 1327 | F 1339 | H 1293 (1273)
//   16 heads, keys 32768                          I 1997 | F 2034 | H 1977
//   512 columns, 128 heads, lists of 1024, in runs of their own, of the wheel's time
//                                                 I 1.050 | F 1.066 | H 1.006
//                           So a warp for Q alone is worth a try in I
//   clocks of a tile        F 2530, of which S and P V are 1632 of the tensor cores; with marks,
//                           its gather warps never waited. H 2330, with marks of some 40 each: a
//                           warp starts a copy in 16 clocks, so a tile of one warp takes 1900 to
//                           ask for, and each third one is late. I 2250, with the same marks: K is
//                           there 1200 ahead of S; S 1160, softmax 860 beside P V and 570 alone, to
//                           the next S 180, P V 1030
//   power                   F is at the limit of 700 W, at 1536 MHz of 64 heads and 1589 of 128;
//                           with zeros for q and keys at 1811 and 1815, where a tile takes as many
//                           clocks and the wheel's ratio is 1.00 and 1.01. H and I take 7 and 11 %
//                           fewer clocks a tile than F, with their marks, but up to 4 % less time,
//                           and H once 1 % more
//   parts of F left out     of its time, 64 heads, keys 32768 | 128 heads, keys 8192: without copies
//                           0.86 | 0.90, without P V 0.78 | 0.79, with 8 of 36 steps of S 0.78 |
//                           0.77, without exponentials 1.00 | 1.02, without copies and P V 0.67 |
//                           0.71, without copies and those steps 0.62 | 0.64
//   length of a list        F, as many tokens in all, 64 heads, lists of 512 to 8192: 2616, 2438,
//                           2158, 2104, 2029 (2489, 2298, 2160, 2169, 2073)
//   room for Q alone        in F 2179 for 2191, 2264 for 2287 | and most of it taken ahead of the
//                           last softmax of a piece, 2222, 2336; in H 2121 for 2136, 2317 for 2294
//   P V is released         in F, 4, 12, 20 steps before the end of S for 8: within 2 %; in H, 12
//                           and 20: within 1 %; as soon as P is written 1.08 to 1.13
//   out stored evict-first  in F, 64 heads, keys 65536, 2405 for 2449 (2470); in F and H elsewhere
//                           within 1.5 %, either way
//   keys evict-last         in F 1.00 to 1.03; L2 prefetch of 256 bytes 1.01 to 1.07, of none 1.01
//                           to 1.06
//   around the kernel       list_lengths and schedule 0.8 and 4 for 512 tokens of 128 heads, 0.9
//                           and 13 for 4096 of 64, ahead of 499 and 1976
// Decoding, 16 heads 83 (3.7 TB/s), 64 heads 87, 128 heads and s_q 2 273 (24 steps).
//
// Of ptxas (NVRTC 12.9), with 512 threads: m64n256 wants 154 registers at launch, where there are
// 128; so P V is two m64n128. wgmma is serialised with 152 registers for the matrix warpgroups,
// with 144 for softmax and 24 steps, with 160 and 28. 28 steps fit 168, then 24 are left to gather.
