"""The pages of a pool, each in one of four states.

free       nobody holds it: it is on the stack `free`
active     `refcount` sequences and open steps hold it
cached     nobody holds it, but what it holds is a known prefix (`prefix`): it is taken when
           nothing is free any more, the one that was let go first
pending    nobody holds it, but launched work may still read it (`fences`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import OutOfPagesError
from .fences import Fence, Fences
from .prefix import PrefixIndex

Int32 = npt.NDArray[np.int32]


class PageCounts(NamedTuple):
    """How many pages of a pool are in which state; together they are all pages."""

    free: int  # held by nobody
    cached: int  # held by nobody, but a known prefix: taken when no page is free any more
    active: int  # held by sequences
    pending: int  # held by nobody, but launched work on another stream may still read them


class PageStates:
    """Who holds which page. Nothing here knows of sequences."""

    def __init__(self, num_pages: int, index: PrefixIndex, fences: Fences) -> None:
        self.num_pages, self.index, self.fences = num_pages, index, fences
        self.refcount = np.zeros(num_pages, np.int32)
        self.free = list(reversed(range(num_pages)))  # the last one is taken first
        self.cached: dict[int, Fence | None] = {}  # the one that was let go first is taken first
        self.pending: deque[tuple[Fence, list[int]]] = deque()
        # Pages that somebody let go whom others outlived, and may still read on another stream.
        self.outlived: dict[int, Fence] = {}

    def counts(self) -> PageCounts:
        self.reclaim()
        pending = sum(len(pages) for _, pages in self.pending)
        free, cached = len(self.free), len(self.cached)
        return PageCounts(free, cached, self.num_pages - free - cached - pending, pending)

    # --- taking and letting go -----------------------------------------------------------------

    def take(self, n: int) -> Int32:
        """n pages, held once each. Raises OutOfPagesError, and has taken none then."""
        if n > len(self.free):
            self._make_free(n)
        keep = len(self.free) - n
        pages = np.array(self.free[keep:][::-1], np.int32)
        del self.free[keep:]
        self.refcount[pages] = 1
        return pages

    def hold(self, pages: Int32) -> None:
        """Holds active pages, no page twice, once more."""
        self.refcount[pages] += 1

    def hold_published(self, pages: Iterable[int]) -> None:
        """Holds published pages, active or cached."""
        for page in pages:
            self.cached.pop(page, None)
            self.refcount[page] += 1

    def release(self, pages: Int32) -> None:
        """Lets go of pages, once for each time they are listed. The first one that becomes free is
        taken first again, a known prefix from its end."""
        np.subtract.at(self.refcount, pages, 1)
        is_dropped = self.refcount[pages] == 0
        fence = self.fences.fence() if len(pages) else None
        if fence is not None:
            self.outlived.update((page, fence) for page in pages[~is_dropped].tolist())
        dropped = list(dict.fromkeys(pages[is_dropped][::-1].tolist()))
        if len(self.index):
            published = self.index.is_published
            self.cached.update((page, fence) for page in dropped if published[page])
            dropped = [page for page in dropped if not published[page]]
        self._let_go(dropped, fence)

    def write(self, pages: Int32) -> None:
        """For pages with one holder who is going to write to them, on the latest stream."""
        if len(self.index):
            self.unpublish(pages[self.index.is_published[pages]].tolist())
        if self.outlived:
            fences = [self.outlived.pop(page, None) for page in pages.tolist()]
            if not all(fence is None or fence.is_done() for fence in fences):
                self.fences.order_latest()

    def unpublish(self, pages: Iterable[int]) -> None:
        """For published pages that are to be written."""
        for page in pages:
            self.index.remove(page)
            self.uncache(page)

    def uncache(self, page: int) -> None:
        """For a page that is published no longer."""
        if page in self.cached:
            self._let_go([page], self.cached.pop(page))

    # --- what waits ----------------------------------------------------------------------------

    def reclaim(self) -> None:
        """Makes free what waits for nothing any more. Does not wait."""
        while self.pending and self.pending[0][0].is_done():
            self.free += self.pending.popleft()[1]

    def wait(self) -> None:
        """Waits until no page is pending."""
        for fence in [*(fence for fence, _ in self.pending), *self.cached.values()]:
            if fence is not None:
                fence.wait()
        self.reclaim()

    def _let_go(self, pages: list[int], fence: Fence | None) -> None:
        if fence is None or fence.is_done():
            self.free += pages
        elif pages:
            self.pending.append((fence, pages))

    def _make_free(self, n: int) -> None:
        """At least n free pages, by evicting cached ones if need be."""
        self.reclaim()
        missing = n - len(self.free)
        ready = [page for page, fence in self.cached.items() if fence is None or fence.is_done()]
        if missing > len(ready):
            pending = sum(len(pages) for _, pages in self.pending) + len(self.cached) - len(ready)
            raise OutOfPagesError(n, len(self.free), len(ready), pending)
        if missing > 0:
            self.unpublish(ready[:missing])
