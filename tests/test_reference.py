"""The NumPy definition of the result against the oracle, and where it is exact, against bits."""

from __future__ import annotations

import numpy as np
import pytest
from support.oracle import assert_within_bound, oracle
from support.problems import UNUSED_ENTRY, make_problem, random_problem

from flashmla_cupy import reference

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def solve(problem, **kwargs):
    return reference.decode(*problem.arrays(), **problem.options(), **kwargs)


def bits(x):
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_lie_within_the_bound(seed):
    problem = random_problem(seed)
    out, lse, violation = solve(problem)
    assert violation is None
    assert out.dtype == problem.q.dtype
    assert lse.dtype == np.float32
    assert_within_bound(out, lse, oracle(*problem.arrays(), **problem.options()), f"seed {seed}")


def test_the_bound_refuses_a_wrong_answer():
    problem = make_problem([100, 20])
    out, lse, _ = solve(problem)
    expected = oracle(*problem.arrays())
    for wrong_out, wrong_lse in ((out[::-1], lse), (out, lse + np.float32(1e-2))):
        with pytest.raises(AssertionError, match="out of bound; first at"):
            assert_within_bound(wrong_out, wrong_lse, expected)
    problem.cache_seqlens[0] -= 1  # one token of a short request missing
    short = solve(problem)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_within_bound(short.out, short.lse, expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_unused_memory_changes_no_bit(poison):
    shape = {"s_q": 2, "h_q": 6, "h_kv": 2, "page_size": 32, "causal": True}
    clean = solve(make_problem([70, 0, 33], poison=0.0, **shape))
    dirty = solve(make_problem([70, 0, 33], poison=poison, **shape))
    assert np.isfinite(clean.out.astype(np.float32)).all()
    assert np.array_equal(bits(clean.out), bits(dirty.out))
    assert np.array_equal(bits(clean.lse), bits(dirty.lse))


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_a_needle_is_found_at_every_edge(page_size):
    length = 2 * page_size + 5
    edges = [0, 1, page_size - 1, page_size, 2 * page_size - 1, 2 * page_size, length - 1]
    for position in edges:
        problem = make_problem([length, 3], h_q=3, page_size=page_size)
        page, slot = problem.token(0, position)
        problem.k_cache[page, slot, 0] = 30 * problem.q[0, 0, 1]  # all the weight of head 1
        out = solve(problem).out
        assert np.array_equal(bits(out[0, 0, 1]), bits(problem.k_cache[page, slot, 0, :512]))


@pytest.mark.parametrize("causal", [False, True])
def test_a_needle_past_the_end_or_the_causal_edge_has_no_effect(causal):
    problem = make_problem([65], s_q=3, h_q=2, causal=causal, poison=0.0)
    before = solve(problem)
    page, slot = problem.token(0, 64)
    problem.k_cache[page, slot + 1, 0] = 30 * problem.q[0, 2, 0]  # one past the end
    assert np.array_equal(bits(solve(problem).out), bits(before.out))
    problem.k_cache[page, slot, 0] = 30 * problem.q[0, 1, 0]  # the last key: only query 2 sees it
    after = solve(problem)
    changed = [not np.array_equal(after.lse[:, :, i], before.lse[:, :, i]) for i in range(3)]
    assert changed == ([False, False, True] if causal else [True, True, True])


def test_no_key_gives_zero_and_plus_infinity():
    problem = make_problem([0, 2, 5], s_q=4, causal=True)
    out, lse, violation = solve(problem)
    assert violation is None
    for request, blind in ((0, 4), (1, 2), (2, 0)):  # the first s_q - length queries see nothing
        assert (bits(out[request, :blind]) == 0).all()
        assert (lse[request, :, :blind] == np.inf).all()
        assert (out[request, blind:] != 0).any(axis=(1, 2)).all()
        assert np.isfinite(lse[request, :, blind:]).all()


def test_causal_is_bottom_right_aligned_and_means_nothing_for_one_query():
    problem = make_problem([70], s_q=3, causal=True)
    whole = solve(problem)
    for i in range(3):  # query i alone, over the keys it sees
        alone = make_problem([70], s_q=3)
        alone.q, alone.cache_seqlens = problem.q[:, i : i + 1], np.array([68 + i], np.int32)
        expected = solve(alone)
        assert np.array_equal(bits(whole.out[:, i : i + 1]), bits(expected.out))
        assert np.array_equal(whole.lse[:, :, i : i + 1], expected.lse)
        alone.causal = True
        assert np.array_equal(bits(solve(alone).out), bits(expected.out))


def test_kv_heads_serve_consecutive_query_heads():
    problem = make_problem([40], h_q=6, h_kv=3)
    out = solve(problem).out
    for g in range(3):
        one = make_problem([40], h_q=6, h_kv=3)
        one.q, one.k_cache = one.q[:, :, 2 * g : 2 * g + 2], one.k_cache[:, :, g : g + 1]
        assert np.array_equal(bits(solve(one).out), bits(out[:, :, 2 * g : 2 * g + 2]))


@pytest.mark.parametrize(
    ("length", "column", "page", "reason"),
    [
        (-1, None, 0, "length"),
        (INT_MIN, None, 0, "length"),
        (193, None, 0, "length"),  # the table holds 3 pages of 64
        (INT_MAX, None, 0, "length"),
        (100, 0, -1, "page id"),
        (100, 1, UNUSED_ENTRY, "page id"),
        (100, 1, 6, "page id"),  # num_pages
        (100, 1, INT_MIN, "page id"),
    ],
)
def test_an_invalid_request_is_nan_and_alone(length, column, page, reason):
    problem = make_problem([10, 100, 64], s_q=2, causal=True)
    assert problem.k_cache.shape[0] == 6
    assert problem.block_table.shape[1] == 3
    before = solve(problem)
    problem.cache_seqlens[1] = length
    if column is not None:
        problem.block_table[1, column] = page
    out, lse, violation = solve(problem)
    assert np.isnan(out[1].astype(np.float32)).all()
    assert np.isnan(lse[1]).all()
    for other in (0, 2):
        assert np.array_equal(bits(out[other]), bits(before.out[other]))
        assert np.array_equal(lse[other], before.lse[other])
    expected = (1, -1 if column is None else column, reason)
    assert (violation.request, violation.column, violation.reason) == expected
    assert "request 1" in str(violation)


def test_stale_requests_are_nan_and_the_first_violation_is_reported():
    problem = make_problem([10, 20, 30])
    out, lse, violation = solve(problem, stale=np.array([False, True, True]))
    assert np.isnan(out.astype(np.float32)).all(axis=(1, 2, 3)).tolist() == [False, True, True]
    assert np.isnan(lse).all(axis=(1, 2)).tolist() == [False, True, True]
    assert (violation.request, violation.reason) == (1, "stale metadata")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_live_latent_stays_in_its_request(value):
    problem = make_problem([10, 70, 30])
    before = solve(problem)
    page, slot = problem.token(1, 66)
    problem.k_cache[page, slot, 0, 3] = value
    out, lse, violation = solve(problem)
    assert violation is None
    assert not np.isfinite(out[1].astype(np.float32)).all()
    for other in (0, 2):
        assert np.array_equal(bits(out[other]), bits(before.out[other]))
        assert np.array_equal(lse[other], before.lse[other])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [3, 511, 575])
def test_what_is_not_finite_reaches_queries_that_do_not_see_it(value, column):
    """In the last live key, which the last of three queries alone sees, in one of two kv heads."""
    problem = make_problem([10, 70, 30], s_q=3, h_q=4, h_kv=2, causal=True)
    before = solve(problem)
    page, slot = problem.token(1, 69)
    problem.k_cache[page, slot, 1, column] = value
    out, lse, violation = solve(problem)
    assert violation is None
    assert np.isnan(out[1, :2, 2:].astype(np.float32)).all() and np.isnan(lse[1, 2:, :2]).all()
    seen = out[1, 2, 2:].astype(np.float32)
    if np.isnan(value):
        assert np.isnan(seen).all() and np.isnan(lse[1, 2:, 2]).all()
    else:
        # A score of +Inf is NaN in all columns; the weight of -Inf is 0, and 0 * Inf is NaN.
        wrong = np.isnan(seen).sum(axis=-1)
        expected = np.where(np.isnan(lse[1, 2:, 2]), 512, int(column < 512))
        assert wrong.tolist() == expected.tolist()
    assert np.array_equal(bits(out[1, :, :2]), bits(before.out[1, :, :2]))
    for other in (0, 2):
        assert np.array_equal(bits(out[other]), bits(before.out[other]))
        assert np.array_equal(lse[other], before.lse[other])


def test_a_query_without_keys_is_nan_when_a_key_it_does_not_see_is():
    problem = make_problem([2], s_q=4, causal=True)
    page, slot = problem.token(0, 1)
    problem.k_cache[page, slot, 0, 0] = np.nan
    out, lse, _ = solve(problem)
    assert np.isnan(out.astype(np.float32)).all() and np.isnan(lse).all()


@pytest.mark.parametrize("factor", [1e-30, 1e4, 1e15])
def test_extreme_scores_are_finite(factor):
    problem = make_problem([130], softmax_scale=factor)
    out, lse, _ = solve(problem)
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.isfinite(lse).all()
    assert_within_bound(out, lse, oracle(*problem.arrays(), softmax_scale=factor))


def test_writes_into_given_outputs_and_takes_strided_inputs():
    problem = make_problem([40, 90], s_q=2, h_q=4, page_size=32)
    expected = solve(problem)
    layers = np.full((*problem.k_cache.shape[:1], 3, *problem.k_cache.shape[1:]), np.nan)
    pool = layers.astype(problem.q.dtype)
    pool[:, 1] = problem.k_cache
    problem.k_cache = pool[:, 1]  # one layer of a packed cache
    problem.block_table = np.repeat(problem.block_table, 2, axis=0)[::2]
    out, lse = np.full_like(expected.out, 7), np.full_like(expected.lse, 7)
    result = solve(problem, out=out, lse=lse)
    assert result.out is out
    assert result.lse is lse
    assert np.array_equal(bits(out), bits(expected.out))
    assert np.array_equal(lse, expected.lse)
