"""Bit-identical results: 64 configurations, 100 runs each, beside a stream that disturbs them.

The configurations split requests in every way there is: not at all, all over the GPU, a few among
many, at the ends of parts. Each run makes its metadata again and writes into arrays that held NaN.
All runs of a configuration are compared on the device and read once.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, differing, fill_nan, host, mark, release_memory, xp

import flashmla_cupy

pytestmark = mark

RUNS = 3 if DRY else 100
NOISE = 1 << 22  # float32 that the disturbing stream adds to
# (s_q, h_q, h_kv): 132, 66, 33, 16, 44, 66, 132 and 66 parts of an H100 or H200
SHAPES = (
    (1, 16, 1),
    (1, 128, 1),
    (2, 128, 1),
    (4, 128, 1),
    (1, 126, 3),
    (3, 8, 2),
    (1, 64, 1),
    (77, 1, 1),
)


def length_sets() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    heavy = np.exp(rng.normal(6.5, 1.8, 60)).astype(int)
    return {
        "one long": np.array([131_072]),
        "three": np.array([20_001, 7, 9_000]),
        "equal": np.full(132, 512),
        "one more than parts": np.full(133, 300),
        "heavy tail": np.minimum(heavy, 40_000),
        "one long among short": np.where(np.arange(120) == 60, 60_000, 130),
        "short": rng.integers(0, 130, 300),
        "half empty": np.where(rng.random(64) < 0.5, 0, rng.integers(0, 3000, 64)),
    }


def configurations() -> list[dict]:
    """The arguments of make(): every set of lengths with every shape."""
    return [
        {
            "lengths": lengths,
            "s_q": s_q,
            "h_q": h_q,
            "h_kv": h_kv,
            "page_size": gpu_problems.PAGE_SIZES[(i + 2 * j) % 5],
            "dtype": ("bfloat16", "float16")[(i + j) % 2],
            "causal": (i + j // 2) % 2 == 0,
            "seed": 8 * i + j,
        }
        for i, lengths in enumerate(length_sets().values())
        for j, (s_q, h_q, h_kv) in enumerate(SHAPES)
    ]


class Noise:
    """A stream that takes multiprocessors and bandwidth away now and then."""

    def __init__(self) -> None:
        self.stream = None if DRY else xp.cuda.Stream(non_blocking=True)
        self.values = xp.zeros(NOISE, "float32")

    def make(self, run: int) -> None:
        if self.stream is not None and run % 2:
            with self.stream:
                for _ in range(run % 7):
                    self.values += 1


@pytest.mark.parametrize("name", length_sets())
def test_runs_are_bit_identical(name):
    release_memory()
    start = list(length_sets()).index(name) * len(SHAPES)
    mine = configurations()[start : start + len(SHAPES)]
    if DRY:
        small = {"lengths": np.minimum(length_sets()[name][:3], 70)}
        mine = [{**settings, **small, "h_q": settings["h_kv"]} for settings in mine]
    noise, failures = Noise(), []
    for settings in mine:
        problem = gpu_problems.make(**settings)
        first_out, first_lse = problem.decode()
        out, lse = problem.outputs()
        wrong = []
        for run in range(RUNS):
            noise.make(run)
            fill_nan(out)
            fill_nan(lse)
            problem.decode(out=out, lse=lse)
            wrong.append(differing(out, first_out) + differing(lse, first_lse))
        counts = host(xp.stack(wrong))
        if counts.any():
            runs = np.flatnonzero(counts)
            failures.append(f"{problem.label}: {len(runs)} of {RUNS} runs differ, {counts[runs]}")
        flashmla_cupy.check()
    print(f"\n{name}: {len(mine)} configurations, {RUNS} runs each, {len(failures)} failures")
    assert not failures, "\n".join(failures)
