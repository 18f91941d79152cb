"""Decoding problems with poison wherever nothing may be read.

Unused slots of used pages and unused pages hold NaN, +Inf or -Inf; unused table entries hold
2147480000, FlashMLA's own filler. Pages of a sequence are scattered over the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
PAGE_SIZES = (16, 32, 64, 128, 256)
UNUSED_ENTRY = 2147480000
EDGES = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129)


@dataclass
class Problem:
    """The arguments of one call, less the metadata."""

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray
    softmax_scale: float | None = None
    causal: bool = False

    @property
    def rows(self) -> int:
        """Query rows of one kv head: the second argument of get_mla_metadata."""
        return self.q.shape[1] * self.q.shape[2] // self.h_kv

    @property
    def h_kv(self) -> int:
        return self.k_cache.shape[2]

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k_cache, self.block_table, self.cache_seqlens

    def options(self) -> dict:
        return {"softmax_scale": self.softmax_scale, "causal": self.causal}

    def token(self, request: int, position: int) -> tuple[int, int]:
        """(page, slot) of a token."""
        page_size = self.k_cache.shape[1]
        return int(self.block_table[request, position // page_size]), position % page_size


def make_problem(
    lengths,
    *,
    s_q: int = 1,
    h_q: int = 8,
    h_kv: int = 1,
    page_size: int = 64,
    dtype: str = "bfloat16",
    causal: bool = False,
    softmax_scale: float | None = None,
    extra_columns: int = 1,
    poison: float = np.nan,
    seed: int = 0,
) -> Problem:
    """Normal q and latents in live slots, `poison` in all others."""
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    needed = [-(-n // page_size) for n in lengths]
    num_pages = sum(needed) + 2
    pages = rng.permutation(num_pages).astype(np.int32)
    k_cache = np.full((num_pages, page_size, h_kv, 576), poison, kind)
    block_table = np.full(
        (len(lengths), max(needed, default=0) + extra_columns), UNUSED_ENTRY, np.int32
    )
    for b, (n, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, pages = pages[:count], pages[count:]
        block_table[b, :count] = mine
        tokens = rng.standard_normal((n, h_kv, 576), np.float32).astype(kind)
        for p, page in enumerate(mine):
            part = tokens[p * page_size : (p + 1) * page_size]
            k_cache[page, : len(part)] = part
    q = rng.standard_normal((len(lengths), s_q, h_q, 576), np.float32).astype(kind)
    return Problem(q, k_cache, block_table, np.array(lengths, np.int32), softmax_scale, causal)


def random_problem(seed: int, longest: int = 300) -> Problem:
    """A small random configuration; the same one for the same seed. Requests have up to `longest`
    tokens, or about a quarter of that where there are many query heads."""
    rng = np.random.default_rng(seed)
    h_kv = int(rng.choice([1, 1, 1, 2, 3]))
    h_q = h_kv * int(rng.choice([1, 3, 8, 16, 43]))
    longest = longest if h_q <= 24 else longest * 7 // 30
    lengths = [
        int(rng.choice([n for n in EDGES if n <= longest]))
        if rng.random() < 0.5
        else int(rng.integers(0, longest))
        for _ in range(rng.integers(1, 6))
    ]
    return make_problem(
        lengths,
        s_q=int(rng.integers(1, 5)),
        h_q=h_q,
        h_kv=h_kv,
        page_size=int(rng.choice(PAGE_SIZES)),
        dtype=str(rng.choice(list(DTYPES))),
        causal=bool(rng.integers(2)),
        softmax_scale=None if rng.random() < 0.5 else float(rng.uniform(0.005, 0.3)),
        extra_columns=int(rng.integers(1, 4)),
        poison=float(rng.choice([np.nan, np.inf, -np.inf])),
        seed=seed,
    )
