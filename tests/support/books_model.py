"""The books of a paged cache beside a naive model, for random tests of any length.

The model has a list of (token, row) for each sequence, where `row` is a number that no other
written row has: the contents of a page are the numbers of its rows. A few token values and two
salts make known prefixes frequent. Each operation takes integers, drawn by Hypothesis or by a
generator; what cannot be done must raise its error and change nothing.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import Counter

import numpy as np
import pytest
from support.fake_streams import FakeStreams

from flashmla_cupy import errors
from flashmla_cupy.cache.audit import check
from flashmla_cupy.cache.fences import Fences
from flashmla_cupy.cache.page_states import PageStates
from flashmla_cupy.cache.page_table import PageTable
from flashmla_cupy.cache.prefix import PrefixIndex

PAGE = 4
MOST = 6  # sequences, so that not all that happens is a lack of pages
SALTS = (b"", b"tenant")
PROMPTS = [[0] * 3 * PAGE + [0, 1], [0] * PAGE + [1] * 2 * PAGE + [0, 1], [1, 0] * 2 * PAGE]


class NotNow(Exception):
    """There is nothing to do the operation on, or no room."""


class Step:
    def __init__(self, seqs, counts, made, rows, stream):
        self.seqs, self.counts, self.made, self.rows, self.stream = seqs, counts, made, rows, stream


class BooksModel:
    def __init__(self, num_pages=12, streams=1):
        self.streams, self.device = streams, FakeStreams()
        self.states = PageStates(num_pages, PrefixIndex(num_pages, PAGE), Fences(self.device))
        self.table = PageTable(self.states, PAGE)
        self.contents = np.zeros((num_pages, PAGE), np.int64)  # numbers of rows
        self.numbers = itertools.count(1)
        self.held = {}  # sequence: its row numbers
        self.tokens = {}  # sequence: (salt, tokens of its prompt), if known
        self.stream_of = {}
        self.away = {}  # sequence: the row numbers that were saved
        self.dead = []
        self.steps = []
        self.prefix_of = {}  # row number: (salt, all tokens up to it)
        self.happened = Counter()

    # --- operations -----------------------------------------------------------------------------

    OPERATIONS = (
        "begin", "begin", "begin", "add", "reserve", "reserve", "reserve", "settle", "settle",
        "settle", "fork", "fork", "truncate", "free", "free", "swap_out", "swap_in", "finish",
        "misuse", "drop_prefixes", "wait",
    )  # fmt: skip

    def operate(self, name, a, b, c):
        """The operation, on three integers."""
        try:
            getattr(self, name)(a, b, c)
        except NotNow:
            name = f"no {name}"
        self.happened[name] += 1

    def begin(self, a, b, c):
        if len(self.held) > MOST:
            raise NotNow
        tokens = [*PROMPTS[a % 3][: b % (3 * PAGE + 2)]]
        if tokens and b % 5 == 0:
            tokens[-1] ^= 1
        salt, stream = SALTS[c % 4 == 0], self.pick_stream(a)
        self.states.fences.use(stream)
        expected = self.longest_known(salt, tokens)
        seq, cached = self.table.begin(np.array(tokens, np.int32), salt)
        assert cached % PAGE == 0 and cached <= max(0, len(tokens) - 1)
        row = self.table.row(seq, "test")
        assert self.table.length(row) == cached
        pages = self.table.pages_of(row)
        self.device.read(stream, pages)
        found = self.contents[pages].ravel().tolist()
        for i, number in enumerate(found):
            assert self.prefix_of[number] == (salt, tuple(tokens[: i + 1])), "another's prefix"
        assert cached <= expected
        self.held[seq], self.tokens[seq] = found, (salt, tokens)
        self.stream_of[seq] = stream
        self.happened["hit"] += cached > 0
        if cached:
            self.happened["cached tokens"] += cached

    def add(self, a, b, c):
        if len(self.held) > MOST:
            raise NotNow
        self.table.vacant_row()
        seq = self.table.register()
        self.held[seq], self.stream_of[seq] = [], self.pick_stream(a)

    def reserve(self, a, b, c):
        rng = random.Random(a)
        closed = [seq for seq in self.held if not self.step_of(seq)]
        if not closed:
            raise NotNow
        cached = set(self.states.cached)
        stream = self.stream_of[closed[b % len(closed)]]
        closed = [seq for seq in closed if self.stream_of[seq] == stream]
        seqs = rng.sample(closed, rng.randint(1, min(3, len(closed))))
        counts = [rng.choice((0, 1, 1, 2, PAGE - 1, PAGE, PAGE + 1)) for _ in seqs]
        if c % 3 == 0:
            counts = [1] * len(seqs)  # as most steps
        self.states.fences.use(stream)
        rows = self.table.closed_rows(tuple(seqs), "test")
        needed = self.needed(seqs, counts)
        given = 1 if set(counts) == {1} else np.array(counts, np.int32)
        made = self.attempt(needed, lambda: self.table.reserve(rows, given))
        self.happened["evicted"] += len(cached - set(self.states.cached))
        self.happened["copied"] += len(made.copied)
        self.device.read(stream, made.source)
        self.device.write(stream, made.target)
        self.contents[made.target] = self.contents[made.source]
        slots = made.slots
        assert slots.shape == (len(seqs), max(counts))
        written = {}
        live = slots[slots >= 0]
        assert not self.states.index.is_published[live // PAGE].any()
        for seq, count, of in zip(seqs, counts, slots.tolist(), strict=True):
            most = len(of)
            assert all(slot == -1 for slot in of[: most - count])
            written[seq] = []
            for slot in of[most - count :]:
                number = next(self.numbers)
                self.contents[slot // PAGE, slot % PAGE] = number
                written[seq].append(number)
        assert len(set(live.tolist())) == len(live), "two tokens in one slot"
        self.device.write(stream, np.unique(live // PAGE))
        self.steps.append(Step(seqs, counts, made, written, stream))
        self.read_all(seqs, stream)

    def settle(self, a, b, c):
        if not self.steps:
            raise NotNow
        step = self.steps.pop(a % len(self.steps))
        rng = random.Random(b)
        if c % 4 < 2:
            accepted = None
        elif c % 4 == 2:
            accepted = [0] * len(step.seqs)
        else:
            accepted = [rng.randint(0, count) for count in step.counts]
        kept = step.counts if accepted is None else accepted
        for seq, n in zip(step.seqs, kept, strict=True):
            for number in step.rows[seq][:n]:
                self.held[seq].append(number)
                self.note_prefix(seq, number)
        self.states.fences.use(step.stream)
        self.table.settle(step.made, None if accepted is None else np.array(accepted, np.int32))

    def fork(self, a, b, c):
        seq = self.pick_closed(a)
        if seq is None or len(self.held) > MOST:
            raise NotNow
        new = self.table.fork(self.table.row(seq, "test", closed=True))
        self.held[new], self.stream_of[new] = list(self.held[seq]), self.stream_of[seq]
        if seq in self.tokens:
            self.tokens[new] = self.tokens[seq]

    def truncate(self, a, b, c):
        seq = self.pick_closed(a)
        if seq is None:
            raise NotNow
        n = b % (len(self.held[seq]) + 1)
        self.table.truncate(self.table.row(seq, "test", closed=True), n)
        del self.held[seq][n:]
        if seq in self.tokens:
            salt, tokens = self.tokens[seq]
            self.tokens[seq] = salt, tokens[:n]

    def free(self, a, b, c):
        seq = self.pick_closed(a)
        if self.away and b % 4 == 0:
            seq = list(self.away)[a % len(self.away)]
        if seq is None:
            raise NotNow
        if seq in self.held:
            self.table.closed_rows((seq,), "test")
        self.table.free(seq, "test")
        with pytest.raises(errors.SequenceError, match="was freed"):
            self.table.closed_rows((seq,), "test")
        self.held.pop(seq, None), self.away.pop(seq, None), self.tokens.pop(seq, None)
        self.dead = [*self.dead[-10:], seq]

    def swap_out(self, a, b, c):
        seq = self.pick_closed(a)
        if seq is None:
            raise NotNow
        row = self.table.row(seq, "test", closed=True)
        self.states.fences.use(self.stream_of[seq])
        self.device.read(self.stream_of[seq], self.table.pages_of(row))
        self.table.leave(seq, row)
        self.away[seq] = self.held.pop(seq)

    def swap_in(self, a, b, c):
        if not self.away:
            raise NotNow
        seq = list(self.away)[a % len(self.away)]
        self.states.fences.use(self.stream_of[seq])
        needed = -(-len(self.away[seq]) // PAGE)
        made = self.attempt(needed, lambda: self.table.come_back(seq))
        slots = made.slots.ravel()
        self.held[seq] = self.away.pop(seq)
        self.contents[slots // PAGE, slots % PAGE] = self.held[seq]
        self.device.write(self.stream_of[seq], np.unique(slots // PAGE))
        self.table.settle(made, None)

    def finish(self, a, b, c):
        self.device.finish(self.pick_stream(a))

    def wait(self, a, b, c):
        if a % 8:
            raise NotNow
        self.states.wait()
        assert self.states.counts().pending == 0

    def drop_prefixes(self, a, b, c):
        if a % 32:
            raise NotNow
        self.table.drop_prefixes()
        assert self.states.counts().cached == 0
        self.tokens.clear()
        self.prefix_of.clear()

    def misuse(self, a, b, c):
        before = self.fingerprint()
        for seq in self.dead[-2:]:
            for call in (
                lambda: self.table.free(seq, "test"),  # noqa: B023
                lambda: self.table.row(seq, "test"),  # noqa: B023
                lambda: self.table.rows([*self.held, seq], "test"),  # noqa: B023
            ):
                with pytest.raises(errors.SequenceError, match="was freed"):
                    call()
        for seq in list(self.away)[:2]:
            with pytest.raises(errors.SequenceError, match="was swapped out"):
                self.table.row(seq, "test")
        for step in self.steps[:1]:
            for seq in step.seqs[:2]:
                with pytest.raises(errors.SequenceError, match="open step"):
                    self.table.free(seq, "test")
                with pytest.raises(errors.SequenceError, match="open step"):
                    self.table.closed_rows((seq,), "test")
        assert self.fingerprint() == before

    # --- what should be so ----------------------------------------------------------------------

    def verify(self):
        """Every invariant, by the model and by check()."""
        check(self.table)
        states = self.states
        assert list(self.table.sequences) == list(self.table.row_of)
        assert set(self.table.sequences) == set(self.held)
        holders = Counter()
        for seq, numbers in self.held.items():
            row = self.table.row(seq, "test")
            assert self.table.length(row) == len(numbers)
            pages = self.table.pages_of(row)
            holders.update(pages.tolist())
            step = self.step_of(seq)
            expected = numbers + (step.rows[seq] if step else [])
            assert len(pages) == -(-len(expected) // PAGE)
            found = self.contents[pages].ravel()[: len(expected)].tolist()
            assert found == expected, "a row differs from what was written"
        for step in self.steps:
            holders.update(step.made.source.tolist())
        assert {p: n for p, n in enumerate(states.refcount.tolist()) if n} == dict(holders)
        waiting = [page for _, pages in states.pending for page in pages]
        everywhere = [*states.free, *states.cached, *waiting, *holders]
        assert sorted(everywhere) == list(range(states.num_pages)), "a page is lost or twice"
        if self.table.row_of:
            rows = np.array(list(self.table.row_of.values()))
            table, lengths = self.table.export(rows)
            for row, of, n in zip(rows, table, lengths, strict=True):
                held = -(-int(n) // PAGE)
                assert of[:held].tolist() == self.table.pages_of(row).tolist()
                assert not of[held:].any()

    def end(self):
        """Nothing is left when all are gone and all work is done."""
        while self.steps:
            self.settle(0, 0, 0)
        for seq in [*self.held, *self.away]:
            self.table.free(seq, "test")
        self.held.clear(), self.away.clear()
        self.states.wait()
        counts = self.states.counts()
        assert counts.free + counts.cached == self.states.num_pages
        assert len(self.states.take(self.states.num_pages)) == self.states.num_pages

    # --- inside ---------------------------------------------------------------------------------

    def attempt(self, needed, call):
        """The result of call(), which must fail if, and only if, pages are missing."""
        before = self.fingerprint()
        try:
            return call()
        except errors.OutOfPagesError as error:
            failure = error
        assert self.fingerprint() == before, "a failed reservation changed something"
        assert failure.needed == needed > failure.free + failure.evictable
        counted = failure.free + failure.evictable + failure.pending
        assert counted == int((self.states.refcount == 0).sum())
        self.happened["full"] += 1
        raise NotNow

    def pick_stream(self, a):
        return a % self.streams

    def pick_closed(self, a):
        closed = [seq for seq in self.held if not self.step_of(seq)]
        return closed[a % len(closed)] if closed else None

    def step_of(self, seq):
        return next((step for step in self.steps if seq in step.seqs), None)

    def read_all(self, seqs, stream):
        for seq in seqs:
            self.device.read(stream, self.table.pages_of(self.table.row(seq, "test")))

    def note_prefix(self, seq, number):
        if seq in self.tokens:
            salt, tokens = self.tokens[seq]
            n = len(self.held[seq])
            if n <= len(tokens):
                self.prefix_of[number] = salt, tuple(tokens[:n])

    def longest_known(self, salt, tokens):
        """Tokens that any live or forgotten row could give at most."""
        known = set(self.prefix_of.values())
        n = 0
        while n + PAGE < len(tokens) and (salt, tuple(tokens[: n + PAGE])) in known:
            n += PAGE
        return n

    def needed(self, seqs, counts):
        """Pages that a reservation takes: for new pages, and for copies of shared last ones."""
        refcount, tails = self.states.refcount, Counter()
        needed = 0
        for seq, n in zip(seqs, counts, strict=True):
            k = len(self.held[seq])
            needed += -(-(k + n) // PAGE) + -k // PAGE
            if k % PAGE and n:
                tails[int(self.table.pages_of(self.table.row(seq, "test"))[-1])] += 1
        for page, writers in tails.items():
            if refcount[page] > 1:
                needed += writers - (writers == refcount[page])
        return needed

    def fingerprint(self):
        """Everything that a failed call must leave alone. (What waits may have become free.)"""
        states, table = self.states, self.table
        states.reclaim()
        return (
            tuple(states.free), tuple(states.cached), states.refcount.tobytes(),
            tuple(tuple(pages) for _, pages in states.pending), frozenset(states.index.pages()),
            tuple((*item, table.length(item[1])) for item in table.row_of.items()),
            tuple(table.pages_of(row).tobytes() for row in table.row_of.values()),
            tuple((row, known.tokens.tobytes()) for row, known in table.known.of_row.items()),
            tuple(table.away), tuple(table.kept_for_rollback.items()),
        )  # fmt: skip


def run(seed, operations, *, num_pages=12, streams=1, every=1):
    """Random operations, verified after every so many; returns the model at its end."""
    rng = random.Random(seed)
    model = BooksModel(num_pages, streams)
    for i in range(operations):
        name = rng.choice(model.OPERATIONS)
        model.operate(name, rng.getrandbits(30), rng.getrandbits(30), rng.getrandbits(30))
        if i % every == 0:
            model.verify()
    model.end()
    return model


def main() -> None:
    """python -m support.books_model OPERATIONS [STREAMS [SEED]]: a long run, with its speed."""
    given = list(map(int, sys.argv[1:]))
    operations, streams, seed = [*given, *(10_000, 1, 0)[len(given) :]]
    start, happened, done = time.perf_counter(), Counter(), 0
    while done < operations:
        part = min(10_000, operations - done)
        happened += run(seed, part, streams=streams).happened
        seed, done = seed + 1, done + part
        rate = done / (time.perf_counter() - start)
        print(f"\r{done:,} operations, {rate:,.0f} a second", end="", flush=True)
    print(f"\n0 violations. {dict(sorted(happened.items()))}")


if __name__ == "__main__":
    main()
