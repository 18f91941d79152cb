"""The GPU oracle and problems against the NumPy oracle of tests/oracle.py, and against mistakes."""

from __future__ import annotations

import gpu_arrays
import gpu_oracle
import gpu_problems
import numpy as np
import pytest
from gpu_arrays import DTYPES, Guards, bits, from_float, host, same, to_float, xp
from oracle import oracle

pytestmark = gpu_arrays.mark


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


def right_answer(problem):
    """out and lse as a perfect kernel would give them."""
    out, lse = problem.outputs()
    for e in gpu_oracle.expected(problem, bounds=False):
        index = xp.asarray(e.requests)
        bits(out)[index] = bits(from_float(e.out, problem.q.dtype.name))
        lse[index] = e.lse.astype("float32")
    return out, lse


def test_the_oracle_takes_a_rounded_answer_and_finds_each_mistake():
    problem = gpu_problems.make([65, 0, 200], s_q=2, h_q=4, causal=True)
    out, lse = right_answer(problem)
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
    assert mistake(lambda o, _: o.__setitem__((1, 0, 0, 7), 1)).out == np.inf  # 0 must be 0
    assert mistake(lambda o, _: o.__setitem__((0, 0, 0, 0), 0x7FC1)).out == np.inf  # not written
    report = mistake(lambda _, s: s.__setitem__((0, 2, 1), s[0, 2, 1] ^ 0x10000))
    assert report.lse > 1 >= report.out
    problem.set_lengths([64, 0, 200])  # a token of a short request dropped
    assert gpu_oracle.check(problem, out, lse).wrong is not None
    assert gpu_oracle.check(problem, out, lse, requests=[1, 2]).wrong is None


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


def test_products():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3, 5, 7)), rng.standard_normal((2, 3, 7, 4))
    ways = [gpu_arrays.matmul] if gpu_arrays.DRY else [gpu_arrays.matmul, gpu_arrays._own_matmul]
    for product in ways:
        np.testing.assert_allclose(host(product(xp.asarray(a), xp.asarray(b))), a @ b, rtol=1e-12)


def test_guards_see_a_byte():
    for where in (-1, 0, 39, 40):  # before, inside, inside, after
        guards = Guards()
        x = guards.empty("x", (10,), "int32")
        y = guards.copy("y", xp.arange(10, dtype="int32"))
        assert guards.changed() == []
        start = gpu_arrays.GUARD_BYTES
        guards._rooms[1][1][start + where] ^= 1
        side = "before" if where < 0 else "in" if where < 40 else "after"
        assert guards.changed() == [f"{side} y"]
        guards.forget("y")
        assert guards.changed() == ([] if side == "in" else [f"{side} y"])
        assert x.shape == y.shape
