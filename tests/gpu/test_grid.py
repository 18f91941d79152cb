"""FlashMLA's own grid of 2,352 dense cases, with its data recipe and its tolerances.

    pytest tests/gpu/test_grid.py -s            (-s prints a line for each group of cases)

After tests/test_flash_mla_dense_decoding.py and tests/kernelkit/compare.py of FlashMLA: normal / 10
clamped to +-1; lengths s_k, or normal around it; NaN in the unused slots of used pages and in all
unused pages; 2147480000 in unused entries of block_table. An element passes if its absolute or its
relative error is small enough, and out and lse as a whole have to be parallel to the expected ones.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
from support.gpu import oracle as gpu_oracle
from support.gpu.arrays import DRY, bits, from_float, host, mark, release_memory, to_float, xp
from support.gpu.problems import UNUSED_ENTRY, Problem, make

import flashmla_cupy

pytestmark = mark

BATCHES, QUERIES, LENGTHS = (1, 2, 6, 64), (1, 2, 4), (20, 140, 4096)
HEADS = [(q, kv) for q in (1, 3, 9, 63, 64, 126, 128) for kv in (1, 2, 3, 8) if q % kv == 0]
# absolute, relative and cosine tolerance
OUT_TOLERANCES = (8e-4, 2.01 / 128, 5e-6)
LSE_TOLERANCES = (1e-6, 8.01 / 65536, 1e-7)


class Case(NamedTuple):
    b: int
    s_q: int
    s_k: int
    h_q: int = 128
    h_kv: int = 1
    is_varlen: bool = True
    is_causal: bool = False
    have_zero_seqlen_k: bool = False


def groups() -> dict[str, list[Case]]:
    """The cases of each test, by its name."""
    flags = [(varlen, causal) for varlen in (False, True) for causal in (False, True)]
    made = {
        f"b={b} s_q={s_q}": [
            Case(b, s_q, s_k, *heads, *flag) for s_k in LENGTHS for heads in HEADS for flag in flags
        ]
        for b in BATCHES
        for s_q in QUERIES
    }
    made["empty requests"] = [
        Case(128, 2, 4096, *heads, True, causal, True)
        for heads in HEADS
        for causal in (False, True)
    ]
    made["performance"] = [
        Case(128, s_q, s_k, is_causal=causal)
        for s_q in (1, 2)
        for s_k in (4096, 8192, 16384, 32768)
        for causal in (False, True)
    ]
    return made


def small(cases: list[Case]) -> list[Case]:
    """What NumPy can do of them."""
    shrunk = [case._replace(b=min(case.b, 4), s_k=min(case.s_k, 70), h_q=9) for case in cases]
    return list(dict.fromkeys(case for case in shrunk if case.h_kv in (1, 3)))


def lengths_of(case: Case) -> np.ndarray:
    rng = random.Random(0)
    lengths = np.full(case.b, case.s_k, np.int32)
    if case.is_varlen:
        for i in range(case.b):
            lengths[i] = max(int(rng.normalvariate(case.s_k, case.s_k / 2)), case.s_q)
    if case.have_zero_seqlen_k:
        lengths[[rng.random() > 0.5 for _ in range(case.b)]] = 0
    return lengths


def problem_of(case: Case) -> Problem:
    """The table is as wide as the longest request padded to 256 tokens, the pool as large as the
    table, as in FlashMLA's test."""
    lengths = lengths_of(case)
    needed = -(-lengths // 64)
    columns = -(-int(lengths.max()) // 256) * 4
    return make(
        lengths,
        s_q=case.s_q,
        h_q=case.h_q,
        h_kv=case.h_kv,
        causal=case.is_causal,
        extra_columns=columns - int(needed.max()),
        extra_pages=case.b * columns - int(needed.sum()),
        table_padding=0,
        std=0.1,
        limit=1.0,
        poison="nan",
        garbage=(UNUSED_ENTRY,),
    )


def compare(got, want, tolerances):
    """Of float64 arrays, on the device: the largest error in units of what is allowed, and the sums
    for the cosine."""
    absolute, relative, _ = tolerances
    with np.errstate(all="ignore"):
        error = xp.abs(got - want)
        error = xp.minimum(error / absolute, error / (xp.abs(want) + 1e-6) / relative)
        # Equal infinities are right; any other NaN or infinity is not.
        error = xp.where(got == want, 0.0, xp.where(xp.isnan(error), xp.inf, error))
        finite = xp.isfinite(want)
        got, want = xp.where(finite, got, 0.0), xp.where(finite, want, 0.0)
        return [error.max(), (got * want).sum(), (got * got + want * want).sum(), (want**2).sum()]


def worst_error(problem: Problem, out, lse) -> float:
    """Below 1 if FlashMLA's test would pass: its tolerances are the unit."""
    found = []
    for e in gpu_oracle.expected(problem, bounds=False):
        index = xp.asarray(e.requests)
        want = to_float(from_float(e.out, out.dtype.name), "float64")
        got = to_float(bits(out)[index].view(out.dtype), "float64")
        found += compare(got, want, OUT_TOLERANCES)
        found += compare(lse[index].astype("float64"), e.lse, LSE_TOLERANCES)
    table = host(xp.stack(found)).reshape(-1, 2, 4)  # group, (out, lse), (error, sums)
    worst = float(table[..., 0].max())
    for sums, (_, _, tolerance) in zip(
        table[..., 1:].sum(axis=0).tolist(), (OUT_TOLERANCES, LSE_TOLERANCES), strict=True
    ):
        product, squares, expected_squares = sums
        difference = 0.0 if expected_squares < 1e-12 else 1 - 2 * product / squares
        worst = max(worst, np.inf if np.isnan(difference) else difference / tolerance)
    return worst


@pytest.mark.parametrize("name", groups())
def test_grid(name):
    release_memory()
    cases = small(groups()[name]) if DRY else groups()[name]
    worst, failures = 0.0, []
    for case in cases:
        problem = problem_of(case)
        error = worst_error(problem, *problem.decode())
        worst = max(worst, error)
        if not error < 1:
            failures.append(f"{case}: error {error:.3g} of the tolerance")
    flashmla_cupy.check()
    print(f"\n{name}: {len(cases)} cases, {len(failures)} failures, worst error {worst:.3f}")
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures[:10])
