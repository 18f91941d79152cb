// Copies whole pages within a cache, all layers of each: what a sequence that shares its last page
// with another one needs before it writes. blockIdx.z is the copy, blockIdx.y the layer.
#include "ptx.cuh"

constexpr int THREADS = 256, MOST_VECTORS = 4;  // of a block; of a thread, 16 bytes each

extern "C" __global__ void __launch_bounds__(THREADS)
    copy_pages(uint8_t* pool, const int* __restrict__ pages,  // [2, copies]: from, then to
               int64_t layer_stride, int64_t page_stride, int64_t slot_stride, int64_t head_stride,
               int vectors,  // of a row of one head
               int heads, int page_size, int copies) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  pool += blockIdx.y * layer_stride;
  const uint8_t* from = pool + pages[blockIdx.z] * page_stride;
  uint8_t* to = pool + pages[copies + blockIdx.z] * page_stride;
  const int total = vectors * heads * page_size, step = gridDim.x * THREADS;
  Vector4 loaded[MOST_VECTORS];
  int64_t at[MOST_VECTORS];
#pragma unroll
  for (int u = 0; u < MOST_VECTORS; ++u) {
    const int i = blockIdx.x * THREADS + threadIdx.x + u * step;
    if (i >= total) continue;
    const int row = i / vectors, slot = row / heads;
    at[u] = slot * slot_stride + (row - slot * heads) * head_stride + (i - row * vectors) * 16;
    loaded[u] = ld_global_v4(from + at[u]);
  }
#pragma unroll
  for (int u = 0; u < MOST_VECTORS; ++u) {
    if (blockIdx.x * THREADS + threadIdx.x + u * step < total) st_global_v4(to + at[u], loaded[u]);
  }
}
