"""PagedKVCache against a model, against the oracle, and when a call fails half-way. What it refuses
is in test_paged_cache_misuse.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from support.cache_model import (
    NAN,
    Model,
    beside,
    bits,
    host,
    latents,
    nearly_full,
    poisoned,
    read,
    snapshot,
)
from support.oracle import assert_within_bound, oracle
from support.problems import DTYPES, PAGE_SIZES

from flashmla_cupy import PagedKVCache, errors, flash_mla_with_kvcache, get_mla_metadata


@pytest.fixture(params=["cpu", pytest.param(0, marks=pytest.mark.gpu, id="gpu")])
def device(request):
    return request.param


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_agree_with_the_model(device, seed):
    model = Model(device, seed)
    for _ in range(2500 if device == "cpu" else 250):
        model.step()
        model.verify()
    assert min(model.happened.values()) > (30 if device == "cpu" else 0), model.happened
    for seq in list(model.held):
        model.cache.free(seq)
    assert model.cache.free_pages == 14
    model.cache.check()


def test_every_page_can_be_used_and_used_again(device):
    cache = PagedKVCache(5, page_size=16, device=device)
    for seed in range(3):
        rows = latents(80, seed)
        seq = cache.add(rows)
        assert cache.free_pages == 0
        assert np.array_equal(read(cache, seq), bits(rows))
        cache.free(seq)
    assert cache.free_pages == 5


# --- all or nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "needed"),
    [
        (lambda cache, a, b: cache.add(latents(33)), 3),
        (lambda cache, a, b: cache.append(a, latents(34)), 3),
        (lambda cache, a, b: cache.append(b, latents(33)), 3),
        (lambda cache, a, b: cache.append_batch([a, b], np.stack([latents(18)] * 2)), 4),
        (lambda cache, a, b: cache.append_batch([b, a], np.stack([latents(17)] * 2)[:, :, 0]), 3),
    ],
)
def test_out_of_pages_leaves_no_trace(device, call, needed):
    cache, a, b = nearly_full(device)
    before = snapshot(cache)
    with pytest.raises(errors.OutOfPagesError, match="only 2 are free") as caught:
        call(cache, a, b)
    assert (caught.value.needed, caught.value.free) == (needed, 2)
    assert snapshot(cache) == before
    cache.check()


def test_the_last_page_can_be_had():
    for call in (
        lambda cache, a, b: cache.add(latents(32)),
        lambda cache, a, b: cache.append(a, latents(33)),
        lambda cache, a, b: cache.append(b, latents(32)),
        lambda cache, a, b: cache.append_batch([a, b], np.stack([latents(16)] * 2)),
    ):
        cache, a, b = nearly_full()
        call(cache, a, b)
        assert cache.free_pages == 0
        cache.check()


def test_a_write_that_fails_leaves_no_trace(monkeypatch):
    cache, a, b = nearly_full()
    before = snapshot(cache)

    def fails(rows, adapter, slots, layers):
        cache.storage[slots // 16, slots % 16] = 7  # as far as it came
        raise MemoryError

    monkeypatch.setattr(cache._core.writer, "write", fails)
    for call in (
        lambda: cache.add(latents(20)),
        lambda: cache.append(a, latents(5)),
        lambda: cache.append_batch([a, b], np.stack([latents(16)] * 2)),
    ):
        with pytest.raises(MemoryError):
            call()
        assert snapshot(cache) == before
        cache.check()
    monkeypatch.undo()
    cache.append_batch([b, a], np.stack([latents(16, 5), latents(16, 6)]))
    assert np.array_equal(read(cache, a)[47:], bits(latents(16, 6)))
    assert np.array_equal(read(cache, b)[16:], bits(latents(16, 5)))


# --- handles -----------------------------------------------------------------------------------

USES = {
    "append": lambda cache, seq: cache.append(seq, latents(1)),
    "append_batch": lambda cache, seq: cache.append_batch([seq], latents(1)[None]),
    "free": lambda cache, seq: cache.free(seq),
    "seqlen": lambda cache, seq: cache.seqlen(seq),
    "tables": lambda cache, seq: cache.tables([seq]),
    "attend": lambda cache, seq: cache.attend(latents(2).reshape(1, 1, 2, 576), [seq]),
}


@pytest.mark.parametrize("use", USES)
def test_a_freed_handle_is_refused_even_when_its_room_is_taken(use):
    cache = PagedKVCache(4, page_size=16, device="cpu")
    seq = cache.add(latents(20))
    cache.tables([seq])  # kept arrays must not answer for it either
    cache.free(seq)
    for _ in range(2):
        with pytest.raises(errors.SequenceError, match=rf"{use}\(\): sequence 0 was freed"):
            USES[use](cache, seq)
        cache.add(latents(20, 1))  # takes the same pages, and the same row of the books
    before = snapshot(cache)
    with pytest.raises(errors.SequenceError, match="was freed"):
        USES[use](cache, seq)
    assert snapshot(cache) == before


@pytest.mark.parametrize("use", USES)
def test_a_foreign_handle_is_refused(use):
    cache, other = (PagedKVCache(4, page_size=16, device="cpu") for _ in range(2))
    cache.add(latents(20))
    before = snapshot(cache)
    with pytest.raises(errors.SequenceError, match=r"sequence 0 belongs to another PagedKVCache"):
        USES[use](cache, other.add(latents(20)))
    assert snapshot(cache) == before


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("seq", [0, None, "0", [0]])
def test_what_is_no_handle_is_refused(use, seq):
    cache = PagedKVCache(4, page_size=16, device="cpu")
    cache.add(latents(20))
    with pytest.raises(errors.ArgTypeError, match=r"seq: expected a sequence handle"):
        USES[use](cache, seq)


def test_a_single_handle_is_no_list():
    cache = PagedKVCache(4, page_size=16, device="cpu")
    seq = cache.add()
    with pytest.raises(errors.ArgTypeError, match=r"list: \[seq\]"):
        cache.tables(seq)


def test_a_sequence_comes_once_in_an_append_but_as_often_as_it_likes_in_a_batch(device):
    cache, a, b = nearly_full(device)
    before = snapshot(cache)
    with pytest.raises(errors.SequenceError, match=r"<sequence 1> comes 2 times"):
        cache.append_batch([b, a, b], np.stack([latents(1)] * 3))
    assert snapshot(cache) == before
    q = beside(cache, np.repeat(latents(4, 3).reshape(1, 1, 4, 576), 3, axis=0))
    out, _ = cache.attend(q, [b, a, b])
    assert np.array_equal(bits(out[0]), bits(out[2]))
    assert not np.array_equal(bits(out[0]), bits(out[1]))


# --- attention ---------------------------------------------------------------------------------


def compare(cache, q, seqs=None, **options):
    """attend() against the oracle, which reads the pool through tables()."""
    out, lse = cache.attend(beside(cache, q), seqs, **options)
    table, lengths = map(host, cache.tables(seqs))
    options.setdefault("causal", True)
    expected = oracle(q, host(cache.storage), table, lengths, **options)
    assert_within_bound(host(out), host(lse), expected)
    return host(out), host(lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_attention_over_reused_pages_sees_no_stale_row(device, page_size, dtype):
    cache = PagedKVCache(12, page_size=page_size, dtype=dtype, device=device)
    cache.storage.view(np.uint16)[...] = NAN
    lengths = [1, 2 * page_size, page_size + 3, 0, page_size - 1, 2]
    seqs = [cache.add(latents(n, n, dtype)) for n in lengths]
    for i in (0, 2, 4):
        cache.free(seqs[i])
    seqs = [*cache.sequences, cache.add(latents(2 * page_size + 1, 9, dtype))]
    seqs.insert(0, cache.add(latents(3, 10, dtype)))
    cache.append_batch(seqs, np.stack([latents(2, 20 + i, dtype) for i in range(len(seqs))]))
    poisoned(cache)
    q = latents(len(seqs) * 2 * 8, 5, dtype).reshape(len(seqs), 2, 8, 576)
    compare(cache, q, seqs)
    compare(cache, q, seqs[::-1], causal=False, softmax_scale=0.1)
    compare(cache, q)  # all, oldest first


def test_rows_come_back_and_are_attended_to_as_they_were_given(device):
    """The oracle on plain arrays that the cache never saw, so that a shuffle cannot hide."""
    cache = PagedKVCache(20, page_size=16, device=device)
    given = [latents(n, n) for n in (5, 33, 64)]
    seqs = [cache.add(rows[:4]) for rows in given]
    for i in (2, 0, 1):  # interleaved, in pieces that cross pages
        cache.append(seqs[i], beside(cache, given[i][4:5]))
        for start in range(5, len(given[i]), 19):
            cache.append(seqs[i], given[i][start : start + 19])
    q = latents(3 * 4, 1).reshape(3, 1, 4, 576)
    out, lse = cache.attend(beside(poisoned(cache), q), seqs)
    pages = np.zeros((3, 64, 1, 576), q.dtype)
    for page, rows in zip(pages, given, strict=True):
        page[: len(rows)] = rows
    lengths = [5, 33, 64]
    assert_within_bound(host(out), host(lse), oracle(q, pages, np.array([[0], [1], [2]]), lengths))


def test_lengths_and_shapes_may_change_between_calls(device):
    """Kept tables and scheduling metadata follow the sequences, s_q, h_q and causal."""
    cache = PagedKVCache(60, page_size=16, device=device)
    seqs = [cache.add(latents(n, n)) for n in (3, 150)]
    for n in (1, 70, 140):
        for s_q, h_q, causal in [(1, 4, True), (2, 4, True), (2, 4, False), (1, 200, True)]:
            q = latents(2 * s_q * h_q, h_q).reshape(2, s_q, h_q, 576)
            for _ in range(2):
                compare(cache, q, seqs, causal=causal)
        compare(cache, q[:1], seqs[1:])
        cache.append_batch(seqs, np.stack([latents(n, 1), latents(n, 2)]))


def test_several_kv_heads(device):
    cache = PagedKVCache(8, page_size=16, num_heads_kv=3, device=device)
    seqs = [cache.add(latents(n, n, h_kv=3)) for n in (20, 1)]
    cache.append_batch(seqs, np.stack([latents(2, n, h_kv=3) for n in (7, 8)]))
    compare(poisoned(cache), latents(2 * 2 * 6).reshape(2, 2, 6, 576), seqs)


def test_no_sequences_and_empty_sequences(device):
    cache = PagedKVCache(2, page_size=16, device=device)
    out, lse = cache.attend(beside(cache, latents(0).reshape(0, 1, 4, 576)))
    assert (out.shape, lse.shape) == ((0, 1, 4, 512), (0, 4, 1))
    cache.append_batch([], latents(0).reshape(0, 1, 576))
    cache.storage.view(np.uint16)[...] = NAN
    seq = cache.add()
    cache.append(seq, latents(0))
    assert cache.seqlen(seq) == 0
    out, lse = cache.attend(beside(cache, latents(4).reshape(1, 1, 4, 576)))
    assert (host(out) == 0).all()
    assert (host(lse) == np.inf).all()


def test_storage_and_tables_serve_the_public_call(device):
    cache, _, b = nearly_full(device)
    q = beside(cache, latents(4).reshape(1, 1, 4, 576))
    block_table, cache_seqlens = cache.tables([b])
    metadata, num_splits = get_mla_metadata(cache_seqlens, 4, 1)
    out, lse = flash_mla_with_kvcache(
        q, cache.storage, block_table, cache_seqlens, 512, metadata, num_splits
    )
    again, lse_again = cache.attend(q, [b])
    assert np.array_equal(bits(out), bits(again))
    assert np.array_equal(host(lse), host(lse_again))


def test_tables_are_kept_until_a_sequence_changes(device):
    cache, a, b = nearly_full(device)
    table, lengths = cache.tables([a, b])
    assert host(lengths).tolist() == [47, 16]
    assert table is cache.tables([a, b])[0] is cache.tables()[0]
    assert host(cache.tables([b])[1]).tolist() == [16]
    cache.append(b, latents(1))
    assert host(cache.tables([a, b])[1]).tolist() == [47, 17]
    assert host(lengths).tolist() == [47, 16], "what was handed out has changed"


# --- storage -----------------------------------------------------------------------------------


def test_one_layer_of_a_packed_pool(device):
    xp = PagedKVCache(1, device=device)._core.pool.xp
    layers = xp.zeros((6, 2, 16, 1, 576), ml_dtypes.bfloat16)
    cache = PagedKVCache.from_storage(layers[:, 1])
    assert (cache.num_pages, cache.page_size, cache.num_heads_kv) == (6, 16, 1)
    assert (cache.dtype, cache.device) == (ml_dtypes.bfloat16, device)
    seqs = [cache.add(latents(n, n)) for n in (20, 30)]
    assert (bits(layers[:, 0]) == 0).all()
    assert np.array_equal(read(cache, seqs[1]), bits(latents(30, 30)))
    assert np.array_equal(bits(layers[:2, 1]).reshape(32, 1, 576)[:20], bits(latents(20, 20)))
    compare(poisoned(cache), latents(8).reshape(2, 1, 4, 576))


def test_rows_may_be_strided_and_keep_their_bits(device):
    cache = PagedKVCache(4, page_size=16, device=device)
    wide = np.arange(9 * 1200, dtype=np.uint16).reshape(9, 1200)
    wide[0, :600] = 0x7F81 + np.arange(600) % 100  # NaN payloads, infinities and all
    rows = wide.view(ml_dtypes.bfloat16)[::-2, 1152::-2]
    seqs = [cache.add(rows[:, :576]), cache.add(beside(cache, rows)[:, :576])]
    for seq in seqs:
        assert np.array_equal(read(cache, seq)[:, 0], wide[::-2, 1152::-2][:, :576])


def test_a_gpu_takes_part_only_if_it_can(monkeypatch):
    def cupy(count, major=9):
        return SimpleNamespace(
            cuda=SimpleNamespace(
                is_available=lambda: count > 0,
                runtime=SimpleNamespace(
                    getDeviceCount=lambda: count,
                    getDeviceProperties=lambda device: {"major": major, "minor": 0},
                ),
                Device=lambda: SimpleNamespace(id=1),
            )
        )

    from flashmla_cupy.cache.place import place_of

    for module, place in [(None, -1), (cupy(0), -1), (cupy(2, 8), -1), (cupy(2), 1)]:
        monkeypatch.setitem(sys.modules, "cupy", module)
        assert place_of(None, None, "f") == place
        assert place_of("cpu", None, "f") == -1
    assert place_of(0, None, "f") == 0
    with pytest.raises(errors.NoDeviceError, match="no CUDA device 2: there are 2, 0 to 1"):
        PagedKVCache(1, device=2)
    monkeypatch.setitem(sys.modules, "cupy", cupy(0))
    with pytest.raises(errors.NoDeviceError, match="device 0: CUDA does not work here"):
        PagedKVCache(1, device=0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(errors.MissingDependencyError, match="device 0 needs CuPy"):
        PagedKVCache(1, device=0)
    assert PagedKVCache(1).device == "cpu"


def test_a_device_of_pytorch_is_the_one_that_it_names(monkeypatch):
    torch = pytest.importorskip("torch")
    from flashmla_cupy.cache.place import framework_at, place_of

    runtime = SimpleNamespace(getDeviceCount=lambda: 4)
    cuda = SimpleNamespace(is_available=lambda: True, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, place in [(("cuda", 0), 0), (("cuda", 2), 2), (("cuda",), 3), (("cpu",), -1)]:
        assert place_of(torch.device(*device), None, "f") == place
    for name in ("meta", "xpu"):
        with pytest.raises(errors.OptionError, match=f"type cuda or cpu, got {name}"):
            PagedKVCache(1, device=torch.device(name))
    with pytest.raises(errors.ArgTypeError, match="device: expected an integer"):
        PagedKVCache(1, device=torch.float16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.NoDeviceError, match="does not work in this PyTorch"):
        PagedKVCache(1, device=torch.device("cuda"))
    with pytest.raises(errors.MissingDependencyError, match="does not work in this PyTorch"):
        framework_at("torch", 0, "f")


def test_tables_made_on_one_stream_are_not_handed_out_on_another(monkeypatch):
    cache, _, b = nearly_full()
    table, _ = cache.tables([b])
    monkeypatch.setattr(cache._core.framework, "stream", lambda device: 0x5EA)
    other, lengths = cache.tables([b])
    assert other is not table
    assert (other.tolist(), lengths.tolist()) == ([[3]], [16])


@pytest.mark.gpu
def test_an_append_is_queued_on_the_current_stream():
    """The rows appear on a side stream after a long delay; the append must wait for them, and the
    host must not."""
    import cupy

    cache = PagedKVCache(8, device=0)
    rows = cupy.asarray(latents(100, 2))
    late = cupy.zeros_like(rows)
    work = cupy.ones(2**26, cupy.float32)
    cache.free(cache.add(late))  # compiles CuPy's own kernels
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(300):
            cupy.sqrt(work, out=work)
        late[...] = rows
        seq = cache.add(late)
        cache.tables([seq])
        assert not stream.done, "the host has waited"
        assert np.array_equal(read(cache, seq), bits(rows))
