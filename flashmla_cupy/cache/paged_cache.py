"""PagedKVCache: the latent vectors of many growing sequences in one pool of pages (one layer).

    cache = PagedKVCache(num_pages=4096)
    seqs = [cache.add(latent) for latent in prompts]      # latent [tokens, 576]
    cache.append_batch(seqs, rows)                        # rows [batch, s_q, 576], the new tokens
    out, lse = cache.attend(q, seqs)                      # q [batch, s_q, h_q, 576]
    cache.free(seqs[0])

The pool is a CuPy array on a GPU and a NumPy array elsewhere; `page_table` keeps the books. A slot
that holds no token may hold anything, NaN included: nothing reads it. A call that raises has
changed nothing: rows are written first, into slots that nobody reads yet, and counted last.

On a GPU all work is queued on CuPy's current stream and nothing waits for it. Use one stream, or
order the streams yourself: a page that free() returns may be overwritten by the next append. A
cache is not thread-safe.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..calls import checks, scalars
from ..calls.wording import kind as kind_of
from ..calls.wording import show
from ..errors import ArgTypeError, DTypeError, SequenceError, ShapeError
from ..frameworks import HOST, framework_of
from ..interface import flash_mla_with_kvcache
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM, HEAD_DIM_V
from . import pool
from .page_table import Index, PageTable, Sequence

__all__ = ["PagedKVCache", "Sequence"]

_SCATTER_ELEMENTS = 2**30  # at once: the scatter kernel of CuPy counts elements in int32


class _Batch(NamedTuple):
    """What the kernels need for some sequences, kept until a sequence of the cache changes."""

    key: tuple[tuple[Sequence, ...], int]  # the sequences, and the stream the arrays are made on
    block_table: Any
    cache_seqlens: Any
    metadata: dict[Any, SchedMeta]  # by shape of q and causal


class PagedKVCache:
    """A pool of pages [num_pages, page_size, num_heads_kv, 576] and the sequences in it.

    num_pages      pages in the pool; a sequence of n tokens holds ceil(n / page_size) of them
    page_size      tokens a page: 16, 32, 64, 128 or 256
    dtype          "bfloat16" or "float16"
    num_heads_kv   kv heads; 1 in DeepSeek's models
    device         a CUDA device number, or "cpu" for NumPy; by default the current CUDA device if
                   it can run the kernels, else "cpu"

    Raises an ArgumentError, or NoDeviceError or MissingDependencyError for a device that cannot be
    used. from_storage() makes a cache over an array that exists already.

    `storage` is the pool itself: the k_cache of flash_mla_with_kvcache(), and what other frameworks
    share with from_dlpack().
    """

    def __init__(
        self,
        num_pages: int,
        *,
        page_size: int = 64,
        dtype: Any = "bfloat16",
        num_heads_kv: int = 1,
        device: int | str | None = None,
    ) -> None:
        function = "PagedKVCache"
        self._own(pool.allocate(num_pages, page_size, dtype, num_heads_kv, device, function))

    @classmethod
    def from_storage(cls, storage: Any) -> PagedKVCache:
        """A cache over `storage`, a NumPy or CuPy array [num_pages, page_size, h_kv, 576] of
        bfloat16 or float16: one layer of a larger pool, or another framework's memory through
        cupy.from_dlpack(). It may be strided. Nothing is copied; what it holds is overwritten as
        pages are taken. Raises an ArgumentError for an array that the kernels cannot read."""
        cache = cls.__new__(cls)
        cache._own(pool.adopt(storage, "PagedKVCache.from_storage"))
        return cache

    def _own(self, storage: Any) -> None:
        self.storage: Any = storage
        self.num_pages, self.page_size, self.num_heads_kv = map(int, storage.shape[:3])
        self.dtype: np.dtype[Any] = storage.dtype
        self._framework = framework_of(storage, "storage")
        self._place = self._framework.describe(storage).device
        self._xp: Any = importlib.import_module(self._framework.name)  # numpy or cupy
        self._bits = storage.view(np.uint16)  # rows move as bits, so that NaN stays what it is
        self._pages = PageTable(self.num_pages, self.page_size)
        self._batch: _Batch | None = None

    # --- what it holds -------------------------------------------------------------------------

    @property
    def device(self) -> int | str:
        """The CUDA device number of the pool, or "cpu"."""
        return "cpu" if self._place == HOST else self._place

    @property
    def free_pages(self) -> int:
        """How many pages no sequence holds."""
        return self._pages.free_pages

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The handles of all sequences, oldest first."""
        return self._pages.sequences

    def seqlen(self, seq: Sequence) -> int:
        """The tokens of a sequence. Raises SequenceError for a freed or foreign handle."""
        return self._pages.length(self._pages.row(seq, "PagedKVCache.seqlen"))

    def __repr__(self) -> str:
        place = "cpu" if self._place == HOST else f"cuda:{self._place}"
        return (
            f"PagedKVCache({self.num_pages} pages of {self.page_size} tokens, {self.dtype.name},"
            f" {place}; {len(self.sequences)} sequences, {self._pages.tokens} tokens,"
            f" {self.free_pages} pages free)"
        )

    def check(self) -> None:
        """Verifies the books, in time proportional to the pages; a broken one raises
        FlashMLAError. For tests and for debugging: no call should ever break them."""
        self._pages.check()

    # --- what changes it -----------------------------------------------------------------------

    def add(self, latent: Any = None) -> Sequence:
        """A new sequence, empty or with the rows `latent`, which are as in append().

        Raises OutOfPagesError or an ArgumentError; then no sequence was added."""
        rows = None if latent is None else self._checked("latent", latent, 1, "PagedKVCache.add")
        row = self._pages.vacant_row()
        if rows is not None:
            self._append(np.array([row], np.intp), rows[None])
        return self._pages.register()

    def append(self, seq: Sequence, rows: Any) -> None:
        """Appends rows [n, 576] or [n, h_kv, 576], of the cache's dtype, to one sequence.

        The form without an axis of kv heads is for a cache with one. `rows` is a NumPy array or
        lies beside the pool. Raises SequenceError, OutOfPagesError or an ArgumentError; then
        nothing was appended."""
        function = "PagedKVCache.append"
        index = self._pages.rows((seq,), function)
        self._append(index, self._checked("rows", rows, 1, function)[None])

    def append_batch(self, seqs: Iterable[Sequence], rows: Any) -> None:
        """Appends n rows to each sequence at once, rows[i] to seqs[i]: a decoding step's tokens.

        rows is [batch, n, 576] or [batch, n, h_kv, 576], else as in append(). No sequence may come
        twice. Raises as append() does; then nothing was appended to any sequence."""
        function = "PagedKVCache.append_batch"
        handles = _handles(seqs, function)
        index = self._pages.rows(handles, function)
        seq, times = max(Counter(handles).items(), key=lambda item: item[1], default=(None, 0))
        if seq is not None and times > 1:
            remedy = "Give each sequence all its rows in one entry."
            raise SequenceError(f"{function}(): {seq} comes {times} times in seqs. {remedy}")
        rows = self._checked("rows", rows, 2, function)
        if len(rows) != len(handles):
            expected = f"a first axis of {len(handles)}, the number of sequences"
            remedy = "Pass the rows of seqs[i] as rows[i]."
            raise ShapeError("rows", expected, f"one of {len(rows)}", remedy, function)
        self._append(index, rows)

    def free(self, seq: Sequence) -> None:
        """Ends a sequence and gives back the pages that no other one holds.

        Raises SequenceError for a handle that was freed before, or is another cache's."""
        self._pages.free(seq, "PagedKVCache.free")
        self._batch = None

    # --- what attention needs ------------------------------------------------------------------

    def tables(self, seqs: Iterable[Sequence] | None = None) -> tuple[Any, Any]:
        """(block_table int32 [batch, max_pages], cache_seqlens int32 [batch]) of the sequences.

        By default of all, oldest first. The arrays lie beside the pool, ready for
        get_mla_metadata() and flash_mla_with_kvcache(); entries past a sequence's pages are 0. The
        same arrays are returned until a sequence changes, so do not write into them. Raises
        SequenceError or ArgTypeError."""
        batch = self._export(seqs, "PagedKVCache.tables")
        return batch.block_table, batch.cache_seqlens

    def attend(
        self,
        q: Any,
        seqs: Iterable[Sequence] | None = None,
        *,
        softmax_scale: float | None = None,
        causal: bool = True,
    ) -> tuple[Any, Any]:
        """flash_mla_with_kvcache() of q [batch, s_q, h_q, 576] over the sequences, by default all.

        q[i] holds the queries of the last s_q tokens of seqs[i]: append their rows first. Returns
        out [batch, s_q, h_q, 512] and lse [batch, h_q, s_q]. Raises SequenceError, and what
        flash_mla_with_kvcache() raises."""
        function = "PagedKVCache.attend"
        handles = self.sequences if seqs is None else _handles(seqs, function)
        info = checks.describe({"storage": self.storage, "q": q}, function)[1]["q"]
        checks.query(info)
        if info.shape[0] != len(handles):
            expected = f"a first axis of {len(handles)}, the number of sequences"
            remedy = "Pass the queries of seqs[i] as q[i]; without seqs, of cache.sequences[i]."
            raise ShapeError("q", expected, show(info), remedy, function)
        batch = self._export(handles, function)
        kind = (tuple(info.shape), scalars.causal(causal))
        metadata = batch.metadata.get(kind)
        if metadata is None:
            metadata = batch.metadata[kind] = SchedMeta()
        return flash_mla_with_kvcache(
            q,
            self.storage,
            batch.block_table,
            batch.cache_seqlens,
            HEAD_DIM_V,
            metadata,
            softmax_scale=softmax_scale,
            causal=causal,
        )

    # --- inside --------------------------------------------------------------------------------

    def _append(self, index: Index, rows: Any) -> None:
        """rows [batch, n, h_kv, 576] to the sequences with these rows in the page table."""
        claim = self._pages.claim(index, rows.shape[1])
        if len(claim.page):
            self._write(claim.page, claim.slot, rows)
        self._pages.commit(claim)
        self._batch = None

    def _write(self, page: Any, slot: Any, rows: Any) -> None:
        """The one place that writes to the pool, by a scatter: the i-th row of
        rows [batch, n, h_kv, 576] to (page[i], slot[i])."""
        step = _SCATTER_ELEMENTS // (self.num_heads_kv * HEAD_DIM)
        with self._framework.device_guard(self._place):
            where = self._xp.asarray(np.stack([page, slot]))
            bits = self._xp.asarray(rows.view(np.uint16)).reshape(-1, *self._bits.shape[2:])
            for start in range(0, len(bits), step):
                some = slice(start, start + step)
                self._bits[where[0, some], where[1, some]] = bits[some]

    def _export(self, seqs: Iterable[Sequence] | None, function: str) -> _Batch:
        handles = self.sequences if seqs is None else _handles(seqs, function)
        # Arrays made on one stream may not be ready on another, so the stream is part of the key.
        key = (handles, self._framework.stream(self._place))
        if self._batch is None or self._batch.key != key:
            table, length = self._pages.export(self._pages.rows(handles, function))
            with self._framework.device_guard(self._place):
                self._batch = _Batch(key, self._xp.asarray(table), self._xp.asarray(length), {})
        return self._batch

    def _checked(self, name: str, rows: Any, axes: int, function: str) -> Any:
        """rows with all its axes, `axes` of them before [h_kv, 576]; or an ArgumentError."""
        if not isinstance(rows, np.ndarray):  # NumPy's go to any device
            checks.describe({"storage": self.storage, name: rows}, function)
        got = f"{rows.dtype} {tuple(rows.shape)}"
        if rows.dtype != self.dtype:
            remedy = f"Convert it with {name}.astype(cache.dtype)."
            raise DTypeError(name, f"{self.dtype}, the dtype of the cache", got, remedy, function)
        one_head = self.num_heads_kv == 1
        full = rows[..., None, :] if one_head and rows.ndim == axes + 1 else rows
        if full.ndim != axes + 2 or full.shape[axes:] != (self.num_heads_kv, HEAD_DIM):
            lead = "n" if axes == 1 else "batch, n"
            expected = f"[{lead}, {self.num_heads_kv}, {HEAD_DIM}]"
            if one_head:
                expected = f"[{lead}, {HEAD_DIM}] or {expected}"
            remedy = "A row holds 512 latent and 64 rotary columns, side by side."
            raise ShapeError(name, expected, got, remedy, function)
        return full


def _handles(seqs: Any, function: str) -> tuple[Any, ...]:
    try:
        return tuple(seqs)
    except TypeError:
        expected, remedy = "a list of sequence handles", "Put a single one into a list: [seq]."
        raise ArgTypeError("seqs", expected, kind_of(seqs), remedy, function) from None
