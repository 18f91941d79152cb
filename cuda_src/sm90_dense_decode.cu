// MLA decode attention over a paged latent cache, for sm_90a:
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// A thread block computes 64 query rows over the tiles (64 tokens each) of one part of the
// schedule. It has three warpgroups:
//
//   softmax         S [64, 64] = Q [64, 576] K^T, then P   sm90_softmax.cuh, 184 registers a thread
//   matrix, half 0  O[:, :256] += P V[:, :256]             sm90_accumulate.cuh, 160 registers
//   matrix, half 1  O[:, 256:] += P V[:, 256:]             the same
//
// Warp 0 of each matrix warpgroup also loads that half of Q and K by TMA, with
// sm90_tma_producer.cuh. Over time, for a piece of four tiles:
//
//   TMA             Q  K0  K1   K2, where Q was    K3, where K0 was    Q of the next piece ...
//   softmax             Q       S0 P0     S1 P1     S2 P2     S3 P3     l, lse
//   matrix, half 0                        P0 V0     P1 V1     P2 V2     P3 V3     out[:, :256]
//   matrix, half 1                        P0 V0     P1 V1     P2 V2     P3 V3     out[:, 256:]
//
// sm90_shared.cuh has the memory map and the table of the barriers that keep them in step.
// sm90_pieces.cuh finds out what a block has to do; metadata.cuh explains the words.
//
// P of a tile overwrites the rotary columns of the same tile, which S no longer needs, so three
// tiles fit 227 KB. The running maximum m is lazy: it moves only when a row's maximum exceeds it by
// 8, and by whole numbers, so that the factors for O are exact powers of two.
//
// When the next tile has already arrived, as in a launch bound by arithmetic, S of that tile is
// issued before P V of this one is released, 8 steps before the end of S, so that the tensor cores
// never wait. Otherwise P V is released at once.
#include "sm90_accumulate.cuh"
#include "sm90_softmax.cuh"

extern "C" __global__ void __launch_bounds__(384, 1)
    dense_decode(const __grid_constant__ TensorMap q_map_0,
                 const __grid_constant__ TensorMap q_map_1,
                 const __grid_constant__ TensorMap k_map_0,
                 const __grid_constant__ TensorMap k_map_1, const __grid_constant__ Params params) {
  fetch_params(params);
  if (thread_index() == 0) {
    prefetch_tensormap(q_map_0);
    prefetch_tensormap(q_map_1);
    prefetch_tensormap(k_map_0);
    prefetch_tensormap(k_map_1);
    init_mbarriers();
  }
  const bool begins = thread_index() >> 5 == 1;  // this warp has nothing to do until Q is there
  if (begins) init_row_block(params);
  if (thread_index() >> 5 == 2) prefetch_tables(params);
  griddepcontrol_wait();
  if (begins) init_part_row(params);
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, thread_index() >> 7, 0);
  if (warpgroup == 0) {
    setmaxnreg_inc<184>();
    softmax_role(params);
    if (thread_index() >> 5 == 1) check_part_row(params);
  } else {
    setmaxnreg_dec<160>();
    const int half = warpgroup - 1;
    matrix_role(params, half, half ? q_map_1 : q_map_0, half ? k_map_1 : k_map_0);
  }
  griddepcontrol_launch_dependents();
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: the setting, then each choice with its time, the one taken first. Microseconds of
// a decode call.
//
// In a prototype of this kernel on an H200, 128 heads, batch 132, 8192 tokens, unless said:
//   who loads K           each half its own, one box a tile 504 | one warpgroup, nine boxes 548
//   page id               loaded a stage ahead | by cp.async, cursor in shared memory: 700 cycles
//                         a stage slower
//   P V is released       8 steps before the end of S 502 | 2 steps 517 | 4 steps 505 |
//                         12 steps 504 | 15 steps 514 | by commit and wait after all of S 527
//   stages                three 500 | two 574
//   L2 policy of K        evict_first 500 | evict_normal 518
//   multicast of K        none 502 to 507, at batch 32 126 | to clusters of two row blocks 501,
//                         at batch 32 143
//   uniform conditions    (ptx.cuh) 5500 instructions and 12 bytes spilled | without them 6700 and
//                         88, with combine beyond the instruction cache: 16 heads, batch 1, 8192
//                         tokens, on an H100, 12.9 | 15.1
//   Q to L2 by TMA        not at all | as soon as the request is known: 10 more where a box is
//                         partly outside
// On an H100, one request of 512 tokens, 16 heads, unless said:
//   masked tiles          those with a hidden key 7.6 | the last ones of a request 7.9
//   a piece               looked at once by the softmax warpgroup 7.45 | twice 7.6
//   P V of the last tile  released at once 8.7 | after l of the piece 8.8 (128 heads)
//   length and page       not prefetched | in the L1 cache ahead of the roles: the same
//   a front               leaves a back under way to combine 28.1 | waits for it 30.6 (128 heads,
//                         8 requests of 4096 tokens)
//   a back is announced   at once | two tiles later: the same
//   launch_dependents     at the end 25 | at the start 35 (16 heads, batch 1, 32768 tokens)
// On an H200, one request of 512 tokens, 16 heads, and 64 of 512 with 2 x 16 heads:
//   metadata is checked   at the end 8.0, 21.2 | at the beginning, where the roles wait for the
//                         check and its instructions, and with 1.5 instructions more for each
//                         element that mask() looks at, 8.25, 22.2
// On an H200 whose memory a plain read fills with 4.52 TB/s, variants taking turns:
//   instructions          as they are needed: 64 heads, 128 requests of 4096 tokens 153.9; 128
//                         heads, one of 512 tokens 9.5, 8 of about 4096 26.1 | rehearsed: each role
//                         goes through its loop once at the beginning, without waiting or leaving a
//                         trace 155.9, 11.2, 27.4. Then the producers' instructions come later
//   the second tile       asked for at once: 64 heads, 128 of 4096 tokens 148.1, 64 of about 16384
//                         305.0 | when Q is taken 147.5, 307.3
//   out                   16 bytes a lane, by transpose_quads: 128 heads, 128 of about 1024 78.4,
//                         one long among 63 short 87.5 | 4 bytes, half the instructions 86.4, 100.8
// What bounds 128 heads is power, 700 W at 1000 to 1600 MHz: 132 requests of 8192 tokens take 467
// to 492, 625 TFLOPS, and 431, 700 TFLOPS, where all read the same 64 pages, from the L2 cache; 64
// of 8192 with s_q 4, whose row blocks share more, 836 to 876, and 833. Ratios to the kernel as it
// is, in up to seven such cases of 1024 to 8192 tokens, s_q 1, 2 and 4. One measurement may be 3
// percent off, since clocks follow what ran before:
//   row blocks            next to each other in the grid | two apart 0.99, 1.02 | four apart 1.07 |
//                         the parts next to each other 1.05 to 1.08 | clusters of two 1.00 to 1.03
//   multicast of K        none | to clusters of two row blocks, each of which loads a half, 0.96 to
//                         1.02, in the mean 1.00; few requests 1.02 to 1.28. With arrivals that
//                         release for the cluster, a fence of global memory, 1.16. To clusters of
//                         four 1.65
//   L2 cache              not filled ahead | by TMA with the next tile 1.03 to 1.12, by one of two
//                         row blocks 1.05 to 1.09
//   L2 policy of K        evict_first | evict_normal 1.05 to 1.10 | evict_unchanged 1.01
//   P V is released       8 steps before the end of S | 4 steps 1.00 | 12 steps 1.02
//                         at once if the next tile is not there | never so 0.96 to 1.03, in the
//                         mean 1.00
// Of 32 heads, P of the 32 rows that are not there may be 1, as it is, or 0, which takes the tensor
// cores less power: 64 requests of about 16384 tokens take 282.5 and 282.7.
// What bounds 64 rows is not power, at 4.62 TB/s: 64 heads, 64 requests of about 16384 tokens,
// sustained, at 1515 MHz and the limit of 700 W, 302.1; in bursts of 3 ms at 1980 MHz 300.5; with
// queries of zeros at 1875 MHz 297.0. With 16 heads the same kernel takes 281.3. Where nothing is
// split (128 of 4096; 132 of 4096 with 4 x 16 heads) it reads at 92.4 percent of the ceiling, and
// with the splits at 86.5. There, a part reads at 4.23 TB/s from its first to its last tile. The
// first P V ends after 11 (all blocks have asked for three stages at once, 29 MB, and what comes
// after, instructions among it, queues behind them), blocks end between 271 and 298, in no order
// that a second run repeats, and combine takes 6 to 9.
// A call of one tile a block takes 7.0: 1.6 for two kernels that do nothing, 0.7 until the roles
// begin, 0.8 until length and page are there, 1.2 until K is, 0.4 for S, 0.4 for P, 0.7 for P V,
// 0.8 for the epilogue, 0.6 until combine goes on, 1.3 there; much of the first overlaps.
