"""Decoding problems made on the GPU, with poison wherever nothing may be read.

Unused slots, unused pages, other layers of a packed cache and all padding hold NaN, +Inf or -Inf;
unused table entries hold numbers that are no page; pages are scattered over the pool; out and lse
are filled with NaN before each call. Lengths and tables are made on the host, which keeps a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from support.gpu.arrays import DRY, DTYPES, INT_MAX, INT_MIN, fill_nan, fill_normal, fill_poison, xp

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

PAGE_SIZES = (16, 32, 64, 128, 256)
UNUSED_ENTRY = 2147480000  # FlashMLA's own filler
GARBAGE = (UNUSED_ENTRY, -1, INT_MIN, INT_MAX)
EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
CACHE_LAYOUTS = ("plain", "layers", "tokens", "padded", "heads first")
Q_LAYOUTS = ("plain", "padded", "fused", "heads first", "positions first")


@dataclass
class Problem:
    """The arguments of one call, less the metadata; lengths and table also on the host."""

    q: object  # [batch, s_q, h_q, 576]
    k_cache: object  # [num_pages, page_size, h_kv, 576]
    block_table: object  # [batch, max_pages] int32
    cache_seqlens: object  # [batch] int32
    lengths: np.ndarray
    table: np.ndarray
    softmax_scale: float | None = None
    causal: bool = False
    label: str = ""
    settings: dict = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def h_kv(self) -> int:
        return self.k_cache.shape[2]

    @property
    def rows(self) -> int:
        """Query rows of one kv head: the second argument of get_mla_metadata."""
        return self.q.shape[1] * self.q.shape[2] // self.h_kv

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    def metadata(self):
        return get_mla_metadata(self.cache_seqlens, self.rows, self.h_kv)

    def outputs(self):
        """out and lse to write into, filled with NaN."""
        batch, s_q, h_q, _ = self.q.shape
        out = xp.empty((batch, s_q, h_q, 512), self.q.dtype)
        lse = xp.empty((batch, h_q, s_q), "float32")
        fill_nan(out)
        fill_nan(lse)
        return out, lse

    def decode(self, metadata=None, out=None, lse=None):
        """(out, lse) of one call that writes into arrays which held NaN."""
        metadata = self.metadata() if metadata is None else metadata
        if out is None:
            out, lse = self.outputs()
        return flash_mla_with_kvcache(
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            512,
            *metadata,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            out=out,
            lse=lse,
        )

    def clean(self) -> Problem:
        """The same problem with zeros for poison and page 0 for garbage."""
        return make(**{**self.settings, "poison": False})

    def set_lengths(self, lengths) -> None:
        self.lengths = np.asarray(lengths, np.int32)
        self.cache_seqlens[...] = xp.asarray(self.lengths)

    def set_table(self, table) -> None:
        self.table = np.asarray(table, np.int32)
        self.block_table[...] = xp.asarray(self.table)


def _cache(layout: str, num_pages: int, page_size: int, h_kv: int, dtype: str, poison):
    """[num_pages, page_size, h_kv, 576] in that layout, poisoned with all that lies around it."""
    p, s, h = num_pages, page_size, h_kv
    shape = {
        "plain": (p, s, h, 576),
        "layers": (p, 4, s, h, 576),  # all layers of a page side by side
        "tokens": (p, s, 3, h, 576),  # all layers of a token side by side
        "padded": (p, s + 1, h, 640),
        "heads first": (h, p, s, 576),
    }[layout]
    storage = _room(shape, dtype, poison)
    return {
        "plain": lambda: storage,
        "layers": lambda: storage[:, 2],
        "tokens": lambda: storage[:, :, 1],
        "padded": lambda: storage[:, :s, :, :576],
        "heads first": lambda: storage.transpose(1, 2, 0, 3),
    }[layout]()


def _query(layout: str, batch: int, s_q: int, h_q: int, dtype: str, poison):
    """[batch, s_q, h_q, 576] in that layout."""
    shape = {
        "plain": (batch, s_q, h_q, 576),
        "padded": (batch, s_q + 1, h_q + 2, 592),
        "fused": (batch, s_q, h_q, 1152),
        "heads first": (h_q, batch, s_q, 576),
        "positions first": (s_q, batch, h_q, 576),
    }[layout]
    storage = _room(shape, dtype, poison)
    return {
        "plain": lambda: storage,
        "padded": lambda: storage[:, :s_q, 1 : h_q + 1, 8:584],
        "fused": lambda: storage[..., 576:],
        "heads first": lambda: storage.transpose(1, 2, 0, 3),
        "positions first": lambda: storage.transpose(1, 0, 2, 3),
    }[layout]()


def _room(shape, dtype: str, poison):
    """An array that starts 16 bytes into its allocation, the least alignment there may be."""
    size = int(np.prod(shape))
    room = xp.empty(size + 16, DTYPES[dtype])
    if DRY:  # NumPy aligns less than the kernels need
        start = -room.ctypes.data % 16 // 2
        storage = room[start : start + size].reshape(shape)
    else:
        storage = room[8 : 8 + size].reshape(shape)
    if poison == "nan":
        fill_nan(room)
    elif poison:
        fill_poison(room)
    else:
        room.view("uint16")[...] = 0
    return storage


def make(
    lengths,
    *,
    s_q: int = 1,
    h_q: int = 16,
    h_kv: int = 1,
    page_size: int = 64,
    dtype: str = "bfloat16",
    causal: bool = False,
    softmax_scale: float | None = None,
    cache_layout: str = "plain",
    q_layout: str = "plain",
    extra_pages: int = 2,
    extra_columns: int = 1,
    table_padding: int = 3,
    std: float = 1.0,
    limit: float = np.inf,
    poison: bool | str = True,
    garbage: tuple[int, ...] = GARBAGE,
    seed: int = 0,
) -> Problem:
    """Normal q and latents in live slots, poison in all others.

    `poison`: NaN and infinities, or NaN alone if "nan", or zeros if False. `garbage`: what unused
    table entries hold, besides num_pages.
    """
    settings = dict(locals())
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    batch = len(lengths)
    needed = -(-lengths // page_size)
    total = int(needed.sum())
    num_pages = total + max(extra_pages, 1)
    width = int(needed.max(initial=0)) + extra_columns
    padded = rng.choice([*garbage, num_pages], (batch, width + table_padding)).astype(np.int32)
    if not poison:
        padded[...] = 0  # after the draw, so that the pages are the same ones
    table = padded[:, :width]
    used = np.arange(width) < needed[:, None]
    table[used] = rng.permutation(num_pages)[:total]
    in_page = np.clip(lengths[:, None] - page_size * np.arange(width), 0, page_size)
    live = np.zeros(num_pages, np.int32)
    live[table[used]] = in_page[used]

    k_cache = _cache(cache_layout, num_pages, page_size, h_kv, dtype, poison)
    fill_normal(k_cache, 2 * seed + 1, std, limit, live)
    q = _query(q_layout, batch, s_q, h_q, dtype, poison)
    fill_normal(q, 2 * seed + 2, std, limit)
    label = ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("lengths", "garbage"))
    shown = lengths.tolist() if batch <= 8 else f"{lengths[:8].tolist()}..."
    return Problem(
        q,
        k_cache,
        xp.asarray(padded)[:, :width],
        xp.asarray(lengths),
        lengths.copy(),
        table.copy(),
        softmax_scale,
        causal,
        f"batch={batch}, lengths={shown}, {label}",
        settings,
    )


# Sizes of a random problem: tokens of all requests times h_kv, and those times query rows.
TOKENS, WORK, ROWS = (700, 40_000, 2000) if DRY else (262_144, 2**25, 2**17)
LONG = 400 if DRY else 131_072
VERY_LONG = 5000 if DRY else 2**20


def random_settings(seed: int) -> dict:
    """The arguments of make() for a random configuration; the same ones for the same seed."""
    rng = np.random.default_rng(seed)

    def pick(options):
        return options[int(rng.integers(len(options)))]

    h_q = int(pick((1, 3, 8, 16, 16, 24, 63, 64, 65, 96, 100, 126, 128, 128, 160)))
    h_kv = int(pick([h for h in (1, 1, 1, 2, 3, 8) if h_q % h == 0]))
    s_q = int(rng.integers(1, 10)) if rng.random() < 0.6 else 1
    if h_q <= 8 and rng.random() < 0.15:
        s_q = int(pick((65, 70, 77)))
    batch = max(1, int(np.exp(rng.uniform(0, np.log(513)))))
    short = rng.random() < 0.1
    if short:
        batch = int(pick((131, 132, 133, 1024, 4096)))
    batch = max(1, min(batch, ROWS // (s_q * h_q)))
    kind = rng.random(batch)
    lengths = np.where(
        kind < 0.4,
        rng.choice(EDGES, batch),
        np.where(
            (kind < 0.75) | short,
            rng.integers(0, 130 if short else 400, batch),
            np.minimum(np.exp(rng.normal(6.5, 1.8, batch)), LONG),
        ),
    ).astype(np.int64)
    if not short and rng.random() < 0.1:
        lengths[rng.integers(batch)] = rng.integers(LONG // 2, LONG + 1)
    if rng.random() < 0.05:
        lengths[:] = lengths[0]
    if seed % 400 == 7:  # one request of a million tokens
        batch, s_q, h_q, h_kv, lengths = 1, 1, 16, 1, np.array([VERY_LONG - seed % 3])
    else:
        budget = max(1, min(TOKENS // h_kv, WORK // (s_q * h_q)))
        over = np.cumsum(lengths) > budget
        lengths[over] = np.minimum(lengths[over], max(1, budget // batch) if DRY else 129)
    return {
        "lengths": lengths,
        "s_q": s_q,
        "h_q": h_q,
        "h_kv": h_kv,
        "page_size": int(pick(PAGE_SIZES)),
        "dtype": str(pick(("bfloat16", "bfloat16", "float16"))),
        "causal": bool(rng.integers(2)),
        "softmax_scale": None if rng.random() < 0.6 else float(np.exp(rng.uniform(-6, -1))),
        "cache_layout": pick(CACHE_LAYOUTS) if rng.random() < 0.5 else "plain",
        "q_layout": pick(Q_LAYOUTS) if rng.random() < 0.5 else "plain",
        "extra_pages": int(rng.integers(1, 5)),
        "extra_columns": int(rng.integers(0, 4)),
        "table_padding": int(rng.integers(0, 4)),
        "seed": seed,
    }


def random_problem(seed: int) -> Problem:
    return make(**random_settings(seed))
