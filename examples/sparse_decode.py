"""A decoding step of a layer as in DeepSeek-V3.2: an indexer chooses what attention sees.

    python examples/sparse_decode.py

The cache holds FP8 (656 bytes a token instead of 1152). A lightning indexer scores every cached
token for the new one, sum_j w_j relu(q_j . k_s) over its own small heads (DeepSeek-V3.2-Exp,
equation 1), and the best TOPK go into `indices`. The result is compared with dense attention over
the same tokens, and what that saves is printed. Computed with NumPy.
"""

from __future__ import annotations

import sys
import time

import ml_dtypes
import numpy as np

from flashmla_cupy import (
    dequantize_kv,
    flash_mla_with_kvcache,
    get_mla_metadata,
    quantize_kv,
    write_kv,
)

HEADS, D_QK, D_V, PAGE = 128, 576, 512, 64
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 256  # V3.2 takes 2048 of up to 163,840
BATCH, TOKENS = 2, 4000  # cached before the step
# DeepSeek-V3's; flashmla_cupy.deepseek.softmax_scale() computes that of a configuration.
SCALE = 0.1352
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def main() -> int:
    rng = np.random.default_rng(0)
    pages = -(-(TOKENS + 1) // PAGE)
    block_table = rng.permutation(BATCH * pages).astype(np.int32).reshape(BATCH, pages)

    # What earlier steps left: latent rows, in FP8, and the indexer's keys, one a token.
    kv = rng.standard_normal((BATCH * pages, PAGE, 1, D_QK)).astype(BFLOAT16)
    k_cache = quantize_kv(kv, "v32")
    index_keys = rng.standard_normal((BATCH * pages * PAGE, INDEX_DIM)).astype(np.float32)

    # The new token of each request: its latent row goes into the slot behind the last one.
    row = rng.standard_normal((BATCH, 1, D_QK)).astype(BFLOAT16)
    slot = block_table[:, TOKENS // PAGE] * PAGE + TOKENS % PAGE
    write_kv(k_cache, row, slot)
    lengths = np.full(BATCH, TOKENS + 1, np.int32)

    # The indexer: its best tokens, by their slots in the pool.
    index_q = rng.standard_normal((BATCH, INDEX_HEADS, INDEX_DIM)).astype(np.float32)
    weights = rng.random((BATCH, INDEX_HEADS)).astype(np.float32)
    token = np.arange(TOKENS + 1)
    slots = block_table[:, token // PAGE] * PAGE + token % PAGE  # [BATCH, tokens]
    keys = index_keys[slots]
    scores = np.einsum("bj,bjs->bs", weights, np.maximum(index_q @ keys.swapaxes(1, 2), 0))
    best = np.argpartition(scores, -TOPK, axis=1)[:, -TOPK:]
    indices = np.take_along_axis(slots, best, axis=1)[:, None].astype(np.int32)

    q = (0.3 * rng.standard_normal((BATCH, 1, HEADS, D_QK))).astype(BFLOAT16)
    metadata, _ = get_mla_metadata()  # made by the first layer's call, for all layers
    begin = time.perf_counter()
    out, lse = flash_mla_with_kvcache(
        q,
        k_cache,
        None,
        None,
        D_V,
        metadata,
        softmax_scale=SCALE,
        is_fp8_kvcache=True,
        indices=indices,
    )
    sparse_time = time.perf_counter() - begin

    # Dense attention over the same tokens: a cache that holds nothing else.
    values = dequantize_kv(k_cache, dtype="bfloat16").reshape(-1, 1, D_QK)
    chosen = values[indices[:, 0]].reshape(-1, PAGE, 1, D_QK)
    table = np.arange(len(chosen), dtype=np.int32).reshape(BATCH, -1)
    count = np.full(BATCH, TOPK, np.int32)
    want, want_lse = flash_mla_with_kvcache(
        q, chosen, table, count, D_V, *get_mla_metadata(), softmax_scale=SCALE
    )
    error = np.abs(out.astype(np.float32) - want.astype(np.float32)).max()
    largest = np.abs(want.astype(np.float32)).max()
    print(f"out beside dense attention over the same tokens: off by {error:.2g} of {largest:.2g}")
    if error > largest * 2**-7 or not np.allclose(lse, want_lse, atol=1e-4):
        return 1

    # Dense attention over all tokens, in 16 bits.
    everything = dequantize_kv(k_cache, dtype="bfloat16")
    begin = time.perf_counter()
    flash_mla_with_kvcache(
        q, everything, block_table, lengths, D_V, *get_mla_metadata(), softmax_scale=SCALE
    )
    dense_time = time.perf_counter() - begin
    cached = BATCH * (TOKENS + 1)
    print(f"cache: {cached * 656 / 2**20:.1f} MiB in FP8, {cached * 1152 / 2**20:.1f} in bfloat16")
    print(
        f"read by attention: {BATCH * TOPK * 656 / 2**20:.2f} MiB of chosen tokens, "
        f"{cached * 1152 / 2**20:.1f} of all in bfloat16"
    )
    print(f"time with NumPy: {sparse_time * 1e3:.0f} ms, {dense_time * 1e3:.0f} over all tokens")
    print("PASS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
