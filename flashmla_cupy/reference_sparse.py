"""The definition of sparse attention, in NumPy; also the backend for arrays in host memory.

Decoding. Query token i of request b names the tokens that it sees by their slots in the pool, which
are page * page_size + offset. For query head h:

    list    = indices[b, i, :n], n = topk_length[b] or topk_length[b, i], topk without it;
              then the same of extra_indices, which are slots of the extra pool
    seen    = { j : list_j is not -1 }                           what comes twice counts twice
    key_j   = the token in slot list_j, d_qk columns: the format of the pool says which values
    score_j = softmax_scale * <q[b, i, h], key_j>
    lse     = log sum_{j seen} exp(score_j)                                     natural logarithm
    out     = sink * sum_{j seen} exp(score_j - lse) * key_j[:512]
    sink    = exp(lse) / (exp(lse) + exp(attn_sink[h]));  1 without attn_sink

So a sink takes a share of the weights and adds no value; lse is without it. A query that sees no
token gives out = 0 and lse = +inf. Causality is the matter of whoever chose the tokens. An entry
beyond the length of a list is not looked at; a slot outside the pool other than -1, or a length
below 0 or above topk, makes the rows of that query token NaN and is reported (see `violation`);
other tokens are left alone.

Prefill is the same for tokens that lie side by side, or in pages, with two differences: every index
outside of them is no token, and max_logits = max_{j seen} score_j comes with the result, -inf if no
token is seen.

Formulas: FlashMLA's docstrings and tests (flash_mla_interface.py; tests/ref.py), and for the sink
the softmax with one more logit whose value is 0. Computed in float64 and rounded once, as in
`reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import DeviceCheckError
from .formats.gather import TokenValues
from .reference import Result, out_dtype
from .sizes import HEAD_DIM_V

PREFILL = "flash_mla_sparse_fwd"

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


class PrefillResult(NamedTuple):
    out: Array  # [s_q, h_q, 512], dtype of q
    max_logits: Array  # [s_q, h_q] float32
    lse: Array  # [s_q, h_q] float32
    violation: DeviceCheckError | None  # of the first query token that was refused


class Lists(NamedTuple):
    """One pool and what each query token sees of it."""

    values: TokenValues
    indices: Array  # [batch, s_q, topk]
    length: Array  # [batch, s_q] of any int dtype: entries of each list that count


@np.errstate(all="ignore")  # NaN and Inf in tokens that are seen are the caller's, and travel
def decode(
    q: Array,
    k_cache: Array,
    indices: Array,
    softmax_scale: float | None = None,
    *,
    topk_length: Array | None = None,
    attn_sink: Array | None = None,
    extra_k_cache: Array | None = None,
    extra_indices: Array | None = None,
    extra_topk_length: Array | None = None,
    descale_q: Array | None = None,
    descale_k: Array | None = None,
    stale: npt.NDArray[np.bool_] | None = None,
    out: Array | None = None,
    lse: Array | None = None,
) -> Result:
    """Sparse MLA decode attention, as the head of this file defines it.

    q [batch, s_q, h_q, d_qk] of any float dtype, k_cache [num_pages, page_size, 1, width] of a
    CacheFormat, indices [batch, s_q, topk] of any int dtype; softmax_scale d_qk ** -0.5 by default.
    topk_length [batch] or [batch, s_q]; attn_sink [h_q]; the extra pool may have another page size.
    descale_q and descale_k, float32 [1], are factors of q and of keys in the e4m3 format. `stale`
    [batch * s_q] marks query tokens whose metadata does not fit; `out` and `lse` are written when
    given. The arguments are taken to fit together: `calls` sees to that.
    """
    batch, s_q, h_q, d_qk = q.shape
    scale = d_qk**-0.5 if softmax_scale is None else float(softmax_scale)
    out = np.empty((batch, s_q, h_q, HEAD_DIM_V), out_dtype(q)) if out is None else out
    lse = np.empty((batch, h_q, s_q), np.float32) if lse is None else lse
    pools = [_lists(k_cache, indices, topk_length, descale_k)]
    if extra_k_cache is not None and extra_indices is not None:
        pools.append(_lists(extra_k_cache, extra_indices, extra_topk_length, descale_k))
    factor = 1.0 if descale_q is None else float(np.asarray(descale_q).item())
    sink = None if attn_sink is None else attn_sink.astype(np.float64)
    first: DeviceCheckError | None = None
    for b, i in np.ndindex(batch, s_q if out.size else 0):
        refused = violation(b, i, pools, stale is not None and bool(stale[b * s_q + i]))
        if refused is not None:
            out[b, i], lse[b, :, i] = np.nan, np.nan
            first = first or refused
            continue
        keys = np.concatenate([_keys(pool, b, i) for pool in pools])
        query = q[b, i].astype(np.float64) * factor
        out[b, i], _, lse[b, :, i] = attend(query, keys, scale, sink)
    return Result(out, lse, first)


@np.errstate(all="ignore")
def prefill(
    q: Array,
    kv: Array,
    indices: Array,
    sm_scale: float,
    *,
    attn_sink: Array | None = None,
    topk_length: Array | None = None,
    descale_q: Array | None = None,
    descale_k: Array | None = None,
    out: Array | None = None,
    max_logits: Array | None = None,
    lse: Array | None = None,
) -> PrefillResult:
    """Sparse MLA attention of a prompt, as the head of this file defines it.

    q [s_q, h_q, d_qk] and kv [s_kv, 1, d_qk] of any float dtype, or kv [num_pages, page_size, 1,
    width] of a CacheFormat; indices [s_q, 1, topk] and topk_length [s_q] of any int dtype,
    attn_sink [h_q]; descale_q and descale_k as in decode(). `out`, `max_logits` and `lse` are
    written when given.
    """
    s_q, h_q, _ = q.shape
    topk = indices.shape[2]
    pages = TokenValues(kv, descale_k) if kv.ndim == 4 else None
    s_kv = len(kv) if pages is None else pages.slots
    factor = 1.0 if descale_q is None else float(np.asarray(descale_q).item())
    out = np.empty((s_q, h_q, HEAD_DIM_V), out_dtype(q)) if out is None else out
    max_logits = np.empty((s_q, h_q), np.float32) if max_logits is None else max_logits
    lse = np.empty((s_q, h_q), np.float32) if lse is None else lse
    sink = None if attn_sink is None else attn_sink.astype(np.float64)
    first: DeviceCheckError | None = None
    for i in range(s_q if out.size else 0):
        length = topk if topk_length is None else int(topk_length[i])
        if not 0 <= length <= topk:
            out[i], max_logits[i], lse[i] = np.nan, np.nan, np.nan
            first = first or DeviceCheckError(i, -1, "topk_length", function=PREFILL)
            continue
        listed = indices[i, 0, :length]
        listed = listed[(listed >= 0) & (listed < s_kv)]
        keys = kv[listed, 0].astype(np.float64) if pages is None else pages(listed)[:, 0]
        query = q[i].astype(np.float64) * factor
        out[i], max_logits[i], lse[i] = attend(query, keys, float(sm_scale), sink)
    return PrefillResult(out, max_logits, lse, first)


def attend(
    q: Float64, keys: Float64, scale: float, sink: Float64 | None
) -> tuple[Float64, Float64, Float64]:
    """One query token: q [h_q, d_qk], keys [n, d_qk], sink [h_q] -> out [h_q, 512], the largest
    score [h_q], lse [h_q]."""
    h_q = len(q)
    if len(keys) == 0:
        return np.zeros((h_q, HEAD_DIM_V)), np.full(h_q, -np.inf), np.full(h_q, np.inf)
    score = scale * (q @ keys.T)  # [h_q, n]
    top = score.max(axis=1, keepdims=True)
    weight = np.exp(score - top)
    total = weight.sum(axis=1, keepdims=True)
    lse = (top + np.log(total))[:, 0]
    out = (weight / total) @ keys[:, :HEAD_DIM_V]
    if sink is not None:
        out /= 1 + np.exp(sink - lse)[:, None]
    return out, top[:, 0], lse


def bad_length(topk: int, length: Array | None) -> int:
    """The first request whose topk_length, [batch] or [batch, s_q], is outside [0, topk]; -1:
    none."""
    if length is None:
        return -1
    wrong = np.argwhere((length < 0) | (length > topk))
    return int(wrong[0][0]) if wrong.size else -1


def violation(b: int, i: int, pools: list[Lists], stale: bool) -> DeviceCheckError | None:
    """Why query token i of request b cannot be computed; None if it can."""
    for prefix, pool in zip(("", "extra "), pools, strict=False):
        if not 0 <= pool.length[b, i] <= pool.indices.shape[2]:
            return DeviceCheckError(b, -1, f"{prefix}topk_length")
    if stale:
        return DeviceCheckError(b, -1, "stale metadata")
    for prefix, pool in zip(("", "extra "), pools, strict=False):
        listed = pool.indices[b, i, : pool.length[b, i]]
        wrong = np.flatnonzero((listed < -1) | (listed >= pool.values.slots))
        if wrong.size:
            return DeviceCheckError(b, int(wrong[0]), f"{prefix}index")
    return None


def _lists(k_cache: Array, indices: Array, length: Array | None, descale_k: Any) -> Lists:
    values = TokenValues(k_cache, descale_k)
    batch, s_q, topk = indices.shape
    lengths = np.full((), topk) if length is None else length.astype(np.int64)
    if lengths.ndim == 1:
        lengths = lengths[:, None]
    return Lists(values, indices, np.broadcast_to(lengths, (batch, s_q)))


def _keys(pool: Lists, b: int, i: int) -> Float64:
    """The tokens of one list, in its order: [n, d_qk]."""
    listed = pool.indices[b, i, : pool.length[b, i]]
    return pool.values(listed[listed != -1])[:, 0]
