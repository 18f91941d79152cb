"""PagedKVCache: the latent rows of many growing sequences, of all layers of a model, in one pool.

    cache = PagedKVCache(num_pages=4096, num_layers=61)
    seqs = [cache.add(latent) for latent in prompts]   # latent [61, tokens, 576]
    step = cache.reserve(seqs, 1)                      # room for a token of each
    for i in range(61):
        step.write(rows[i], layer=i)                   # [batch, 1, 576]
        out, lse = step.attend(q[i], layer=i)          # q [batch, 1, h_q, 576]
    step.commit()
    cache.free(seqs[0])

`page_table` keeps the books on the host, `pool` has the array, `core` writes and reads it. A slot
that holds no token may hold anything, NaN included: nothing reads it. A call that raises has
changed nothing: rows are written first, into slots that nobody reads yet, and counted last.

On a GPU all work is queued on the current stream of the framework whose arrays are given, else of
the cache's own, and nothing waits for it. A page that was freed is not written while work on
another stream may still read it; what one stream writes and another reads is yours to order. A
cache is not thread-safe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import SequenceError, ShapeError, StepError
from ..frameworks import Adapter
from ..schedule.sched_meta import SchedMeta
from . import pool
from .core import handle_list
from .exports import csr, tables_of
from .page_table import Reservation
from .row_arrays import checked
from .sequence import Sequence
from .sequence_cache import SequenceCache
from .sequence_rows import Int32
from .step import Step, counts_of
from .tables import FreshTables, Tables

__all__ = ["PagedKVCache", "Sequence", "Step"]

LAYER_AXIS = 1


class _Batch:
    """The tables of some sequences, kept until a sequence of the cache changes."""

    def __init__(self, key: Any, tables: FreshTables) -> None:
        self.key, self.tables = key, tables
        self.metadata: dict[Any, SchedMeta] = {}


class PagedKVCache(SequenceCache):
    """A pool of pages, each with a place for page_size tokens of every layer, and the sequences in
    it.

    num_pages      pages in the pool; a sequence of n tokens holds ceil(n / page_size) of them
    page_size      tokens a page: 16, 32, 64, 128 or 256; 64 by default
    num_layers     layers of the model, which share the books
    dtype          "bfloat16" or "float16"; "bfloat16" by default
    num_heads_kv   kv heads; by default 1, as in DeepSeek's models
    device         a CUDA device number, "cpu", or a torch.device of either; by default the current
                   CUDA device if it can run the kernels, else "cpu"
    framework      of `storage` and of tables(): "numpy" or "cupy", by the device, or "torch".
                   Arrays of every framework are taken, and results are of the one that came.
    storage        an array to use instead of a new one, [num_pages, page_size, h_kv, 576], with an
                   axis of layers first or second if there are several, of NumPy, CuPy or PyTorch.
                   uint8 [num_pages, page_size, 1, 656, 584 or 576] is an FP8 cache (CacheFormat),
                   whose rows come in 16 bits or float32 and are quantised; bytes of another width,
                   a multiple of 16, are moved as they are. The arguments before it follow from it:
                   what is given beside it has to agree, num_layers always.
    layer_axis     where that axis is: 1, [num_pages, num_layers, ...], or 0
    max_seqs, max_pages_per_seq
                   of a step: with max_seqs, each step has the same arrays, at the same addresses,
                   so that a captured CUDA graph serves growing sequences. One step may then be
                   open at a time, and max_pages_per_seq is num_pages unless given.

    Raises an ArgumentError, or NoDeviceError or MissingDependencyError for a device that cannot be
    used.

    `storage` is the array: of one layer the k_cache of flash_mla_with_kvcache(), and in general
    layer(i) is.
    """

    _batch: _Batch | None = None

    def __init__(
        self,
        num_pages: int | None = None,
        *,
        page_size: int | None = None,
        num_layers: int = 1,
        dtype: Any = None,
        num_heads_kv: int | None = None,
        device: Any = None,
        framework: str | None = None,
        storage: Any = None,
        layer_axis: int = LAYER_AXIS,
        max_seqs: int | None = None,
        max_pages_per_seq: int | None = None,
    ) -> None:
        function = "PagedKVCache"
        given = pool.Given(num_pages, page_size, num_heads_kv, dtype, device, framework)
        if storage is None:
            made = pool.allocate(given, num_layers, layer_axis, function)
        else:
            made = pool.adopt(storage, num_layers, layer_axis, function)
            pool.require_same(made, given, function)
        self._own(made, max_seqs, max_pages_per_seq, function)

    @classmethod
    def from_storage(
        cls,
        storage: Any,
        *,
        num_layers: int = 1,
        layer_axis: int = LAYER_AXIS,
        max_seqs: int | None = None,
        max_pages_per_seq: int | None = None,
    ) -> PagedKVCache:
        """A cache over `storage`, an array as the class takes it: one layer of a larger pool, say.
        It may be strided. Nothing is copied; what it holds is overwritten as pages are taken. The
        options are those of the class. Raises an ArgumentError for an array that the kernels
        cannot read."""
        cache, function = cls.__new__(cls), "PagedKVCache.from_storage"
        made = pool.adopt(storage, num_layers, layer_axis, function)
        cache._own(made, max_seqs, max_pages_per_seq, function)
        return cache

    # --- growing -------------------------------------------------------------------------------

    def add(self, latent: Any = None) -> Sequence:
        """A new sequence, empty or with the rows `latent`, which are as in append().

        Raises OutOfPagesError or an ArgumentError; then no sequence was added."""
        row = self._table.vacant_row()
        if latent is not None:
            self._append(np.array([row], np.intp), "latent", latent, 1, "PagedKVCache.add")
        return self._table.register()

    def reserve(self, seqs: Iterable[Sequence], counts: int | Iterable[int] = 1) -> Step:
        """Room for more tokens of some sequences, counts of each or counts[i] of seqs[i], as a
        Step, which writes their rows layer by layer.

        All or nothing: raises OutOfPagesError, SequenceError for a sequence that comes twice, has
        an open step or would exceed max_pages_per_seq, StepError, or an ArgumentError; then nothing
        has changed."""
        function, core = "PagedKVCache.reserve", self._core
        handles = handle_list(seqs, function)
        rows = self._table.closed_rows(handles, function)
        tokens: Int32 | int = 1
        if type(counts) is not int or counts != 1:
            tokens = counts_of("counts", counts, len(handles), function)
        self._require_room(handles, rows, tokens, function)
        lasting = core.lasting
        if lasting is not None:
            self._require_lasting(len(handles), function)
        stream = core.stream()
        core.require_uncaptured(stream, function)
        before = self._table.edits
        made = self._table.reserve(rows, tokens)
        try:
            core.open(made, stream)
            table = functools.partial(self._table.export, rows)
            if lasting is None:
                return Step(core, handles, made, FreshTables(table, made.slots, core.place), stream)
            after = self._table.edits
            lasting.update(stream, made, table, (handles, before), (handles, after))
            lasting.of(core.framework, *made.slots.shape)  # views, which a capture could not make
            step = core.lasting_step = Step(core, handles, made, lasting, stream)
        except BaseException:
            self._table.settle(made, np.zeros(len(handles), np.int32))
            raise
        return step

    def append(self, seq: Sequence, rows: Any) -> None:
        """Appends rows [n, 576] or [n, h_kv, 576], of the cache's dtype, to one sequence; of
        several layers [num_layers, n, ...].

        The form without an axis of kv heads is for a cache with one. `rows` lies beside the pool or
        in host memory. Raises SequenceError, OutOfPagesError or an ArgumentError; then nothing was
        appended."""
        function = "PagedKVCache.append"
        index = self._table.closed_rows(handle_list((seq,), function), function)
        self._append(index, "rows", rows, 1, function)

    def append_batch(self, seqs: Iterable[Sequence], rows: Any) -> None:
        """Appends n rows to each sequence at once, rows[i] to seqs[i]: a decoding step's tokens.

        rows is [batch, n, 576] or [batch, n, h_kv, 576], with an axis of layers before if there are
        several, else as in append(). No sequence may come twice. Raises as append() does; then
        nothing was appended to any sequence."""
        function = "PagedKVCache.append_batch"
        handles = handle_list(seqs, function)
        index = self._table.closed_rows(handles, function)
        self._append(index, "rows", rows, 2, function, len(handles))

    # --- what attention needs ------------------------------------------------------------------

    def tables(
        self,
        seqs: Iterable[Sequence] | None = None,
        *,
        width: int | None = None,
        framework: str | None = None,
    ) -> tuple[Any, Any]:
        """(block_table int32 [batch, max_pages], cache_seqlens int32 [batch]) of the sequences.

        By default of all, oldest first. The arrays lie beside the pool, ready for
        get_mla_metadata() and flash_mla_with_kvcache(), and for vLLM's kernels; entries past a
        sequence's pages are 0, and `width` asks for so many columns. They are of the cache's
        framework, or of `framework`. The same arrays are returned until a sequence changes, so do
        not write into them. Raises SequenceError or an ArgumentError."""
        function = "PagedKVCache.tables"
        adapter = self._adapter(framework, function)
        if width is not None:
            rows = self._table.rows(self._handles(seqs, function), function)
            return tables_of(self._table, rows, width, adapter, self._core.place, function)
        made = self._tables(self._handles(seqs, function), function).tables.of(adapter)
        return made.block_table, made.cache_seqlens

    def csr(
        self, seqs: Iterable[Sequence] | None = None, framework: str | None = None
    ) -> tuple[Any, Any, Any]:
        """(indptr int32 [batch + 1], indices int32 [pages], last_page_len int32 [batch]):
        FlashInfer's form of the tables. Raises SequenceError for a sequence without tokens, and as
        tables() does."""
        function = "PagedKVCache.csr"
        adapter, handles = self._adapter(framework, function), self._handles(seqs, function)
        rows = self._table.rows(handles, function)
        return csr(self._table, rows, handles, adapter, self._core.place, function)

    def attend(
        self,
        q: Any,
        seqs: Iterable[Sequence] | None = None,
        *,
        layer: int = 0,
        softmax_scale: float | None = None,
        causal: bool = True,
    ) -> tuple[Any, Any]:
        """flash_mla_with_kvcache() of q [batch, s_q, h_q, 576] over the sequences, by default all,
        in one layer; q[i] holds the queries of the last s_q tokens of seqs[i]: append their rows
        first. softmax_scale and causal are as there, but causal is True unless False is passed.
        Returns out [batch, s_q, h_q, 512] and lse [batch, h_q, s_q], of q's framework. Raises
        SequenceError, and what flash_mla_with_kvcache() raises."""
        function, core = "PagedKVCache.attend", self._core
        layer = core.layer(layer, function)
        batch = self._tables(self._handles(seqs, function), function)
        count = len(batch.key[0])

        def ready(adapter: Adapter) -> Tables:
            core.fences.use(core.stream_of(adapter))
            return core.fresh(batch.tables, adapter, function)

        return core.attend(q, layer, count, ready, batch.metadata, softmax_scale, causal, function)

    # --- inside --------------------------------------------------------------------------------

    def _append(
        self,
        index: Any,
        name: str,
        rows: Any,
        axes: int,
        function: str,
        batch: int | None = None,
    ) -> None:
        """rows to the sequences with these rows in the page table."""
        full, adapter = checked(self._core.pool, name, rows, axes, function)
        if axes == 1:
            full = full[:, None]
        elif full.shape[1] != batch:
            expected = f"a first axis of {batch}, the number of sequences"
            remedy = "Pass the rows of seqs[i] as rows[i]."
            raise ShapeError(name, expected, f"one of {full.shape[1]}", remedy, function)
        n = int(full.shape[2])
        self._require_room((), index, n, function)
        stream = self._core.stream()
        self._core.require_uncaptured(self._core.stream_of(adapter), function)
        made: Reservation = self._table.reserve(index, n)
        self._core.append(made, full, adapter, stream)

    def _tables(self, handles: tuple[Any, ...], function: str) -> _Batch:
        key = handles, self._table.edits
        if self._batch is None or self._batch.key != key:
            rows = self._table.rows(handles, function)
            made = self._table.export(rows)
            self._batch = _Batch(key, FreshTables(lambda: made, None, self._core.place))
        return self._batch

    def _handles(self, seqs: Any, function: str) -> tuple[Any, ...]:
        return self.sequences if seqs is None else handle_list(seqs, function)

    def _require_room(
        self, handles: tuple[Any, ...], rows: Any, tokens: Int32 | int, function: str
    ) -> None:
        """No sequence gets longer than it may be."""
        if self.max_pages_per_seq >= self.num_pages:
            return
        most = self.max_pages_per_seq * self.page_size
        length = self._table.reserved[rows].astype(np.int64) + tokens
        if (length > most).any():
            i = int(np.flatnonzero(length > most)[0])
            who = f"{handles[i]}" if handles else "the sequence"
            raise SequenceError(
                f"{function}(): {who} would have {length[i]} tokens, but max_pages_per_seq ="
                f" {self.max_pages_per_seq} is for {most}. Free it, or make the cache with more."
            )

    def _require_lasting(self, batch: int, function: str) -> None:
        assert self.max_seqs is not None
        if batch > self.max_seqs:
            expected, remedy = f"at most max_seqs = {self.max_seqs} sequences", "Make two steps."
            raise ShapeError("seqs", expected, f"{batch}", remedy, function)
        if self._core.lasting_step is not None:
            raise StepError(
                f"{function}(): a step is open, and with max_seqs a cache has the arrays of one."
                " Commit it or roll it back first."
            )
