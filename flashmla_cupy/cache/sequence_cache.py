"""The sequences of a cache: what they hold, how they begin, share, shrink, rest and end.

PagedKVCache adds how they grow and are attended to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from ..calls import scalars
from ..calls.wording import kind
from ..errors import ArgTypeError, ScalarError, SequenceError
from ..frameworks import HOST, Adapter, framework
from . import audit
from .core import Core
from .page_states import PageCounts
from .pool import Pool
from .sequence import Sequence
from .step import tokens_of
from .tables import LastingTables


class SequenceCache:
    """A pool and its books."""

    def _own(self, made: Pool, max_seqs: Any, max_pages: Any, function: str) -> None:
        core = self._core = Core(made)
        layout = made.layout
        self.storage: Any = made.storage
        self.num_pages, self.num_layers, self.page_size = layout[:3]
        self.num_heads_kv = layout.num_heads_kv
        self.dtype: np.dtype[Any] = core.dtype
        self.max_seqs: int | None = None
        if max_seqs is not None:
            self.max_seqs = scalars.integer("max_seqs", max_seqs, function, least=1)
        self.max_pages_per_seq = self.num_pages
        if max_pages is not None:
            pages = scalars.integer("max_pages_per_seq", max_pages, function, least=1)
            self.max_pages_per_seq = min(pages, self.num_pages)
        if self.max_seqs is not None:
            core.lasting = LastingTables(made, core.launches, self.max_seqs, self.max_pages_per_seq)
        self._table = core.table
        self._saved: dict[Sequence, Any] = {}  # the rows of those that are swapped out

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        expected = "an object that can be copied or pickled"
        remedy = "Make another cache, and add the rows of its sequences to it."
        raise ArgTypeError("self", expected, "a PagedKVCache", remedy, "PagedKVCache")

    # --- what it holds -------------------------------------------------------------------------

    @property
    def device(self) -> int | str:
        """The CUDA device number of the pool, or "cpu"."""
        return "cpu" if self._core.place == HOST else self._core.place

    @property
    def free_pages(self) -> int:
        """How many pages nobody holds, those of known prefixes not included; see page_counts."""
        return self._core.states.counts().free

    @property
    def page_counts(self) -> PageCounts:
        """(free, cached, active, pending): how many pages are in which state."""
        return self._core.states.counts()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The handles of all sequences in the pool, oldest first."""
        return self._table.sequences

    @property
    def swapped(self) -> tuple[Sequence, ...]:
        """The handles of the sequences that are swapped out."""
        return tuple(self._table.away)

    def seqlen(self, seq: Sequence) -> int:
        """The tokens of a sequence, without those of an open step. Raises SequenceError for a freed
        or foreign handle."""
        if type(seq) is Sequence and seq in self._table.away:
            return self._table.away[seq][0]
        return self._table.length(self._table.row(seq, "PagedKVCache.seqlen"))

    def layer(self, i: int, framework: str | None = None) -> Any:
        """The pages of one layer, [num_pages, page_size, h_kv, 576]: a view, strided if there are
        several layers, which flash_mla_with_kvcache() takes as its k_cache. `framework`: another
        one than the cache's, "torch" for instance. Raises an ArgumentError."""
        i = self._core.layer(i, "PagedKVCache.layer")
        return self._core.pool.layer(i, self._adapter(framework, "PagedKVCache.layer").name)

    def __repr__(self) -> str:
        place = "cpu" if self._core.place == HOST else f"cuda:{self._core.place}"
        counts = self.page_counts
        layers = f" of {self.num_layers} layers" if self.num_layers > 1 else ""
        also = f", {counts.cached} cached" * (counts.cached > 0)
        also += f", {counts.pending} pending" * (counts.pending > 0)
        return (
            f"PagedKVCache({self.num_pages} pages of {self.page_size} tokens{layers},"
            f" {self.dtype.name}, {place}; {len(self.sequences)} sequences,"
            f" {self._table.tokens} tokens, {counts.free} pages free{also})"
        )

    def check(self) -> None:
        """Verifies the books, in time proportional to the pages; a broken one raises
        FlashMLAError. For tests and for debugging: no call should ever break them."""
        audit.check(self._table)

    def begin(self, token_ids: Iterable[int], salt: bytes | str = b"") -> tuple[Sequence, int]:
        """(a new sequence that is going to have these tokens, how many of them it has already).

        The full pages of the longest known prefix are shared, not copied, but for one token at
        least: append the rows of token_ids[cached:], by reserve() or append(). What becomes full of
        known tokens is a known prefix in turn, also after its sequence was freed, until its page is
        needed. Nothing is shared between sequences of different `salt`: give each tenant one, if
        none may find out, by the time that a prompt takes, what another one has asked.

        Raises an ArgumentError for ids that are none."""
        function = "PagedKVCache.begin"
        tokens = tokens_of("token_ids", token_ids, function)
        if isinstance(salt, str):
            salt = _encoded(salt, function)
        if not isinstance(salt, bytes):
            remedy = "Pass something that names the tenant."
            raise ArgTypeError("salt", "bytes or a string", kind(salt), remedy, function)
        self._core.stream()
        return self._table.begin(tokens, salt)

    def fork(self, seq: Sequence) -> Sequence:
        """A new sequence with the same tokens. Both share all pages; the last one is copied when
        either of them is about to write to it. Raises SequenceError."""
        return self._table.fork(self._table.row(seq, "PagedKVCache.fork", closed=True))

    def truncate(self, seq: Sequence, length: int) -> None:
        """Keeps the first `length` tokens of a sequence. Raises SequenceError, or ScalarError for
        more than it has."""
        function = "PagedKVCache.truncate"
        row = self._table.row(seq, function, closed=True)
        length = scalars.integer("length", length, function)
        if length > self._table.length(row):
            expected = f"at most {self._table.length(row)}, the tokens of {seq}"
            raise ScalarError("length", expected, f"{length}", "See seqlen().", function)
        self._table.truncate(row, length)

    def free(self, seq: Sequence) -> None:
        """Ends a sequence and gives back the pages that no other one holds.

        Raises SequenceError for a handle that was freed before, or is another cache's, and while a
        step is open on it."""
        self._table.free(seq, "PagedKVCache.free")
        self._saved.pop(seq, None)

    def swap_out(self, seq: Sequence) -> None:
        """Moves the rows of a sequence to host memory and gives its pages back. Waits for the work
        that was launched on the current stream. Raises SequenceError."""
        row = self._table.row(seq, "PagedKVCache.swap_out", closed=True)
        core = self._core
        self._saved[seq] = core.writer.save(self._table.pages_of(row), core.stream())
        self._table.leave(seq, row)

    def swap_in(self, seq: Sequence) -> None:
        """Brings a sequence back that was swapped out. Raises SequenceError for one that was not,
        or OutOfPagesError; then it is still in host memory."""
        function = "PagedKVCache.swap_in"
        if type(seq) is not Sequence or seq not in self._saved:
            self._table.row(seq, function)
            raise SequenceError(f"{function}(): {seq} is in the pool. swap_out() was not called.")
        core, stream = self._core, self._core.stream()
        made = self._table.come_back(seq)
        pages = self._table.pages_of(int(made.rows[0]))
        try:
            core.writer.restore(self._saved[seq], pages, stream)
        finally:
            self._table.settle(made, None)
        del self._saved[seq]

    def drop_prefixes(self) -> None:
        """Forgets all known prefixes, because the model's weights have changed, say."""
        self._table.drop_prefixes()

    def wait(self) -> None:
        """Waits until no page is pending: until launched work on other streams is done."""
        self._core.states.wait()

    def _adapter(self, name: Any, function: str) -> Adapter:
        if name is None:
            return self._core.framework
        known = ("numpy" if self._core.place == HOST else "cupy", "torch", "jax")
        if not isinstance(name, str) or name not in known:
            expected = f"one of {', '.join(map(repr, known))}, or None"
            remedy = "Name a framework whose arrays can lie beside the pool."
            raise ArgTypeError("framework", expected, kind(name), remedy, function)
        return framework(name)


def _encoded(salt: str, function: str) -> bytes:
    try:
        return salt.encode()
    except UnicodeEncodeError:
        remedy = "Pass bytes, or salt.encode('utf-8', 'surrogatepass')."
        expected = "bytes, or a string that UTF-8 can encode"
        raise ScalarError("salt", expected, "one with a lone surrogate", remedy, function) from None
