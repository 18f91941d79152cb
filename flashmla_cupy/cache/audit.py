"""PagedKVCache.check(): whether the books agree with one another.

What has to hold:
    a page is in exactly one of the states free, active, cached and pending
    its count is the number of sequences, and of open steps, that hold it; none holds it twice
    a sequence has pages for its tokens and those of an open step, and no more
    a page in the index of known prefixes is neither free nor pending, and full of tokens that are
    those of the sequences that know it by its entry
    each row of the table belongs to one sequence, or to none
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..errors import FlashMLAError
from .page_states import PageStates
from .page_table import PageTable


def check(table: PageTable) -> None:
    """Raises FlashMLAError for the first thing that does not hold. Time proportional to the
    pages."""
    held: Counter[int] = Counter(table.kept_for_rollback)
    for seq, row in table.row_of.items():
        pages = table.pages_of(row).tolist()
        held.update(pages)
        if len(set(pages)) < len(pages):
            raise broken(f"sequence {seq.number} holds a page twice")
        length, reserved = table.length(row), int(table.reserved[row])
        if length > reserved or (length < reserved and not table.is_open[row]):
            raise broken(f"sequence {seq.number} has {length} tokens, but room for {reserved}")
    _check_states(table.states, held)
    rows = sorted([*table.row_of.values(), *table.free_rows])
    if rows != list(range(len(table.reserved))):
        raise broken("a row of the table is lost, or two sequences share it")
    if set(table.away) & set(table.row_of):
        raise broken("a sequence is swapped out and in the pool")
    _check_known(table)


def _check_states(states: PageStates, held: Counter[int]) -> None:
    free, cached = Counter(states.free), Counter(list(states.cached))
    pending = Counter(page for _, pages in states.pending for page in pages)
    for page, count in enumerate(states.refcount.tolist()):
        waits = cached[page] + pending[page]
        if held[page] != count or free[page] + waits != (count == 0):
            also = f", cached {cached[page]} and pending {pending[page]} times" if waits else ""
            raise broken(
                f"page {page} is free {free[page]} times and held by {held[page]} sequences{also},"
                f" but its count is {count}"
            )
    if (set(held) | set(free) | set(cached) | set(pending)) != set(range(states.num_pages)):
        raise broken("a page outside the pool is in use")
    published = set(states.index.pages())
    if published != set(np.flatnonzero(states.index.is_published).tolist()):
        raise broken("the marks of published pages differ from the index")
    if not set(cached) <= published:
        raise broken("a cached page is not published")
    if published & (set(free) | set(pending)):
        raise broken("a published page is free or pending")


def _check_known(table: PageTable) -> None:
    size = table.page_size
    if not set(table.known.of_row) <= set(table.row_of.values()):
        raise broken("the tokens of a freed sequence are known")
    for row, known in table.known.of_row.items():
        if len(known.chain) > table.length(row) // size:
            raise broken("a page that is not full is published")
        for i, entry in enumerate(known.chain):
            own = known.tokens[i * size : (i + 1) * size].astype("<i4").tobytes()
            if entry.tokens != own or entry.parent is not (known.chain[i - 1] if i else None):
                raise broken(f"page {entry.page} is published with other tokens")


def broken(what: str) -> FlashMLAError:
    """The error of books that contradict themselves."""
    return FlashMLAError(f"The PagedKVCache is inconsistent: {what}. Please report this bug.")
