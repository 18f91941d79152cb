"""The schedule kernel makes the integers of schedule.plan, bit for bit, and in a graph as well."""

from __future__ import annotations

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

import flashmla_cupy
from flashmla_cupy.schedule import split as schedule

pytestmark = pytest.mark.gpu

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
EDGES = (0, 1, 63, 64, 65, -1, INT_MIN, INT_MAX, INT_MAX - 63, 4096)

# 128: one pass of the warp. 16384 | 16385 and 32769: the prefix is kept at every 1st, 2nd, 4th.
BATCHES = (1, 2, 31, 33, 127, 128, 129, 132, 1000, 1025, 4096, 16384, 16385, 20000, 32769, 70000)
# (s_q * h_q // h_kv, h_kv): 132, 66, 33, 8, 16 and 1 parts of an H100 or H200
SHAPES = ((16, 1), (128, 1), (256, 1), (1024, 1), (64, 8), (8192, 2))


def lengths_of(seed: int, batch: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return [
        lambda: rng.integers(0, 300, batch),
        lambda: rng.integers(0, 30000, batch),
        lambda: np.full(batch, rng.integers(1, 70000)),
        lambda: rng.choice(EDGES, batch),
        lambda: np.where(rng.random(batch) < 0.7, 0, rng.integers(0, 5000, batch)),
        lambda: np.where(rng.random(batch) < 0.02, 131072, 512),
        lambda: rng.integers(INT_MIN, INT_MAX + 1, batch),
    ][seed % 7]().astype(np.int32)


def assert_equal(lengths: np.ndarray, made, rows: int, h_kv: int) -> None:
    metadata, num_splits = (cupy.asnumpy(x) for x in made)
    expected_metadata, expected_splits = schedule.plan(lengths, len(metadata), rows, h_kv)
    np.testing.assert_array_equal(metadata, expected_metadata)
    np.testing.assert_array_equal(num_splits, expected_splits)


@pytest.mark.parametrize("batch", BATCHES)
def test_device_makes_the_schedule_of_the_host(batch):
    for seed in range(14):
        lengths = lengths_of(seed, batch)
        rows, h_kv = SHAPES[(seed + batch) % len(SHAPES)]
        made = flashmla_cupy.get_mla_metadata(cupy.asarray(lengths), rows, h_kv)
        assert_equal(lengths, made, rows, h_kv)


def test_random_batches():
    rng = np.random.default_rng(0)
    for seed in range(100):
        lengths = lengths_of(seed, int(rng.integers(1, 400)))
        rows, h_kv = SHAPES[int(rng.integers(len(SHAPES)))]
        made = flashmla_cupy.get_mla_metadata(cupy.asarray(lengths), rows, h_kv)
        assert_equal(lengths, made, rows, h_kv)


def test_a_replayed_graph_follows_the_lengths():
    """The schedule is made from the lengths of the replay, not from those of the capture."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        lengths = cupy.asarray(lengths_of(1, 128))
        # Compiles, loads, and leaves memory in the stream's pool: a capture forbids all three.
        flashmla_cupy.get_mla_metadata(lengths, 16)
        stream.synchronize()
        stream.begin_capture()
        made = flashmla_cupy.get_mla_metadata(lengths, 16)
        graph = stream.end_capture()
        for seed in range(7):
            host = lengths_of(seed, 128)
            lengths.set(host)
            graph.launch(stream)
            stream.synchronize()
            assert_equal(host, made, 16, 1)
