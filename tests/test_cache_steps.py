"""PagedKVCache of a whole model: steps of several layers in every framework, against plain arrays
that it never saw; sharing, rollback, swapping, arrays that last, and every misuse."""

from __future__ import annotations

import copy
import importlib
import pickle

import ml_dtypes
import numpy as np
import pytest
from support.foreign import Foreign
from support.whole_cache import WholeCache, back, places, to

from flashmla_cupy import (
    PagedKVCache,
    errors,
    flash_mla_with_kvcache,
    get_mla_metadata,
    write_kv,
)

E = errors
HOST = ("cpu", "numpy")


@places
def test_layers_are_written_and_attended_to_one_by_one(place):
    whole = WholeCache(place, dtype="bfloat16")
    a, b, c = (whole.add(n) for n in (30, 1, 16))
    for _ in range(3):
        whole.step([a, b, c], 1, softmax_scale=0.1352)
    whole.step([c, a], 2)
    whole.cache.free(b)
    whole.attend_all()
    assert [whole.cache.seqlen(seq) for seq in (a, c)] == [35, 21]


@places
def test_ragged_counts_are_right_aligned(place):
    whole = WholeCache(place)
    seqs = [whole.add(n) for n in (15, 3, 40)]
    step = whole.step(seqs, [3, 0, 1])
    assert step.tokens == 3
    whole.step(seqs, [1, 17, 2])
    whole.attend_all()


@places
def test_speculative_tokens_are_rolled_back(place):
    whole = WholeCache(place)
    seqs = [whole.add(n) for n in (14, 31)]
    before = whole.cache.page_counts
    whole.step(seqs, 4, -1)
    assert whole.cache.page_counts == before
    whole.step(seqs, 4, [1, 3])
    whole.step(seqs, 2, 1)
    whole.step(seqs, [4, 2], 0)
    whole.attend_all()
    assert [whole.cache.seqlen(seq) for seq in seqs] == [16, 35]


@places
@pytest.mark.parametrize("accepted", [None, -1, [0, 1], [1, 0]])
def test_a_fork_copies_when_it_writes(place, accepted):
    whole = WholeCache(place)
    a = whole.add(21)
    free = whole.cache.free_pages
    b = whole.cache.fork(a)
    whole.rows[b] = whole.rows[a]
    assert whole.cache.free_pages == free
    whole.step([a, b], 1, accepted)
    whole.step([b], 2)
    whole.attend_all()
    whole.cache.free(a)
    whole.attend_all()
    whole.cache.free(b)
    assert whole.cache.free_pages == 40


@places
def test_truncated_and_swapped_sequences_go_on(place):
    whole = WholeCache(place)
    a, b = whole.add(50), whole.add(20)
    c = whole.cache.fork(a)
    whole.rows[c] = whole.rows[a][:, :37]
    whole.cache.truncate(c, 37)
    whole.cache.swap_out(a)
    assert whole.cache.swapped == (a,)
    assert whole.cache.seqlen(a) == 50
    whole.step([b, c], 3)
    whole.cache.swap_in(a)
    whole.step([a, b, c], 1)
    whole.cache.swap_out(c)
    whole.cache.free(c)
    del whole.rows[c]
    whole.attend_all()
    assert whole.cache.page_counts == (40 - 4 - 2, 0, 6, 0)


@places
def test_a_known_prefix_needs_no_prefill(place):
    whole = WholeCache(place)
    cache, ids = whole.cache, list(range(100, 150))
    first, cached = cache.begin(ids)
    assert cached == 0
    whole.rows[first] = whole.new(3, 0)
    whole.step([first], 50)
    used = cache.page_counts.active
    second, cached = cache.begin([*ids[:40], 7, 8, 9])
    assert cached == 32
    assert cache.page_counts.active == used
    whole.rows[second] = whole.rows[first][:, :32]
    whole.step([second], 11)
    whole.step([first, second], 1)
    cache.free(first)
    cache.free(second)
    third, cached = cache.begin(ids)
    assert cached == 48
    whole.rows[third] = whole.rows[first][:, :48]
    whole.step([third], 2)
    other, cached = cache.begin(ids, salt="somebody else")
    assert cached == 0
    whole.rows[other] = whole.new(3, 0)
    whole.attend_all()


def test_generated_tokens_can_become_a_known_prefix():
    whole = WholeCache(HOST)
    seq, _ = whole.cache.begin(range(15))
    whole.rows[seq] = whole.new(3, 0)
    whole.step([seq], 15)
    step = whole.cache.reserve([seq], 4)
    step.write(whole.new(3, 1, 4))
    step.commit(2, token_ids=[[77, 78]])
    assert whole.cache.begin([*range(15), 77, 1])[1] == 16
    whole.cache.drop_prefixes()
    assert whole.cache.begin([*range(15), 77, 1])[1] == 0


@pytest.mark.parametrize("layer_axis", [0, 1])
@places
def test_storage_that_is_given_is_used(place, layer_axis):
    if place[1] == "jax":
        pytest.skip("JAX's arrays are not written in place")
    shape = (2, 20, 16, 1, 576) if layer_axis == 0 else (20, 2, 16, 1, 576)
    storage = to(np.zeros(shape, np.float16), place)
    whole = WholeCache(place, layers=2)
    whole.cache = PagedKVCache(storage=storage, num_layers=2, layer_axis=layer_axis)
    assert whole.cache.storage is storage
    assert whole.cache.device == place[0]
    seq = whole.add(20)
    whole.step([seq], 1)
    found = back(storage) if layer_axis == 1 else back(storage).swapaxes(0, 1)
    pages = back(whole.cache.tables([seq])[0])[0]
    rows = found[pages].swapaxes(0, 1).reshape(2, -1, 576)[:, :21]
    assert np.array_equal(rows, whole.rows[seq])
    assert tuple(whole.cache.layer(1).shape) == (20, 16, 1, 576)
    table, lengths = whole.cache.tables([seq])
    q = to(whole.new(1, 1, 4), place)
    out, _ = flash_mla_with_kvcache(
        q, whole.cache.layer(1), table, lengths, 512, *get_mla_metadata(lengths, 4, 1)
    )
    assert np.array_equal(back(out), back(whole.cache.attend(q, [seq], layer=1)[0]))


def test_bytes_of_another_format():
    storage = np.zeros((8, 2, 16, 1, 656), np.uint8)
    cache = PagedKVCache(storage=storage, num_layers=2)
    rows = np.random.default_rng(0).integers(0, 256, (2, 20, 656), np.uint8)
    seq = cache.add(rows)
    step = cache.reserve([seq])
    step.write(rows[0, None, :1], layer=0)
    step.write(rows[1, None, :1], layer=1)
    step.commit()
    pages = cache.tables([seq])[0][0]
    found = storage[pages].swapaxes(0, 1).reshape(2, -1, 656)[:, :21]
    assert np.array_equal(found, np.concatenate([rows, rows[:, :1]], axis=1))


@pytest.mark.parametrize("width", [656, 576, 584])
@places
def test_a_cache_of_fp8_quantises_what_it_is_given(place, width):
    """Beside a plain cache that write_kv() filled; a fork copies whole pages, scales and all."""
    if place[1] == "jax":
        pytest.skip("JAX's arrays are not written in place")
    d_qk = 512 if width == 584 else 576
    rng = np.random.default_rng(0)

    def new(*shape):
        x = rng.standard_normal((*shape, d_qk), np.float32)
        return to(x.astype(ml_dtypes.bfloat16), place)

    def bytes_of(*shape):
        x = np.zeros(shape, np.uint8)
        return importlib.import_module("torch").from_numpy(x) if place[1] == "torch" else x

    def there(x):
        if place[0] == "cpu":
            return x
        return x.cuda() if place[1] == "torch" else importlib.import_module("cupy").asarray(x)

    cache = PagedKVCache(storage=there(bytes_of(10, 2, 64, 1, width)), num_layers=2)
    rows = new(2, 70)
    a = cache.add(rows)
    b = cache.fork(a)
    step = cache.reserve([b, a])
    last = new(2, 2, 1)
    for layer in range(2):
        step.write(last[layer], layer=layer)
    step.commit()
    q = new(1, 1, 4)
    options = {"softmax_scale": 0.1, "causal": True}
    for i, seq in enumerate((b, a)):
        for layer in range(2):
            plain = there(bytes_of(2, 64, 1, width))
            slots = cache.csr([seq])[1][:0]  # int32, of the framework and place
            slots = there_like(slots, np.arange(70))
            write_kv(plain, rows[layer][:, None], slots)
            write_kv(plain, last[layer, i][:, None], there_like(slots, np.array([70])))
            table, lengths = (
                there_like(slots, np.array([[0, 1]])),
                there_like(slots, np.array([71])),
            )
            metadata, _ = get_mla_metadata()
            expected, _ = flash_mla_with_kvcache(
                q, plain, table, lengths, 512, metadata, is_fp8_kvcache=True, **options
            )
            out, _ = cache.attend(q, [seq], layer=layer, **options)
            assert np.array_equal(back(out).view(np.uint16), back(expected).view(np.uint16))
    cache.check()
    if width == 584:  # whose scales lie behind all rows of a page
        with pytest.raises(E.DTypeError, match="rows: expected bfloat16, float16 or float32"):
            cache.append(a, there(bytes_of(2, 1, 584)))


def there_like(x, values):
    """int32 values as an array of the framework and place of x."""
    values = values.astype(np.int32)
    if type(x).__module__.startswith("torch"):
        return importlib.import_module("torch").from_numpy(values).to(x.device)
    if hasattr(x, "get"):
        return importlib.import_module("cupy").asarray(values)
    return values


def test_frameworks_may_mix():
    torch = pytest.importorskip("torch")
    whole = WholeCache(HOST, framework="torch", dtype="bfloat16")
    seq = whole.add(20)
    assert isinstance(whole.cache.storage, torch.Tensor)
    assert all(isinstance(x, torch.Tensor) for x in whole.cache.tables())
    assert isinstance(whole.cache.tables(framework="numpy")[0], np.ndarray)
    for name in ("numpy", "torch", "jax"):
        whole.place = "cpu", name
        whole.step([seq], 1)
    whole.attend_all()
    layer = whole.cache.layer(2, "numpy")
    assert layer.dtype == whole.dtype
    assert np.shares_memory(layer, whole.cache._core.pool.bits)


def test_tables_are_shared_without_a_copy():
    torch = pytest.importorskip("torch")
    whole = WholeCache(HOST)
    whole.add(20)
    table, lengths = whole.cache.tables()
    for ours, theirs in zip((table, lengths), whole.cache.tables(framework="torch"), strict=True):
        assert theirs.dtype == torch.int32
        assert ours.ctypes.data == theirs.data_ptr()


# --- exports -----------------------------------------------------------------------------------


def test_forms_of_other_libraries():
    whole = WholeCache(HOST, layers=1)
    a, b = whole.add(33), whole.add(16)
    indptr, indices, last_page_len = whole.cache.csr([b, a])
    table, lengths = whole.cache.tables([b, a], width=6)
    assert table.shape == (2, 6)
    assert indptr.tolist() == [0, 1, 4]
    assert last_page_len.tolist() == [16, 1]
    assert indices.tolist() == [table[0, 0], *table[1, :3]]
    assert {x.dtype for x in (indptr, indices, last_page_len)} == {np.dtype(np.int32)}
    assert lengths.tolist() == [16, 33]
    assert not table[1, 3:].any()
    with pytest.raises(E.ShapeError, match="width: expected at least 3"):
        whole.cache.tables([a], width=2)
    empty = whole.cache.add()
    with pytest.raises(E.SequenceError, match="<sequence 2> has no tokens"):
        whole.cache.csr()
    assert whole.cache.csr([])[0].tolist() == [0]
    whole.cache.free(empty)


def test_slots_of_a_step():
    whole = WholeCache(HOST, layers=1)
    a, b = whole.add(15), whole.add(4)
    step = whole.cache.reserve([b, a], [1, 3])
    pages = {seq: whole.cache.tables([seq])[0][0] for seq in (a, b)}
    first, second = pages[a][:2]
    assert step.slot_mapping.dtype == np.int64
    assert step.slot_mapping.tolist() == [
        [-1, -1, pages[b][0] * 16 + 4],
        [first * 16 + 15, second * 16, second * 16 + 1],
    ]
    assert step.cache_seqlens.tolist() == [5, 18]
    assert step.block_table.tolist() == [[pages[b][0], 0], [first, second]]


# --- arrays that last --------------------------------------------------------------------------


@places
def test_lasting_arrays_keep_their_place(place):
    whole = WholeCache(place, max_seqs=4, max_pages_per_seq=8)
    a, b, c = (whole.add(n) for n in (10, 31, 5))
    step = whole.cache.reserve([a, b, c])
    arrays = step.block_table, step.cache_seqlens, step.slot_mapping
    assert [x.shape for x in arrays] == [(3, 8), (3,), (3, 1)]
    step.rollback()
    before = [whole.cache._core.framework.pointer(x) for x in arrays]
    d = whole.cache.fork(b)
    whole.rows[d] = whole.rows[b]
    for seqs, counts, accepted in [
        ([a, b, c], 1, None),
        ([a, b, c], 1, None),
        ([c, d], 1, -1),
        ([b, d, a], 1, [1, 0, 1]),
        ([b, d, a], 2, [1, 0, 1]),
        ([c], 60, None),
        ([a, b, c, d], 1, None),
    ]:
        step = whole.step(seqs, counts, accepted)
        tables = whole.cache._core.lasting
        for array, expected in zip(
            (tables._seqlens, tables._slots[step.tokens]), (0, -1), strict=True
        ):
            assert (back(array)[len(seqs) :] == expected).all()
    whole.cache.free(a)
    step = whole.cache.reserve([b, c, d])
    arrays = step.block_table, step.cache_seqlens, step.slot_mapping
    assert [whole.cache._core.framework.pointer(x) for x in arrays] == before
    step.rollback()
    whole.attend_all()


def test_one_step_may_be_open_where_arrays_last():
    whole = WholeCache(HOST, max_seqs=2)
    a, b, c = (whole.add(3) for _ in range(3))
    step = whole.cache.reserve([a])
    with pytest.raises(E.StepError, match="a step is open, and with max_seqs"):
        whole.cache.reserve([b])
    step.rollback()
    with pytest.raises(E.ShapeError, match=r"seqs: expected at most max_seqs = 2 seq"):
        whole.cache.reserve([a, b, c])
    whole.step([a, b], 1)


def test_what_would_be_copied_in_a_capture_is_refused(monkeypatch):
    whole = WholeCache(HOST)
    seq = whole.add(3)
    step = whole.cache.reserve([seq])
    monkeypatch.setattr(whole.cache._core, "is_capturing", lambda stream: True)
    with pytest.raises(E.StepError, match=r"Step\(\): the stream is being captured.* max_seqs"):
        step.write(whole.new(1, 1), layer=0)
    with pytest.raises(E.StepError, match=r"attend\(\): the stream is being captured"):
        whole.cache.attend(whole.new(1, 1, 4), [seq])
    with pytest.raises(E.StepError, match=r"reserve\(\): the stream is being captured"):
        whole.cache.reserve([whole.cache.add()])
    with pytest.raises(E.StepError, match=r"append\(\): the stream is being captured"):
        whole.cache.append(whole.cache.add(), whole.new(3, 1))
    monkeypatch.undo()
    step.rollback()
    whole.step([seq], 1)


def test_a_sequence_has_at_most_so_many_pages():
    whole = WholeCache(HOST, max_pages_per_seq=2)
    a, b = whole.add(31), whole.add(1)
    words = "33 tokens, but max_pages_per_seq = 2 is for 32"
    for call in (
        lambda: whole.cache.reserve([b, a], 2),
        lambda: whole.cache.append_batch([b, a], whole.new(3, 2, 2)),
        lambda: whole.cache.append(a, whole.new(3, 2)),
        lambda: whole.cache.add(whole.new(3, 33)),
    ):
        with pytest.raises(E.SequenceError, match=words):
            call()
    whole.step([a, b], 1)


# --- misuse ------------------------------------------------------------------------------------


def torch():
    return pytest.importorskip("torch")


def state(cache):
    """All that a refused call must leave alone."""
    table = cache._table
    return (
        cache.sequences, cache.swapped, cache.page_counts, repr(cache), tuple(table.is_open),
        tuple(table.pages_of(row).tobytes() for row in table.row_of.values()),
        tuple(table.reserved[list(table.row_of.values())]), cache._core.pool.bits.tobytes(),
    )  # fmt: skip


MISUSE = {  # name: (what is done, its error, words)
    "freed twice": (lambda w, c, s: c.free(s.freed), E.SequenceError, "was freed"),
    "append to a freed one": (
        lambda w, c, s: c.append(s.freed, w.new(3, 1)), E.SequenceError, "was freed"
    ),
    "reserve for a freed one": (
        lambda w, c, s: c.reserve([s.a, s.freed]), E.SequenceError, "was freed"
    ),
    "fork of a freed one": (lambda w, c, s: c.fork(s.freed), E.SequenceError, "was freed"),
    "truncate of a freed one": (
        lambda w, c, s: c.truncate(s.freed, 0), E.SequenceError, "was freed"
    ),
    "swap of a freed one": (lambda w, c, s: c.swap_out(s.freed), E.SequenceError, "was freed"),
    "a foreign one": (lambda w, c, s: c.fork(s.foreign), E.SequenceError, "another PagedKVCache"),
    "no handle": (lambda w, c, s: c.reserve([3]), E.ArgTypeError, "expected a sequence handle"),
    "no list": (lambda w, c, s: c.reserve(s.a), E.ArgTypeError, r"list: \[seq\]"),
    "twice in a step": (
        lambda w, c, s: c.reserve([s.a, s.a]), E.SequenceError, "comes 2 times in seqs"
    ),
    "append while a step is open": (
        lambda w, c, s: c.append(s.b, w.new(3, 1)), E.SequenceError, "has an open step"
    ),
    "reserve while a step is open": (
        lambda w, c, s: c.reserve([s.a, s.b]), E.SequenceError, "has an open step"
    ),
    "free while a step is open": (lambda w, c, s: c.free(s.b), E.SequenceError, "has an open step"),
    "fork while a step is open": (lambda w, c, s: c.fork(s.b), E.SequenceError, "has an open step"),
    "truncate while a step is open": (
        lambda w, c, s: c.truncate(s.b, 1), E.SequenceError, "has an open step"
    ),
    "swap while a step is open": (
        lambda w, c, s: c.swap_out(s.b), E.SequenceError, "has an open step"
    ),
    "swap in of one in the pool": (
        lambda w, c, s: c.swap_in(s.a), E.SequenceError, "is in the pool"
    ),
    "attend to one that is away": (
        lambda w, c, s: c.attend(w.new(1, 1, 4), [s.away]), E.SequenceError, "was swapped out"
    ),
    "swap out twice": (lambda w, c, s: c.swap_out(s.away), E.SequenceError, "was swapped out"),
    "a negative count": (
        lambda w, c, s: c.reserve([s.a], -1), E.ScalarError, "counts: expected an integer from 0"
    ),
    "negative counts": (
        lambda w, c, s: c.reserve([s.a], [-1]), E.ScalarError, "counts: expected integers from 0"
    ),
    "a count that is none": (lambda w, c, s: c.reserve([s.a], 1.5), E.ArgTypeError, "counts"),
    "a flag for a count": (lambda w, c, s: c.reserve([s.a], True), E.ArgTypeError, "counts"),
    "counts of others": (
        lambda w, c, s: c.reserve([s.a], [1, 1]), E.ArgTypeError, "counts: .* got 2 values"
    ),
    "counts that are none": (
        lambda w, c, s: c.reserve([s.a], [0.5]), E.ArgTypeError, "values of float64"
    ),
    "counts with another axis": (
        lambda w, c, s: c.reserve([s.a], np.array([[20]])), E.ArgTypeError, r"of shape \(1, 1\)"
    ),
    "counts in lists of different lengths": (
        lambda w, c, s: c.reserve([s.a], [[1], [1, 2]]), E.ArgTypeError, "counts: .* cannot read"
    ),
    "counts without memory": (
        lambda w, c, s: c.reserve([s.a], torch().ones(1, device="meta")), E.ArgTypeError,
        "counts: expected an integer, or 1 of them, .* got torch.Tensor",
    ),
    "too much": (lambda w, c, s: c.reserve([s.a], 1000), E.OutOfPagesError, "needs 62 more pages"),
    "truncate to more": (
        lambda w, c, s: c.truncate(s.a, 21), E.ScalarError, "length: expected at most 20"
    ),
    "truncate to less than nothing": (lambda w, c, s: c.truncate(s.a, -1), E.ScalarError, "length"),
    "no such layer": (
        lambda w, c, s: s.step.write(w.new(1, 2), layer=3), E.ScalarError, "layer: .* at most 2"
    ),
    "no such layer to read": (lambda w, c, s: c.layer(-1), E.ScalarError, "layer"),
    "rows of one layer for all": (
        lambda w, c, s: s.step.write(w.new(1, 2)), E.ShapeError,
        r"\[3, batch, n, 576\] or \[3, batch, n, 1, 576\]",
    ),
    "rows of other sequences": (
        lambda w, c, s: s.step.write(w.new(2, 2), layer=0), E.ShapeError, "axes of 1 sequences"
    ),
    "too few rows": (
        lambda w, c, s: s.step.write(w.new(1, 1), layer=0), E.ShapeError, "got 1 and 1"
    ),
    "rows of another dtype": (
        lambda w, c, s: s.step.write(w.new(1, 2).astype(np.float32), layer=0), E.DTypeError,
        "float16, the dtype of the cache",
    ),
    "queries of others": (
        lambda w, c, s: s.step.attend(w.new(2, 2, 4)), E.ShapeError, "q: expected a first axis of 1"
    ),
    "queries with heads before tokens": (
        lambda w, c, s: s.step.attend(w.new(1, 4, 2)), E.ShapeError,
        "q: expected at most the 2 tokens",
    ),
    "the same through DLPack": (
        lambda w, c, s: s.step.attend(Foreign(w.new(1, 4, 2))), E.ShapeError,
        "q: expected at most the 2 tokens",
    ),
    "accepted more than reserved": (
        lambda w, c, s: s.step.commit(3), E.ScalarError, "accepted: expected at most 2"
    ),
    "accepted less than nothing": (lambda w, c, s: s.step.commit([-1]), E.ScalarError, "accepted"),
    "accepted with another axis": (
        lambda w, c, s: s.step.commit(np.array([[1]])), E.ArgTypeError, "accepted: .* of shape"
    ),
    "changed counts": (
        lambda w, c, s: s.step.counts.__setitem__(0, 9), ValueError, "read-only"
    ),
    "ids that are no list": (
        lambda w, c, s: s.step.commit(None, 5), E.ArgTypeError, "token_ids: .* got int 5"
    ),
    "ids in lists of different lengths": (
        lambda w, c, s: s.step.commit(1, [[[1], [1, 2]]]), E.ArgTypeError, "token_ids: .* list,"
    ),
    "ids of others": (
        lambda w, c, s: s.step.commit(1, token_ids=[[1, 2]]), E.ShapeError, "ids of .1. tokens"
    ),
    "rollback past a commit": (
        lambda w, c, s: s.done.rollback(), E.StepError, "the step was committed before"
    ),
    "commit twice": (lambda w, c, s: s.done.commit(), E.StepError, "was committed before"),
    "write to an ended step": (
        lambda w, c, s: s.done.write(w.new(1, 1), layer=0), E.StepError, "was committed before"
    ),
    "attend in an ended step": (
        lambda w, c, s: s.done.attend(w.new(1, 1, 4)), E.StepError, "was committed before"
    ),
    "ids that are none": (lambda w, c, s: c.begin([0.5]), E.ArgTypeError, "token_ids"),
    "negative ids": (lambda w, c, s: c.begin([-1]), E.ScalarError, "token_ids: expected ids"),
    "a salt that is none": (lambda w, c, s: c.begin([1], salt=3), E.ArgTypeError, "salt"),
    "a salt that UTF-8 has not": (
        lambda w, c, s: c.begin([1], salt="\ud800"), E.ScalarError, "salt: .* lone surrogate"
    ),
    "another framework's tables": (
        lambda w, c, s: c.tables(framework="cupy"), E.ArgTypeError, "'numpy', 'torch', 'jax'"
    ),
    "a copy": (lambda w, c, s: copy.deepcopy(c), E.ArgTypeError, "copied or pickled"),
    "a pickle": (lambda w, c, s: pickle.dumps(c), E.ArgTypeError, "copied or pickled"),
    "a copied step": (lambda w, c, s: copy.copy(s.step), E.ArgTypeError, "copied or pickled"),
    "a deep copy of a step": (
        lambda w, c, s: copy.deepcopy(s.step), E.ArgTypeError, "copied or pickled"
    ),
    "a pickled step": (lambda w, c, s: pickle.dumps(s.step), E.ArgTypeError, "copied or pickled"),
    "a pickled handle": (lambda w, c, s: pickle.dumps(s.a), E.ArgTypeError, "can be pickled"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISUSE)
def test_misuse_has_its_error_and_changes_nothing(what):
    do, error, words = MISUSE[what]

    class Names:
        pass

    whole, s = WholeCache(HOST), Names()
    s.a, s.b, s.freed, s.away = (whole.add(20) for _ in range(4))
    s.foreign = WholeCache(HOST).add(1)
    s.done = whole.cache.reserve([s.a])
    s.done.rollback()
    s.done = whole.cache.reserve([s.freed])
    s.done.commit()
    whole.cache.free(s.freed)
    whole.cache.swap_out(s.away)
    s.step = whole.cache.reserve([s.b], 2)
    before = state(whole.cache)
    with pytest.raises(error, match=words):
        do(whole, whole.cache, s)
    assert state(whole.cache) == before
    whole.cache.check()
    s.step.commit(1)
    whole.cache.swap_in(s.away)
    whole.cache.check()


def test_handles_are_their_own_copies():
    whole = WholeCache(HOST)
    seq = whole.add(3)
    assert copy.deepcopy(seq) is seq
    assert copy.copy(seq) is seq


def test_an_exception_rolls_a_step_back():
    whole = WholeCache(HOST)
    a = whole.add(16)
    before = state(whole.cache)[:-1]
    with pytest.raises(ZeroDivisionError), whole.cache.reserve([a], 5) as step:
        step.write(whole.new(3, 1, 5))
        raise ZeroDivisionError
    assert state(whole.cache)[:-1] == before
    with whole.cache.reserve([a], 5) as step:
        step.commit(2)
    assert whole.cache.seqlen(a) == 18


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_layers": 0}, E.ScalarError, "num_layers"),
        ({"layer_axis": 2}, E.OptionError, "layer_axis: expected 0 or 1"),
        ({"framework": "jax"}, E.OptionError, "framework: expected 'numpy' or 'torch'"),
        ({"framework": "cupy"}, E.OptionError, "NumPy's arrays lie on the CPU"),
        ({"max_seqs": 0}, E.ScalarError, "max_seqs"),
        ({"max_pages_per_seq": 0}, E.ScalarError, "max_pages_per_seq"),
        ({"max_pages_per_seq": 1.5}, E.ArgTypeError, "max_pages_per_seq"),
    ],
)
def test_a_cache_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        PagedKVCache(**{"num_pages": 4, "num_layers": 2, "device": "cpu", **options})


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "error", "words"),
    [
        (
            (4, 2, 16, 1, 512),
            np.float16,
            {},
            E.ShapeError,
            r"\[num_pages, 2, page_size, h_kv,",
        ),
        ((4, 16, 1, 576), np.float16, {}, E.ShapeError, "these 5 axes"),
        ((4, 3, 16, 1, 576), np.float16, {}, E.ShapeError, "num_layers"),
        ((2, 4, 16, 1, 576), np.float16, {}, E.ShapeError, "layer_axis"),
        ((4, 2, 24, 1, 576), np.float16, {}, E.ShapeError, "page_size .third axis"),
        ((4, 2, 16, 1, 576), np.float32, {}, E.DTypeError, "bfloat16 or float16"),
        ((4, 2, 16, 656), np.uint8, {}, E.ShapeError, "row_bytes"),
        ((4, 2, 24, 1, 656), np.uint8, {}, E.ShapeError, "page_size .third axis"),
        ((4, 2, 16, 1, 576), np.float16, {"num_pages": 5}, E.ScalarError, "num_pages: expected 4"),
    ],
)
def test_storage_of_layers_that_cannot_serve(shape, dtype, options, error, words):
    with pytest.raises(error, match=words):
        PagedKVCache(storage=np.zeros(shape, dtype), num_layers=2, **options)


def test_layers_that_overlap():
    storage = np.zeros((4, 1, 16, 1, 576), np.float16)
    same = np.lib.stride_tricks.as_strided(
        storage, (4, 2, 16, 1, 576), (storage.strides[0], 1152, *storage.strides[2:])
    )
    with pytest.raises(E.StrideError, match="do not overlap"):
        PagedKVCache(storage=same, num_layers=2)
