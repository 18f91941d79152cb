// MLA decode attention over a paged latent cache, for SM90a:
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// One thread block computes 64 query rows over the tiles (64 tokens) of one part of the schedule.
// Three warpgroups:
//
//   softmax.cuh  S [64, 64] = Q K^T, then P. 184 registers a thread.
//   matrix.cuh   O[:, :256] += P V[:, :256], half 0, and in another warpgroup the other columns, half
//                1; each also loads that half of Q and K, through ring.cuh. 160 registers a thread.
//
// P of a tile overwrites the rotary columns of the same tile, which S no longer needs, so the ring
// holds three tiles in 227 KB. The running maximum m is lazy: it moves only when a row's maximum
// exceeds it by 8, and by whole numbers, so that the factors for O are exact powers of two.
//
// When the next tile has already arrived (a compute-bound launch), S of it is issued before P V is
// released, 8 steps before its end, so that the tensor cores never wait; otherwise at once.
//
// What was tried in a prototype of this kernel, on an H200; microseconds at 128 heads, batch 132 and
// 8192 tokens unless said:
//   who loads K        one warpgroup, nine boxes a tile 548 | each its half, one box 504
//   page id            loaded a slot ahead | by cp.async, cursor in shared memory: 700 cycles a slot
//   P V released       k steps of S before its end: 2 517 | 4 505 | 8 502 | 12 504 | 15 514;
//                      by commit and wait after all of S 527
//   stages             three 500 | two 574
//   L2 policy of K     evict_first 500 | evict_normal 518
//   multicast of K     to clusters of two row blocks 501 | none 502 to 507; at batch 32 143 | 126
//   uniform conditions (ptx.cuh)  without them 6700 instructions and 88 bytes spilled, not 5500 and
//                      12; with combine beyond the instruction cache: 16 heads, batch 1, 8192 tokens,
//                      on an H100, 15.1 | 12.9
//   Q brought to L2 by TMA as soon as the request is known: 10 us more where a box is partly outside
// On an H100, microseconds of one request of 512 tokens and 16 heads unless said:
//   masked             the last tiles of a request 7.9 | only those with a hidden key 7.6
//   a piece            looked at twice by the softmax warpgroup 7.6 | once 7.45
//   P V of the last tile  behind the piece's l 8.8 | at once 8.7 (128 heads)
//   length and page    in the L1 cache ahead of the roles: the same
//   heads              wait for a tail under way 30.6 | leave it to combine 28.1 (128 heads, 8 requests
//                      of 4096)
//   tails told of at once or two tiles later: the same
//   launch_dependents  at the end 25 | at the start 35 (16 heads, batch 1, 32768 tokens)
// What a call of one tile a block takes (7.0): 1.6 for two kernels that do nothing, 0.7 until the roles
// begin, 0.8 until length and page are there, 1.2 until K is, 0.4 for S, 0.4 for P, 0.7 for P V, 0.8 for
// the epilogue, 0.6 until combine goes on, 1.3 there; much of the first overlaps.
#include "matrix.cuh"
#include "softmax.cuh"

extern "C" __global__ void __launch_bounds__(384, 1)
    dense_decode(const __grid_constant__ TensorMap q_map_0, const __grid_constant__ TensorMap q_map_1,
                 const __grid_constant__ TensorMap k_map_0, const __grid_constant__ TensorMap k_map_1,
                 const __grid_constant__ Params p) {
  if (thread_index() == 0) {
    prefetch_tensormap(q_map_0);
    prefetch_tensormap(q_map_1);
    prefetch_tensormap(k_map_0);
    prefetch_tensormap(k_map_1);
    init_barriers();
  }
  const bool begins = thread_index() >> 5 == 1;  // a warp that waits for Q afterwards
  if (begins) init_row_block(p);
  if (thread_index() >> 5 == 2) prefetch_tables(p);
  griddepcontrol_wait();
  uint32_t column = 0;
  if (begins) column = init_part_row(p);
  __syncthreads();
  if (begins) check_part_row(p, column);
  const int warpgroup = __shfl_sync(~0u, thread_index() >> 7, 0);
  if (warpgroup == 0) {
    setmaxnreg_inc<184>();
    softmax_role(p);
  } else {
    setmaxnreg_dec<160>();
    const int half = warpgroup - 1;
    matrix_role(p, half, half ? q_map_1 : q_map_0, half ? k_map_1 : k_map_0);
  }
  griddepcontrol_launch_dependents();
}
