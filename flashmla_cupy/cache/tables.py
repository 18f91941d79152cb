"""The tables of a step as arrays of a framework: block_table, cache_seqlens and slot_mapping.

FreshTables makes new arrays when they are first asked for, once for each framework and stream.
LastingTables has one set of arrays for a cache's whole life, which each step updates where they
lie, so that a captured graph goes on with them: rows beyond the batch have length 0 and slots -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..frameworks import HOST, Adapter
from .page_table import Reservation
from .pool import Pool
from .sequence_rows import Index, Int32, Int64
from .views import array_of, current_stream, view_as

if TYPE_CHECKING:
    from ..gpu.append_launch import CacheLaunches


class Tables(NamedTuple):
    block_table: Any  # int32 [batch, max_pages]
    cache_seqlens: Any  # int32 [batch]
    slot_mapping: Any  # int64 [batch, tokens], page * page_size + slot, or -1; None: no new tokens


class FreshTables:
    """New arrays for one batch."""

    def __init__(
        self, table: Callable[[], tuple[Int32, Int32]], slots: Int64 | None, device: int
    ) -> None:
        """table: what gives block_table and cache_seqlens, when they are needed."""
        self._table, self._slots, self._device = table, slots, device
        self._tables: Tables | None = None
        self._made: dict[tuple[str, int], Tables] = {}

    def has(self, adapter: Adapter) -> bool:
        """Whether those of a framework are there already."""
        return (adapter.name, current_stream(adapter, self._device)) in self._made

    def of(self, adapter: Adapter) -> Tables:
        """The arrays of a framework, ready on its current stream."""
        # Arrays made on one stream may not be ready on another, so the stream is part of the key.
        key = adapter.name, current_stream(adapter, self._device)
        found = self._made.get(key)
        if found is None:
            if self._tables is None:
                self._tables = Tables(*self._table(), self._slots)
            found = self._made[key] = Tables(
                *(None if x is None else array_of(x, key[0], self._device) for x in self._tables)
            )
        return found


class _Staging:
    """Pinned host memory for the news of the steps, in turns, so that one that the device has yet
    to read is not written again."""

    TURNS = 4

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._room: list[tuple[Any, npt.NDArray[np.int32], Any]] = []
        self._turn = 0

    def next(self, size: int) -> tuple[int, npt.NDArray[np.int32], Any]:
        """(address, int32 [size], the event to record behind what reads it)."""
        self._turn = (self._turn + 1) % self.TURNS
        if self._turn < len(self._room):
            memory, array, event = self._room[self._turn]
            event.synchronize()  # of four steps ago
            if len(array) >= size:
                return memory.ptr, array, event
        size = max(1024, 1 << (size - 1).bit_length())
        memory = self._cuda.alloc_pinned_memory(4 * size)
        array = np.frombuffer(memory, np.int32, size)
        made = memory, array, self._cuda.Event(block=False, disable_timing=True)
        self._room[self._turn : self._turn + 1] = [made]
        self._turn = min(self._turn, len(self._room) - 1)
        return memory.ptr, array, made[2]


class LastingTables:
    """One set of arrays, for up to max_seqs sequences of max_pages_per_seq pages."""

    def __init__(
        self, pool: Pool, launches: Callable[[], CacheLaunches], max_seqs: int, max_pages: int
    ) -> None:
        """launches: what gives the kernels, on a GPU."""
        self._pool, self._launches = pool, launches
        self.max_seqs, self.max_pages = max_seqs, max_pages
        self._held = np.zeros((max_seqs, max_pages), np.int32)  # what block_table holds
        self._length = np.zeros(max_seqs, np.int32)
        self._slots: dict[int, Any] = {}  # slot_mapping [max_seqs, tokens], by tokens
        self._views: dict[tuple[str, int, int], Tables] = {}
        with pool.framework.device_guard(pool.place):
            self._table = pool.xp.zeros((max_seqs, max_pages), np.int32)
            self._seqlens = pool.xp.zeros(max_seqs, np.int32)
            self._synchronise()
        self._staging = None if pool.place == HOST else _Staging(pool.xp.cuda)
        self._last: Any = None  # the batch whose rows the table has

    def update(
        self,
        stream: int,
        made: Reservation,
        table: Callable[[], tuple[Int32, Int32]],
        before: Any,
        after: Any,
    ) -> None:
        """Brings the arrays up to date, on a stream. table: what gives the whole block_table.

        before, after: the batch, and its state. If `before` is the `after` of the last time, only
        the new pages have come since then."""
        n, tokens = made.slots.shape
        if len(made.copied) or before != self._last:
            which, where, page = self._changes(table()[0])
        else:
            which, where, page = made.grown
        self._last = after
        if len(page):
            self._held[which, where] = page
        self._length[:n], self._length[n:] = made.end, 0
        slots = self._slots_of(tokens)
        if self._staging is None:
            self._table[...], self._seqlens[...] = self._held, self._length
            slots[:n], slots[n:] = made.slots, -1
            return
        count = self.max_seqs * tokens
        total = 2 * count + self.max_seqs
        address, staged, event = self._staging.next(total + 2 * len(page))
        staged_slots = staged[: 2 * count].view(np.int64)
        staged_slots[: n * tokens] = made.slots.ravel()
        staged_slots[n * tokens :] = -1
        staged[2 * count : total] = self._length
        if len(page):
            changes = staged[total : total + 2 * len(page)].reshape(-1, 2)
            changes[:, 0], changes[:, 1] = which * self.max_pages + where, page
        self._launch(stream, address, slots, (count, self.max_seqs, len(page)), event)

    def _changes(self, table: Int32) -> tuple[Index, Index, Int32]:
        """What differs from block_table as it is: (row, column, page)."""
        longest = int(self._length.max())
        width = max(table.shape[1], -(-longest // self._pool.layout.page_size))
        new = np.zeros((len(table), width), np.int32)
        new[:, : table.shape[1]] = table
        which, where = np.nonzero(self._held[: len(table), :width] != new)
        return which, where, new[which, where]

    def of(self, adapter: Adapter, batch: int, tokens: int) -> Tables:
        """The rows of a batch, as arrays of a framework."""
        key = adapter.name, batch, tokens
        found = self._views.get(key)
        if found is None:
            name = adapter.name
            found = self._views[key] = Tables(
                view_as(self._table, "int32", name)[:batch],
                view_as(self._seqlens, "int32", name)[:batch],
                view_as(self._slots_of(tokens), "int64", name)[:batch],
            )
        return found

    def _slots_of(self, tokens: int) -> Any:
        found = self._slots.get(tokens)
        if found is None:
            with self._pool.framework.device_guard(self._pool.place):
                shape = (self.max_seqs, tokens)
                found = self._slots[tokens] = self._pool.xp.full(shape, -1, np.int64)
                self._synchronise()
        return found

    def _synchronise(self) -> None:
        """New arrays are there for every stream."""
        if self._pool.place != HOST:
            self._pool.xp.cuda.get_current_stream().synchronize()

    def _launch(
        self, stream: int, staged: int, slots: Any, sizes: tuple[int, int, int], event: Any
    ) -> None:
        addresses = slots.data.ptr, self._seqlens.data.ptr, self._table.data.ptr
        with self._pool.framework.device_guard(self._pool.place):
            self._launches().update_tables(stream, staged, *addresses, sizes)
            self._pool.xp.cuda.runtime.eventRecord(event.ptr, stream)
