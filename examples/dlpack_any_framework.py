"""Arrays of any framework that speaks DLPack: in without a copy, and on to the next one.

    python examples/dlpack_any_framework.py

NumPy, CuPy, PyTorch and JAX arrays are known, and results are of their kind. An array of any other
framework only needs __dlpack__ and __dlpack_device__; the results are then CuPy arrays on a GPU and
NumPy arrays in host memory, which every such framework imports without a copy. The producer's
pending work is ordered before CuPy's current stream, on which the kernels run.
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np

from flashmla_cupy import PagedKVCache, flash_mla_with_kvcache, get_mla_metadata

HEADS, D_QK, D_V, PAGE = 128, 576, 512, 64
SCALE = 0.1352  # DeepSeek-V3's; flashmla_cupy.deepseek computes that of a configuration


class Unknown:
    """An array of a framework that flashmla_cupy has never heard of."""

    def __init__(self, owner) -> None:
        self._owner = owner

    def __dlpack__(self, **options):
        return self._owner.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._owner.__dlpack_device__()


def main() -> int:
    on_gpu = PagedKVCache(1).device != "cpu"
    if on_gpu:
        import cupy as xp
    else:
        xp = np
        print("No Hopper GPU found: computing with NumPy.")
    batch, longest = (64, 8192) if on_gpu else (3, 200)

    rng = np.random.default_rng(0)
    columns = -(-longest // PAGE)
    shape = (batch * columns, PAGE, 1, D_QK)
    k_cache = xp.asarray(rng.standard_normal(shape, np.float32)).astype(np.float16)
    q = xp.asarray(rng.standard_normal((batch, 1, HEADS, D_QK), np.float32)).astype(np.float16)
    pages = rng.permutation(batch * columns).astype(np.int32)
    block_table = xp.asarray(pages.reshape(batch, columns))
    lengths = xp.asarray(rng.integers(1, longest, batch).astype(np.int32))

    def decode(q, k_cache, block_table, lengths):
        metadata, num_splits = get_mla_metadata(lengths, HEADS, 1)
        return flash_mla_with_kvcache(
            q,
            k_cache,
            block_table,
            lengths,
            D_V,
            metadata,
            num_splits,
            softmax_scale=SCALE,
            causal=True,
        )

    out, lse = decode(q, k_cache, block_table, lengths)
    results = {"an unknown framework": decode(*map(Unknown, (q, k_cache, block_table, lengths)))}
    for name in ("torch", "jax"):
        if importlib.util.find_spec(name):
            converted = [share(name, x) for x in (q, k_cache, block_table, lengths)]
            results[name] = decode(*converted)

    ok = True
    for name, (its_out, its_lse) in results.items():
        # Back into NumPy or CuPy by the same protocol, again without a copy.
        same = bool((xp.from_dlpack(its_out) == out).all() & (xp.from_dlpack(its_lse) == lse).all())
        ok = ok and same
        kind = f"{type(its_out).__module__}.{type(its_out).__qualname__}"
        print(f"{name:22}{kind:24}{'the same bits' if same else 'DIFFERENT'}")
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


def share(framework: str, x):
    """x as an array of the framework, in the same memory."""
    if framework == "torch":
        import torch

        return torch.from_dlpack(x)
    import jax

    return jax.dlpack.from_dlpack(x)


if __name__ == "__main__":
    sys.exit(main())
