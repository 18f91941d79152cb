"""What is known of the tokens of sequences, so that their full pages become known prefixes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .page_states import PageStates
from .prefix import Entry, Int32


class Known(NamedTuple):
    """Of one sequence."""

    root: bytes  # the digest of no tokens, with the sequence's salt
    tokens: Int32  # the first ones of the sequence, or more than it has yet
    chain: list[Entry]  # of its first full pages: their published twins, or they themselves


class KnownTokens:
    """Of the sequences that were begun with token ids, by their rows in the page table."""

    def __init__(self, states: PageStates, page_size: int) -> None:
        self._states, self._page_size = states, page_size
        self.of_row: dict[int, Known] = {}

    def find(self, tokens: Int32, salt: bytes) -> Known:
        """What is known of a new sequence with these tokens."""
        index = self._states.index
        root = index.root(salt)
        return Known(root, tokens, index.find(root, tokens))

    def set(self, row: int, known: Known | None) -> None:
        """For a new sequence."""
        if known is not None:
            self.of_row[row] = known._replace(chain=list(known.chain))

    def get(self, row: int) -> Known | None:
        return self.of_row.get(row)

    def forget(self, row: int) -> None:
        self.of_row.pop(row, None)

    def clear(self) -> None:
        """Forgets all of them, and the known prefixes."""
        self._states.unpublish(self._states.index.pages())
        self.of_row.clear()

    def truncate(self, row: int, length: int) -> None:
        """The sequence has so many tokens left."""
        known = self.of_row.get(row)
        if known is not None:
            del known.chain[length // self._page_size :]
            self.of_row[row] = known._replace(tokens=known.tokens[:length])

    def extend(self, row: int, length: int, tokens: Int32) -> None:
        """Further tokens of a sequence of that length, if all of those are known; else ignored."""
        known = self.of_row.get(row)
        if known is not None and len(known.tokens) == length:
            self.of_row[row] = known._replace(tokens=np.concatenate([known.tokens, tokens]))

    def publish(self, row: int, length: int, pages: Int32) -> None:
        """Publishes the full pages whose tokens are known."""
        known = self.of_row.get(row)
        if known is None:
            return
        size, index = self._page_size, self._states.index
        for i in range(len(known.chain), min(length, len(known.tokens)) // size):
            parent = known.chain[-1] if known.chain else None
            tokens = known.tokens[i * size : (i + 1) * size]
            entry, displaced = index.publish(int(pages[i]), known.root, tokens, parent)
            known.chain.append(entry)
            if displaced is not None:
                self._states.uncache(displaced)
