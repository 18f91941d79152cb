"""The rows of a page table: which sequence has which, its pages and its tokens.

`table` has the page numbers of each row, `_length` its tokens, and `reserved` those and the ones of
a step that is open on it. PageTable adds how sequences grow, share pages and end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..calls.wording import kind
from ..errors import ArgTypeError, SequenceError
from .known_tokens import Known, KnownTokens
from .page_states import PageStates
from .sequence import Sequence, require_distinct

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Index = npt.NDArray[np.intp]


class SequenceRows:
    """The sequences of a pool, and the pages that they hold."""

    def __init__(self, states: PageStates, page_size: int) -> None:
        self.states, self.page_size = states, page_size
        self.row_of: dict[Sequence, int] = {}  # of those in the pool, oldest first
        self.away: dict[Sequence, tuple[int, Known | None]] = {}  # swapped out: their tokens
        self.free_rows: list[int] = []
        self.table = np.zeros((0, 1), np.int32)  # [rows, columns]
        self._length = np.zeros(0, np.int32)  # [rows]
        self.reserved = np.zeros(0, np.int32)  # [rows]
        self.is_open = np.zeros(0, np.bool_)  # [rows] a step is open on it
        self.known = KnownTokens(states, page_size)
        self._owner = object()
        self._count = 0  # sequences ever added
        self._members = 0  # changes of who is in the pool
        self._latest: tuple[Any, int, Index] = (), -1, np.zeros(0, np.intp)

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

    def rows(self, seqs: tuple[Any, ...], function: str) -> Index:
        """The rows of sequences in the pool, [batch]."""
        try:
            return np.array([self.row_of[seq] for seq in seqs], np.intp)
        except (KeyError, TypeError):  # TypeError: what is no handle may have no hash
            return np.array([self.row(seq, function) for seq in seqs], np.intp)

    def closed_rows(self, seqs: tuple[Any, ...], function: str) -> Index:
        """The same, of sequences that differ and on which no step is open."""
        latest, members, rows = self._latest
        if members != self._members or latest != seqs:  # most steps are of those of the last one
            rows = self.rows(seqs, function)
            require_distinct(seqs, function)
            self._latest = seqs, self._members, rows
        if self.is_open[rows].any():
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
        self._members += 1
        self.known.set(row, known)
        return seq

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

    # --- inside --------------------------------------------------------------------------------

    def _pages(self, tokens: Any) -> Any:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)

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
