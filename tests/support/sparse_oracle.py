"""The float64 oracle of sparse MLA attention, and how far a right result may lie from it.

Written apart from `flashmla_cupy.reference_sparse`, in another way: bytes of tokens are decoded by
ml_dtypes and views; how often a list names a slot is a weight of that slot, not a further
key; logaddexp instead of a maximum; the sink is one more logit.

The bound is that of `oracle`, for fp32 accumulation and any split, with one more cause of error:

    u   unit round-off of the result's dtype; p of P, before the second product; k of a key's value
        as the kernel holds it (0 where every value is held exactly); s of the sum of a score's
        products: the tensor cores sum those of e4m3 to some 14 bits
    delta     = (d_qk * 2^-23 + k + s) * scale * max_j sum_c |q_c k_jc|        scores; exp amplifies
    out_bound = u |o| + (p + k + 2 delta + n_blk 2^-23 + 2^-20) sum_j w_j |v_j| + tiny
                + 2^-24 sum_j |v_j| over an FP8 cache, of all j with w_j < 2^-13 max w: P is
                float16 there, and what is small against the largest is subnormal or lost
    lse_bound = delta + 2^-20 max(1, |lse|) + n_blk 2^-23
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from support.oracle import TINY, UNIT_ROUNDOFF, Oracle
from support.sparse_calls import FP8
from support.sparse_problems import Pool, SparseProblem

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def pool_values(k_cache: np.ndarray, format: str, descale_k: float = 1.0) -> np.ndarray:
    """All tokens of a cache, slot by slot: [num_pages * page_size, d_qk] float64."""
    num_pages, page_size, h_kv, width = k_cache.shape
    assert h_kv == 1
    if format.startswith(("bfloat16", "float16")):
        return k_cache.reshape(-1, width).astype(np.float64)
    raw = np.ascontiguousarray(k_cache).view(np.uint8)
    if format == "e4m3":
        return raw.reshape(-1, 576).view(E4M3).astype(np.float64) * descale_k
    if format == "v32":
        rows = raw.reshape(-1, 656)
        scale = rows[:, 512:528].copy().view("<f4").astype(np.float64)
        latent = rows[:, :512].view(E4M3).astype(np.float64) * np.repeat(scale, 128, axis=1)
        rotary = rows[:, 528:].copy().view(BFLOAT16).astype(np.float64)
        return np.hstack([latent, rotary])
    assert format == "v4"
    found = []
    for page in raw.reshape(num_pages, -1):
        rows = page[: page_size * 576].reshape(page_size, 576)
        tails = page[page_size * 576 : page_size * 584].reshape(page_size, 8)
        scale = tails[:, :7].copy().view(E8M0).astype(np.float64)
        latent = rows[:, :448].copy().view(E4M3).astype(np.float64) * np.repeat(scale, 64, axis=1)
        rotary = rows[:, 448:].copy().view(BFLOAT16).astype(np.float64)
        found.append(np.hstack([latent, rotary]))
    return np.concatenate(found)


def times_seen(pool: Pool, b: int, i: int, slots: int) -> np.ndarray:
    """How often query token i of request b sees each slot: [slots]."""
    length = pool.topk_length
    listed = pool.indices[b, i].astype(np.int64)
    if length is not None:
        listed = listed[: int(length[b] if length.ndim == 1 else length[b, i])]
    return np.bincount(listed[listed >= 0], minlength=slots)


def sparse_oracle(
    problem: SparseProblem,
    *,
    p: float | None = None,
    k: float = 0.0,
    s: float | None = None,
    out_dtype: str = "",
) -> Oracle:
    """Expected results and bounds. p: by default that of the dtype of q; k: 0; s: 0, or 2^-11 for
    queries in e4m3."""
    q = problem.q
    batch, s_q, h_q, d_qk = q.shape
    name = out_dtype or (q.dtype.name if q.dtype.itemsize > 1 else "bfloat16")
    u, tiny = UNIT_ROUNDOFF[name], TINY[name]
    p = u if p is None else p
    s = (2.0**-11 if q.dtype.itemsize == 1 else 0.0) if s is None else s
    scale = d_qk**-0.5 if problem.softmax_scale is None else problem.softmax_scale
    descale_k = 1.0 if problem.descale_k is None else float(problem.descale_k[0])
    factor = 1.0 if problem.descale_q is None else float(problem.descale_q[0])
    pools = [problem.pool] + ([] if problem.extra is None else [problem.extra])
    values = np.concatenate([pool_values(x.k_cache, problem.format, descale_k) for x in pools])
    out = np.zeros((batch, s_q, h_q, 512))
    lse = np.full((batch, h_q, s_q), np.inf)
    out_bound, lse_bound = np.zeros_like(out), np.zeros_like(lse)
    for b, i in np.ndindex(batch, s_q):
        counts = [times_seen(x, b, i, x.k_cache.shape[0] * x.k_cache.shape[1]) for x in pools]
        count = np.concatenate(counts)
        if not count.any():
            continue
        seen = np.flatnonzero(count)
        keys, many = values[seen], np.log(count[seen].astype(np.float64))
        query = q[b, i].astype(np.float64) * factor
        logits = scale * np.matmul(query, keys.T) + many
        total = np.logaddexp.reduce(logits, axis=1)
        weight = np.exp(logits - total[:, None])
        size = scale * np.matmul(np.abs(query), np.abs(keys).T)
        delta = (d_qk * 2.0**-23 + k + s) * size.max(axis=1)
        sums = -(-int(count.sum()) // 64) * 2.0**-23
        share = np.ones(h_q)
        if problem.attn_sink is not None:
            sink = problem.attn_sink.astype(np.float64)
            share = np.where(np.isposinf(sink), 0.0, np.exp(total - np.logaddexp(total, sink)))
        mean = np.matmul(weight, keys[:, :512])
        spread = np.matmul(weight, np.abs(keys[:, :512])) * share[:, None]
        relative = p + k + 2 * delta + sums + 2.0**-20
        out[b, i] = mean * share[:, None]
        out_bound[b, i] = u * np.abs(out[b, i]) + relative[:, None] * spread + tiny
        if problem.format in FP8:
            once = weight / count[seen]
            small = once < 2.0**-13 * once.max(axis=1, keepdims=True)
            lost = np.matmul(2.0**-24 * small * count[seen], np.abs(keys[:, :512]))
            out_bound[b, i] += lost * share[:, None]
        lse[b, :, i] = total
        lse_bound[b, :, i] = delta + 2.0**-20 * np.maximum(1, np.abs(total)) + sums
    return Oracle(out, lse, out_bound, lse_bound)


def prefill_oracle(q, kv, indices, sm_scale, attn_sink=None, topk_length=None):
    """All tokens with a mask of how often each is seen."""
    topk, s_kv = indices.shape[2], len(kv)
    listed = np.where((indices >= 0) & (indices < s_kv), indices, s_kv)[:, 0]
    if topk_length is not None:
        listed = np.where(np.arange(topk) < topk_length[:, None], listed, s_kv)
    count = np.stack([np.bincount(row, minlength=s_kv + 1)[:s_kv] for row in listed])
    q, keys = q.astype(np.float64), kv[:, 0].astype(np.float64)
    logits = sm_scale * np.matmul(q, keys.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        weighted = logits + np.log(count)[:, None]
        lse = np.logaddexp.reduce(weighted, axis=2)
        weight = np.exp(weighted - lse[..., None])
        share = 1 if attn_sink is None else np.exp(lse - np.logaddexp(lse, attn_sink))[..., None]
        out = np.matmul(weight, keys[:, :512]) * share
    lonely = ~count.any(axis=1)
    out[lonely], lse[lonely] = 0, np.inf
    return out, np.where(count[:, None] > 0, logits, -np.inf).max(axis=2), lse


def largest_logits(problem: SparseProblem) -> np.ndarray:
    """max_logits of the query tokens of the only request: [s_q, h_q]."""
    factor = 1.0 if problem.descale_k is None else float(problem.descale_k[0])
    factor_q = 1.0 if problem.descale_q is None else float(problem.descale_q[0])
    values = pool_values(problem.pool.k_cache, problem.format, factor)
    top = np.full(problem.q.shape[1:3], -np.inf)
    for i, query in enumerate(problem.q[0].astype(np.float64) * factor_q):
        keys = values[times_seen(problem.pool, 0, i, len(values)) > 0]
        if len(keys):
            top[i] = problem.softmax_scale * np.matmul(query, keys.T).max(axis=1)
    return top


def flashmla_allclose(got, want, abs_tol: float, rel_tol: float, cos_tol: float) -> None:
    """FlashMLA's own measure (tests/kernelkit/compare.py): positions of inf and NaN equal, each
    element near by either tolerance, and the two almost parallel as one vector."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    for is_special in (np.isposinf, np.isneginf, np.isnan):
        assert np.array_equal(is_special(got), is_special(want))
    finite = np.isfinite(want)
    got, want = got[finite], want[finite]
    error = np.abs(got - want)
    assert ((error < abs_tol) | (error / (np.abs(want) + 1e-6) < rel_tol)).all(), error.max()
    norm = (got**2 + want**2).sum()
    if norm >= 1e-12:
        assert 1 - 2 * (got * want).sum() / norm <= cos_tol
