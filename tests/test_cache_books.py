"""The books of the paged cache: random operations against a naive model, planted bugs that the
model must notice, and what no random operation would find.

A long run, by hand:

    PYTHONPATH=tests python -m support.books_model 1000000
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.books_model import PAGE, BooksModel, run
from support.fake_streams import FakeStreams

from flashmla_cupy import errors
from flashmla_cupy.cache import (
    audit,
    fences,
    known_tokens,
    page_states,
    page_table,
    prefix,
    sequence_rows,
)
from flashmla_cupy.cache.fences import Fences
from flashmla_cupy.cache.page_states import PageStates
from flashmla_cupy.cache.page_table import PageTable
from flashmla_cupy.cache.prefix import PrefixIndex


@pytest.mark.parametrize("streams", [1, 3])
def test_random_operations_agree_with_the_model(streams):
    happened = sum(
        (run(seed, 1500, streams=streams).happened for seed in range(4)), start=Counter()
    )
    for what in ("hit", "copied", "evicted", "full", "settle", "swap_in", "truncate", "fork"):
        assert happened[what] > 5, happened


# --- Hypothesis --------------------------------------------------------------------------------


class Books(RuleBasedStateMachine):
    """Any order of operations; Hypothesis makes the shortest one that fails."""

    streams = 1

    def __init__(self):
        super().__init__()
        self.model = BooksModel(num_pages=8, streams=self.streams)

    @rule(
        name=st.sampled_from(sorted(set(BooksModel.OPERATIONS))),
        a=st.integers(0, 2**20),
        b=st.integers(0, 2**20),
        c=st.integers(0, 2**20),
    )
    def operate(self, name, a, b, c):
        self.model.operate(name, a, b, c)

    @invariant()
    def holds(self):
        self.model.verify()

    def teardown(self):
        self.model.end()


class BooksOnStreams(Books):
    streams = 3


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
TestBooksOnStreams = BooksOnStreams.TestCase
TestBooksOnStreams.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


# --- planted bugs ------------------------------------------------------------------------------

BUGS = {  # name: (module, what is there, what a careless hand would write)
    "a fork does not count": (page_table, "self.states.hold(self.table[row, :held])", "pass"),
    "no copy on write": (
        page_table, "    shared = self.states.refcount[page] > 1", "    shared = page < 0"
    ),
    "no copy on write of one token": (
        page_table, "is_shared = self.states.refcount[page] > 1", "is_shared = page < 0"
    ),
    "a published page is written by one token": (
        page_table, "self.states.write(page[slot > 0])", "pass"
    ),
    "a shared page is written before another's end": (
        page_table, "np.argsort(-begin[writes], kind=\"stable\")", "range(len(page))"
    ),
    "the copied page is not let go": (
        page_table, "of.target[~keeps], of.source[keeps]", "of.target[~keeps]"
    ),
    "a rollback keeps the copy": (
        page_table,
        "self.table[of.rows[back], of.begin[back] // self.page_size] = of.source[~keeps]",
        "pass",
    ),
    "a partial commit keeps all pages": (
        page_table, "let_go.append(self.table[of.rows[which], where])", "pass"
    ),
    "truncate rounds down": (
        page_table,
        "old, new = self._pages(self.length(row)), self._pages(length)",
        "old, new = self._pages(self.length(row)), length // self.page_size",
    ),
    "truncate keeps the known chain": (
        known_tokens, "del known.chain[length // self._page_size :]", "pass"
    ),
    "the whole prompt is taken for known": (
        prefix, "range(0, len(tokens) - size, size)", "range(0, len(tokens) - size + 1, size)"
    ),
    "salts are ignored": (prefix, "return _sha256(self._secret, salt)", "return self._secret"),
    "a published page is written": (
        page_states, "self.unpublish(pages[self.index.is_published[pages]].tolist())", "pass"
    ),
    "an evicted page stays published": (
        page_states,
        "self.unpublish(ready[:missing])",
        "self.free += [self.cached.pop(page) or page for page in ready[:missing]]",
    ),
    "a hit stays evictable": (page_states, "self.cached.pop(page, None)\n            ", ""),
    "taken by parts when there are too few": (
        page_states,
        "raise OutOfPagesError(n, len(self.free), len(ready), pending)",
        "error = OutOfPagesError(n, len(self.free), len(ready), pending)\n"
        "            self.free.clear()\n            raise error",
    ),
    "freed pages are not fenced": (
        fences,
        "if not self._left or self._latest is None:\n            return None\n        return",
        "return None\n        return",
    ),
    "pending pages are free at once": (
        page_states, "while self.pending and self.pending[0][0].is_done():", "while self.pending:"
    ),
    "a new stream does not wait": (
        fences, "for event in self._left.values():\n                self._device.order(stream",
        "for event in ():\n                self._device.order(stream",
    ),
    "others' reads of a page are forgotten": (
        page_states, "if self.outlived:", "if False:"
    ),
    "pages that another stream is writing are read": (
        page_table, "if pages:\n            self.states", "if False:\n            self.states"
    ),
    "no vacant row": (page_table, "self.free_rows.append(row)", "pass"),
    "rows of freed sequences are remembered": (sequence_rows, "members != self._members or ", ""),
}  # fmt: skip


def plant(monkeypatch, module, old, new):
    """The classes of the module as they would be with one place changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} comes {source.count(old)} times"
    spec = importlib.util.spec_from_loader(module.__name__, loader=None)
    changed = importlib.util.module_from_spec(spec)
    changed.__package__ = module.__package__
    with monkeypatch.context() as while_executed:  # dataclasses and typing look there
        while_executed.setitem(sys.modules, module.__name__, changed)
        exec(
            compile(source.replace(old, new), f"{module.__file__} (planted)", "exec"), vars(changed)
        )
    for name, value in vars(changed).items():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for attribute, function in vars(value).items():
                if inspect.isfunction(function):
                    monkeypatch.setattr(getattr(module, name), attribute, function)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(monkeypatch, bug):
    plant(monkeypatch, *BUGS[bug])
    # An assertion, or books that break down; but no plant that makes no sense.
    with pytest.raises((Exception, pytest.fail.Exception)) as noticed:
        test_a_page_is_not_written_while_another_stream_reads_it()
        test_a_rollback_finds_the_shared_page_as_it_was()
        for seed in range(20):
            run(seed, 1500, streams=1 + 2 * (seed % 2))
    assert not isinstance(noticed.value, (NameError, SyntaxError))


def test_no_bug_is_noticed_where_none_is(monkeypatch):
    plant(monkeypatch, page_states, "def wait(self)", "def wait(self) ")
    run(0, 300, streams=3)


# --- known prefixes ----------------------------------------------------------------------------


def books(num_pages=16, device=None):
    device = device or FakeStreams()
    states = PageStates(num_pages, PrefixIndex(num_pages, PAGE), Fences(device))
    states.fences.use(0)
    return PageTable(states, PAGE)


def grown(table, tokens, salt=b""):
    """A sequence that has all these tokens."""
    seq, cached = table.begin(np.array(tokens, np.int32), salt)
    row = np.array([table.row(seq, "test")])
    table.settle(table.reserve(row, len(tokens) - cached), None)
    return seq, cached


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)]
)
def test_one_token_is_always_left_to_compute(length, cached):
    table = books()
    grown(table, range(12))
    assert grown(table, range(length))[1] == cached


def test_a_prefix_outlives_its_sequence_until_its_pages_are_needed():
    table = books(num_pages=4)
    first, _ = grown(table, range(9))
    table.free(first, "test")
    assert table.states.counts() == (2, 2, 0, 0)
    again, cached = grown(table, [*range(8), 100])
    assert cached == 8
    table.free(again, "test")
    other, _ = grown(table, range(50, 61))  # 3 pages, so the second one of the two is evicted
    assert table.states.counts() == (0, 1, 3, 0)
    table.free(other, "test")
    assert grown(table, range(9))[1] == 4


def test_no_two_salts_share():
    table = books(64)
    grown(table, range(9), b"a")
    for salt in (b"", b"b", b"aa", b"a\0"):
        assert grown(table, range(9), salt)[1] == 0
    assert grown(table, range(9), b"a")[1] == 8


def test_two_caches_have_no_digest_in_common():
    one, other = (books().states.index.root(b"") for _ in range(2))
    assert one != other
    assert len(one) == 32


@pytest.mark.parametrize("forged", ["constant", "own tokens only"])
def test_equal_digests_lead_to_no_other_prefix(monkeypatch, forged):
    """The tokens are compared, and so are the pages before them."""
    if forged == "constant":
        monkeypatch.setattr(prefix, "_sha256", lambda *parts: b"0" * 32)
    else:
        real = prefix._sha256
        monkeypatch.setattr(prefix, "_sha256", lambda *parts: real(parts[-1]))
    rng = np.random.default_rng(0)
    table = books(400)
    truth = {}  # page: its salt and all tokens up to its end
    for _ in range(300):
        tokens = rng.integers(0, 2, 3 * PAGE + 1, np.int32)
        seq, cached = grown(table, tokens)
        pages = table.pages_of(table.row(seq, "test")).tolist()
        for i, page in enumerate(pages[:3]):
            mine = tokens[: (i + 1) * PAGE].tolist()
            if i * PAGE < cached:
                assert truth[page] == mine
            truth[page] = mine
        audit.check(table)
        table.free(seq, "test")


def test_tokens_of_a_dropped_prefix_are_computed_again():
    table = books()
    seq, _ = grown(table, range(9))
    table.drop_prefixes()
    table.settle(table.reserve(np.array([table.row(seq, "test")]), 8), None)
    assert grown(table, range(9))[1] == 0


def test_generated_tokens_become_a_known_prefix_when_they_are_told():
    table = books()
    seq, _ = grown(table, range(6))
    row = table.row(seq, "test")
    for tokens in ([6], [7, 8]):
        made = table.reserve(np.array([row]), len(tokens))
        table.extend_known(row, np.array(tokens, np.int32))
        table.settle(made, None)
    assert grown(table, range(9))[1] == 8


# --- streams -----------------------------------------------------------------------------------


def test_one_stream_costs_no_event():
    assert run(3, 500, streams=1).device.events == 0


def test_what_is_pending_is_told_and_can_be_waited_for():
    device = FakeStreams()
    table = books(4, device)
    row = np.array([table.row(grown(table, range(9))[0], "test")])
    table.drop_prefixes()
    device.read(0, table.pages_of(int(row[0])))
    table.states.fences.use(1)
    table.free(table.sequences[0], "test")
    assert table.states.counts() == (1, 0, 0, 3)
    table.vacant_row()
    with pytest.raises(errors.OutOfPagesError, match=r"3 wait for launched work\. Call wait"):
        table.begin(np.arange(1, dtype=np.int32), b"")
        table.reserve(np.array([table.row(table.sequences[0], "test")]), 16)
    table.states.wait()
    assert table.states.counts() == (4, 0, 0, 0)


def test_a_page_is_not_written_while_another_stream_reads_it():
    """Two sequences share a page, one of them on another stream and freed while it is being read;
    then nobody else holds the page, and the first one is cut back into it and goes on."""
    device = FakeStreams()
    table = books(device=device)
    first, _ = grown(table, range(5))
    device.write(0, table.pages_of(table.row(first, "test")))  # so that stream 0 is not idle
    table.states.fences.use(1)
    second, cached = grown(table, [*range(4), 9])
    assert cached == 4
    shared = table.pages_of(table.row(first, "test"))[:1]
    device.read(1, shared)
    table.free(second, "test")
    table.states.fences.use(0)
    row = table.row(first, "test")
    table.truncate(row, 2)
    made = table.reserve(np.array([row]), 1)
    assert table.pages_of(row).tolist() == shared.tolist()
    device.write(0, shared)
    table.settle(made, None)


def test_a_rollback_finds_the_shared_page_as_it_was():
    """Of two that hold a page the shorter one must not write to it: the longer one comes back."""
    table = books()
    long, _ = grown(table, range(3))
    short = table.fork(table.row(long, "test"))
    table.truncate(table.row(short, "test"), 1)
    rows = np.array([table.row(seq, "test") for seq in (short, long)])
    shared = table.pages_of(int(rows[1])).tolist()
    made = table.reserve(rows, np.array([1, 1], np.int32))
    assert made.source.tolist() == shared
    assert made.slots[1].tolist() == [shared[0] * PAGE + 3]
    table.settle(made, np.array([1, 0], np.int32))
    assert table.pages_of(int(rows[1])).tolist() == shared
    assert table.pages_of(int(rows[0])).tolist() != shared


def test_a_stream_that_is_done_is_forgotten():
    device = FakeStreams()
    table = books(8, device)
    table.states.fences.use(1)
    table.states.fences.use(0)
    seq, _ = grown(table, range(3))
    device.finish(1)
    table.free(seq, "test")
    assert table.states.counts() == (8, 0, 0, 0)
    before = device.events
    for _ in range(5):
        table.free(grown(table, range(3))[0], "test")
    assert device.events == before


def test_streams_are_kept_alive_while_events_may_be_recorded_on_them():
    """Recording on a stream that its owner has destroyed would end the process."""
    device = FakeStreams()
    fences = Fences(device)
    for stream in (1, 2, 3):
        fences.use(stream)
        device.read(stream, [stream])
    assert {stream: fences.holder(stream) for stream in (1, 2, 3)} == device.held
    device.finish(1)
    assert fences.fence() is not None
    assert [fences.holder(stream) for stream in (1, 2, 3)] == [None, "stream 2", "stream 3"]
    device.finish(2)
    device.finish(3)
    assert fences.fence() is None
    assert [fences.holder(stream) for stream in (2, 3)] == [None, "stream 3"]


def test_the_model_is_told_of_a_race():
    device = FakeStreams()
    device.read(0, [3])
    with pytest.raises(AssertionError, match="races"):
        device.write(1, [3])
