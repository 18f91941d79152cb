"""The GPU suite itself: its oracle against that of tests/oracle.py, and its tests against mistakes.

What counts and covers needs no GPU. The rest does, or a dry run, in which NumPy stands for the GPU:

    FLASHMLA_CUPY_TEST_XP=numpy pytest tests/gpu

test_the_suite_runs_dry does that for most of the suite, so that its logic is tested everywhere.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sanitize
import test_determinism
import test_grid
from support.gpu import guards as gpu_guards
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu import products as gpu_products
from support.gpu.arrays import DRY, DTYPES, bits, from_float, host, same, to_float, xp
from support.oracle import oracle

from flashmla_cupy import Schedule

TESTS = Path(__file__).resolve().parent


def on_device(test):
    """On the GPU, or anywhere in a dry run."""
    return test if DRY else pytest.mark.gpu(test)


def piece_counts(settings: dict) -> np.ndarray:
    """Pieces of each request on a GPU of 132 multiprocessors."""
    lengths = np.asarray(settings["lengths"], np.int32)
    rows = settings["s_q"] * settings["h_q"] // settings["h_kv"]
    return np.diff(Schedule.of(lengths, rows, settings["h_kv"]).num_splits)


def test_the_grid_is_that_of_flashmla():
    groups = test_grid.groups()
    cases = [case for group in groups.values() for case in group]
    assert len(test_grid.HEADS) == 16
    assert len(groups["empty requests"]) == 32
    assert len(groups["performance"]) == 16
    assert len(cases) == len(set(cases)) == 2352
    for case in cases:
        lengths = test_grid.lengths_of(case)
        assert case.have_zero_seqlen_k == (lengths == 0).any()
        assert case.is_varlen or (lengths == case.s_k).all()
        assert case.have_zero_seqlen_k or (lengths >= case.s_q).all() or not case.is_varlen


def test_random_configurations_cover_the_axes():
    seen = [gpu_problems.random_settings(seed) for seed in range(400 if DRY else 2000)]

    def values(name):
        return {settings[name] for settings in seen}

    assert values("page_size") == set(gpu_problems.PAGE_SIZES)
    assert values("dtype") == set(DTYPES)
    assert values("cache_layout") == set(gpu_problems.CACHE_LAYOUTS)
    assert values("q_layout") == set(gpu_problems.Q_LAYOUTS)
    assert values("causal") == {False, True}
    assert values("s_q") >= {*range(1, 10), 70}
    assert values("h_kv") == {1, 2, 3, 8}
    assert values("h_q") >= {1, 63, 64, 65, 126, 128, 160}
    assert all(settings["h_q"] % settings["h_kv"] == 0 for settings in seen)
    assert max(len(settings["lengths"]) for settings in seen) >= 300
    assert any((settings["lengths"] == 0).any() for settings in seen)
    if not DRY:
        longest = np.array([settings["lengths"].max() for settings in seen])
        assert (longest > 100_000).sum() > 20
        split = sum(piece_counts(settings).max() > 1 for settings in seen[:200])
        assert 40 < split < 160


def test_determinism_and_sanitizer_configurations_cover_splits_and_variants():
    chosen = test_determinism.configurations()
    assert len(chosen) == 64
    split = [piece_counts(settings).max() > 1 for settings in chosen]
    assert 16 <= sum(split) <= 56
    assert {(c["dtype"], c["page_size"]) for c in chosen} == set(
        itertools.product(DTYPES, gpu_problems.PAGE_SIZES)
    )
    chosen = sanitize.configurations()
    assert len(chosen) >= 60
    axes = set()
    for settings in chosen:
        is_split = bool(piece_counts(settings).max() > 1)
        assert is_split == (settings["lengths"] == sanitize.SPLIT)
        assert 0 in settings["lengths"]
        axes.add((settings["dtype"], settings["page_size"], is_split, settings["causal"]))
    assert len(axes) == 40


@pytest.mark.skipif(DRY, reason="this is the dry run")
def test_the_suite_runs_dry():
    files = (
        "random",
        "needles",
        "determinism",
        "fail_closed",
        "graph",
        "gpu_helpers",
        "gpu_mistakes",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command + [str(TESTS / f"test_{name}.py") for name in files],
        env={**os.environ, "FLASHMLA_CUPY_TEST_XP": "numpy", "FLASHMLA_CUPY_TEST_CASES": "5"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]


@on_device
@pytest.mark.parametrize("seed", range(10))
def test_the_oracle_agrees_with_that_of_the_host(seed):
    rng = np.random.default_rng(seed)
    h_kv = int(rng.choice([1, 2, 3]))
    problem = gpu_problems.make(
        rng.choice(gpu_problems.EDGES, 5),
        s_q=int(rng.integers(1, 5)),
        h_q=h_kv * int(rng.choice([1, 3, 8])),
        h_kv=h_kv,
        page_size=int(rng.choice(gpu_problems.PAGE_SIZES)),
        dtype=["bfloat16", "float16"][seed % 2],
        causal=bool(rng.integers(2)),
        softmax_scale=[None, 0.11][seed // 2 % 2],
        cache_layout=gpu_problems.CACHE_LAYOUTS[seed % 5],
        q_layout=gpu_problems.Q_LAYOUTS[(seed + 2) % 5],
        seed=seed,
    )
    arrays = (problem.q, problem.k_cache, problem.block_table, problem.cache_seqlens)
    theirs = oracle(*map(host, arrays), problem.softmax_scale, problem.causal)
    seen = []
    for ours in gpu_oracle.expected(problem):
        seen += ours.requests.tolist()
        for name in ("out", "lse", "out_bound", "lse_bound"):
            got, want = host(getattr(ours, name)), getattr(theirs, name)[ours.requests]
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, err_msg=name)
    assert sorted(seen) == list(range(5))


@on_device
def test_the_oracle_takes_a_rounded_answer_and_finds_each_mistake():
    problem = gpu_problems.make([65, 0, 200], s_q=2, h_q=4, causal=True)
    out, lse = gpu_oracle.rounded_answer(problem)
    assert gpu_oracle.check(problem, out, lse).wrong is None

    def mistake(change):
        wrong_out, wrong_lse = out.copy(), lse.copy()
        change(bits(wrong_out), bits(wrong_lse))
        return gpu_oracle.check(problem, wrong_out, wrong_lse)

    at = (2, 1, 3, 511)
    report = mistake(lambda o, _: o.__setitem__(at, o[at] ^ 0x4000))  # one bit of one element
    assert report.out > 1 >= report.lse
    assert "1 of" in report.wrong
    assert "(2, 1, 3, 511), length 200" in report.wrong
    assert mistake(lambda o, _: o.__setitem__((1, 0, 0, 7), 0x0080)).out == np.inf  # 0 must be 0
    assert mistake(lambda o, _: o.__setitem__((0, 0, 0, 0), 0x7FC1)).out == np.inf  # not written
    report = mistake(lambda _, s: s.__setitem__((0, 2, 1), s[0, 2, 1] ^ 0x10000))
    assert report.lse > 1 >= report.out
    problem.set_lengths([64, 0, 200])  # a token of a short request dropped
    assert gpu_oracle.check(problem, out, lse).wrong is not None
    assert gpu_oracle.check(problem, out, lse, requests=[1, 2]).wrong is None


@on_device
@pytest.mark.parametrize("layout", gpu_problems.CACHE_LAYOUTS)
def test_problems_are_live_where_they_should_be_and_poison_elsewhere(layout):
    problem = gpu_problems.make([70, 0, 16], page_size=32, h_q=2, h_kv=2, cache_layout=layout)
    live = np.zeros(problem.k_cache.shape[:2], bool)
    for b, n in enumerate(problem.lengths.tolist()):
        for t in range(n):
            live[problem.table[b, t // 32], t % 32] = True
    finite = np.isfinite(host(to_float(problem.k_cache)))
    assert np.array_equal(finite, np.broadcast_to(live[..., None, None], finite.shape))
    used = np.arange(problem.table.shape[1]) < -(-problem.lengths[:, None] // 32)
    pages = problem.k_cache.shape[0]
    assert np.array_equal((problem.table >= 0) & (problem.table < pages), used)
    assert np.array_equal(problem.table, host(problem.block_table))
    assert problem.block_table.strides[0] > problem.block_table.shape[1] * 4
    clean = problem.clean()
    assert np.isfinite(host(to_float(clean.k_cache))).all()
    assert same(clean.q, problem.q)
    values = host(to_float(problem.q))
    assert abs(values.mean()) < 0.1
    assert 0.9 < values.std() < 1.1


@on_device
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_conversions_round_to_nearest_even(dtype):
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    values[:4] = 1.00390625, 1.01171875, np.inf, np.nan  # two ties of bfloat16
    expected = values.astype(DTYPES[dtype])
    got = from_float(xp.asarray(values), dtype)
    keep = ~np.isnan(values)
    assert np.array_equal(host(bits(got))[keep], expected.view(np.uint16)[keep])
    assert np.isnan(host(to_float(got))[3])
    assert np.array_equal(host(to_float(got, "float64"))[keep], expected.astype(np.float64)[keep])


@on_device
@pytest.mark.parametrize(("m", "k", "n"), [(5, 7, 4), (64, 16, 64), (130, 33, 70)])
def test_products(m, k, n):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3, m, k)), rng.standard_normal((2, 3, k, n))
    ways = [gpu_products.matmul]
    if not DRY:
        ways.append(gpu_products._own_matmul)
    for product in ways:
        np.testing.assert_allclose(host(product(xp.asarray(a), xp.asarray(b))), a @ b, rtol=1e-9)


@on_device
def test_guards_see_a_byte():
    for where in (-1, 0, 39, 40):  # before, inside, inside, after
        guards = gpu_guards.Guards()
        x = guards.empty("x", (10,), "int32")
        y = guards.copy("y", xp.arange(10, dtype="int32"))
        assert guards.changed() == []
        start = gpu_guards.GUARD_BYTES
        guards._rooms[1][1][start + where] ^= 1
        side = "before" if where < 0 else "in" if where < 40 else "after"
        assert guards.changed() == [f"{side} y"]
        guards.forget("y")
        assert guards.changed() == ([] if side == "in" else [f"{side} y"])
        assert x.shape == y.shape
