"""Known prefixes: which full page holds which tokens, behind which other pages.

A full page is published under a digest of all tokens up to its end:

    digest_0 = SHA-256(secret, salt)              secret: random, of one cache
    digest_i = SHA-256(digest_{i-1}, tokens of page i as int32, little-endian)

A look-up walks from the root. It follows an entry only if the entry's own tokens are equal and its
parent is the entry before it, so that not even two equal digests lead to another prefix's page.
With different salts nothing is shared, which is for tenants that must not find out, by the time a
prompt takes, what others have asked.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


class Entry:
    """A published page. Entries are told apart by identity: a page that is published again has
    another one."""

    __slots__ = ("digest", "page", "parent", "tokens")

    def __init__(self, page: int, digest: bytes, tokens: bytes, parent: Entry | None) -> None:
        self.page, self.digest, self.tokens, self.parent = page, digest, tokens, parent


class PrefixIndex:
    """The published pages of one pool."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.is_published = np.zeros(num_pages, np.bool_)
        self._secret = os.urandom(32)
        self._by_digest: dict[bytes, Entry] = {}
        self._by_page: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._by_page)

    def root(self, salt: bytes) -> bytes:
        """The digest of no tokens."""
        return _sha256(self._secret, salt)

    def find(self, root: bytes, tokens: Int32) -> list[Entry]:
        """The longest chain of published pages that `tokens` begins with, one token being left
        over at least: the last one has to be computed, or there would be no output."""
        found: list[Entry] = []
        digest, size = root, self.page_size
        for start in range(0, len(tokens) - size, size):
            own = _bytes(tokens[start : start + size])
            digest = _sha256(digest, own)
            entry = self._by_digest.get(digest)
            parent = found[-1] if found else None
            if entry is None or entry.tokens != own or entry.parent is not parent:
                break
            found.append(entry)
        return found

    def publish(
        self, page: int, root: bytes, tokens: Int32, parent: Entry | None
    ) -> tuple[Entry, int | None]:
        """(the entry of these tokens, one page of them, behind `parent`: of `page`, or of a page
        that was published before with the same; a page that is published no longer, if any)."""
        own = _bytes(tokens)
        digest = _sha256(parent.digest if parent is not None else root, own)
        known, displaced = self._by_digest.get(digest), None
        if known is not None:
            if known.tokens == own and known.parent is parent:
                return known, None
            displaced = known.page  # its parent is gone, so no look-up can reach it
            self.remove(displaced)
        entry = self._by_digest[digest] = self._by_page[page] = Entry(page, digest, own, parent)
        self.is_published[page] = True
        return entry, displaced

    def is_live(self, entry: Entry) -> bool:
        """Whether it is still published."""
        return self._by_page.get(entry.page) is entry

    def remove(self, page: int) -> None:
        """Forgets what the page held, because it is to be written."""
        entry = self._by_page.pop(page)
        del self._by_digest[entry.digest]
        self.is_published[page] = False

    def pages(self) -> list[int]:
        """All published pages."""
        return list(self._by_page)


def _bytes(tokens: Int32) -> bytes:
    return tokens.astype("<i4").tobytes()


def _sha256(*parts: bytes) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.digest()
