"""PagedKVCache on a GPU: one graph for growing sequences, forks and copies on write, streams."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest
from support.whole_cache import back

from flashmla_cupy import PagedKVCache, errors

pytestmark = pytest.mark.gpu
LAYERS, BATCH, HEADS = 3, 8, 16


class Turns:
    """The same sequences in a cache whose arrays last, stepped by one captured graph, and in one
    that is stepped eagerly."""

    def __init__(self, torch, seed=0):
        self.torch, self.rng = torch, np.random.default_rng(seed)
        torch.manual_seed(seed)
        sizes = {"num_pages": 400, "page_size": 16, "num_layers": LAYERS, "device": 0}
        self.graphed = PagedKVCache(**sizes, framework="torch", max_seqs=BATCH, layer_axis=0)
        self.eager = PagedKVCache(**sizes, framework="torch", layer_axis=1)
        self.pairs = [self.new_pair(n) for n in (1, 15, 16, 17, 100, 64, 33, 2)]
        self.rows = self.random(LAYERS, BATCH, 1, 576)
        self.q = self.random(LAYERS, BATCH, 1, HEADS, 576)
        self.graph = torch.cuda.CUDAGraph()
        self.out = []

    def random(self, *shape):
        return self.torch.randn(shape, dtype=self.torch.bfloat16, device="cuda")

    def new_pair(self, tokens):
        rows = self.random(LAYERS, tokens, 576)
        return self.graphed.add(rows), self.eager.add(rows)

    def layers(self, step):
        results = []
        for i in range(LAYERS):
            step.write(self.rows[i], layer=i)
            results.append(step.attend(self.q[i], layer=i, softmax_scale=0.1352))
        return results

    def capture(self):
        graphed = [pair[0] for pair in self.pairs]
        step = self.graphed.reserve(graphed)
        self.layers(step)  # compiles and loads the kernels
        step.rollback()
        step = self.graphed.reserve(graphed)
        with self.torch.cuda.graph(self.graph):
            self.out = self.layers(step)
        step.rollback()

    def turn(self, pairs, keep):
        self.rows.copy_(self.random(*self.rows.shape))
        self.q.copy_(self.random(*self.q.shape))
        n = len(pairs)
        graphed = self.graphed.reserve([pair[0] for pair in pairs])
        self.graph.replay()
        eager = self.eager.reserve([pair[1] for pair in pairs])
        for i in range(LAYERS):
            eager.write(self.rows[i, :n], layer=i)
            out, lse = eager.attend(self.q[i, :n], layer=i, softmax_scale=0.1352)
            assert self.torch.equal(self.out[i][0][:n], out)
            assert self.torch.equal(self.out[i][1][:n], lse)
            assert not self.out[i][0][n:].any()
        for step in (graphed, eager):
            step.commit() if keep else step.rollback()


def test_one_graph_serves_500_growing_steps():
    torch = importlib.import_module("torch")
    turns = Turns(torch)
    turns.capture()
    for i in range(500):
        if i % 40 == 39:  # one leaves, another one comes
            gone = turns.pairs.pop(int(turns.rng.integers(len(turns.pairs))))
            turns.graphed.free(gone[0])
            turns.eager.free(gone[1])
            turns.pairs.append(turns.new_pair(int(turns.rng.integers(1, 60))))
        fewer = turns.pairs[: turns.rng.integers(1, BATCH + 1)] if i % 7 == 3 else turns.pairs
        turns.turn(fewer, keep=i % 11 != 5)
    for graphed, eager in turns.pairs:
        assert turns.graphed.seqlen(graphed) == turns.eager.seqlen(eager)
    turns.graphed.check()


def test_a_graph_of_cupy_grows_too():
    cupy = importlib.import_module("cupy")
    cache = PagedKVCache(64, page_size=16, device=0, max_seqs=2)
    rng = np.random.default_rng(0)
    new = lambda *shape: cupy.asarray(rng.standard_normal(shape).astype(ml_dtypes.bfloat16))  # noqa: E731
    seqs = [cache.add(new(n, 576)) for n in (15, 30)]
    rows, q = new(2, 1, 576), new(2, 1, 4, 576)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        step = cache.reserve(seqs)
        step.write(rows)
        step.attend(q)
        step.rollback()
        step = cache.reserve(seqs)
        stream.begin_capture()
        step.write(rows)
        out, lse = step.attend(q)
        graph = stream.end_capture()
        step.rollback()
        for _ in range(50):
            rows[...], q[...] = new(2, 1, 576), new(2, 1, 4, 576)
            step = cache.reserve(seqs)
            graph.launch(stream)
            step.commit()
            again, lse_again = cache.attend(q, seqs)
            assert np.array_equal(back(out).view(np.uint16), back(again).view(np.uint16))
            assert np.array_equal(back(lse), back(lse_again))
        with pytest.raises(errors.StepError, match="is being captured"):
            stream.begin_capture()
            try:
                cache.reserve(seqs)
            finally:
                stream.end_capture()


def test_10000_forks_copies_and_cuts_have_the_bits_of_a_dense_copy():
    cupy = importlib.import_module("cupy")
    cache = PagedKVCache(9, page_size=16, num_layers=2, dtype="float16", device=0)
    rng, held, count = np.random.default_rng(1), {}, 1
    happened = dict.fromkeys(("copied", "cut", "forked", "full", "swapped"), 0)

    def rows_of(numbers):
        """[2, ..., 576] with a number in each row: one layer has it, the other its complement."""
        low = numbers.astype(np.uint32)
        rows = np.repeat(low[None, ..., None] & 0xFFFF, 576, axis=-1).astype(np.uint16)
        rows[..., 0] = low >> 16
        return np.concatenate([rows, ~rows])

    for i in range(10_000):
        seqs = list(held)
        what = rng.choice(5, p=[0.2, 0.5, 0.12, 0.15, 0.03])
        if not seqs:
            held[cache.add()] = []
        elif what == 0 and len(seqs) < 12:
            seq = seqs[rng.integers(len(seqs))]
            held[cache.fork(seq)] = list(held[seq])
            happened["forked"] += 1
        elif what == 1:
            some = [seqs[j] for j in rng.permutation(len(seqs))[: rng.integers(1, 5)]]
            counts = rng.integers(0, 4, len(some))
            try:
                step = cache.reserve(some, counts)
            except errors.OutOfPagesError:
                happened["full"] += 1
                cache.free(seqs[0])
                del held[seqs[0]]
                continue
            happened["copied"] += len(step._made.copied)
            numbers = np.arange(count, count + len(some) * step.tokens).reshape(len(some), -1)
            count += numbers.size
            step.write(cupy.asarray(rows_of(numbers).view(np.float16)))
            accepted = np.minimum(counts, rng.integers(0, 4, len(some)))
            step.commit(accepted)
            for seq, n, k, of in zip(some, counts, accepted, numbers.tolist(), strict=True):
                held[seq] += of[len(of) - n : len(of) - n + k]
        elif what == 2:
            seq = seqs[rng.integers(len(seqs))]
            n = int(rng.integers(0, len(held[seq]) + 1))
            cache.truncate(seq, n)
            del held[seq][n:]
            happened["cut"] += 1
        elif what == 3 and len(seqs) > 6:
            seq = seqs[rng.integers(len(seqs))]
            cache.free(seq)
            del held[seq]
        elif what == 4:
            seq = seqs[rng.integers(len(seqs))]
            cache.swap_out(seq)
            numbers = held.pop(seq)
            try:
                cache.swap_in(seq)
            except errors.OutOfPagesError:  # its pages were shared, and are still held
                cache.free(seq)
            else:
                held[seq] = numbers
            happened["swapped"] += 1
        if i % 20 == 19 and held:
            cache.check()
            table, lengths = (back(x) for x in cache.tables(list(held)))
            bits = cache._core.pool.bits[cupy.asarray(table)].get()  # [seqs, pages, 2, 16, 1, 576]
            for of, n, numbers in zip(bits, lengths, held.values(), strict=True):
                found = of[..., 0, :].swapaxes(0, 1).reshape(2, -1, 576)[:, :n]
                assert np.array_equal(found, rows_of(np.array(numbers, np.int64)))
    assert min(happened.values()) > 100, happened


@pytest.mark.parametrize("writer_is_busy", [True, False])
def test_a_page_is_not_written_while_another_stream_reads_it(writer_is_busy):
    """The reader is behind a long delay when its page is freed and taken on another stream. If that
    stream has unfinished work of the cache, too, the page is pending until both are done; else the
    stream waits for the reader, and the host does not."""
    cupy = importlib.import_module("cupy")
    rng = np.random.default_rng(2)
    first, second = (
        cupy.asarray(rng.standard_normal((64, 576)).astype(ml_dtypes.bfloat16)) for _ in range(2)
    )
    q = cupy.asarray(rng.standard_normal((1, 1, 16, 576)).astype(ml_dtypes.bfloat16))
    work = [cupy.ones(2**26, cupy.float32) for _ in range(2)]

    def delay(i):
        for _ in range(100):
            cupy.sqrt(work[i], out=work[i])

    cache = PagedKVCache(1 + writer_is_busy, device=0)
    expected = back(cache.attend(q, [seq := cache.add(first)])[0]).view(np.uint16)
    cache.free(seq)
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        reader, writer = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        with reader:
            seq = cache.add(first)
            delay(0)
            out, _ = cache.attend(q, [seq])
        with writer:
            if writer_is_busy:
                delay(1)
                other = cache.add(second)
            cache.free(seq)
            assert not reader.done, "the delay is too short to tell"
            if writer_is_busy:
                with pytest.raises(errors.OutOfPagesError) as caught:
                    cache.add(second)
                assert caught.value.pending == 1
                assert cache.page_counts == (0, 0, 1, 1)
                cache.wait()
                cache.free(other)
            cache.free(cache.add(second))
            assert writer_is_busy or not reader.done, "the host has waited"
        with reader:
            assert np.array_equal(back(out).view(np.uint16), expected)
        cupy.cuda.Device().synchronize()


def test_host_time_of_a_step_does_not_grow_with_the_layers():
    """benchmarks/cache.py has the figures; this is a bound that a slow host keeps, too."""
    import time

    def median(layers, **options):
        cache = PagedKVCache(1000, num_layers=layers, device=0, **options)
        seqs = [cache.add() for _ in range(128)]
        times = []
        for _ in range(60):
            start = time.perf_counter()
            cache.reserve(seqs).commit()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    few, many = median(1, max_seqs=128), median(8, max_seqs=128)
    assert many < 1.5 * few
    assert many < 1e-3
