// Brings the tables of a decoding step up to date where they lie, so that captured graphs, which
// hold their addresses, go on with them. The news come from host memory that the GPU can read.
#include "ptx.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    update_tables(const int* staged,  // slots as 64 bits each, lengths, then pairs (index, page)
                  int64_t* slot_mapping, int* cache_seqlens, int* block_table,
                  int slots, int lengths, int changes) {  // how many of each
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i < slots) slot_mapping[i] = ((const int64_t*)staged)[i];
  staged += 2 * slots;
  if (i < lengths) cache_seqlens[i] = staged[i];
  staged += lengths;
  if (i < changes) block_table[staged[2 * i]] = staged[2 * i + 1];
}
