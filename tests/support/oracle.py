"""The float64 oracle of MLA decode attention, and how far a right result may lie from it.

Written apart from `flashmla_cupy.reference`, in another way: token by token indices instead of
pages, a mask instead of slices, heads repeated instead of grouped, logaddexp instead of a maximum.
It reads live tokens only, so that NaN elsewhere shows in neither.

The bound is a priori, for fp32 accumulation, P rounded to the input type, any split:

    u = unit round-off of the dtype (2^-8 bfloat16, 2^-11 float16), w = softmax weights, v = V rows
    delta     = 576 * 2^-23 * scale * max_i sum_j |q_j k_ij|           fp32 scores; exp amplifies
    out_bound = u |o| + (u + 2 delta + n_blk 2^-23 + 2^-20) sum_i w_i |v_i| + tiny
    lse_bound = delta + 2^-20 max(1, |lse|) + n_blk 2^-23

Terms of out: rounding of the output, P before the second product, scores, sums over n_blk blocks
of 64 keys, exp2; tiny is half the smallest subnormal of the dtype. Not among them: where a request
is in more than two pieces, their results are rounded to 11 bits, by 2^-11 sum_i w_i |v_i| at most.
That is an eighth of the term of P in bfloat16 and as much as it in float16; the kernels are held to
the bound without it, as errors of P hardly ever add up. The bound is for numerics: a dropped token
of a long request hides below it, which is what needles are for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = {"bfloat16": 2.0**-134, "float16": 2.0**-25}


class Oracle(NamedTuple):
    out: np.ndarray  # [batch, s_q, h_q, 512] float64
    lse: np.ndarray  # [batch, h_q, s_q] float64
    out_bound: np.ndarray  # like out: the largest error of a right result
    lse_bound: np.ndarray  # like lse


def oracle(q, k_cache, block_table, cache_seqlens, softmax_scale=None, causal=False) -> Oracle:
    """Expected results and bounds of valid requests; q, k_cache of a dtype in UNIT_ROUNDOFF."""
    batch, s_q, h_q, head_dim = q.shape
    page_size, h_kv = k_cache.shape[1:3]
    scale = 1 / np.sqrt(head_dim) if softmax_scale is None else softmax_scale
    u, tiny = UNIT_ROUNDOFF[q.dtype.name], TINY[q.dtype.name]
    out = np.zeros((batch, s_q, h_q, 512))
    lse = np.full((batch, s_q, h_q), np.inf)
    out_bound, lse_bound = np.zeros_like(out), np.zeros_like(lse)
    for b, n in enumerate(np.asarray(cache_seqlens).tolist()):
        if n == 0:
            continue
        token = np.arange(n)
        live = k_cache[block_table[b, token // page_size], token % page_size]
        k = np.repeat(live.astype(np.float64), h_q // h_kv, axis=1)  # [n, h_q, 576]
        v = k[..., :512]
        q_b = q[b].astype(np.float64)
        score = scale * np.einsum("shd,nhd->shn", q_b, k)
        size = scale * np.einsum("shd,nhd->shn", np.abs(q_b), np.abs(k))
        if causal:
            seen = token <= n - s_q + np.arange(s_q)[:, None, None]  # [s_q, 1, n]
            score, size = np.where(seen, score, -np.inf), np.where(seen, size, 0.0)
        lse[b] = np.logaddexp.reduce(score, axis=-1)
        none = np.isneginf(lse[b])
        weight = np.exp(score - np.where(none, 0.0, lse[b])[..., None])
        out[b] = np.einsum("shn,nhd->shd", weight, v)
        spread = np.einsum("shn,nhd->shd", weight, np.abs(v))
        delta = head_dim * 2.0**-23 * size.max(axis=-1)
        sums = -(-n // 64) * 2.0**-23
        relative = u + 2 * delta + sums + 2.0**-20
        out_bound[b] = u * np.abs(out[b]) + relative[..., None] * spread + tiny
        lse_bound[b] = delta + 2.0**-20 * np.maximum(1, np.abs(lse[b])) + sums
        lse[b][none] = np.inf
        out_bound[b][none], lse_bound[b][none] = 0.0, 0.0
    return Oracle(out, lse.swapaxes(1, 2), out_bound, lse_bound.swapaxes(1, 2))


def worst_ratio(got, expected, bound) -> float:
    """The largest |got - expected| / bound; inf where got is not finite and expected is not got,
    or where there is an error and no room for one."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    with np.errstate(all="ignore"):
        ratio = np.abs(got - expected) / bound
    ratio = np.where(got == expected, 0.0, np.where(np.isnan(ratio), np.inf, ratio))
    return float(ratio.max(initial=0.0))


def assert_within_bound(out, lse, expected: Oracle, what: str = "") -> tuple[float, float]:
    """Fails, saying where, when an element of out or lse lies outside its bound."""
    pairs = (
        ("out", out, expected.out, expected.out_bound),
        ("lse", lse, expected.lse, expected.lse_bound),
    )
    worst = []
    for name, got, want, bound in pairs:
        worst.append(worst_ratio(got, want, bound))
        if worst[-1] > 1:
            got = np.asarray(got).astype(np.float64)
            wrong = np.argwhere(~(np.abs(got - want) <= bound) & (got != want))
            where = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{what}: {name}: {len(wrong)} of {got.size} elements out of bound; first at "
                f"{where}: got {got[where]!r}, expected {want[where]!r} +- {bound[where]:.3g}"
            )
    return worst[0], worst[1]
