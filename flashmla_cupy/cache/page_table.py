"""Which page holds which tokens of which sequence: the bookkeeping of PagedKVCache, on the host.

Small arrays have a row for each sequence: `table` (its page numbers), `_length` (its tokens) and
`reserved` (those and the ones of a step that is open on it). Adding tokens takes two steps:
reserve() says where they go, settle() keeps as many of them as were accepted, perhaps none.

Sequences may share pages. A token is written to a page only if nobody else holds it and it is not
published as a known prefix; reserve() sees to that when the write is planned. Only the last page of
a sequence is ever written, and only where it is not full: if it is shared, a copy takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..calls.wording import kind
from ..errors import ArgTypeError, SequenceError
from .known_tokens import Known, KnownTokens
from .page_states import PageStates
from .sequence import Sequence

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Index = npt.NDArray[np.intp]


class Reservation(NamedTuple):
    """Room for more tokens of some sequences."""

    rows: Index  # [batch]
    begin: Int32  # [batch] tokens before
    end: Int32  # [batch] and with the new ones
    copied: Index  # [copies] of the batch: whose last page was shared and has a copy
    source: Int32  # [copies] the page before
    target: Int32  # [copies] the page that takes its place
    grown: tuple[Index, Index, Int32]  # new pages: which of the batch, column, page


class PageTable:
    """The sequences of a pool, and the pages that they hold."""

    def __init__(self, states: PageStates, page_size: int) -> None:
        self.states, self.page_size = states, page_size
        self._owner = object()
        self._count = 0  # sequences ever added
        self.edits = 0  # changes of what sequences hold, other than by keeping what was reserved
        self.row_of: dict[Sequence, int] = {}  # of those in the pool, oldest first
        self.away: dict[Sequence, tuple[int, Known | None]] = {}  # swapped out: their tokens
        self.free_rows: list[int] = []
        self.table = np.zeros((0, 1), np.int32)  # [rows, columns]
        self._length = np.zeros(0, np.int32)  # [rows]
        self.reserved = np.zeros(0, np.int32)  # [rows]
        self.is_open = np.zeros(0, np.bool_)  # [rows] a step is open on it
        self.known = KnownTokens(states, page_size)
        self.kept_for_rollback: Counter[int] = (
            Counter()
        )  # pages that open steps hold for a rollback

    # --- handles -------------------------------------------------------------------------------

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The handles of the sequences in the pool, oldest first."""
        return tuple(self.row_of)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self._length[list(self.row_of.values())].sum())

    def row(self, seq: Any, function: str, closed: bool = False) -> int:
        """The row of a sequence in the pool; `closed`: on which no step is open. Raises
        SequenceError or ArgTypeError, as `function`."""
        row = self.row_of.get(seq) if type(seq) is Sequence else None
        if row is None:
            raise self._no_row(seq, function)
        if closed and self.is_open[row]:
            raise SequenceError(
                f"{function}(): {seq} has an open step. Commit it or roll it back first."
            )
        return row

    def rows(self, seqs: SequenceOf[Any], function: str, closed: bool = False) -> Index:
        """The rows of sequences in the pool, [batch]."""
        try:
            rows = np.array([self.row_of[seq] for seq in seqs], np.intp)
        except (KeyError, TypeError):  # TypeError: what is no handle may have no hash
            rows = np.array([self.row(seq, function) for seq in seqs], np.intp)
        if closed and self.is_open[rows].any():
            for seq in seqs:
                self.row(seq, function, closed=True)
        return rows

    def _no_row(self, seq: Any, function: str) -> Exception:
        if type(seq) is not Sequence:
            remedy = "Pass what add() or begin() returned."
            return ArgTypeError("seq", "a sequence handle", kind(seq), remedy, function)
        reason = "was freed. Make a new one with add()."
        if seq.owner is not self._owner:
            reason = "belongs to another PagedKVCache. Pass it to the cache that added it."
        elif seq in self.away:
            reason = "was swapped out. Bring it back with swap_in()."
        return SequenceError(f"{function}(): sequence {seq.number} {reason}")

    def length(self, row: int) -> int:
        """The tokens of one sequence."""
        return int(self._length[row])

    def vacant_row(self) -> int:
        """The row of the next new sequence, with no tokens; register() makes it one."""
        if not self.free_rows:
            self._grow(rows=2 * len(self._length) + 8)
        row = self.free_rows[-1]
        self._length[row] = self.reserved[row] = 0
        return row

    def register(self, seq: Sequence | None = None, known: Known | None = None) -> Sequence:
        """Makes a sequence of the row that vacant_row() gave."""
        if seq is None:
            seq = Sequence(self._owner, self._count)
            self._count += 1
        row = self.row_of[seq] = self.free_rows.pop()
        self.known.set(row, known)
        return seq

    # --- growing -------------------------------------------------------------------------------

    def reserve(self, rows: Index, counts: Int32 | int) -> Reservation:
        """Room for more tokens of each sequence, no row twice. Raises OutOfPagesError; then
        nothing has changed."""
        begin = self._length[rows]
        end = begin + np.int32(counts) if isinstance(counts, int) else begin + counts
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
        return Reservation(rows, begin, end, copied, source, target, (which, where, fresh[:grown]))

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

    # --- reading -------------------------------------------------------------------------------

    def export(self, rows: Index, width: int = 0) -> tuple[Int32, Int32]:
        """(block_table [batch, max_pages or width], with 0 past the pages; cache_seqlens [batch]),
        with what is reserved."""
        length = self.reserved[rows]
        held = self._pages(length)
        widest = max(1, int(held.max(initial=0)))  # an axis of size 0 has no address
        column = np.arange(widest)
        table = self.table[rows[:, None], column]
        table[column >= held[:, None]] = 0
        if width > widest:
            table = np.pad(table, ((0, 0), (0, width - widest)))
        return table, length

    def pages_of(self, row: int) -> Int32:
        """The pages of one sequence, in order."""
        return self.table[row, : self._pages(int(self.reserved[row]))].copy()

    def slots(self, of: Reservation) -> Int64:
        """Where the new tokens go, page * page_size + slot, [batch, most]; those of a sequence with
        fewer are right-aligned, with -1 before them."""
        counts = of.end - of.begin
        most = int(counts.max(initial=0))
        position = of.end[:, None] - np.arange(most, 0, -1, dtype=np.int32)  # [batch, most]
        skipped = position < of.begin[:, None]
        if most * len(counts) != counts.sum():
            position[skipped] = 0
        page = self.table[of.rows[:, None], position // self.page_size]
        slots: Int64 = page.astype(np.int64) * self.page_size + position % self.page_size
        slots[skipped] = -1
        return slots

    # --- inside --------------------------------------------------------------------------------

    def _pages(self, tokens: Any) -> Any:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)

    def _span(self, low: Int32, high: Int32) -> tuple[Index, Index]:
        """(which of the batch, column) of columns low[i] .. high[i] - 1 of each."""
        grows = np.flatnonzero(high > low)
        which = np.repeat(grows, (high - low)[grows])
        first = np.cumsum((high - low)[grows]) - (high - low)[grows]
        where = np.arange(len(which)) - np.repeat(first - low[grows], (high - low)[grows])
        return which, where

    def _grow(self, rows: int = 0, columns: int = 0) -> None:
        """Makes the arrays large enough; columns at least double, so that it is rare."""
        old_rows, old_columns = self.table.shape
        more_rows = max(0, rows - old_rows)
        more_columns = max(columns - old_columns, old_columns) if columns > old_columns else 0
        if more_rows or more_columns:
            self.table = np.pad(self.table, ((0, more_rows), (0, more_columns)))
            self._length = np.pad(self._length, (0, more_rows))
            self.reserved = np.pad(self.reserved, (0, more_rows))
            self.is_open = np.pad(self.is_open, (0, more_rows))
            self.free_rows += reversed(range(old_rows, old_rows + more_rows))
