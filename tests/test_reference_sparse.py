"""The NumPy definition of sparse attention against the oracle; where it is exact, against bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.oracle import assert_within_bound, worst_ratio
from support.sparse_oracle import (
    flashmla_allclose,
    pool_values,
    prefill_oracle,
    sparse_oracle,
    times_seen,
)
from support.sparse_problems import (
    NO_TOKEN,
    Pool,
    make_sparse_problem,
    poison,
    prefill_problem,
    token_bytes,
)

from flashmla_cupy import reference_sparse
from flashmla_cupy.formats.cache_format import FORMATS

FP8 = ("v32", "e4m3", "v4")
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def solve(problem, **kwargs):
    return reference_sparse.decode(**problem.arguments(), **kwargs)


def bits(x):
    return x.view(f"u{x.dtype.itemsize}")


def random_sparse_problem(seed: int):
    """A small random configuration over every axis; the same one for the same seed."""
    rng = np.random.default_rng(seed)
    format = str(rng.choice([*FORMATS, *FP8]))
    extra = (int(rng.integers(1, 150)), int(rng.choice([1, 17, 64])), int(rng.integers(1, 70)))
    kinds = ["none", "request", "query"]
    return make_sparse_problem(
        format,
        batch=int(rng.integers(1, 4)),
        s_q=int(rng.integers(1, 4)),
        h_q=int(rng.choice([1, 3, 8, 20])),
        s_k=int(rng.integers(1, 200)),
        topk=int(rng.choice([1, 17, 63, 64, 65, 130])),
        page_size=int(rng.choice([1, 2, 16, 61, 64])),
        extra=extra if rng.random() < 0.4 else None,
        lengths=str(rng.choice(kinds)),
        extra_lengths=str(rng.choice(kinds)),
        sink=bool(rng.integers(2)),
        pow2_scales=format != "v32" or bool(rng.integers(2)),
        q_dtype=str(rng.choice(["bfloat16", "float16"])),
        softmax_scale=None if rng.random() < 0.3 else 0.0,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations_lie_within_the_bound(seed):
    problem = random_sparse_problem(seed)
    out, lse, violation = solve(problem)
    assert violation is None
    assert out.dtype == problem.q.dtype
    assert lse.dtype == np.float32
    assert_within_bound(out, lse, sparse_oracle(problem), f"seed {seed}")


@pytest.mark.parametrize("fp8", FP8)
def test_the_bound_refuses_a_wrong_answer(fp8):
    problem = make_sparse_problem(fp8, topk=20, sink=True)
    out, _, _ = solve(problem)
    expected = sparse_oracle(problem)
    seen = problem.pool.indices[0, 0]
    problem.pool.indices[0, 0] = np.roll(seen, 1)  # the order is free
    rolled = solve(problem)
    assert_within_bound(rolled.out, rolled.lse, expected)
    problem.pool.indices[0, 0, 0] = problem.pool.indices[0, 0, 1]  # one twice, one missing
    wrong = solve(problem)
    assert worst_ratio(wrong.out, expected.out, expected.out_bound) > 1
    problem.attn_sink += 0.1
    assert worst_ratio(solve(problem).lse, expected.lse, expected.lse_bound) > 1
    assert worst_ratio(out, expected.out, expected.out_bound) <= 1


SCOPES = [
    (512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 2),
    (2046, 2048, 64), (2046, 2048, 576),
]  # fmt: skip
GRID = [
    (format, extra, *lengths, scope)
    for scope, (format, extra, *lengths) in itertools.product(
        SCOPES,
        [
            ("v32", False, "none", "none"), ("v32", False, "request", "none"),
            ("v4", False, "none", "none"), ("v4", False, "request", "none"),
            ("v4", True, "none", "none"), ("v4", True, "request", "request"),
        ],
    )
]  # fmt: skip


@pytest.mark.parametrize(("format", "extra", "lengths", "extra_lengths", "scope"), GRID)
def test_flashmla_grid(format, extra, lengths, extra_lengths, scope):
    """tests/test_flash_mla_sparse_decoding.py of FlashMLA: its axes and tolerances; of b, s_q and
    h_q one value each, since the definition has one path for all."""
    s_k, topk, page_size = scope
    problem = make_sparse_problem(
        format, batch=1, s_q=1 + (topk == 64), h_q=64 if topk == 64 else 8, s_k=s_k, topk=topk,
        page_size=page_size, extra=scope if extra else None, lengths=lengths,
        extra_lengths=extra_lengths, varlen=lengths == "request",
    )  # fmt: skip
    out, lse, violation = solve(problem)
    expected = sparse_oracle(problem)
    assert violation is None
    flashmla_allclose(out, expected.out, 1e-3, 2.01 / 128, 5e-6)
    flashmla_allclose(lse, expected.lse, 1e-6, 8.01 / 65536, 1e-7)


@pytest.mark.parametrize("scope", [(512, 64, 61), (650, 576, 53)])
@pytest.mark.parametrize(("all_invalid", "zero"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sink", [False, True])
def test_flashmla_corner_cases(scope, all_invalid, zero, sink):
    s_k, topk, page_size = scope
    problem = make_sparse_problem(
        "v4", s_q=3, s_k=s_k, topk=topk, page_size=page_size, extra=scope, lengths="request",
        extra_lengths="request", sink=sink, all_invalid=all_invalid,
    )  # fmt: skip
    if zero:
        problem.pool.topk_length[0] = problem.extra.topk_length[0] = 0
    out, lse, violation = solve(problem)
    expected = sparse_oracle(problem)
    assert violation is None
    assert_within_bound(out, lse, expected)
    blind = [0, 1] if all_invalid else [0] if zero else []
    for b in blind:
        assert (bits(out[b]) == 0).all()
        assert (lse[b] == np.inf).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_needle_is_found_wherever_it_lies(format):
    """A token like the query, far from all others: all the weight of head 1 is its."""
    problem = make_sparse_problem(
        format, topk=48, s_k=100, page_size=16, h_q=3, sink=False, varlen=False
    )
    d_qk = FORMATS[format].d_qk
    query = np.sign(np.random.default_rng(5).standard_normal(d_qk)) * 0.5  # e4m3 has it exactly
    problem.q[0, 0, 1] = query
    problem.softmax_scale = 1.0
    for position in (0, 1, 17, 46, 47):
        slot = problem.pool.indices[0, 0, position]
        before = [part.copy() for part in token_bytes(problem.pool.k_cache, format, [slot])]
        write_token(problem, slot, query)
        values = pool_values(problem.pool.k_cache, format, descale(problem))
        out, lse, _ = solve(problem)
        assert np.array_equal(out[0, 0, 1].astype(np.float64), values[slot, :512])
        assert np.isclose(lse[0, 1, 0], d_qk / 4, rtol=1e-6)
        parts = token_bytes(problem.pool.k_cache, format, [slot])
        for part, old in zip(parts, before, strict=True):
            part[:] = old


def descale(problem) -> float:
    return 1.0 if problem.descale_k is None else float(problem.descale_k[0])


def write_token(problem, slot: int, values: np.ndarray) -> None:
    from flashmla_cupy.formats.write import write_kv

    if problem.descale_k is not None:
        problem.descale_k = np.array([2.0**-8], np.float32)
    write_kv(
        problem.pool.k_cache,
        values.astype(np.float32)[None, None],
        np.array([slot]),
        descale_k=problem.descale_k,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_of_rows_that_are_not_selected_change_no_bit(format):
    """A pool full of NaN around the tokens that are seen, or of zeros: the same bits."""
    results = []
    for fill in (0xFF, 0x7F, 0x00):
        problem = make_sparse_problem(
            format, s_q=2, topk=33, s_k=70, page_size=16, lengths="query", extra=(40, 17, 8)
        )
        for pool in (problem.pool, problem.extra):
            seen = np.zeros(pool.k_cache.shape[0] * pool.k_cache.shape[1], int)
            for b, i in np.ndindex(2, 2):
                seen += times_seen(pool, b, i, len(seen))
            for part in token_bytes(pool.k_cache, format, np.flatnonzero(seen == 0)):
                part[:] = fill
        results.append(solve(problem))
        assert np.isfinite(results[-1].out.astype(np.float32)).all()
    for other in results[1:]:
        assert np.array_equal(bits(results[0].out), bits(other.out))
        assert np.array_equal(bits(results[0].lse), bits(other.lse))


@pytest.mark.parametrize("format", FP8)
def test_nan_in_a_selected_token_stays_with_those_who_see_it(format):
    problem = make_sparse_problem(format, s_q=2, topk=16, s_k=64, varlen=False)
    before = solve(problem)
    mine = set(problem.pool.indices[1, 0].tolist()) - set(problem.pool.indices[1, 1].tolist())
    poison(problem.pool.k_cache, format, np.array([mine.pop()]))
    out, _, violation = solve(problem)
    assert violation is None
    assert np.isnan(out[1, 0].astype(np.float32)).all(axis=1).any()
    for b, i in ((0, 0), (0, 1), (1, 1)):
        assert np.array_equal(bits(out[b, i]), bits(before.out[b, i]))


def test_duplicates_count_twice():
    problem = make_sparse_problem("v32", topk=1, sink=False, varlen=False)
    one = solve(problem)
    problem.pool = problem.pool._replace(indices=np.repeat(problem.pool.indices, 5, axis=2))
    five = solve(problem)
    assert np.array_equal(bits(one.out), bits(five.out))
    assert np.allclose(five.lse - one.lse, np.log(5), atol=1e-5)


def test_a_sink_scales_out_alone():
    problem = make_sparse_problem("v32", h_q=4, topk=30, sink=False)
    plain = solve(problem)
    problem.attn_sink = np.array([-np.inf, np.inf, 0.0, plain.lse[0, 3, 0]], np.float32)
    out, lse, _ = solve(problem)
    assert np.array_equal(bits(lse), bits(plain.lse))
    assert np.array_equal(bits(out[:, :, 0]), bits(plain.out[:, :, 0]))
    assert (out[:, :, 1] == 0).all()
    share = 1 / (1 + np.exp(-plain.lse[0, 2, 0]))
    for head, factor in ((2, share), (3, 0.5)):
        want = plain.out[0, 0, head].astype(np.float64) * factor
        assert np.allclose(out[0, 0, head].astype(np.float64), want, rtol=2**-7)


@pytest.mark.parametrize("value", [-2, -123456, INT_MIN, "slots", INT_MAX])
@pytest.mark.parametrize("where", ["pool", "extra"])
def test_an_index_outside_the_pool_makes_nan_of_its_query_token_alone(value, where):
    problem = make_sparse_problem("v4", s_q=2, topk=20, s_k=40, extra=(30, 5, 16), varlen=False)
    problem.pool = problem.pool._replace(topk_length=np.full((2, 2), 4, np.int32))
    problem.extra = problem.extra._replace(topk_length=np.full(2, 4, np.int32))
    pool: Pool = getattr(problem, where)
    before = solve(problem)
    slots = pool.k_cache.shape[0] * pool.k_cache.shape[1]
    pool.indices[1, 0, 3] = slots if value == "slots" else value
    pool.indices[0, 0, 4] = INT_MIN  # beyond the length
    out, lse, violation = solve(problem)
    reason = "index" if where == "pool" else "extra index"
    assert (violation.request, violation.column, violation.reason) == (1, 3, reason)
    assert np.isnan(out[1, 0].astype(np.float32)).all() and np.isnan(lse[1, :, 0]).all()
    for b, i in ((0, 0), (0, 1), (1, 1)):
        assert np.array_equal(bits(out[b, i]), bits(before.out[b, i]))
        assert np.array_equal(lse[b, :, i], before.lse[b, :, i])


@pytest.mark.parametrize("value", [-1, 21, INT_MIN, INT_MAX])
@pytest.mark.parametrize("kind", ["request", "query"])
def test_a_length_outside_its_list_makes_nan_of_its_rows(value, kind):
    problem = make_sparse_problem("v32", s_q=2, topk=20, lengths=kind)
    before = solve(problem)
    problem.pool.topk_length[1] = value
    out, lse, violation = solve(problem)
    assert (violation.request, violation.column, violation.reason) == (1, -1, "topk_length")
    assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
    assert np.array_equal(bits(out[0]), bits(before.out[0]))


def test_stale_query_tokens_are_nan():
    problem = make_sparse_problem("v32", s_q=2)
    out, lse, violation = solve(problem, stale=np.array([False, False, True, False]))
    nan = np.isnan(out.astype(np.float32)).all(axis=(2, 3))
    assert nan.tolist() == [[False, False], [True, False]]
    assert np.isnan(lse).any(axis=1).tolist() == nan.tolist()
    assert (violation.request, violation.reason) == (1, "stale metadata")


def test_queries_of_e4m3_and_their_scale():
    from support.sparse_oracle import E4M3

    problem = make_sparse_problem("e4m3", sink=False)
    problem.q = (problem.q.astype(np.float32) / 0.25).astype(E4M3)
    problem.descale_q = np.array([0.25], np.float32)
    out, lse, _ = solve(problem)
    assert out.dtype == "bfloat16"
    assert_within_bound(out, lse, sparse_oracle(problem))


def test_sixteen_bit_pools_see_what_dense_attention_sees():
    """All tokens of a request in its list: the dense result, to rounding."""
    from support.problems import make_problem

    from flashmla_cupy import reference

    dense = make_problem([70, 130], s_q=2, h_q=4, page_size=32)
    expected = reference.decode(*dense.arrays())
    indices = np.full((2, 2, 130), -1, np.int32)
    for b, n in enumerate((70, 130)):
        token = np.arange(n)
        indices[b, :, :n] = dense.block_table[b, token // 32] * 32 + token % 32
    out, lse, violation = reference_sparse.decode(dense.q, dense.k_cache, indices)
    assert violation is None
    assert np.array_equal(bits(out), bits(expected.out))
    assert np.array_equal(lse, expected.lse)


# --- prefill -----------------------------------------------------------------------------------

PREFILL = [
    (128, 128), (256, 256), (512, 512), (592, 128), (1840, 256), (1592, 384), (1521, 512),
    (95, 128), (153, 256), (114, 384),
]  # fmt: skip


@pytest.mark.parametrize(("s_kv", "topk"), PREFILL)
@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("features", [False, True])
def test_prefill_grid(s_kv, topk, d_qk, features):
    problem = prefill_problem(5, 8, d_qk, s_kv, topk, sink=features, lengths=features)
    result = reference_sparse.prefill(**problem)
    want_out, want_max, want_lse = prefill_oracle(**problem)
    assert result.violation is None
    assert result.out.dtype == problem["q"].dtype
    flashmla_allclose(result.out, want_out, 8e-4, 3.01 / 128, 7e-6)
    flashmla_allclose(result.max_logits, want_max, 1e-6, 2.01 / 65536, 1e-7)
    flashmla_allclose(result.lse, want_lse, 1e-6, 2.01 / 65536, 1e-7)


@pytest.mark.parametrize("value", NO_TOKEN)
def test_prefill_of_no_token(value):
    problem = prefill_problem(3, 4, 576, 100, 20)
    problem["indices"][1] = 100 if value == "s_kv" else value
    if value in (114514, 1919810):
        assert value >= 100
    problem["topk_length"] = np.array([20, 20, 0], np.int32)
    result = reference_sparse.prefill(**problem)
    assert result.violation is None
    for i in (1, 2):
        assert (bits(result.out[i]) == 0).all()
        assert (result.lse[i] == np.inf).all()
        assert (result.max_logits[i] == -np.inf).all()


@pytest.mark.parametrize("value", [-1, 21, INT_MIN, INT_MAX])
def test_prefill_with_a_length_outside_its_list(value):
    problem = prefill_problem(3, 4, 576, 100, 20)
    before = reference_sparse.prefill(**problem)
    problem["topk_length"][1] = value
    result = reference_sparse.prefill(**problem)
    assert (result.violation.request, result.violation.reason) == (1, "topk_length")
    for array, old in zip(result[:3], before[:3], strict=True):
        assert np.isnan(array[1].astype(np.float32)).all()
        assert np.array_equal(bits(array[[0, 2]]), bits(old[[0, 2]]))


def test_prefill_is_decoding_with_each_query_token_a_request():
    problem = prefill_problem(6, 4, 576, 130, 40)
    listed = problem["indices"]
    problem["indices"] = np.where((listed >= 0) & (listed < 130), listed, -1).astype(np.int32)
    result = reference_sparse.prefill(**problem)
    out, lse, violation = reference_sparse.decode(
        problem["q"][:, None],
        problem["kv"][:, None],  # pages of one token
        problem["indices"],
        problem["sm_scale"],
        topk_length=problem["topk_length"],
        attn_sink=problem["attn_sink"],
    )
    assert violation is None
    assert np.array_equal(bits(out[:, 0]), bits(result.out))
    assert np.array_equal(lse[..., 0], result.lse)
