// The lengths of the requests that lists of tokens make, for schedule.cu: each query token is a
// request of its own. flashmla_cupy/schedule/lists.py is the definition.
//
// A length that is not within its list counts as 0 here; the decode kernel refuses it.
#include "ptx.cuh"

constexpr int THREADS = 256;
constexpr int TOKENS = 64;  // of a tile, at which the second list begins

DEVICE int counted(const int* lengths, int group, int topk) {
  const int length = lengths ? __ldg(lengths + group) : topk;
  return (uint32_t)length <= (uint32_t)topk ? length : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) list_lengths(
    const int* topk_length,        // of each group of query tokens, or null: all of the list
    const int* extra_topk_length,  // the same of the second list
    int* cache_seqlens,            // [batch], of query tokens
    uint64_t length_group,         // 2^40 / query tokens that share a length, rounded up
    int batch, int topk, int extra_topk) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();  // the lengths may be the work of a kernel
  const int request = blockIdx.x * THREADS + threadIdx.x;
  if (request >= batch) return;
  const int group = request * length_group >> 40;
  int length = counted(topk_length, group, topk);
  if (extra_topk > 0) {
    const int second = (length + TOKENS - 1) / TOKENS * TOKENS;
    length = second + counted(extra_topk_length, group, extra_topk);
  }
  cache_seqlens[request] = length;
}
