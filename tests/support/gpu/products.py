"""Matrix products of float32 and float64 on the GPU, whether or not cuBLAS is installed."""

from __future__ import annotations

import numpy as np
from support.gpu.arrays import DRY, host, xp

_made: dict = {}
_MATMUL = r"""
extern "C" __global__ void __launch_bounds__(256) product(
    const REAL* a, const REAL* b, REAL* c, long long count, long long m, long long k, long long n) {
  __shared__ REAL left[16][64 + 1], right[16][64 + 1];  // [inner, row] and [inner, column]
  const int t = threadIdx.x, x = t % 16, y = t / 16;
  const long long row0 = blockIdx.y * 64ll, column0 = blockIdx.x * 64ll;
  for (long long matrix = blockIdx.z; matrix < count; matrix += gridDim.z) {
    const REAL *a0 = a + matrix * m * k, *b0 = b + matrix * k * n;
    REAL sum[4][4] = {};
    for (long long inner0 = 0; inner0 < k; inner0 += 16) {
      for (int e = t; e < 16 * 64; e += 256) {
        const long long row = row0 + e / 16, inner = inner0 + e % 16;
        left[e % 16][e / 16] = row < m && inner < k ? a0[row * k + inner] : REAL(0);
      }
      for (int e = t; e < 16 * 64; e += 256) {
        const long long inner = inner0 + e / 64, column = column0 + e % 64;
        right[e / 64][e % 64] = inner < k && column < n ? b0[inner * n + column] : REAL(0);
      }
      __syncthreads();
      for (int inner = 0; inner < 16; ++inner)
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j)
            sum[i][j] += left[inner][y + 16 * i] * right[inner][x + 16 * j];
      __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const long long row = row0 + y + 16 * i, column = column0 + x + 16 * j;
        if (row < m && column < n) c[(matrix * m + row) * n + column] = sum[i][j];
      }
  }
}
"""


def _own_matmul(a, b):
    """[..., m, k] @ [..., k, n] in tiles of 64 x 64; it needs no library."""
    a, b = xp.ascontiguousarray(a), xp.ascontiguousarray(b)
    m, k, n = *a.shape[-2:], b.shape[-1]
    c = xp.empty((*a.shape[:-1], n), a.dtype)
    count = int(np.prod(a.shape[:-2]))
    real = {"float32": "float", "float64": "double"}[a.dtype.name]
    if real not in _made:
        _made[real] = xp.RawKernel(_MATMUL.replace("REAL", real), "product")
    if c.size:
        grid = (-(-n // 64), -(-m // 64), min(count, 65535))
        _made[real](grid, (256,), (a, b, c, *map(np.int64, (count, m, k, n))))
    return c


def _torch_matmul(a, b):
    import torch

    product = torch.matmul(torch.from_dlpack(a), torch.from_dlpack(b))
    torch.cuda.current_stream().synchronize()
    return xp.from_dlpack(product)


def _find_matmul():
    """cuBLAS through CuPy, else through torch, else our own loop."""
    if DRY:
        return np.matmul
    a = xp.asarray(np.arange(24.0).reshape(2, 3, 4))
    expected = np.matmul(host(a), host(a).swapaxes(1, 2))
    for candidate in (xp.matmul, _torch_matmul):
        try:
            if np.array_equal(host(candidate(a, xp.ascontiguousarray(a.swapaxes(1, 2)))), expected):
                return candidate
        except Exception:  # whatever a missing cuBLAS raises
            continue
    return _own_matmul


def matmul(a, b):
    """[..., m, k] @ [..., k, n] of float32 (no tf32) or float64."""
    if "product" not in _made:
        _made["product"] = _find_matmul()
    return _made["product"](a, b)
