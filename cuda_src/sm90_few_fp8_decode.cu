// MLA attention of few query rows over an FP8 cache, for SM90a: whole (dense), or the tokens of a
// list (sparse).
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// A thread block computes up to 16 query rows over the tokens of one part of the schedule, as
// sm90_few_rows_decode.cu does over a 16-bit cache. Rows of the cache lie in shared memory as they
// are, in FP8: the warps that multiply convert what they need in registers, to float16, which is
// exact. Scales never meet a key: they multiply S and P. Twelve warps:
//
//   score  four warps  S [16, 64] = Q [16, 576] K^T of a slot, then P   sm90_few_fp8_scores.cuh
//   value  four warps  O [16, 512] += P V, 128 columns each             sm90_few_fp8_values.cuh
//   load   four warps  Q by TMA, rows of the cache by bulk copies       sm90_few_fp8_loader.cuh
//
// sm90_few_fp8_queries.cuh and sm90_few_fp8_scales.cuh have what their names say, and
// sm90_few_fp8_shared.cuh the memory map and the barriers that keep the warps in step. Parameters,
// lists, metadata and partial results are those of sm90_fp8_decode.cu.
#include "sm90_few_fp8_scores.cuh"
#include "sm90_few_fp8_values.cuh"

extern "C" __global__ void __launch_bounds__(384, 1)
    FEW_ROWS_KERNEL(const __grid_constant__ TensorMap q_map,
                    const __grid_constant__ TensorMap same_q_map,  // launches have two
                    const __grid_constant__ Params params) {
  fetch_params(params);
  if (thread_index() == 0) {
#if !defined(QUERY_E4M3)
    prefetch_tensormap(q_map);
#endif
    init_mbarriers();
  }
  const int warp = uniform(thread_index() >> 5);
  const bool begins = warp == 1;  // a score warp, which has nothing to do until Q is there
  if (begins) init_row_block(params);
  griddepcontrol_wait();
  if (begins) init_part_row(params);
  __syncthreads();
  if (warp < GROUP_WARPS) {
    setmaxnreg_inc<248>();
    score_role(params);
    if (begins) check_part_row(params);
  } else if (warp < 2 * GROUP_WARPS) {
    setmaxnreg_inc<200>();
    if (GROUPS == 8 && warp == 2 * GROUP_WARPS - 1) {
      value_role<true>(params);
    } else {
      value_role<false>(params);
    }
  } else {
    setmaxnreg_dec<56>();
    load_role(params, q_map);
  }
  griddepcontrol_launch_dependents();
}

// ---- lab notes ------------------------------------------------------------------------------
// What was tried: microseconds of a call on an H200, L2 cold, in a CUDA graph, 16 query heads; in
// brackets the kernels in the wheel of vllm 0.33.0 in the same run, which pads lists to 64 heads.
// 1: lists of 2048 tokens of 8192 for each of 128 requests, 656 bytes; 2: dense, 576 bytes, 132
// requests of 8192 tokens; 3: the same, 656 bytes; 4: one request with a list, 656 bytes.
//
//                                            1      2      3      4
//   the kernel for 64 rows                   133.0  426.2  483.7  16.4
//   32 tokens a slot, six slots, V converted by integer instructions behind the wait for P
//                                            66.4   206.1  235.1  12.0  (1 116, 2 213)
//     four slots                             66.8   207.4  237.8
//     eight slots                            66.3   204.6  234.0
//     K not converted (wrong results)        65.8   188.5  226.6
//     V not converted (wrong results)        60.2   182.7  208.4
//   S of a slot ahead of P of the one before 68.7   208.1  240.5  11.7
//     and a copy for each row in 3                         247.3
//     and V converted before the wait for P  62.6   190.4  222.0  12.1
//     and V by cvt, scales by a vote         63.0   189.9  214.9  11.3  (1 115, 2 209)
//     and 64 tokens a slot, four slots       56.3   159.6  177.1  12.1
//       three slots                          61.1   184.9  188.0  12.1
//       odd columns of V by integers         57.8   166.8  185.1
//       all columns of V by integers         58.4   170.1  190.9
//     the same on another board              56.4   161.4  178.1  11.8  (1 114, 2 210)
//     and V by LDS.128 instead of ldmatrix, for which 576-byte rows had been 592 bytes apart and
//     copied one by one; slots are empty before the last products
//                                            56.0   159.7  180.2  13.1
//       slots empty behind the last products 56.3   159.2  178.5  13.3
//       copies with an evict-first policy    56.2   159.6  180.1  13.2
//       a loop over rows, not over lanes     56.2                 13.2
//       five slots, as it is                        158.3
//   3 has no room for five slots. Since then partial results are stored 64 bytes a quad, instead
//   of 16 bytes a lane, 128 bytes apart, to win back what 4 lost; that was not timed.
//   16 requests of 65536 tokens: 576 bytes 161.5 (208), 656 bytes 182.9
//   queries in e4m3, 2: 157.2 with four slots (211), the kernel for 64 rows 420.2
//   lists of 2048 tokens in 1, 8, 32 requests: 13.1 | 18.1 | 27.9  (21.1 | 26.2 | 50.4)
//
//   584 bytes (V4), lists of 2048 | 640 tokens for each of 128 requests, of 2048 for one; dense,
//   132 requests of 7936 tokens
//     the kernel for 64 rows                 157.2 | 58.2 | 15.8 | 537.8  (119 | 45 | 21 | -)
//     four slots                             70.9 | 33.6 | 16.5 | 227.6
//     five, as it is                         68.9 | 32.9 | 16.4 | 222.4
//
// Profiles of 2: with 32 tokens a slot, a scheduler issues 733 instructions for a slot, in 1413
// cycles; the arithmetic pipe, where cvt runs too, is busy 55 percent of them, the tensor pipe 29.
// With 64 tokens a slot it is 506 instructions for 32 tokens, in 1023 cycles, 54 and 40 percent. So
// the number of instructions counts: those of softmax and of barriers are for a slot, not for a
// token, and a row that is copied by itself takes nine.
// cvt.rn.f16x2.e4m3x2 takes the upper half of a register as it is (.H1), if told so by mov.b32.
// Accuracy over 656 bytes, of the wheel's root mean square error: results in float16 0.13, with
// scales that are no powers of two 0.08; in bfloat16 0.88 and 0.55.
