// MLA decode attention over a paged latent cache, for sm_90a and few query rows:
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// A thread block computes up to 16 query rows over the tokens of one part of the schedule. Reading
// K bounds it, so the design is about that: a ring of three slots of 32 tokens, filled by a warp
// that does nothing else, and as little as possible between the last tokens and the end.
// Products are those of a warp (mma.sync), which need no 64 rows. Nine warps have a role:
//
//   score  four warps  S [16, 32] = Q [16, 576] K^T of a slot, then P   sm90_few_rows_scores.cuh
//   value  four warps  O [16, 512] += P V, 128 columns each             sm90_few_rows_values.cuh
//   load   one warp    Q and K by TMA                                   sm90_few_rows_loader.cuh
//
// Over time, for a piece of 100 tokens:
//
//   TMA    Q  K0  K1   K2, where Q was   K3, where K0 was   Q of the next piece ...
//   score      Q  S0 P0    S1 P1    S2 P2    S3 P3    l, lse
//   value              P0 V0    P1 V1    P2 V2    P3 V3    out
//
// sm90_few_rows_shared.cuh has the memory map and the table of the barriers that keep them in step.
// Parameters, metadata, partial results and pairs are those of sm90_dense_decode.cu, which computes
// the same of more rows.
#include "sm90_few_rows_scores.cuh"
#include "sm90_few_rows_values.cuh"

extern "C" __global__ void __launch_bounds__(384, 1)
    few_rows_decode(const __grid_constant__ TensorMap q_map,
                    const __grid_constant__ TensorMap same_q_map,
                    const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap same_k_map,  // launches have two of each
                    const __grid_constant__ Params params) {
  fetch_params(params);
  if (thread_index() == 0) {
    prefetch_tensormap(q_map);
    prefetch_tensormap(k_map);
    init_mbarriers();
  }
  const int warp = uniform(thread_index() >> 5);
  const bool begins = warp == 1;  // a score warp, which has nothing to do until Q is there
  if (begins) init_row_block(params);
  if (warp == 2) prefetch_tables(params);
  griddepcontrol_wait();
  if (begins) init_part_row(params);
  __syncthreads();
  if (warp < GROUP_WARPS) {
    setmaxnreg_inc<232>();
    score_role(params);
    if (begins) check_part_row(params);
  } else if (warp < 2 * GROUP_WARPS) {
    setmaxnreg_inc<200>();
    value_role(params);
  } else {
    setmaxnreg_dec<72>();
    if (warp == 2 * GROUP_WARPS) load_role(params, q_map, k_map);
  }
  griddepcontrol_launch_dependents();
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried, on H200s, whose memory a plain read fills with 4.53 to 4.62 TB/s. Microseconds of
// a decode call, bfloat16, pages of 64, variants taking turns; 1: 64 requests of about 16384
// tokens, 2: 128 of 4096, 3: 128 of 1024, 4: 8 of about 4096, 5: one of 32768, all with 16 heads.
//
//                              1      2      3     4     5
//   sm90_dense_decode.cu       280.1  142.7  42.7  19.9  19.6
//   six slots of 32 tokens     279.4  141.7  41.2  18.5  18.9
//   five                       276.4  140.0  40.1  18.3  18.6
//   four                       275.2  138.8  39.9  17.7  18.2
//   three, as it is            275.3  139.9  39.6  17.0  17.6
//   On another board, two | three | four: 1 285.9 | 280.3 | 283.6, 3 40.9 | 40.3 | 40.8,
//   4 17.5 | 17.1 | 17.6
//   More bytes on their way are worse: the first slot of a block waits behind them. Three slots are
//   94 to 96 percent of a plain read in 1, 2 and 16 requests of 65536 tokens (271), 85 in 3.
//   one request of 512 | 2048 | 8192 | 131072 tokens: 6.7 | 7.9 | 11.7 | 43.6, where
//   sm90_dense_decode.cu takes 7.8 | 9.4 | 12.3 | 44.9
//
//   V loaded after P           605 cycles for P V of a slot | before it, as it is: 363
//   loads of K six ahead of their products | nine | twelve: the same, 610 cycles for S of a slot
//   32 rows a block            32 heads: 1 is 289 to 317 where dense_decode takes 291 to 298, 2 is
//                              145 to 164 where it takes 145 to 152. S then takes 1100 cycles, 15
//                              a product, whether two warps read all of K or each a half
//
//   instructions           as they are needed: one request of 512 tokens 6.7, 8 of about 4096 16.9,
//                          128 of 1024 40.5 | rehearsed before K is there (sm90_dense_decode.cu)
//                          8.3, 17.9, 41.2
//   launch_dependents      by warps without a role, at the beginning: one request of 512 tokens 6.7,
//                          8192 11.1, 32768 17.2, 65536 25.9, 8 of about 4096 17.0 | by those with
//                          a role, at their end 7.0, 10.8, 16.9, 25.4, 17.5
//
// How fast K is read without computing, GB/s (plain read 4555), 147 KB on their way:
//   TMA, column blocks of 64 columns, 32 tokens, 128 bytes promoted 4513 | 256 bytes 4063
//   TMA, whole rows of 1152 bytes 4530 | at a pitch of 1168, by columns out of bounds 4413
//   a bulk copy for each row, from 2 warps 4411 | at a pitch of 1168 4241, from 4 warps 4265, from
//   1 warp 3882
//   a bulk copy of 32 rows 4519
// So the swizzled column blocks of TMA, which ldmatrix reads without conflicts, cost nothing.
