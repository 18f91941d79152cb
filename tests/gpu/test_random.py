"""Random configurations over all axes; every element within the bound of the float64 oracle.

    FLASHMLA_CUPY_TEST_CASES=100000 pytest tests/gpu/test_random.py -s             (default 2000)
    FLASHMLA_CUPY_TEST_FIRST=1234 FLASHMLA_CUPY_TEST_CASES=1 pytest tests/gpu/test_random.py

The second line replays a case: a configuration and its data follow from its seed alone. Every
eighth case runs again with zeros for poison and page 0 for garbage, which must change no bit.
"""

from __future__ import annotations

import os

import pytest
from support.gpu import oracle as gpu_oracle
from support.gpu.arrays import DRY, mark, release_memory, same
from support.gpu.problems import random_problem

import flashmla_cupy

pytestmark = mark

CASES = int(os.environ.get("FLASHMLA_CUPY_TEST_CASES", "40" if DRY else "2000"))
FIRST = int(os.environ.get("FLASHMLA_CUPY_TEST_FIRST", "0"))
CHUNK = 100  # cases of one test
EVERY = 8  # a case of so many is compared with one without poison


def run(seed: int) -> gpu_oracle.Report:
    problem = random_problem(seed)
    out, lse = problem.decode()
    report = gpu_oracle.check(problem, out, lse, what=f"seed {seed}: {problem.label}")
    if report.wrong is None and seed % EVERY == 0:
        clean_out, clean_lse = problem.clean().decode()
        if not (same(out, clean_out) and same(lse, clean_lse)):
            return report._replace(wrong=f"seed {seed}: {problem.label}: poison changes the bits")
    return report


@pytest.mark.parametrize("first", range(FIRST, FIRST + CASES, CHUNK))
def test_random(first):
    release_memory()
    seeds = range(first, min(first + CHUNK, FIRST + CASES))
    reports = {}
    for seed in seeds:
        reports[seed] = run(seed)
        flashmla_cupy.check()
    worst_out = max(report.out for report in reports.values())
    worst_lse = max(report.lse for report in reports.values())
    failures = {seed: r.wrong for seed, r in reports.items() if r.wrong is not None}
    print(
        f"\nseeds {seeds.start}..{seeds.stop - 1}: {len(seeds)} cases, {len(failures)} failures, "
        f"worst error / bound {worst_out:.3f} (out) {worst_lse:.3f} (lse)"
    )
    assert not failures, (
        f"seeds {list(failures)} (to replay one: FLASHMLA_CUPY_TEST_FIRST={next(iter(failures))} "
        "FLASHMLA_CUPY_TEST_CASES=1)\n" + "\n".join(list(failures.values())[:5])
    )
