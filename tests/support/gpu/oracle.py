"""The float64 oracle and its a-priori bound, batched on the GPU; every element is checked.

The bound is that of tests/oracle.py, which derives it, and so is the definition; this is a third
way to compute it: requests of similar length together, padded with zeros, as batched products. It
knows nothing of flashmla_cupy and reads live tokens only.

    delta     = 576 * 2^-23 * scale * max_i sum_j |q_j k_ij|
    out_bound = u |o| + (u + 2 delta + n_blk 2^-23 + 2^-20) sum_i w_i |v_i| + tiny
    lse_bound = delta + 2^-20 max(1, |lse|) + n_blk 2^-23
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from support.gpu.arrays import DRY, bits, from_float, gather, host, to_float, xp
from support.gpu.products import matmul

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = {"bfloat16": 2.0**-134, "float16": 2.0**-25}
ROOM = (64 if DRY else 3072) << 20  # bytes of one group, roughly
GROWTH = 1.4  # lengths of one group differ by at most this factor


class Expected(NamedTuple):
    """For some requests of a problem. The bounds are None if not asked for."""

    requests: np.ndarray  # their numbers
    out: Any  # [requests, s_q, h_q, 512]
    lse: Any  # [requests, h_q, s_q]
    out_bound: Any
    lse_bound: Any


class Report(NamedTuple):
    """The largest error / bound of out and lse; what is wrong first, if anything."""

    out: float
    lse: float
    wrong: str | None


def expected(
    problem, requests=None, *, real: str = "float64", bounds: bool = True
) -> Iterator[Expected]:
    """What a problem should give, group by group; all requests by default."""
    requests = np.arange(problem.batch) if requests is None else np.asarray(requests, np.int64)
    for group in _groups(problem, requests, np.dtype(real).itemsize):
        yield _solve(problem, group, real, bounds)


def _groups(problem, requests: np.ndarray, itemsize: int) -> Iterator[np.ndarray]:
    """Requests of similar length that fit into memory together."""
    _, s_q, h_q, _ = problem.q.shape
    order = requests[np.argsort(problem.lengths[requests], kind="stable")]
    start = 0
    while start < len(order):
        least = max(64, int(problem.lengths[order[start]]))
        stop = start
        while stop < len(order):
            longest = max(1, int(problem.lengths[order[stop]]))
            size = itemsize * (longest * (problem.h_kv * 576 + 4 * s_q * h_q) + s_q * h_q * 4096)
            if stop > start and (longest > GROWTH * least or size * (stop - start + 1) > ROOM):
                break
            stop += 1
        yield order[start:stop]
        start = stop


def _solve(problem, group: np.ndarray, real: str, bounds: bool) -> Expected:
    count, h_kv = len(group), problem.h_kv
    _, s_q, h_q, _ = problem.q.shape
    heads = h_q // h_kv
    dtype = problem.q.dtype.name
    scale = 576**-0.5 if problem.softmax_scale is None else problem.softmax_scale
    lengths = problem.lengths[group]
    n = max(1, int(lengths.max()))
    k = gather(problem.k_cache, problem.table[group], lengths, n, real)  # [count, h_kv, n, 576]
    q = to_float(bits(problem.q)[xp.asarray(group)].view(problem.q.dtype), real)
    q = q.reshape(count, s_q, h_kv, heads, 576).transpose(0, 2, 1, 3, 4)
    q = q.reshape(count, h_kv, s_q * heads, 576)

    end = np.repeat(lengths[:, None], s_q, axis=1).astype(np.int64)  # [count, s_q]
    if problem.causal:
        end += np.arange(s_q) + 1 - s_q
    seen = xp.arange(n) < xp.asarray(end)[:, None, :, None, None]  # [count, 1, s_q, 1, n]
    blind = xp.asarray(end <= 0)[:, None, :, None]

    def scores(q, k):  # [count, h_kv, s_q, heads, n]
        product = matmul(k, xp.ascontiguousarray(q.swapaxes(2, 3)))
        return scale * product.swapaxes(2, 3).reshape(count, h_kv, s_q, heads, n)

    def sums(weight, k):  # [count, s_q, h_q, 512]
        product = matmul(weight.reshape(count, h_kv, s_q * heads, n), k)[..., :512]
        product = product.reshape(count, h_kv, s_q, heads, 512).transpose(0, 2, 1, 3, 4)
        return product.reshape(count, s_q, h_q, 512)

    def rows(x):  # [count, h_kv, s_q, heads] -> [count, s_q, h_q]
        return x.transpose(0, 2, 1, 3).reshape(count, s_q, h_q)

    score = xp.where(seen, scores(q, k), -xp.inf)
    top = xp.where(blind, 0.0, score.max(axis=-1))
    weight = xp.exp(score - top[..., None])
    total = xp.where(blind, 1.0, weight.sum(axis=-1))
    weight /= total[..., None]
    del score
    out = sums(weight, k)
    lse = rows(xp.where(blind, xp.inf, top + xp.log(total)))
    if not bounds:
        return Expected(group, out, lse.swapaxes(1, 2), None, None)

    k = xp.abs(k)
    size = xp.where(seen, scores(xp.abs(q), k), 0.0).max(axis=-1)
    delta = rows(576 * 2.0**-23 * size)
    tiles = xp.asarray(-(-lengths // 64) * 2.0**-23)[:, None, None]
    u = UNIT_ROUNDOFF[dtype]
    relative = u + 2 * delta + tiles + 2.0**-20
    out_bound = u * xp.abs(out) + relative[..., None] * sums(weight, k) + TINY[dtype]
    lse_bound = delta + 2.0**-20 * xp.maximum(1, xp.abs(lse)) + tiles
    blind = rows(xp.broadcast_to(blind, (count, h_kv, s_q, heads)))
    out_bound = xp.where(blind[..., None], 0.0, out_bound)  # a query without keys is exact
    lse_bound = xp.where(blind, 0.0, lse_bound)
    return Expected(group, out, lse.swapaxes(1, 2), out_bound, lse_bound.swapaxes(1, 2))


def _ratio(got, want, bound):
    """|got - want| / bound; 0 where equal, inf where that is no number."""
    with np.errstate(all="ignore"):
        ratio = xp.abs(got - want) / bound
    return xp.where(got == want, 0.0, xp.where(xp.isnan(ratio), xp.inf, ratio))


def check(problem, out, lse, requests=None, what: str = "") -> Report:
    """Compares every element of those requests; waits for the device once."""
    batch, s_q, h_q, _ = problem.q.shape
    if out.shape != (batch, s_q, h_q, 512) or out.dtype != problem.q.dtype:
        return Report(np.inf, np.inf, f"{what}: out is {out.dtype} {out.shape}")
    if lse.shape != (batch, h_q, s_q) or lse.dtype != np.float32:
        return Report(np.inf, np.inf, f"{what}: lse is {lse.dtype} {lse.shape}")
    groups, worst = [], []
    for e in expected(problem, requests):
        groups.append(e.requests)
        worst += [_ratio(*part).max() for part in _parts(out, lse, e)]
    if not groups:
        return Report(0.0, 0.0, None)
    ratios = host(xp.stack(worst)).reshape(-1, 2)
    wrong = None
    for group, ratio in zip(groups, ratios, strict=True):
        if wrong is None and not (ratio <= 1).all():
            wrong = f"{what or problem.label}: {_first_wrong(problem, out, lse, group)}"
    return Report(float(ratios[:, 0].max()), float(ratios[:, 1].max()), wrong)


def _parts(out, lse, e: Expected):
    """(got, expected, bound) of out, then of lse."""
    index = xp.asarray(e.requests)
    got = to_float(bits(out)[index].view(out.dtype), "float64")
    return (got, e.out, e.out_bound), (lse[index].astype("float64"), e.lse, e.lse_bound)


def _first_wrong(problem, out, lse, group: np.ndarray) -> str:
    e = _solve(problem, group, "float64", True)
    for name, (got, want, bound) in zip(("out", "lse"), _parts(out, lse, e), strict=True):
        bad = np.argwhere(host(_ratio(got, want, bound)) > 1)
        if len(bad):
            at = tuple(bad[0].tolist())
            where = (int(e.requests[at[0]]), *at[1:])
            values = (float(x[at]) for x in (got, want, bound))
            return (
                f"{name}: {len(bad)} of {got.size} elements out of bound; first at {where}, "
                f"length {problem.lengths[where[0]]}: got {next(values)!r}, expected "
                f"{next(values)!r} +- {next(values):.3g}"
            )
    return "differs from one look to the next"


def assert_right(problem, out, lse, requests=None, what: str = "") -> Report:
    """Fails, saying where, when an element lies outside its bound."""
    report = check(problem, out, lse, requests, what)
    assert report.wrong is None, report.wrong
    return report


def rounded_answer(problem):
    """out and lse as a perfect kernel would give them."""
    out, lse = problem.outputs()
    for e in expected(problem, bounds=False):
        index = xp.asarray(e.requests)
        bits(out)[index] = bits(from_float(e.out, problem.q.dtype.name))
        lse[index] = e.lse.astype("float32")
    return out, lse
