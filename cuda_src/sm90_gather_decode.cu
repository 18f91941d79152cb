// MLA attention over rows that are gathered one by one, for SM90a: an FP8 cache, whole (dense) or
// the tokens of a list (sparse), and a list of tokens of a 16-bit cache.
//
//     S = q K^T        P = 2^(scale S - m)        out = P V / sum(P)        V = K[:, :512]
//
// One thread block computes 64 query rows over one part of the schedule, in tiles of 48 tokens.
// Four warpgroups:
//
//   sm90_gather_softmax.cuh     S [64, 48] = Q K^T, then P
//   sm90_gather_accumulate.cuh  O[:, :256] += P V[:, :256], and in another warpgroup the rest
//   sm90_gather_fp8.cuh         copies rows and converts them to float16 in the ring; or
//   sm90_gather_16bit.cuh       copies rows into the ring
//
// The schedule counts in tiles of 64 tokens, so pieces begin at multiples of 64. A query token with
// a list of its own is a request of its own.
#include "sm90_gather_format.cuh"
#if defined(FORMAT_V32) || defined(FORMAT_PER_TENSOR)
#include "sm90_gather_fp8.cuh"
#else
#include "sm90_gather_16bit.cuh"
#endif
#include "sm90_gather_accumulate.cuh"
#include "sm90_gather_softmax.cuh"

#if defined(FORMAT_V32)
#define GATHER gather_v32
#elif defined(FORMAT_PER_TENSOR)
#define GATHER gather_e4m3
#else
#define GATHER gather_16bit
#endif
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    GATHER(const __grid_constant__ TensorMap q_map_0, const __grid_constant__ TensorMap q_map_1,
           const __grid_constant__ Params params) {
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
    softmax_role(params);
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
