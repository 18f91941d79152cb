"""Sparse decoding problems by FlashMLA's data recipe, with poison wherever nothing may be read.

A request's tokens lie in pages that are scattered over the pool; each query token sees topk of
them in random order, -1 where there are too few. Slots that no query token names hold NaN bytes, so
do the list entries' slots beyond a length. q is normal and clamped to +-1, tokens are normal / 10,
softmax_scale is d_qk ** -0.55 (tests/lib.py and test_flash_mla_sparse_decoding.py of FlashMLA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from flashmla_cupy.formats.cache_format import FORMATS
from flashmla_cupy.formats.quantize import quantize_kv

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
Q_DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float8_e4m3fn": E4M3}
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
# What FlashMLA's tests of prefill take for no token.
NO_TOKEN = (INT_MIN, -123456, -1, "s_kv", 114514, 1919810, 2147480000, INT_MAX)
BEYOND = 2147480000  # in list entries beyond a length, which nobody may look at


class Pool(NamedTuple):
    """One cache and the lists of slots in it."""

    k_cache: np.ndarray
    indices: np.ndarray  # [batch, s_q, topk]
    topk_length: np.ndarray | None  # [batch] or [batch, s_q]


@dataclass
class SparseProblem:
    """The arguments of one sparse call."""

    format: str
    q: np.ndarray
    pool: Pool
    extra: Pool | None
    softmax_scale: float | None
    attn_sink: np.ndarray | None
    descale_q: np.ndarray | None = None
    descale_k: np.ndarray | None = None
    wide_fp8: bool = False

    def arguments(self) -> dict:
        """By the names of reference_sparse.decode(), to which wide_fp8 makes no difference."""
        named = {
            "q": self.q,
            "k_cache": self.pool.k_cache,
            "indices": self.pool.indices,
            "topk_length": self.pool.topk_length,
            "softmax_scale": self.softmax_scale,
            "attn_sink": self.attn_sink,
            "descale_q": self.descale_q,
            "descale_k": self.descale_k,
        }
        if self.extra is not None:
            named["extra_k_cache"], named["extra_indices"], named["extra_topk_length"] = self.extra
        return named


def make_sparse_problem(
    format: str = "v32",
    *,
    batch: int = 2,
    s_q: int = 1,
    h_q: int = 8,
    s_k: int = 200,
    topk: int = 64,
    page_size: int = 64,
    extra: tuple[int, int, int] | None = None,
    lengths: str = "none",
    extra_lengths: str = "none",
    varlen: bool = True,
    sink: bool = True,
    all_invalid: bool = False,
    pow2_scales: bool = True,
    q_dtype: str = "bfloat16",
    softmax_scale: float | None = 0.0,
    kv_size: float = 0.1,
    seed: int = 0,
) -> SparseProblem:
    """extra: (s_k, topk, page_size) of a second pool. lengths, extra_lengths: "none", "request" or
    "query", whose topk_length it is. softmax_scale 0: d_qk ** -0.55; None: the default. kv_size:
    the standard deviation of tokens."""
    rng = np.random.default_rng(seed)
    d_qk = FORMATS[format].d_qk
    descale = np.array([0.01], np.float32) if FORMATS[format].has_descale else None

    def pool(s_k: int, topk: int, page_size: int, lengths: str) -> Pool:
        shape = {"none": None, "request": (batch,), "query": (batch, s_q)}[lengths]
        length = None if shape is None else rng.integers(0, topk + 1, shape).astype(np.int32)
        return _pool(
            rng, format, (batch, s_q), s_k, topk, page_size, length, varlen, all_invalid,
            pow2_scales, descale, kv_size,
        )  # fmt: skip

    if not FORMATS[format].is_fp8:
        q_dtype = FORMATS[format].dtypes[0]
    q = np.clip(rng.standard_normal((batch, s_q, h_q, d_qk)), -1, 1).astype(np.float32)
    attn_sink = None
    if sink:
        attn_sink = rng.standard_normal(h_q).astype(np.float32)
        attn_sink[rng.random(h_q) < 0.2] = np.inf
        attn_sink[rng.random(h_q) < 0.2] = -np.inf
    return SparseProblem(
        format,
        q.astype(Q_DTYPES[q_dtype]),
        pool(s_k, topk, page_size, lengths),
        None if extra is None else pool(*extra, extra_lengths),
        d_qk**-0.55 if softmax_scale == 0.0 else softmax_scale,
        attn_sink,
        descale_q=np.array([1.25], np.float32) if q_dtype == "float8_e4m3fn" else None,
        descale_k=descale,
    )


def _pool(
    rng, format, leading, s_k, topk, page_size, length, varlen, all_invalid, pow2_scales, descale,
    kv_size,
) -> Pool:  # fmt: skip
    batch, _ = leading
    seqlens = np.full(batch, s_k)
    if varlen:
        seqlens = np.maximum(1, rng.normal(s_k, s_k / 2, batch).astype(int))
    pages = -(-seqlens // page_size)
    num_pages = int(pages.sum()) + 1
    order = rng.permutation(num_pages)
    indices = np.full((*leading, topk), -1, np.int32)
    for b, n in enumerate(seqlens.tolist()):
        mine, order = order[: pages[b]], order[pages[b] :]
        slots = (mine[:, None] * page_size + np.arange(page_size)).reshape(-1)[:n]
        for i in range(0 if all_invalid else leading[1]):
            seen = rng.permutation(slots)[:topk]
            indices[b, i, : len(seen)] = seen
            rng.shuffle(indices[b, i])
    shape = (num_pages, page_size, 1, FORMATS[format].d_qk)
    kv = (rng.standard_normal(shape) * kv_size).astype(BFLOAT16)
    k_cache = quantize_kv(kv, format, pow2_scales=pow2_scales, descale_k=descale)
    counted = np.arange(topk) < (topk if length is None else _aligned(length))
    indices = np.where(counted, indices, BEYOND).astype(np.int32)
    poison(k_cache, format, np.setdiff1d(np.arange(num_pages * page_size), indices))
    return Pool(k_cache, indices, length)


def _aligned(length: np.ndarray) -> np.ndarray:
    """[batch] or [batch, s_q] -> [batch, 1 or s_q, 1]."""
    return length.reshape(len(length), -1, 1)


def poison(k_cache: np.ndarray, format: str, slots: np.ndarray) -> None:
    """0xff in all bytes of these slots, which makes NaN of every number in every format."""
    for row in token_bytes(k_cache, format, slots):
        row[:] = 0xFF


def token_bytes(k_cache: np.ndarray, format: str, slots: np.ndarray) -> list[np.ndarray]:
    """Views of the bytes of tokens, one part of all slots after the other: where they lie is
    written down here a second time, apart from flashmla_cupy.formats."""
    page_size = k_cache.shape[1]
    views = []
    for slot in np.asarray(slots).tolist():
        page, offset = divmod(slot, page_size)
        if format == "v4":
            whole = k_cache[page].reshape(-1).view(np.uint8)
            assert np.shares_memory(whole, k_cache)
            behind = page_size * 576 + offset * 8
            views += [whole[offset * 576 : (offset + 1) * 576], whole[behind : behind + 8]]
        else:
            views.append(k_cache[page, offset].reshape(-1).view(np.uint8))
    return views


def prefill_problem(s_q, h_q, d_qk, s_kv, topk, *, sink=True, lengths=True, seed=0):
    """FlashMLA's recipe (tests/test_flash_mla_sparse_prefill.py): the lists hold random tokens, and
    what is no token in the places that are left."""
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((s_q, h_q, d_qk)) / 10).astype(BFLOAT16)
    kv = (rng.standard_normal((s_kv, 1, d_qk)) / 10).astype(BFLOAT16)
    invalid = [s_kv if x == "s_kv" else x for x in NO_TOKEN if x == "s_kv" or not 0 <= x < s_kv]
    indices = rng.choice(invalid, (s_q, 1, topk)).astype(np.int32)
    for i in range(s_q):
        seen = rng.permutation(s_kv)[: rng.integers(0, min(topk, s_kv) + 1)]
        indices[i, 0, rng.permutation(topk)[: len(seen)]] = seen
    return {
        "q": q,
        "kv": kv,
        "indices": indices,
        "sm_scale": 0.5,
        "attn_sink": rng.standard_normal(h_q).astype(np.float32) if sink else None,
        "topk_length": rng.integers(0, topk + 1, s_q).astype(np.int32) if lengths else None,
    }


def as_prompt(problem: SparseProblem, **changes) -> dict:
    """The arguments of flash_mla_sparse_fwd() that see what the query tokens of the only request
    do, over its pages; beside -1, places outside of the pool are no tokens either."""
    (indices,), slots = problem.pool.indices, np.prod(problem.pool.k_cache.shape[:2])
    outside = np.array([-1, slots, INT_MIN, -7, INT_MAX])
    other = outside[np.arange(indices.size).reshape(indices.shape) % len(outside)]
    length = problem.pool.topk_length
    return {
        "q": problem.q[0],
        "kv": problem.pool.k_cache,
        "indices": np.where(indices == -1, other, indices).astype(np.int32)[:, None],
        "sm_scale": problem.softmax_scale,
        "attn_sink": problem.attn_sink,
        "topk_length": None if length is None else length[0],
        "descale_q": problem.descale_q,
        "descale_k": problem.descale_k,
        "wide_fp8": problem.wide_fp8,
    } | changes
