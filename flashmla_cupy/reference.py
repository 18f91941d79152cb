"""The definition of the result, in NumPy; also the backend for arrays in host memory.

For query token i of request b and query head h, whose kv head is g = h // (h_q // h_kv):

    n       = cache_seqlens[b]                           keys of the request, new tokens included
    key_j   = k_cache[block_table[b, j // page_size], j % page_size, g]            j = 0 .. n - 1
    seen    = { j : j <= n - s_q + i } if causal, else all j     (bottom-right aligned causal mask)
    score_j = softmax_scale * <q[b, i, h], key_j>
    lse     = log sum_{j seen} exp(score_j)                                     natural logarithm
    out     = sum_{j seen} exp(score_j - lse) * key_j[:512]      V is the first 512 columns of K

A query that sees no key gives out = 0 and lse = +inf. Computed in float64 and rounded once, to the
dtype of q for out and to float32 for lse. No slot beyond n, no other page and no other entry of
block_table is read. A request that cannot be computed (see `violation`) gives NaN in its rows and
leaves the other requests alone.

What is not finite in a live key is the caller's, and is computed with. A NaN makes every query of
the request NaN in out and lse, in the heads that share the kv head; so does an Inf for queries that
do not see the key, while for those that do it follows IEEE arithmetic. Neither reaches another
request. (The causal mask is applied to scores, and 0 * Inf is NaN: who does not see a key cannot be
shielded from it at no cost, so that the definition does not promise it.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import DeviceCheckError
from .formats.gather import TokenValues
from .frameworks import numpy_dtype
from .sizes import HEAD_DIM_V

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


class Result(NamedTuple):
    out: Array  # [batch, s_q, h_q, 512], dtype of q
    lse: Array  # [batch, h_q, s_q] float32
    violation: DeviceCheckError | None  # of the first request that was refused


@np.errstate(all="ignore")  # NaN and Inf in live data are the caller's, and travel
def decode(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    descale_q: Array | None = None,
    descale_k: Array | None = None,
    stale: npt.NDArray[np.bool_] | None = None,
    out: Array | None = None,
    lse: Array | None = None,
) -> Result:
    """MLA decode attention of every request, as the head of this file defines it.

    q [batch, s_q, h_q, d_qk] and k_cache [num_pages, page_size, h_kv, d_qk] of any float dtype,
    block_table [batch, max_pages] and cache_seqlens [batch] of any int dtype, softmax_scale
    d_qk ** -0.5 by default; d_qk is 576. An FP8 cache, [num_pages, page_size, 1, width] of bytes,
    stands for the values that its CacheFormat says. descale_q and descale_k, float32 [1], are
    factors of q and of the keys in the e4m3 format. `stale` [batch] marks requests whose metadata
    does not fit; `out` and `lse` are written when given. The arguments are taken to fit together:
    `checks` sees to that.
    """
    batch, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else float(softmax_scale)
    out = np.empty((batch, s_q, h_q, HEAD_DIM_V), out_dtype(q)) if out is None else out
    lse = np.empty((batch, h_q, s_q), np.float32) if lse is None else lse
    factor = 1.0 if descale_q is None else float(descale_q.item())
    values = TokenValues(k_cache, descale_k) if k_cache.dtype.itemsize == 1 else None
    first: DeviceCheckError | None = None
    for b in range(batch if out.size else 0):
        is_stale = stale is not None and bool(stale[b])
        refused = violation(b, k_cache, block_table, cache_seqlens, is_stale)
        if refused is not None:
            out[b], lse[b] = np.nan, np.nan
            first = first or refused
            continue
        length = int(cache_seqlens[b])
        if values is None:
            keys = gather(k_cache, block_table[b], length).astype(np.float64)
        else:
            keys = values(slots(block_table[b], values.page_size, length))
        for i in range(s_q):
            seen = max(0, len(keys) - s_q + i + 1) if causal else len(keys)
            query = q[b, i].astype(np.float64) * factor
            out[b, i], lse[b, :, i] = attend(query, keys[:seen], scale)
            if not np.isfinite(keys[seen:]).all():  # of keys that this query does not see
                h_kv = keys.shape[1]
                spoiled = np.repeat(~np.isfinite(keys[seen:]).all(axis=(0, 2)), h_q // h_kv)
                out[b, i, spoiled], lse[b, spoiled, i] = np.nan, np.nan
    return Result(out, lse, first)


def attend(q: Float64, keys: Float64, scale: float) -> tuple[Float64, Float64]:
    """One query token: q [h_q, 576], keys [n, h_kv, 576] -> out [h_q, 512], lse [h_q]."""
    n, h_kv, _ = keys.shape
    h_q = len(q)
    if n == 0:
        return np.zeros((h_q, HEAD_DIM_V)), np.full(h_q, np.inf)
    out, lse = np.empty((h_q, HEAD_DIM_V)), np.empty(h_q)
    group = h_q // h_kv
    for g in range(h_kv):
        heads = slice(g * group, (g + 1) * group)
        key, value = keys[:, g], keys[:, g, :HEAD_DIM_V]  # [n, 576], [n, 512]
        score = scale * (q[heads] @ key.T)  # [group, n]
        top = score.max(axis=1, keepdims=True)
        weight = np.exp(score - top)
        total = weight.sum(axis=1, keepdims=True)
        out[heads] = (weight / total) @ value
        lse[heads] = (top + np.log(total))[:, 0]
    return out, lse


def gather(k_cache: Array, pages: Array, length: int) -> Array:
    """The first `length` tokens of the sequence in these pages: [length, h_kv, head_dim]."""
    page_size = k_cache.shape[1]
    used = pages[: -(-length // page_size)]
    tokens = k_cache[used].reshape(-1, *k_cache.shape[2:])
    return tokens[:length]


def slots(pages: Array, page_size: int, length: int) -> Array:
    """Where the first `length` tokens of the sequence in these pages lie in the pool."""
    token = np.arange(length)
    where: Array = pages[token // page_size].astype(np.int64) * page_size + token % page_size
    return where


def out_dtype(q: Array) -> np.dtype[Any]:
    """That of q; bfloat16 where q is of a dtype that no result is."""
    return q.dtype if q.dtype.itemsize > 1 else numpy_dtype("bfloat16")


def bad_length(cache_seqlens: Array, block_table: Array, page_size: int) -> int:
    """The first request whose length is negative or exceeds its row of block_table; -1: none."""
    most = block_table.shape[1] * page_size
    wrong = np.flatnonzero((cache_seqlens < 0) | (cache_seqlens > most))
    return int(wrong[0]) if wrong.size else -1


def violation(
    b: int, k_cache: Array, block_table: Array, cache_seqlens: Array, stale: bool
) -> DeviceCheckError | None:
    """Why request b cannot be computed; None if it can."""
    num_pages, page_size = k_cache.shape[:2]
    length = int(cache_seqlens[b])
    if length < 0 or length > block_table.shape[1] * page_size:
        return DeviceCheckError(b, -1, "length")
    if stale:
        return DeviceCheckError(b, -1, "stale metadata")
    used = block_table[b, : -(-length // page_size)]
    wrong = np.flatnonzero((used < 0) | (used >= num_pages))
    return DeviceCheckError(b, int(wrong[0]), "page id") if wrong.size else None
