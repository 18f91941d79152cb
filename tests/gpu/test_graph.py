"""CUDA graphs: a replay with other lengths, tables and q has the bits of an eager call.

The graph holds get_mla_metadata() and flash_mla_with_kvcache(), as a decoding step has them. Before
each of 1,000 replays all inputs change in place, under a graph captured once; an eager call on the
same arrays writes beside it, and the two are compared on the device. Now and then the oracle looks.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, differing, fill_nan, fill_normal, host, mark, release_memory, xp
from support.gpu.graphs import capture, new_stream

import flashmla_cupy
from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.gpu import launch_graph

pytestmark = mark

REPLAYS, TORCH_REPLAYS = (5, 2) if DRY else (1000, 1000)
ORACLE_EVERY = 2 if DRY else 100
CAPACITY = 150 if DRY else 6000  # tokens that a row of the table can hold
SHAPES = {
    "16 heads": {"batch": 64, "h_q": 16},
    "128 heads": {"batch": 24, "s_q": 2, "h_q": 128, "causal": True},
    "one request": {"batch": 1, "h_q": 128, "dtype": "float16", "page_size": 16},
    "kv heads": {"batch": 9, "s_q": 3, "h_q": 12, "h_kv": 3, "page_size": 128, "causal": True},
}


class Step:
    """Static arrays of one decoding step, whose contents change between replays."""

    def __init__(self, batch: int, **settings) -> None:
        batch = min(batch, 3) if DRY else batch
        # A full pool: every page is live, so any permutation of the table is right.
        self.problem = p = gpu_problems.make([CAPACITY] * batch, table_padding=0, **settings)
        self.pages = p.table[:, : -(-CAPACITY // p.page_size)].copy()
        fill_normal(p.k_cache, 5)  # the rest of the last pages too
        self.rng = np.random.default_rng(4)
        self.out, self.lse = p.outputs()
        self.eager_out, self.eager_lse = p.outputs()

    def change(self, number: int) -> None:
        """Other lengths, another table and another q, in the same arrays."""
        p, rng = self.problem, self.rng
        batch = p.batch
        lengths = (
            rng.integers(0, CAPACITY + 1, batch),
            rng.integers(0, 130, batch),
            np.where(rng.random(batch) < 0.1, CAPACITY, rng.integers(0, 64, batch)),
            np.full(batch, rng.integers(0, CAPACITY + 1)),
            np.where(rng.random(batch) < 0.6, 0, rng.integers(0, CAPACITY + 1, batch)),
        )[number % 5]
        p.set_lengths(np.minimum(lengths, CAPACITY))
        table = rng.choice(gpu_problems.GARBAGE, p.table.shape)
        used = np.arange(table.shape[1]) < -(-p.lengths[:, None] // p.page_size)
        columns = self.pages.shape[1]
        pages = rng.permutation(self.pages.reshape(-1)).reshape(self.pages.shape)
        table[:, :columns] = np.where(used[:, :columns], pages, table[:, :columns])
        p.set_table(table)
        fill_normal(p.q, 1000 + number)

    def run(self, out, lse):
        """The step itself; what it returns has to live as long as a graph of it."""
        metadata = self.problem.metadata()
        self.problem.decode(metadata, out, lse)
        return metadata


@pytest.mark.parametrize("name", SHAPES)
def test_replays_equal_eager_calls(name):
    release_memory()
    stream = new_stream()
    with stream:
        step = Step(**SHAPES[name])
        step.change(0)
        # Compiles, loads, and leaves memory in the stream's pool: a capture forbids all three.
        step.run(step.out, step.lse)
        replay, _kept = capture(stream, lambda: step.run(step.out, step.lse))
        wrong = []
        for number in range(REPLAYS):
            step.change(number)
            fill_nan(step.out)
            fill_nan(step.lse)
            replay()
            step.run(step.eager_out, step.eager_lse)
            wrong.append(differing(step.out, step.eager_out) + differing(step.lse, step.eager_lse))
            if number % ORACLE_EVERY == 0:
                gpu_oracle.assert_right(step.problem, step.out, step.lse, what=f"replay {number}")
        counts = host(xp.stack(wrong))
        print(f"\n{name}: {REPLAYS} replays, {np.count_nonzero(counts)} differ")
        assert not counts.any(), f"replays {np.flatnonzero(counts)[:10].tolist()} differ"
        flashmla_cupy.check()


@pytest.mark.parametrize("given", ["out and lse", "nothing"])
def test_a_graph_with_memory_of_cupys_asynchronous_pool(given):
    """MemoryAsyncPool allocates with cudaMallocAsync, which a capture makes part of the graph."""
    if DRY:
        pytest.skip("needs CuPy's pools")
    release_memory()
    before = xp.cuda.get_allocator()
    xp.cuda.set_allocator(xp.cuda.MemoryAsyncPool().malloc)
    try:
        with new_stream() as stream:
            step = Step(**SHAPES["16 heads"])
            step.change(0)
            p = step.problem

            arrays = p.q, p.k_cache, p.block_table, p.cache_seqlens

            def run(**results):
                metadata = p.metadata()
                out, lse = flash_mla_with_kvcache(*arrays, 512, *metadata, **results)
                return metadata, out, lse

            eager = run()
            results = {"out": step.out, "lse": step.lse} if given != "nothing" else {}
            replay, (_metadata, out, lse) = capture(stream, lambda: run(**results))
            for number in range(20):
                step.change(number)
                fill_nan(out)
                fill_nan(lse)
                replay()
                eager = run()
                assert not differing(out, eager[1]).any() and not differing(lse, eager[2]).any()
            flashmla_cupy.check()
            stream.synchronize()
    finally:
        xp.cuda.set_allocator(before)


def test_a_replay_refuses_what_an_eager_call_refuses():
    """A bad page id that comes after the capture."""
    stream = new_stream()
    with stream:
        step = Step(batch=3, h_q=16)
        p = step.problem
        step.change(0)
        p.set_lengths([70, 100, 0])
        step.run(step.out, step.lse)
        replay, _kept = capture(stream, lambda: step.run(step.out, step.lse))
        table = np.zeros_like(p.table)
        table[1, 1] = p.k_cache.shape[0]
        p.set_table(table)
        replay()
        out = host(gpu_oracle.to_float(step.out))
        assert np.isnan(out[1]).all()
        assert np.isfinite(out[[0, 2]]).all()
        with pytest.raises(flashmla_cupy.DeviceCheckError) as raised:
            flashmla_cupy.check()
        assert raised.value.args == (1, 1, "page id")
        p.set_table(np.zeros_like(table))
        replay()
        assert np.isfinite(host(gpu_oracle.to_float(step.out))).all()
        flashmla_cupy.check()


def test_eager_calls_after_the_first_are_one_graph(monkeypatch):
    """On any stream; with the arrays of each call, though the graph is the same."""
    launched, start = [], launch_graph.LaunchGraph.__call__

    def spy(graph, stream):
        launched.append(stream)
        start(graph, stream)

    monkeypatch.setattr(launch_graph.LaunchGraph, "__call__", spy)
    problems = [gpu_problems.make([700, 3000, 90], h_q=128, seed=seed) for seed in range(3)]
    streams = [new_stream() for _ in range(2)]
    if not DRY:
        xp.cuda.Device().synchronize()
    for problem in problems * 2:
        for stream in streams:
            with stream:
                out, lse = problem.decode()
                gpu_oracle.assert_right(problem, out, lse)
    flashmla_cupy.check()
    assert DRY or len(launched) >= 11
    assert DRY or set(launched) == {stream.ptr for stream in streams}


def test_replays_of_a_torch_graph():
    """The same, captured by torch; its tensors share the memory of the CuPy arrays."""
    torch = pytest.importorskip("torch")
    if DRY or not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    release_memory()
    step = Step(batch=24, s_q=2, h_q=128, causal=True)
    p = step.problem
    p.set_lengths([CAPACITY] * p.batch)
    p.set_table(p.table)

    def tensor(x):
        if x.dtype.itemsize == 2:  # by its bits: CuPy does not export bfloat16 everywhere
            dtype = torch.float16 if x.dtype == np.float16 else torch.bfloat16
            return torch.from_dlpack(x.view("int16")).view(dtype)
        return torch.from_dlpack(x)

    arrays = [tensor(x) for x in (p.q, p.k_cache, p.block_table, p.cache_seqlens)]
    out, lse, eager_out, eager_lse = map(
        tensor, (step.out, step.lse, step.eager_out, step.eager_lse)
    )

    def run(out, lse):
        metadata = get_mla_metadata(arrays[3], p.rows, p.h_kv)
        options = {"causal": True, "out": out, "lse": lse}
        flash_mla_with_kvcache(*arrays, 512, *metadata, **options)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(out, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out, lse)
    wrong = []
    for number in range(TORCH_REPLAYS):
        step.change(number)
        fill_nan(step.out)
        fill_nan(step.lse)
        xp.cuda.Device().synchronize()
        graph.replay()
        run(eager_out, eager_lse)
        torch.cuda.synchronize()
        wrong.append(differing(step.out, step.eager_out) + differing(step.lse, step.eager_lse))
        if number % ORACLE_EVERY == 0:
            gpu_oracle.assert_right(p, step.out, step.lse, what=f"replay {number}")
    counts = host(xp.stack(wrong))
    assert not counts.any(), f"replays {np.flatnonzero(counts)[:10].tolist()} differ"
    flashmla_cupy.check()
