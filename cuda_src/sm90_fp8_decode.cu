// MLA attention over an FP8 cache, for SM90a: whole (dense), or the tokens of a list (sparse).
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// One thread block computes 64 query rows over one part of the schedule, in tiles of 64 tokens. Rows
// of the cache lie in shared memory as they are. Both products are transposed, so that the latent is
// their A, which wgmma takes from registers: the warps that multiply convert what they need on the
// way there, to float16, which is exact. Four warpgroups:
//
//   sm90_fp8_scores.cuh  S^T [64, 64] = K Q^T of a tile, then P; sm90_fp8_queries.cuh prepares Q
//                        (of queries in e4m3, which are multiplied as they are:
//                        sm90_fp8_e4m3_keys.cuh; else sm90_fp8_keys.cuh)
//   sm90_fp8_values.cuh  O^T [:256] += V^T [:256] P^T, and in another warpgroup the rest
//   sm90_fp8_loader.cuh  copies rows
//
// sm90_fp8_convert.cuh makes numbers of the products of FP8. A query token with a list of its own is
// a request of its own.
#include "sm90_fp8_loader.cuh"
#include "sm90_fp8_scores.cuh"
#include "sm90_fp8_values.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    GATHER(const __grid_constant__ TensorMap q_map_0, const __grid_constant__ TensorMap q_map_1,
           const __grid_constant__ Params params) {
  fetch_params(params);
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
    setmaxnreg_inc<SCORE_REGISTERS>();
    score_role(params, q_map_0, q_map_1);
    if (thread_index() >> 5 == 1) check_part_row(params);
  } else if (warpgroup == 3) {
    setmaxnreg_dec<LOAD_REGISTERS>();
    if (is_plain(params)) {
      load_role<true>(params);  // so that less code is fetched before the first row
    } else {
      load_role<false>(params);
    }
  } else {
    setmaxnreg_inc<VALUE_REGISTERS>();
    value_role(params, warpgroup - 1);
  }
  griddepcontrol_launch_dependents();
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: microseconds of a call on an H200, L2 cold, in a CUDA graph; in brackets the
// kernels in the wheel of vllm 0.33.0 in the same run. Lists of 2048 tokens of 8192 for each of 128
// requests, unless said; dense: 576 bytes, 132 requests of 8192 tokens.
//
// States. G was another kernel: S = Q K^T and O = P V with the latent as B, which wgmma takes from
// shared memory alone, so a warpgroup copied rows, converted them and stored them there again, in
// tiles of 48 tokens. A is this one with rows copied by cp.async, B with bulk copies. In C, P V of a
// tile is released behind S of the next, not four units ahead of its end; D has no spilled registers,
// results that are stored without shuffles, and a vote about the maxima in one instruction. In E what
// comes next is loaded ahead of that vote, rotary columns come first and in bfloat16, the proxy fence
// is the reader's, and what is executed once is short. In F rows of a plain pool are found in less
// code, and Q is asked for first of all. In H ldmatrix is two units ahead of the conversion of K, and
// two loads ahead of that of V, the vote is about halves of P, and what is rare lies behind one branch;
// S of queries in e4m3 is a product of e4m3. Since H parameters are fetched all at once, and partial
// results are stored by lines, as noted below.
//   656 bytes, 64 heads      G 90.8 | A 100 | B 91.7 | C 90.8 | D 85.7 | E 83 | F 82 | H 79.7 (116)
//   128 heads                G 165 | A 186 | B 169 | C 165 | D 157 | E, F 154 | H 149 (211)
//   64 heads, s_q 2          G 171 | D 162 | E 160 | F 159 | H 153 (226)
//   64 heads, 1, 8, 32 requests   G 19.2, 25.5, 40.3 | B 28, 33.4, - | E 17.5, 23.4, 36.3 | F 18.3,
//                                 23.1, 35.4 | H 17.7, 23.9, 36.1 (22.1, 26.9, 52.5)
//   584 bytes, 64 heads      G 107 | A 99 | B 98 | C 98 | E 91.4 | F 88.5 | H 84.5 (121); 128 heads F
//                            163 | H 154 (201); 2 requests G 20.5 | E 21.7 | F 20.4 | H 20.0 (23.9)
//   dense, 64, 128 heads     G 287, 555 | A 280, 530 | B 269, 512 | C 256, 481 | E 252, 472
//                            (221, 423); of queries in e4m3 F 247, 462 | H, S in float16, 239, 455;
//                            in e4m3 222, 411 (217, 418)
//
//   wgmma with A in registers   m64n64k16 33.9 clocks by one warpgroup, 63.6 each by two, 94 by three:
//                            as with A in shared memory. m64n48k16 26, m64n64k32 of e4m3 34
//   clocks of a tile, dense, 64 heads   S 2040: to the first product 370, then 70 to 90 for each of
//                            18 units of 68, to its end 400; P 1090, beside P V, 800 over 656 bytes;
//                            fence 140, vote 140, to the next tile 130. P V 1550 to 1800, then its
//                            warps wait as long. So S and P of a tile, one after the other, are the
//                            bound: of 3300 clocks the tensor cores have 2176 to do
//   copies of rows           cp.async 3100 clocks of a tile and warp over 656 bytes, and the warp waits
//                            for the queue; bulk copies, a row each: its warps wait for stages
//   P V is released          behind S 256.5 | one, two, four units earlier 257.2, 259.2, 265.0 | ahead
//                            of S 298
//   units of S in registers  3 of 18 | 2, 4: 1.01, 1.00
//   units of P V             of two products, 1.00; a pass for each step of 16 tokens 1.04
//   P before the vote        256 for 280, with the fence and the vote behind it
//   vote by sums, not maxima 1.01; in a loop with P 1.02
//   code that is executed once   takes some 150 clocks for every 8 instructions to fetch. So short
//                            pieces take P V in a loop (64 heads, 2 requests, 584 bytes, 20.7 for
//                            23.1) and results are stored in two passes (24.8 for 26.7 of 8 requests)
//   maxima as registers      of each thread: 16 of them, which then are spilled
//   in G: bulk copies        in place of cp.async, row by row and, dense, by fours 364 for 285, 107 for
//                            90: it had room for no more than a tile. Without copies 276, 83
//   in G: two blocks share   the conversion of their rows, in a cluster: 188 to 233 for 190, dense 660
//                            to 811 for 635; distributed shared memory moves 17 bytes a clock
//   in G: value warps convert   and store, in the shadow of P V 101 for 91, by bulk copies 107
//   Accuracy                 over 656 bytes, of the wheel's root mean square error: results in float16
//                            0.15, in bfloat16 0.89; with scales that are no powers of two 0.14, 0.56
//   products of e4m3 for S   of queries in e4m3: added up in float32 by 128 columns, dense 229.5; by 192,
//                            230.6; by 288, 239.6, with spills; by halves of the query rows, one of
//                            which is added up while the other is multiplied, 227.6, and 235 with what
//                            is rare behind one branch, since it spills. Root mean square error of out
//                            1.65e-3 as before, 1.77e-3 for 1.65e-3 with scores up to 40 (FlashMLA's
//                            7e-3 to 1.1e-2); of lse 5e-5, then 5e-3
//   the same of queries in bfloat16, each the sum of two e4m3: no conversion of K then, and scales come
//                            in with the sums of their 128 columns. S 1763 clocks for 1890, but P
//                            1550 for 1000: 656 bytes 82.5 for 82.8, 128 heads under lasting load 164
//                            for 160, dense 256.8 for 249.4
//   P of a tile beside S of the next, unit by unit or in one piece after the first, second, fifth unit,
//                            656 bytes 87 to 90 for 82, dense 253 to 266 for 249: S with P takes as long
//                            as one after the other, and a tile must be there earlier, for which three
//                            stages are too few. S takes its units in a loop in short pieces: 19.7 for
//                            18.7 of one request
//   ldmatrix ahead of K      one unit 82.0, two units 80.1; of more at once, with the scales, 82.0,
//                            spilled. Of V, one load more: 584 bytes 83.1 for 85.9, dense 243.5 for
//                            242.6; over 656 bytes there are no registers for it
//   P V released earlier     now 81.5, 82.5 for 80.7, four and nine units before the end of S; of e4m3
//                            products 237 to 246 for 229.5
//   Q before other rows      the second tile is asked for when Q is there: 80.7 for 80.4
//   what is rare             behind one branch 149.2 for 151.1, dense 239.6 for 240.8; whether the next
//                            tile is there, asked ahead of P: dense 251.0 for 243.8
//   the code that stores results   walked through by idle warps ahead of a piece of 4 tiles or
//                            fewer, as it is over 584 bytes, in brackets the wheel: 64 heads, 1, 4
//                            requests 16.6 for 18.8 (21.8), 21.3 for 23.8 (24.4); lists of 512, 64
//                            heads, 4 requests 16.4 for 18.6 (16.9), 128 heads, 2, 8 requests 16.9
//                            for 19.7 (16.9), 21.5 for 23.6 (21.0). Over 656 bytes 64 heads, 1, 8
//                            requests 15.8 for 17.9, 22.5 for 24.7, 128 heads 17.3 for 20.0; but
//                            where code is in the caches, as between calls of benchmarks, 15.0 for
//                            14.5, 18.9 for 18.6, 15.5 for 14.9, of which half is what a walk that
//                            never comes costs
//   fetch_params             656 bytes, cold, 64 heads, 8 requests 23.7 for 24.4, 128 heads, 1, 8
//                            requests 19.0 for 20.0, 28.7 for 29.6, 16 heads, 8, 32 requests 17.1
//                            for 17.8, 27.3 for 28.7; with code in the caches 14.5 for 14.7, 18.6
//                            for 18.8
//   partial results          by lines of 128 bytes, with scales found once a row, cold: 656 bytes, 64 heads,
//                            8, 32 requests 24.1 for 24.4, 35.7 for 37.0, 128 heads, 8 requests 27.9
//                            for 29.1; 584 bytes, lists of 512, 64 heads, 4 requests 15.3 for 16.0, 128
//                            heads, 1, 2, 8 requests 14.7 for 15.0, 15.6 for 16.3, 20.1 for 20.7 (14.8,
//                            16.1, 20.7), where before 64 bytes of two rows were stored at once
//   where the time of a short call goes   64 heads, 8 requests of 2048, with code in the caches,
//                            in us: the first row asked for 2.5, there 4.6 (Q 3.8), S 5.9, P 6.7,
//                            P V of two tiles 10.2, partial results 13.1, combine ready 14.8, done
//                            17.2. Of these short paths, none took less: partial results as floats
//                            19.7 for 18.7; all of them in one pass 19.0; by way of shared memory
//                            and bulk copies 20.1, for 64 KB leave a multiprocessor with 24 bytes
//                            a clock; entries of lists prefetched and Q asked for ahead of
//                            setmaxnreg, whose time goes by as before, 19.0; P V in one pass 18.9.
//                            An instruction takes a scheduler 1.05 clocks in code of up to 32 KB,
//                            2.1 up to 128 KB, 4.6 to 5.9 beyond; caches keep code from launch to
//                            launch
//   blocks of 16 query rows where lists leave multiprocessors idle, by sm90_few_fp8_decode.cu:
//                            656 bytes, cold, 64 heads, 1, 2, 4 requests 16.0 for 17.6, 16.6 for
//                            19.2, 19.5 for 22.2, 128 heads, 1, 2 requests 16.5 for 19.3, 19.9 for
//                            22.3; 584 bytes 24.0 for 18.6. Not taken, since metadata would have
//                            another shape, or bits depend on who makes it
//   stalls, of ncu, of F     in S a warp waits for ldmatrix 28 % of its time, for wgmma never; P is 206
//                            instructions in 1240 clocks, of which what issues takes 18 %, and code that is
//                            jumped over costs a fetch each time
//   lasting load             700 W. 128 heads over 656 bytes then run at 1740 to 1800 MHz, and FlashMLA, with
//                            205 us, at 1980: what takes fewer clocks runs slower by as much, F and H
//                            both 157 to 162 us. Dense 1640 for 1760 MHz
//
// Of ptxas (NVRTC 12.9), with 512 threads: wgmma is serialised with 168 registers for the value
// warpgroups, or where a loop goes round with products under way.
