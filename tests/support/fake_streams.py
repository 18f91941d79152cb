"""Streams that do their work when a test says so, for `flashmla_cupy.cache.fences`: which access
comes before which other one is known by vector clocks, and a race is an AssertionError."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple


class Event(NamedTuple):
    stream: int
    time: int  # accesses of the stream before it
    seen: dict[int, int]  # what the stream had waited for


class FakeStreams:
    """A StreamEvents, and the accesses to pages that are launched on its streams."""

    def __init__(self) -> None:
        self.time = defaultdict(int)  # accesses launched on each stream
        self.done = defaultdict(int)  # those that are done
        self.seen = defaultdict(lambda: defaultdict(int))  # [stream][other]: it waits for those
        self.events = 0
        self.held = {}
        self._reads = defaultdict(dict)  # page: {stream: time of the last one}
        self._writes = defaultdict(dict)

    # --- what Fences asks -----------------------------------------------------------------------

    def hold(self, stream):
        return self.held.setdefault(stream, f"stream {stream}")

    def record(self, stream):
        self.events += 1
        return Event(stream, self.time[stream], dict(self.seen[stream]))

    def is_done(self, event):
        return self.done[event.stream] >= event.time

    def wait(self, event):
        self.done[event.stream] = max(self.done[event.stream], event.time)

    def order(self, stream, event):
        seen = self.seen[stream]
        seen[event.stream] = max(seen[event.stream], event.time)
        for other, time in event.seen.items():
            seen[other] = max(seen[other], time)

    # --- what a test does -----------------------------------------------------------------------

    def read(self, stream, pages):
        self._access(stream, pages, self._reads, (self._writes,))

    def write(self, stream, pages):
        self._access(stream, pages, self._writes, (self._writes, self._reads))

    def finish(self, stream):
        """All work of the stream gets done, and what it waited for."""
        self.done[stream] = self.time[stream]
        for other, time in self.seen[stream].items():
            self.done[other] = max(self.done[other], time)

    def _access(self, stream, pages, kind, conflicting):
        self.time[stream] += 1
        for page in map(int, pages):
            for accesses in conflicting:
                for other, time in accesses[page].items():
                    ordered = max(self.seen[stream][other], self.done[other])
                    assert other == stream or time <= ordered, (
                        f"page {page}: an access on stream {stream} races with one on {other}"
                    )
            kind[page][stream] = self.time[stream]
