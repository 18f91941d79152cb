"""FP8 caches and lists of tokens on a GPU: FlashMLA's grids, random configurations against the
float64 oracle, needles, bytes that nobody may look at, corrupt lists, repeated runs and replays.

    FLASHMLA_CUPY_TEST_CASES=2000 pytest tests/gpu/test_sparse.py -k random -s        (default 150)
    FLASHMLA_CUPY_TEST_FIRST=1234 FLASHMLA_CUPY_TEST_CASES=1 pytest ...               replays one

Formats whose kernel there is not (an OptionError says so) are skipped.
"""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import pytest
from support.gpu.arrays import DRY, differing, fill_nan, from_float, host, mark, release_memory, xp
from support.gpu.arrays import same as same_on_device
from support.gpu.graphs import capture, new_stream
from support.oracle import Oracle, assert_within_bound
from support.sparse_calls import FP8, keywords, schedule_arguments
from support.sparse_oracle import (
    flashmla_allclose,
    largest_logits,
    pool_values,
    prefill_oracle,
    sparse_oracle,
)
from support.sparse_problems import as_prompt, make_sparse_problem, prefill_problem, token_bytes

import flashmla_cupy
from flashmla_cupy import (
    OptionError,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    reference_sparse,
)
from flashmla_cupy.formats.cache_format import FORMATS
from flashmla_cupy.formats.write import write_kv

if not DRY:
    from cupy.lib.stride_tricks import as_strided

pytestmark = mark

CASES = int(os.environ.get("FLASHMLA_CUPY_TEST_CASES", "10" if DRY else "150"))
FIRST = int(os.environ.get("FLASHMLA_CUPY_TEST_FIRST", "0"))
RUNS, REPLAYS = (2, 2) if DRY else (100, 200)
RAW = 2.0**-10  # what a kernel that holds keys in float16 adds for scales that are no power of two
RAW_WIDE = 2.0**-8  # and one that holds them in bfloat16


@pytest.fixture(autouse=True)
def _lengths_are_looked_at_as_on_a_gpu(monkeypatch):
    """A bad length in host memory is refused before anything is computed; on a GPU, later."""
    monkeypatch.setattr(reference_sparse, "bad_length", lambda *_: -1)
    release_memory()


def put(x):
    """The same array on the GPU."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name in ("bfloat16", "float8_e4m3fn"):
        return xp.asarray(x.view(f"uint{8 * x.itemsize}")).view(x.dtype)
    if DRY or x.ndim < 4 or x.strides[0] == x[0].nbytes:
        return x if DRY else xp.asarray(x)
    pages = np.zeros((len(x), x.strides[0]), np.uint8)  # of a cache whose pages are padded
    pages[:, : x[0].nbytes] = x.reshape(len(x), -1).view(np.uint8)
    return as_strided(xp.asarray(pages), x.shape, x.strides)


@functools.cache
def missing(format: str, kind: str) -> str:
    """Why calls of this kind cannot be made; "" if they can."""
    try:
        if kind == "prefill":
            flash_mla_sparse_fwd(
                **prompt_on_gpu(prefill_problem(1, 16, FORMATS[format].d_qk, 9, 5))
            )
        else:
            extra = (9, 5, 64) if kind == "extra" else None
            decode(make_sparse_problem(format, batch=1, s_k=9, topk=5, extra=extra))
    except OptionError as error:
        return str(error)
    return ""


def need(format: str, kind: str = "decode") -> None:
    why = missing(format, kind)
    if why:
        pytest.skip(why)


def on_gpu(problem) -> dict:
    return {name: put(value) for name, value in keywords(problem).items()}


def decode(problem, arrays: dict | None = None, **outputs):
    """Both calls of a step; the arrays may be on the GPU already."""
    return step(problem, on_gpu(problem) if arrays is None else arrays, **outputs)[:2]


def step(problem, arrays: dict, lengths=None, **outputs):
    """(out, lse, metadata) of both calls. With `lengths`, whose batch alone counts, on the GPU
    nothing is copied there."""
    here, *rows = schedule_arguments(problem)
    lengths = put(here) if lengths is None else lengths
    sizes = {
        "topk": arrays["indices"].shape[2],
        "topk_length": arrays.get("topk_length"),
        "extra_topk": problem.extra and arrays["extra_indices_in_kvcache"].shape[2],
        "extra_topk_length": arrays.get("extra_topk_length"),
    }
    made = get_mla_metadata(lengths, *rows, **sizes)
    named = dict(zip(("tile_scheduler_metadata", "num_splits"), made, strict=True))
    return *flash_mla_with_kvcache(**arrays, **named, **outputs), made


def results_of(problem) -> tuple[np.ndarray, np.ndarray]:
    return tuple(host(x) for x in decode(problem))


def outputs_of(problem) -> dict:
    batch, s_q, h_q, _ = problem.q.shape
    dtype = problem.q.dtype.name if problem.q.dtype.itemsize > 1 else "bfloat16"
    out = from_float(xp.zeros((batch, s_q, h_q, 512), "float32"), dtype)
    return {"out": out, "lse": xp.zeros((batch, h_q, s_q), "float32")}


def prompt_on_gpu(problem: dict) -> dict:
    return {name: put(value) for name, value in problem.items()}


# --- numbers -----------------------------------------------------------------------------------

SCOPES = [
    (512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 2),
    (2046, 2048, 64), (2046, 2048, 576),
]  # fmt: skip
AXES = {"format": ("v32", "v4"), "h_q": (64, 128), "scope": SCOPES, "batch": (4, 74), "s_q": (1, 3)}
GRID = list(itertools.product(*AXES.values()))[:: 7 if DRY else 1]


@pytest.mark.parametrize(("format", "h_q", "scope", "batch", "s_q"), GRID)
def test_flashmla_grid(format, h_q, scope, batch, s_q):
    """tests/test_flash_mla_sparse_decoding.py of FlashMLA, its recipe and tolerances."""
    need(format)
    s_k, topk, page_size = scope
    if DRY or (batch == 74 and topk == 2048):
        batch, h_q = 2, h_q if topk == 2048 and not DRY else 8
    extras = (None, scope) if format == "v4" else (None,)  # as there
    for lengths, extra in itertools.product(("none", "request"), extras):
        problem = make_sparse_problem(
            format, batch=batch, s_q=s_q, h_q=h_q, s_k=s_k, topk=topk, page_size=page_size,
            extra=extra, lengths=lengths, extra_lengths=lengths, seed=batch,
        )  # fmt: skip
        out, lse = results_of(problem)
        few = slice(0, 4)  # requests that the oracle, on the host, looks at
        expected = sparse_oracle(first_requests(problem, few))
        flashmla_allclose(out[few], expected.out, 1e-3, 2.01 / 128, 5e-6)
        flashmla_allclose(lse[few], expected.lse, 1e-6, 8.01 / 65536, 1e-7)
        flashmla_cupy.check()


@pytest.mark.parametrize("format", ["v32", "v4"])
@pytest.mark.parametrize("scope", [(512, 64, 61), (650, 576, 53)])
def test_flashmla_corners(format, scope):
    """And those of the same file: nothing valid, or no length, with and without a sink."""
    need(format)
    s_k, topk, page_size = scope
    kinds = itertools.product((False, True), ("none", "zero"), (False, True))
    for all_invalid, lengths, sink in kinds:
        problem = make_sparse_problem(
            format, batch=4, s_q=3, h_q=4 if DRY else 128, s_k=s_k, topk=topk,
            page_size=page_size, sink=sink, all_invalid=all_invalid,
        )  # fmt: skip
        if lengths == "zero":
            problem.pool = problem.pool._replace(topk_length=np.array([0, topk, 0, 1], np.int32))
        out, lse = results_of(problem)
        flashmla_cupy.check()
        expected = sparse_oracle(problem)
        flashmla_allclose(out, expected.out, 1e-3, 2.01 / 128, 5e-6)
        flashmla_allclose(lse, expected.lse, 1e-6, 8.01 / 65536, 1e-7)


def first_requests(problem, some: slice):
    """The problem of some requests, over the same pool."""
    length = problem.pool.topk_length
    pool = problem.pool._replace(
        indices=problem.pool.indices[some], topk_length=None if length is None else length[some]
    )
    fewer = type(problem)(**{**vars(problem), "pool": pool, "q": problem.q[some]})
    if problem.extra is not None:
        length = problem.extra.topk_length
        fewer.extra = problem.extra._replace(
            indices=problem.extra.indices[some],
            topk_length=None if length is None else length[some],
        )
    return fewer


def random_problem(seed: int):
    rng = np.random.default_rng((11, seed))

    def pick(options):
        return options[int(rng.integers(len(options)))]

    formats = [name for name in FORMATS if not missing(name, "decode")]
    if not formats:
        pytest.skip("there is no kernel")
    format, with_extra = pick(formats), rng.random() < 0.3
    if with_extra and missing(format, "extra"):
        with_extra = False
    extra = (int(rng.integers(1, 300)), pick((1, 17, 64, 300)), pick((2, 64)))
    extra, lengths = extra if with_extra else None, pick(("none", "request", "query"))
    problem = make_sparse_problem(
        format,
        batch=int(rng.integers(1, 6)),
        s_q=pick((1, 1, 2, 3)),
        h_q=pick((1, 3, 8) if DRY else (1, 8, 16, 20, 32, 40, 64, 96, 128)),
        s_k=int(rng.integers(1, 600 if DRY else 2100)),
        topk=pick((1, 17, 63, 64, 65) if DRY else (1, 17, 63, 64, 65, 512, 2047, 2048)),
        page_size=pick((1, 2, 16, 53, 64, 69, 256)),
        extra=(int(rng.integers(1, 300)), pick((1, 17, 64, 300)), pick((2, 64)))
        if with_extra
        else None,
        lengths=lengths,
        extra_lengths=lengths if rng.random() < 0.7 else "none",  # a GPU takes no mixture
        sink=bool(rng.integers(2)),
        pow2_scales=format != "v32" or bool(rng.integers(2)),
        q_dtype=pick(("bfloat16", "float16") + ("float8_e4m3fn",) * FORMATS[format].has_descale)
        if format in FP8
        else format.split("_")[0],
        softmax_scale=None if rng.random() < 0.3 else 0.0,
        all_invalid=rng.random() < 0.03,
        seed=seed,
    )
    of_bf16 = problem.q.dtype.name == "bfloat16"
    problem.wide_fp8 = format in FP8 and of_bf16 and rng.random() < 0.3
    return problem


def test_random():
    """Every element within the bound of the oracle; seed by seed, so that one can be replayed."""
    failures = []
    for seed in range(FIRST, FIRST + CASES):
        problem = random_problem(seed)
        out, lse = results_of(problem)
        flashmla_cupy.check()
        expected: Oracle = sparse_oracle(problem, k=RAW_WIDE if problem.wide_fp8 else RAW)
        try:
            assert_within_bound(out, lse, expected, f"seed {seed}: {problem.format}")
        except AssertionError as failure:
            failures.append(str(failure))
    print(f"\n{CASES} configurations, {len(failures)} outside the bound")
    assert not failures, f"{len(failures)} of {CASES}:\n" + "\n".join(failures[:5])


# Of either kernel over FP8: those for few query rows, and for more.
BOTH_SIZES = pytest.mark.parametrize("h_q", [16, 64])
# The queries of 16-bit formats have the dtype of the cache, whatever is said here.
ALL_QUERIES = pytest.mark.parametrize(
    ("format", "q_dtype"), [*((name, "bfloat16") for name in FORMATS), ("e4m3", "float8_e4m3fn")]
)


@BOTH_SIZES
@ALL_QUERIES
def test_needles(format, q_dtype, h_q):
    """A key like the query, far from all others: all the weight of its head is its."""
    need(format)
    d_qk = FORMATS[format].d_qk
    rng = np.random.default_rng(5)
    problem = make_sparse_problem(
        format, batch=3, topk=300, s_k=700, page_size=16, h_q=h_q, sink=False, varlen=False,
        q_dtype=q_dtype,
    )  # fmt: skip
    problem.softmax_scale, problem.descale_q = 1.0, None
    if problem.descale_k is not None:
        problem.descale_k = np.array([2.0**-8], np.float32)
    for trial in range(3 if DRY else 40):
        query = np.sign(rng.standard_normal(d_qk)) * 0.5  # e4m3 has it exactly
        b, head = int(rng.integers(3)), int(rng.integers(h_q))
        edges = (0, 1, 11, 12, 47, 48, 63, 64, 127, 128, 255, 256, 298, 299)
        position = edges[trial % len(edges)]
        problem.q[b, 0, head] = query
        slot = problem.pool.indices[b, 0, position]
        write_kv(
            problem.pool.k_cache, query.astype(np.float32)[None, None], np.array([slot]),
            descale_k=problem.descale_k,
        )  # fmt: skip
        out, lse = results_of(problem)
        factor = 1.0 if problem.descale_k is None else float(problem.descale_k[0])
        values = pool_values(problem.pool.k_cache, format, factor)[slot]
        assert np.array_equal(out[b, 0, head].astype(np.float64), values[:512]), (trial, position)
        assert np.isclose(lse[b, head, 0], d_qk / 4, rtol=1e-5), (trial, position)
        problem.q[b, 0, head] = 0


# --- memory ------------------------------------------------------------------------------------


@BOTH_SIZES
@ALL_QUERIES
def test_bytes_of_tokens_that_are_not_selected_change_no_bit(format, q_dtype, h_q):
    need(format)
    results = []
    for fill in (0xFF, 0x7F, 0x00):
        problem = make_sparse_problem(
            format, batch=3, s_q=2, topk=130, s_k=400, page_size=16, h_q=h_q, lengths="query",
            q_dtype=q_dtype,
        )  # fmt: skip
        slots = np.arange(problem.pool.k_cache.shape[0] * 16)
        length = problem.pool.topk_length[..., None]
        seen = problem.pool.indices[np.arange(130) < length]
        for part in token_bytes(problem.pool.k_cache, format, np.setdiff1d(slots, seen)):
            part[:] = fill
        results.append(decode(problem))
    assert np.isfinite(host(results[0][0]).astype(np.float32)).all()
    for other in results[1:]:
        assert all(same_on_device(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH_SIZES
@ALL_QUERIES
def test_corrupt_lists(format, q_dtype, h_q):
    """A bad index or length: NaN in the rows of its query token, no bit changed elsewhere."""
    need(format)
    rng = np.random.default_rng(3)
    problem = make_sparse_problem(
        format, batch=5, s_q=2, topk=200, s_k=300, h_q=h_q, varlen=False, q_dtype=q_dtype
    )
    problem.pool = problem.pool._replace(topk_length=np.full((5, 2), 150, np.int32))
    before = results_of(problem)
    slots = problem.pool.k_cache.shape[0] * problem.pool.k_cache.shape[1]
    arrays = on_gpu(problem)
    made = get_mla_metadata()[0]
    for trial in range(4 if DRY else 40):
        b, i, place = (int(rng.integers(n)) for n in (5, 2, 150))
        indices, length = problem.pool.indices.copy(), problem.pool.topk_length.copy()
        is_length = trial % 4 == 3
        if is_length:
            length[b, i] = rng.choice([-1, 201, 2**31 - 1, -(2**31)])
        else:
            indices[b, i, place] = rng.choice([-2, slots, 2**31 - 1, -(2**31), slots + 7])
        indices[..., 150:] = rng.choice([-5, slots], indices[..., 150:].shape)
        changed = {"indices": put(indices), "topk_length": put(length)}
        made = get_mla_metadata()[0]
        out, lse = (
            host(x)
            for x in flash_mla_with_kvcache(**(arrays | changed), tile_scheduler_metadata=made)
        )
        assert np.isnan(out[b, i].astype(np.float32)).all() and np.isnan(lse[b, :, i]).all()
        others = np.ones((5, 2), bool)
        others[b, i] = False
        flat = out.view(np.uint16)[others]
        if not is_length:  # which changes the schedule, and so may the order of sums
            assert np.array_equal(flat, before[0].view(np.uint16)[others])
        else:
            assert np.isfinite(out[others].astype(np.float32)).all()
        with pytest.raises(flashmla_cupy.DeviceCheckError) as raised:
            flashmla_cupy.check()
        reason = "topk_length" if is_length else "index"
        place = -1 if is_length else place
        assert (raised.value.request, raised.value.column, raised.value.reason) == (
            b,
            place,
            reason,
        )
        flashmla_cupy.check()


# --- repetition --------------------------------------------------------------------------------


@ALL_QUERIES
@pytest.mark.parametrize(("batch", "h_q"), [(1, 16), (7, 64), (80, 16), (80, 64)])
def test_runs_are_bit_identical(format, q_dtype, batch, h_q):
    need(format)
    problem = make_sparse_problem(
        format, batch=2 if DRY else batch, s_q=2, topk=700, s_k=2000, h_q=8 if DRY else h_q,
        page_size=64, lengths="query", q_dtype=q_dtype,
    )  # fmt: skip
    arrays, given = on_gpu(problem), outputs_of(problem)
    first = decode(problem, arrays)
    wrong = []
    for _ in range(RUNS):
        fill_nan(given["out"])
        fill_nan(given["lse"])
        decode(problem, arrays, **given)
        wrong.append(differing(given["out"], first[0]) + differing(given["lse"], first[1]))
    assert not host(xp.stack(wrong)).any()


@pytest.mark.parametrize("format", ["v32", "v4", "e4m3", "bfloat16", "bfloat16_512"])
@pytest.mark.parametrize("h_q", [16, 64])
def test_replays_with_changed_lists(format, h_q):
    """A graph with both calls; lists, lengths and queries change in place between its replays."""
    need(format)
    rng = np.random.default_rng(4)
    problem = make_sparse_problem(
        format, batch=3 if DRY else 30, s_q=2, topk=500, s_k=1500, h_q=8 if DRY else h_q,
        page_size=64, varlen=False, sink=True,
    )  # fmt: skip
    batch = len(problem.q)
    problem.pool = problem.pool._replace(topk_length=np.full((batch, 2), 500, np.int32))
    with new_stream() as stream:
        arrays, given, eager = on_gpu(problem), outputs_of(problem), outputs_of(problem)
        lengths = put(
            schedule_arguments(problem)[0]
        )  # ahead: a capture takes no copy from the host
        step(problem, arrays, lengths, **given)
        replay, _kept = capture(stream, lambda: step(problem, arrays, lengths, **given))
        wrong = []
        for _ in range(REPLAYS):
            order = rng.permutation(problem.pool.indices.reshape(-1))
            arrays["indices"][...] = put(order.reshape(problem.pool.indices.shape))
            arrays["topk_length"][...] = put(rng.integers(0, 501, (batch, 2)).astype(np.int32))
            fill_nan(given["out"])
            fill_nan(given["lse"])
            replay()
            step(problem, arrays, lengths, **eager)
            wrong.append(
                differing(given["out"], eager["out"]) + differing(given["lse"], eager["lse"])
            )
        assert not host(xp.stack(wrong)).any()
        flashmla_cupy.check()


# --- values beyond float16 ---------------------------------------------------------------------


@pytest.mark.parametrize("format", ["v32", "v4"])
@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_values_beyond_float16(format, h_q):
    """Products in bfloat16 hold them, and the kernels for few rows do; those in float16 do not, and
    show it."""
    problem = make_sparse_problem(
        format, batch=3, s_q=2, h_q=4 if DRY else h_q, topk=300, s_k=700, kv_size=1e5,
        softmax_scale=1e-7, pow2_scales=format == "v4", sink=False, seed=h_q,
    )  # fmt: skip
    problem.wide_fp8 = True
    out, lse = results_of(problem)
    assert_within_bound(out, lse, sparse_oracle(problem, k=RAW_WIDE), format)
    assert np.abs(out.astype(np.float32)).max() > 2e4
    problem.wide_fp8 = False
    out, lse = results_of(problem)
    if DRY or h_q <= 16:
        assert_within_bound(out, lse, sparse_oracle(problem), format)
    else:
        assert not np.isfinite(out.astype(np.float32)).all(axis=-1).any()
    flashmla_cupy.check()


# --- queries in e4m3 ---------------------------------------------------------------------------


@pytest.mark.parametrize("h_q", [1, 16, 40, 64, 128])
@pytest.mark.parametrize("s_q", [1, 3])
def test_queries_in_e4m3(h_q, s_q):
    """Lists, and dense attention to the same; a result in bfloat16."""
    from support.sparse_dense import dense_problem

    h_q = min(h_q, 3) if DRY else h_q
    problem = make_sparse_problem(
        "e4m3", batch=3, s_q=s_q, h_q=h_q, topk=300, s_k=700, q_dtype="float8_e4m3fn",
        lengths="query", seed=h_q,
    )  # fmt: skip
    out, lse = results_of(problem)
    flashmla_cupy.check()
    assert_within_bound(out, lse, sparse_oracle(problem, k=RAW), "lists")
    for causal in (False, True):
        lengths = [700, 0, 3, 65]
        dense, lists = dense_problem("e4m3", lengths, s_q=s_q, h_q=h_q, page_size=64, causal=causal)
        dense["q"] = lists.q = dense["q"].astype(problem.q.dtype)
        out, lse = flash_mla_with_kvcache(
            **{name: put(value) for name, value in dense.items()}, head_dim_v=512, causal=causal,
            tile_scheduler_metadata=get_mla_metadata()[0], is_fp8_kvcache=True,
        )  # fmt: skip
        flashmla_cupy.check()
        assert_within_bound(host(out), host(lse), sparse_oracle(lists, k=RAW), f"dense {causal}")


# --- prefill -----------------------------------------------------------------------------------

PROMPTS = [
    (128, 128), (256, 256), (512, 512), (592, 128), (1840, 256), (1592, 384), (1521, 512),
    (95, 128), (153, 256), (114, 384),
]  # fmt: skip


@pytest.mark.parametrize(("s_kv", "topk"), PROMPTS)
@pytest.mark.parametrize("d_qk", [512, 576])
def test_prefill_grid(s_kv, topk, d_qk):
    """tests/test_flash_mla_sparse_prefill.py of FlashMLA, its recipe and tolerances."""
    need("bfloat16" if d_qk == 576 else "bfloat16_512", "prefill")
    for s_q, h_q, features in itertools.product((1, 62), (64, 128), (False, True)):
        s_q, h_q = (min(s_q, 3), 4) if DRY else (s_q, h_q)
        problem = prefill_problem(s_q, h_q, d_qk, s_kv, topk, sink=features, lengths=features)
        got = [host(x) for x in flash_mla_sparse_fwd(**prompt_on_gpu(problem))]
        out, top, lse = prefill_oracle(**problem)
        flashmla_allclose(got[0], out, 8e-4, 3.01 / 128, 7e-6)
        flashmla_allclose(got[1], top, 1e-6, 2.01 / 65536, 1e-7)
        flashmla_allclose(got[2], lse, 1e-6, 2.01 / 65536, 1e-7)
        flashmla_cupy.check()


@pytest.mark.parametrize("h_q", [1, 8, 16, 20, 40, 96, 128])
@pytest.mark.parametrize("topk", [1, 17, 63, 65, 2047])
def test_prefill_of_any_size(h_q, topk):
    need("bfloat16", "prefill")
    problem = prefill_problem(5, 4 if DRY else h_q, 576, 300, topk, seed=h_q)
    got = [host(x) for x in flash_mla_sparse_fwd(**prompt_on_gpu(problem))]
    out, top, lse = prefill_oracle(**problem)
    flashmla_allclose(got[0], out, 8e-4, 3.01 / 128, 1e-5)
    flashmla_allclose(got[1], top, 1e-6, 2.01 / 65536, 1e-7)
    flashmla_allclose(got[2], lse, 1e-6, 2.01 / 65536, 1e-7)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("h_q", [8, 64, 128])
def test_prefill_over_pages(format, h_q):
    """As decoding of one request, and places outside of the pool are no tokens."""
    for topk, lengths, q in ((300, "none", "bfloat16"), (65, "query", "float8_e4m3fn")):
        problem = make_sparse_problem(
            format, batch=1, s_q=2 if DRY else 40, h_q=2 if DRY else h_q, topk=topk, s_k=700,
            page_size=53, lengths=lengths, q_dtype=q if format == "e4m3" else "bfloat16",
        )  # fmt: skip
        got = flash_mla_sparse_fwd(**prompt_on_gpu(as_prompt(problem)))
        out, max_logits, lse = (host(x) for x in got)
        flashmla_cupy.check()
        want = sparse_oracle(problem, k=RAW)
        assert_within_bound(out[None], lse.T[None], want, format)
        flashmla_allclose(max_logits, largest_logits(problem), 1e-4, 1e-3, 1e-5)


# --- dense FP8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("h_q", [1, 8, 16, 64, 128])
def test_dense_attention_over_fp8(format, h_q):
    """A block table is a list of all tokens: the oracle of lists looks at it."""
    from support.sparse_dense import dense_problem

    rng = np.random.default_rng(h_q)
    for causal, page_size in itertools.product((False, True), (16, 64, 256)):
        lengths = [0, 1, 2, 63, 64, 65] + ([] if DRY else rng.integers(1, 3000, 6).tolist())
        dense, lists = dense_problem(
            format, lengths, s_q=2, h_q=2 if DRY else h_q, page_size=page_size, causal=causal,
        )  # fmt: skip
        arrays = {name: put(value) for name, value in dense.items()}
        rows = 2 * arrays["q"].shape[2]
        try:
            made = get_mla_metadata(arrays["cache_seqlens"], rows, 1, is_fp8_kvcache=True)
            out, lse = flash_mla_with_kvcache(
                **arrays, head_dim_v=512, tile_scheduler_metadata=made[0], num_splits=made[1],
                causal=causal, is_fp8_kvcache=True,
            )  # fmt: skip
        except OptionError as error:
            pytest.skip(str(error))
        flashmla_cupy.check()
        expected = sparse_oracle(lists, k=RAW)
        assert_within_bound(host(out), host(lse), expected, f"{format} {causal} {page_size}")
