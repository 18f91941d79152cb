"""Which page holds which tokens of which sequence: the bookkeeping of PagedKVCache, on the host.

Two small arrays have a row for each sequence: `_table` (its page numbers) and `_length` (its
tokens). A page is either free, on the stack `_free`, or held; `_refcount` says by how many
sequences. Adding tokens takes two steps: claim() says where they go and changes nothing that can be
seen, commit() counts them. So whatever fails in between leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..calls.wording import kind
from ..errors import ArgTypeError, FlashMLAError, OutOfPagesError, SequenceError

Int32 = npt.NDArray[np.int32]
Index = npt.NDArray[np.intp]


class Sequence:
    """A handle for one sequence of one cache, from PagedKVCache.add(). It is valid until free(),
    and never stands for another sequence."""

    __slots__ = ("_owner", "number")

    def __init__(self, owner: object, number: int) -> None:
        self._owner = owner  # a tag of the table, not the table: a handle keeps no pool alive
        self.number = number

    def __repr__(self) -> str:
        return f"<sequence {self.number}>"


class Claim(NamedTuple):
    """Room for n more tokens of each of some sequences."""

    rows: Index  # [batch]
    length: Int32  # [batch] with the new tokens
    fresh: Int32  # pages to take from the free ones
    page: Int32  # [batch * n] where each new token goes
    slot: Int32  # [batch * n]


class PageTable:
    """The pages of a pool and the sequences that hold them."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._owner = object()
        self._count = 0  # sequences ever added
        self._rows: dict[Sequence, int] = {}  # of the living, oldest first
        self._free_rows: list[int] = []
        self._table = np.zeros((0, 1), np.int32)  # [rows, columns]
        self._length = np.zeros(0, np.int32)  # [rows]
        self._refcount = np.zeros(num_pages, np.int32)
        self._free = list(reversed(range(num_pages)))  # the last one is taken first

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The handles of the living sequences, oldest first."""
        return tuple(self._rows)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self._length[list(self._rows.values())].sum())

    def row(self, seq: Any, function: str) -> int:
        """The row of a living sequence. Raises SequenceError or ArgTypeError, as `function`."""
        if type(seq) is not Sequence:
            remedy = "Pass what add() returned."
            raise ArgTypeError("seq", "a sequence handle", kind(seq), remedy, function)
        row = self._rows.get(seq)
        if row is not None:
            return row
        reason = "was freed. Make a new one with add()."
        if seq._owner is not self._owner:
            reason = "belongs to another PagedKVCache. Pass it to the cache that added it."
        raise SequenceError(f"{function}(): sequence {seq.number} {reason}")

    def rows(self, seqs: tuple[Any, ...], function: str) -> Index:
        """The rows of living sequences, [batch]."""
        return np.array([self.row(seq, function) for seq in seqs], np.intp)

    def length(self, row: int) -> int:
        """The tokens of one sequence."""
        return int(self._length[row])

    def vacant_row(self) -> int:
        """The row of the next new sequence, with no tokens; register() makes it one."""
        if not self._free_rows:
            self._grow(rows=2 * len(self._length) + 8)
        self._length[self._free_rows[-1]] = 0
        return self._free_rows[-1]

    def register(self) -> Sequence:
        """Makes a sequence of the row that vacant_row() gave."""
        seq = Sequence(self._owner, self._count)
        self._count += 1
        self._rows[seq] = self._free_rows.pop()
        return seq

    def claim(self, rows: Index, n: int) -> Claim:
        """Room for n more tokens of each sequence; no row twice. Raises OutOfPagesError."""
        begin = self._length[rows]
        held, wanted = self._pages(begin), self._pages(begin.astype(np.int64) + n)
        needed = int((wanted - held).sum())
        if needed > len(self._free):
            raise OutOfPagesError(needed, len(self._free))
        self._grow(columns=int(wanted.max(initial=0)))
        fresh = np.array(self._free[len(self._free) - needed :][::-1], np.int32)
        column = np.arange(self._table.shape[1])
        which, where = np.nonzero((column >= held[:, None]) & (column < wanted[:, None]))
        self._table[rows[which], where] = fresh  # not seen before commit(): past the length
        position: Int32 = np.add.outer(begin, np.arange(n, dtype=np.int32))  # [batch, n]
        page = self._table[rows[:, None], position // self.page_size]
        return Claim(rows, begin + n, fresh, page.ravel(), (position % self.page_size).ravel())

    def commit(self, claim: Claim) -> None:
        """Counts the tokens of a claim; nothing may have changed since it was made."""
        del self._free[len(self._free) - len(claim.fresh) :]
        self._refcount[claim.fresh] += 1
        self._length[claim.rows] = claim.length

    def free(self, seq: Sequence, function: str) -> None:
        """Ends a sequence; pages that nobody else holds become free, its first one on top."""
        row = self.row(seq, function)
        pages = self._table[row, : self._pages(self.length(row))]
        self._refcount[pages] -= 1
        self._free += pages[self._refcount[pages] == 0][::-1].tolist()
        self._free_rows.append(row)
        del self._rows[seq]

    def export(self, rows: Index) -> tuple[Int32, Int32]:
        """(block_table [batch, max_pages], with 0 past the pages; cache_seqlens [batch])."""
        length = self._length[rows]
        held = self._pages(length)
        column = np.arange(max(1, held.max(initial=0)))  # an axis of size 0 has no address
        table = self._table[rows[:, None], column]
        table[column >= held[:, None]] = 0
        return table, length

    def check(self) -> None:
        """Raises FlashMLAError unless each page is in exactly one state: free, or held by as many
        sequences as its count says, and by none twice. Time proportional to the pages."""
        held: Counter[int] = Counter()
        for seq, row in self._rows.items():
            pages = self._table[row, : self._pages(self.length(row))].tolist()
            held.update(pages)
            if len(set(pages)) < len(pages):
                raise _broken(f"sequence {seq.number} holds a page twice")
        free = Counter(self._free)
        for page, count in enumerate(self._refcount.tolist()):
            if held[page] != count or free[page] != (count == 0):
                raise _broken(
                    f"page {page} is free {free[page]} times and held by {held[page]} sequences,"
                    f" but its count is {count}"
                )
        if set(held) | set(free) != set(range(self.num_pages)):
            raise _broken("a page outside the pool is in use")
        if sorted([*self._rows.values(), *self._free_rows]) != list(range(len(self._length))):
            raise _broken("a row of the table is lost, or two sequences share it")

    def _pages(self, tokens: Any) -> Any:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)

    def _grow(self, rows: int = 0, columns: int = 0) -> None:
        """Makes the two arrays large enough; columns at least double, so that it is rare."""
        old_rows, old_columns = self._table.shape
        more_rows = max(0, rows - old_rows)
        more_columns = max(columns - old_columns, old_columns) if columns > old_columns else 0
        if more_rows or more_columns:
            self._table = np.pad(self._table, ((0, more_rows), (0, more_columns)))
            self._length = np.pad(self._length, (0, more_rows))
            self._free_rows += reversed(range(old_rows, old_rows + more_rows))


def _broken(what: str) -> FlashMLAError:
    return FlashMLAError(f"The PagedKVCache is inconsistent: {what}. Please report this bug.")
