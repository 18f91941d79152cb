"""Which page holds which tokens of which sequence: the bookkeeping of PagedKVCache, on the host.

Adding tokens takes two steps: reserve() says where they go, settle() keeps as many of them as were
accepted, perhaps none.

Sequences may share pages. A token is written to a page only if nobody else holds it and it is not
published as a known prefix; reserve() sees to that when the write is planned. Only the last page of
a sequence is ever written, and only where it is not full: if it is shared, a copy takes its place.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from .page_states import PageStates
from .sequence import Sequence
from .sequence_rows import Index, Int32, Int64, SequenceRows

_NONE: Index = np.zeros(0, np.intp)


class Reservation(NamedTuple):
    """Room for more tokens of some sequences."""

    rows: Index  # [batch]
    begin: Int32  # [batch] tokens before
    end: Int32  # [batch] and with the new ones
    copied: Index  # [copies] of the batch: whose last page was shared and has a copy
    source: Int32  # [copies] the page before
    target: Int32  # [copies] the page that takes its place
    grown: tuple[Index, Index, Int32]  # new pages: which of the batch, column, page
    slots: Int64  # [batch, most] where the new tokens go, page * page_size + slot; those of a
    # sequence with fewer are at the end, with -1 before them


class PageTable(SequenceRows):
    """The sequences of a pool: how they grow, share pages and end."""

    def __init__(self, states: PageStates, page_size: int) -> None:
        super().__init__(states, page_size)
        self.edits = 0  # changes of what sequences hold, other than by keeping what was reserved
        self.kept_for_rollback: Counter[int] = Counter()  # pages, held by open steps
        self._shift, self._mask = page_size.bit_length() - 1, page_size - 1

    # --- growing -------------------------------------------------------------------------------

    def reserve(self, rows: Index, counts: Int32 | int) -> Reservation:
        """Room for more tokens of each sequence, no row twice. Raises OutOfPagesError; then
        nothing has changed."""
        if type(counts) is int and counts == 1:
            made = self._reserve_one(rows)
            if made is not None:
                return made
        begin = self._length[rows]
        end = begin + np.asarray(counts, np.int64)
        if end.max(initial=0) > self.states.num_pages * self.page_size:
            self.states.take(int((self._pages(end) - self._pages(begin)).sum()))  # too many
        end = end.astype(np.int32)
        held, wanted = self._pages(begin), self._pages(end)
        copied, source, written = self._tails(rows, begin, end)
        grown = int((wanted - held).sum())
        fresh = self.states.take(grown + len(copied))
        self.states.write(written)
        self._grow(columns=int(wanted.max(initial=0)))
        which, where = self._span(held, wanted)
        if grown:
            self.table[rows[which], where] = fresh[:grown]
        target = fresh[grown:]
        if len(copied):
            self.table[rows[copied], begin[copied] // self.page_size] = target
            self.kept_for_rollback.update(source.tolist())
        self.reserved[rows] = end
        self.is_open[rows] = True
        self.edits += 1
        new = which, where, fresh[:grown]
        slots = self._slots(rows, begin, end)
        return Reservation(rows, begin, end, copied, source, target, new, slots)

    def _reserve_one(self, rows: Index) -> Reservation | None:
        """The same for one token each, as most steps have it; None if a last page is shared."""
        begin = self._length[rows]
        slot, column = begin & self._mask, begin >> self._shift
        if len(rows) and int(column.max()) >= self.table.shape[1]:
            self._grow(columns=int(column.max()) + 1)
        page = self.table[rows, column]
        which = np.flatnonzero(slot == 0)
        is_shared = self.states.refcount[page] > 1
        is_shared[which] = False  # there is no page yet
        if is_shared.any():
            return None
        where, fresh = column[which], self.states.take(len(which))
        self.states.write(page[slot > 0])
        page[which] = self.table[rows[which], where] = fresh
        end = begin + np.int32(1)
        self.reserved[rows] = end
        self.is_open[rows] = True
        self.edits += 1
        slots = (page.astype(np.int64) << self._shift) + slot
        new = which, where, fresh
        return Reservation(rows, begin, end, _NONE, fresh[:0], fresh[:0], new, slots[:, None])

    def settle(self, of: Reservation, accepted: Int32 | None) -> None:
        """Ends a reservation: keeps the first accepted[i] new tokens of each, all of them if None,
        and lets go of the pages that are not needed."""
        end = of.end if accepted is None else of.begin + accepted
        self.edits += accepted is not None
        let_go: list[Int32] = []
        if accepted is not None:
            which, where = self._span(self._pages(end), self._pages(of.end))
            let_go.append(self.table[of.rows[which], where])
        if len(of.copied):
            self.kept_for_rollback -= Counter(of.source.tolist())
            keeps = end[of.copied] > of.begin[of.copied]
            back = of.copied[~keeps]
            self.table[of.rows[back], of.begin[back] // self.page_size] = of.source[~keeps]
            let_go += [of.target[~keeps], of.source[keeps]]
        self._length[of.rows] = self.reserved[of.rows] = end
        self.is_open[of.rows] = False
        if let_go:
            self.states.release(np.concatenate(let_go))
        if self.known.of_row:
            filled = end // self.page_size > of.begin // self.page_size
            for row in of.rows[filled].tolist():
                self.known.publish(row, self.length(row), self.table[row])

    def _tails(self, rows: Index, begin: Int32, end: Int32) -> tuple[Index, Int32, Int32]:
        """(which of the batch have a last page that is to be written but that others hold, too;
        those pages; the last pages that are written as they are). Of several in the batch that
        hold all of a page the longest writes to it, behind the tokens of the others, which copy
        but may come back to it by a rollback."""
        slot = begin % self.page_size
        writes = np.flatnonzero((slot > 0) & (end > begin))
        page = self.table[rows[writes], begin[writes] // self.page_size]
        shared = self.states.refcount[page] > 1
        if shared.any():
            holders = Counter(page[shared].tolist())
            for i in np.argsort(-begin[writes], kind="stable"):
                if shared[i] and holders[int(page[i])] == self.states.refcount[page[i]]:
                    shared[i] = False
                    holders[int(page[i])] = 0
        return writes[shared], page[shared], page[~shared]

    # --- sharing and ending --------------------------------------------------------------------

    def fork(self, row: int) -> Sequence:
        """A new sequence with the same tokens, in the same pages."""
        new = self.vacant_row()
        held = self._pages(self.length(row))
        self.table[new] = self.table[row]
        self._length[new] = self.reserved[new] = self._length[row]
        self.states.hold(self.table[row, :held])
        return self.register(None, self.known.get(row))

    def truncate(self, row: int, length: int) -> None:
        """Keeps the first tokens of a sequence."""
        old, new = self._pages(self.length(row)), self._pages(length)
        self.edits += 1
        self._length[row] = self.reserved[row] = length
        self.states.release(self.table[row, new:old])
        self.known.truncate(row, length)

    def free(self, seq: Any, function: str) -> None:
        """Ends a sequence, also one that is swapped out, and lets go of its pages."""
        if type(seq) is Sequence and seq in self.away:
            del self.away[seq]
            return
        self._leave(seq, self.row(seq, function, closed=True))

    def _leave(self, seq: Sequence, row: int) -> None:
        self.states.release(self.table[row, : self._pages(self.length(row))])
        self.free_rows.append(row)
        self.edits += 1
        self._members += 1
        self.known.forget(row)
        del self.row_of[seq]

    def leave(self, seq: Sequence, row: int) -> None:
        """Lets go of the pages of a sequence that is swapped out."""
        self.away[seq] = self.length(row), self.known.get(row)
        self._leave(seq, row)

    def come_back(self, seq: Sequence) -> Reservation:
        """Room for a sequence that is swapped in, which is to be settled. Raises
        OutOfPagesError."""
        length, known = self.away[seq]
        row = self.vacant_row()
        made = self.reserve(np.array([row], np.intp), length)
        del self.away[seq]
        self.register(seq, known and known._replace(chain=[]))
        return made

    # --- known prefixes ------------------------------------------------------------------------

    def begin(self, tokens: Int32, salt: bytes) -> tuple[Sequence, int]:
        """A new sequence that will have these tokens, with as many of them as are known."""
        known = self.known.find(tokens, salt)
        row = self.vacant_row()
        self._grow(columns=len(known.chain))
        pages = [entry.page for entry in known.chain]
        self.table[row, : len(pages)] = pages
        self._length[row] = self.reserved[row] = len(pages) * self.page_size
        self.states.hold_published(pages)
        if pages:
            self.states.fences.order_latest()  # they may have been written on another stream
        return self.register(None, known), self.length(row)

    def extend_known(self, row: int, tokens: Int32) -> None:
        """The ids of the tokens that are going to be kept next."""
        self.known.extend(row, self.length(row), tokens)

    def drop_prefixes(self) -> None:
        """Forgets every known prefix, and the tokens of the sequences."""
        self.known.clear()
        self.away = {seq: (length, None) for seq, (length, _) in self.away.items()}

    # --- inside --------------------------------------------------------------------------------

    def _span(self, low: Int32, high: Int32) -> tuple[Index, Index]:
        """(which of the batch, column) of columns low[i] .. high[i] - 1 of each."""
        grows = np.flatnonzero(high > low)
        which = np.repeat(grows, (high - low)[grows])
        first = np.cumsum((high - low)[grows]) - (high - low)[grows]
        where = np.arange(len(which)) - np.repeat(first - low[grows], (high - low)[grows])
        return which, where

    def _slots(self, rows: Index, begin: Int32, end: Int32) -> Int64:
        most = int((end - begin).max(initial=0))
        back = np.arange(most, 0, -1).astype(np.int32)
        position: Int32 = end[:, None] - back  # [batch, most]
        skipped = position < begin[:, None]
        position[skipped] = 0
        page = self.table[rows[:, None], position >> self._shift].astype(np.int64)
        slots: Int64 = (page << self._shift) + (position & self._mask)
        slots[skipped] = -1
        return slots
