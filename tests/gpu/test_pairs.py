"""Pairs of pieces: the front merges the back, or `combine` does, and no bit tells which.

On a GPU with nothing else to do, backs are done when fronts end, and fronts merge. Then a kernel on
another stream keeps most of the multiprocessors, so that thread blocks come one after another, and
fronts end before their backs have started: with one multiprocessor left, all of them.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, host, mark, same, synchronize, xp

import flashmla_cupy
from flashmla_cupy.schedule.split import BEGINS_IN_PAIR, ENDS_IN_PAIR

pytestmark = mark

SHAPES = ((1, 128, 1), (2, 64, 1), (1, 16, 1), (3, 24, 2), (1, 100, 1), (5, 3, 1))


BUSY = r"""
extern "C" __global__ void keep_busy(const volatile int* stop, int* started) {
  extern __shared__ char room[];  // so much that nothing else fits
  if (threadIdx.x == 0) {
    atomicAdd(started, 1);
    const long long begin = clock64();
    while (!*stop && clock64() - begin < 4000000000ll) {
    }
  }
}
"""
SHARED_BYTES = 200 << 10


@contextlib.contextmanager
def busy(multiprocessors: int):
    """So many multiprocessors are occupied inside a with block."""
    kernel = xp.RawKernel(BUSY, "keep_busy")
    kernel.max_dynamic_shared_size_bytes = SHARED_BYTES
    words = xp.cuda.alloc_pinned_memory(8)
    stop, started = np.frombuffer(words, np.int32, 2)[:1], xp.zeros(1, np.int32)
    stop[0] = 0
    stream = xp.cuda.Stream(non_blocking=True)
    synchronize()
    with stream:
        kernel((multiprocessors,), (32,), (words.ptr, started), shared_mem=SHARED_BYTES)
    counting = xp.cuda.Stream(non_blocking=True)
    try:
        with counting:
            while int(started[0]) < multiprocessors:
                pass
        yield
    finally:
        stop[0] = 1
        synchronize()


def problem_of(case: int):
    rng = np.random.default_rng(case)
    s_q, h_q, h_kv = SHAPES[case % len(SHAPES)]
    lengths = [
        lambda: rng.integers(1, 4000, 90),
        lambda: np.maximum(rng.normal(2000, 1000, 128), 4).astype(int),
        lambda: rng.integers(300, 2500, 150),
        lambda: np.where(rng.random(70) < 0.2, 0, rng.integers(300, 6000, 70)),
    ][case % 4]()
    return gpu_problems.make(
        lengths[:9] if DRY else lengths,
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        page_size=gpu_problems.PAGE_SIZES[case % 5],
        dtype=("bfloat16", "float16")[case // 2 % 2],
        causal=case % 3 == 0,
        seed=case,
    )


@pytest.mark.parametrize("case", range(24))
def test_who_merges_changes_no_bit(case):
    problem = problem_of(case)
    metadata = problem.metadata()
    marks = host(metadata[0])[:, 4] & (BEGINS_IN_PAIR | ENDS_IN_PAIR)
    assert DRY or marks.any(), "no pair: the case tests nothing"
    results = [problem.decode(metadata)]
    for free in () if DRY else (1, 5, 66, 131):
        multiprocessors = xp.cuda.Device().attributes["MultiProcessorCount"]
        with busy(multiprocessors - free):
            results.append(problem.decode(metadata))
            xp.cuda.get_current_stream().synchronize()
    flashmla_cupy.check()
    gpu_oracle.assert_right(problem, *results[0], what=f"case {case}")
    for out, lse in results[1:]:
        assert same(out, results[0][0])
        assert same(lse, results[0][1])
