"""Dense decoding of FP8 caches, and the same as lists of all tokens that a query sees."""

from __future__ import annotations

import numpy as np
from support.problems import UNUSED_ENTRY, make_problem
from support.sparse_problems import Pool, SparseProblem, poison

from flashmla_cupy.formats.cache_format import FORMATS
from flashmla_cupy.formats.quantize import quantize_kv


def dense_problem(format: str, lengths, *, s_q: int, h_q: int, page_size: int, causal: bool):
    """(the arrays of flash_mla_with_kvcache() by name, the SparseProblem that sees the same)."""
    problem = make_problem(lengths, s_q=s_q, h_q=h_q, page_size=page_size, poison=0.0)
    width = FORMATS[format].d_qk
    descale = np.array([0.02], np.float32) if FORMATS[format].has_descale else None
    q = np.ascontiguousarray(problem.q[..., :width])
    cache = quantize_kv(problem.k_cache[..., :width], format, descale_k=descale)
    longest = max(1, max(lengths))
    indices = np.full((len(lengths), s_q, longest), -1, np.int32)
    used = []
    for b, n in enumerate(lengths):
        token = np.arange(n)
        slots = problem.block_table[b, token // page_size] * page_size + token % page_size
        used.append(slots)
        for i in range(s_q):
            seen = max(0, n - s_q + i + 1) if causal else n
            indices[b, i, :seen] = slots[:seen]
    slots = np.arange(cache.shape[0] * page_size)
    poison(cache, format, np.setdiff1d(slots, np.concatenate(used)))
    table = np.where(problem.block_table == UNUSED_ENTRY, -7, problem.block_table)
    arrays = {
        "q": q,
        "k_cache": cache,
        "block_table": table.astype(np.int32),
        "cache_seqlens": problem.cache_seqlens,
    }
    if descale is not None:
        arrays["descale_k"] = descale
    lists = SparseProblem(
        format, q, Pool(cache, indices, None), None, None, None, descale_k=descale
    )
    return arrays, lists
