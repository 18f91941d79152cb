"""FP8 caches and lists of tokens through the public functions, in host memory: results of every
framework are the definition's, bit for bit; every mistake has its name.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.every_framework import get, same_bits
from support.foreign import Foreign
from support.oracle import assert_within_bound, oracle
from support.problems import make_problem
from support.sparse_calls import FP8, call, here, keywords, schedule
from support.sparse_oracle import largest_logits, sparse_oracle
from support.sparse_problems import as_prompt, make_sparse_problem

import flashmla_cupy
from flashmla_cupy import (
    errors,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    reference,
    reference_sparse,
)
from flashmla_cupy.calls import metadata
from flashmla_cupy.formats.cache_format import FORMATS
from flashmla_cupy.formats.quantize import dequantize_kv, quantize_kv
from flashmla_cupy.schedule.lists import list_lengths
from flashmla_cupy.schedule.split import MAX_BATCH, plan

HERE = ("numpy", "torch", "jax")


def problem_of(format: str, **changes):
    options = {
        "s_q": 2, "topk": 70, "extra": (50, 20, 8), "lengths": "query", "extra_lengths": "request"
    }  # fmt: skip
    return make_sparse_problem(format, **(options | changes))


# --- sparse decoding ---------------------------------------------------------------------------


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_definition(framework, format):
    problem = problem_of(format)
    want = reference_sparse.decode(**problem.arguments())
    for changes in ({}, schedule(problem, framework)):
        out, lse = call(problem, framework, **changes)
        assert same_bits(out, want.out)
        assert same_bits(lse, want.lse)
    assert_within_bound(get(out), get(lse), sparse_oracle(problem))


@pytest.mark.parametrize("framework", HERE)
def test_the_least_that_a_call_has(framework):
    problem = make_sparse_problem("bfloat16", sink=False, softmax_scale=None, topk=1, page_size=3)
    out, lse = call(problem, framework)
    want = reference_sparse.decode(**problem.arguments())
    assert same_bits(out, want.out) and same_bits(lse, want.lse)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn"])
def test_bytes_may_be_of_any_dtype_of_a_byte(dtype):
    import ml_dtypes

    problem = problem_of("v32", extra=None)
    want = call(problem)
    kind = ml_dtypes.float8_e4m3fn if dtype.startswith("float8") else dtype
    for framework in ("numpy", "torch", "jax"):
        k_cache = here(framework, problem.pool.k_cache.view(kind))
        assert same_bits(call(problem, framework, k_cache=k_cache)[0], want[0])


@pytest.mark.parametrize("framework", HERE)
def test_queries_of_e4m3(framework):
    import ml_dtypes

    problem = make_sparse_problem("e4m3")
    problem.q = problem.q.astype(ml_dtypes.float8_e4m3fn)
    problem.descale_q = np.array([0.5], np.float32)
    out, lse = call(problem, framework)
    want = reference_sparse.decode(**problem.arguments())
    assert same_bits(out, want.out) and same_bits(lse, want.lse)
    assert "bfloat16" in str(out.dtype)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_given_outputs_are_written(framework):
    problem = problem_of("v4")
    want = call(problem)
    out, lse = (here(framework, np.full_like(x, 7)) for x in want)
    for given in ({"out": out, "lse": lse}, {"out": out}, {"lse": lse}):
        got = call(problem, framework, **given)
        assert all(
            a is b
            for a, b in zip(got, (out, lse), strict=True)
            if any(b is x for x in given.values())
        )
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


def test_strided_arrays_as_flashmla_tests_them():
    """Gaps in every axis of q and lists, and between pages."""
    problem = problem_of("v32", extra=None)
    want = call(problem)

    def apart(x, last=128):
        wide = np.zeros([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + last], x.dtype)
        view = wide[tuple(slice(n) for n in x.shape)]
        view[...] = x
        return view

    pool = problem.pool
    pages = np.zeros((len(pool.k_cache), 65, 1, 656), np.uint8)[:, :64]
    pages[...] = pool.k_cache
    changes = {"q": apart(problem.q), "indices": apart(pool.indices), "k_cache": pages}
    assert not any(x.flags.c_contiguous for x in changes.values())
    got = call(problem, **changes)
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


def foreign(named: dict) -> dict:
    return {n: Foreign(x) if isinstance(x, np.ndarray) else x for n, x in named.items()}


def test_arrays_of_other_frameworks_come_through_dlpack():
    problem = make_sparse_problem("v32", q_dtype="float16", lengths="request")
    want = call(problem)
    made = get_mla_metadata(**foreign({"cache_seqlens": np.zeros(2, np.int32)}),
                            num_q_tokens_per_head_k=8, num_heads_q=8, topk=64,
                            topk_length=Foreign(problem.pool.topk_length))  # fmt: skip
    got = flash_mla_with_kvcache(
        **foreign(keywords(problem)), tile_scheduler_metadata=made[0], num_splits=made[1]
    )
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    arguments = prompt(dtype="float16")
    want = flash_mla_sparse_fwd(**arguments)
    got = flash_mla_sparse_fwd(**foreign(arguments))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    pages = as_prompt(make_sparse_problem("v32", batch=1, s_q=5, h_q=3, topk=40, q_dtype="float16"))
    want = flash_mla_sparse_fwd(**pages)
    got = flash_mla_sparse_fwd(**foreign(pages))  # whose axes are known to DLPack alone
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_empty_batches_and_no_query_token():
    problem = problem_of("v32", extra=None, lengths="none")
    for axis in (0, 1, 2):
        q = problem.q.take(np.arange(0), axis=axis)
        indices = problem.pool.indices
        indices = indices.take(np.arange(0), axis=axis) if axis < 2 else indices
        sink = problem.attn_sink if axis < 2 else problem.attn_sink[:0]
        out, lse = call(problem, q=q, indices=indices, attn_sink=sink)
        assert out.shape == (*q.shape[:3], 512) and lse.shape == (
            q.shape[0],
            q.shape[2],
            q.shape[1],
        )


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", HERE)
def test_metadata_is_the_split_of_the_lists(framework):
    problem = problem_of("v4", batch=3)
    made = schedule(problem, framework)
    lengths = list_lengths(3, 2, 70, problem.pool.topk_length, 20, problem.extra.topk_length)
    want = plan(lengths, 132, 8, 1)
    assert same_bits(made["tile_scheduler_metadata"], want[0])
    assert same_bits(made["num_splits"], want[1])


def test_a_sched_meta_is_bound_to_the_lists():
    problem = problem_of("v32", extra=None, lengths="none", varlen=False)
    meta, _ = get_mla_metadata()
    first = call(problem, tile_scheduler_metadata=meta)
    assert meta.have_initialized
    assert same_bits(call(problem, tile_scheduler_metadata=meta)[0], first[0])
    narrow = problem.pool.indices[..., :30].copy()
    with pytest.raises(errors.StaleMetadataError, match="topk 70 -> 30"):
        call(problem, tile_scheduler_metadata=meta, indices=narrow)
    with pytest.raises(errors.StaleMetadataError, match="made for another"):
        call(problem, **(schedule(problem) | {"num_splits": np.zeros(4, np.int32)}))


def test_no_heads_with_metadata():
    problem = problem_of("v32", extra=None, lengths="none")
    made = schedule(problem)
    out, lse = call(problem, q=problem.q[:, :, :0], attn_sink=problem.attn_sink[:0], **made)
    assert out.shape == (2, 2, 0, 512) and lse.shape == (2, 0, 2)


def test_a_sched_meta_is_made_once_by_calls_of_all_kinds(monkeypatch):
    """The first one makes it, and others, of whatever kind, wait for it."""
    problem, dense = problem_of("v32"), make_problem([60, 3])
    lazy, _ = get_mla_metadata()
    outcomes = []

    def other():
        try:
            call(problem, tile_scheduler_metadata=lazy)
        except errors.StaleMetadataError as error:
            outcomes.append(error)

    thread = threading.Thread(target=other)

    def slow(*arguments, **options):
        thread.start()
        thread.join(0.3)
        return plan(*arguments, **options)

    monkeypatch.setattr(metadata.split, "plan", slow)
    flash_mla_with_kvcache(*dense.arrays(), 512, lazy, **dense.options())
    monkeypatch.undo()
    thread.join()
    assert len(outcomes) == 1 and lazy.bound.format == ""


def test_metadata_of_other_lengths_is_stale():
    problem = make_sparse_problem("v32", s_q=2, topk=200, s_k=300, varlen=False)
    problem.pool = problem.pool._replace(topk_length=np.array([10, 150], np.int32))
    made = schedule(problem)
    before = call(problem, **made)
    problem.pool.topk_length[0] = 150
    out, _ = call(problem, **made)
    assert np.isnan(out[0].astype(np.float32)).all()
    assert same_bits(out[1], before[0][1])
    with pytest.raises(
        errors.DeviceCheckError, match="request 0: the scheduling metadata"
    ) as caught:
        flashmla_cupy.check()
    assert caught.value.reason == "stale metadata"


# --- what is refused at run time ---------------------------------------------------------------


@pytest.mark.parametrize("framework", HERE)
def test_an_index_outside_the_pool_is_reported_by_the_next_call(framework):
    problem = problem_of("v32", extra=None, lengths="none")
    problem.pool.indices[1, 1, 3] = -2
    out, lse = (get(x) for x in call(problem, framework))
    assert np.isnan(out[1, 1].astype(np.float32)).all() and np.isnan(lse[1, :, 1]).all()
    assert np.isfinite(out[0].astype(np.float32)).all()
    problem.pool.indices[1, 1, 3] = -1
    with pytest.raises(errors.DeviceCheckError, match="entry 3 of a list of indices") as caught:
        call(problem, framework)
    assert (caught.value.request, caught.value.column, caught.value.reason) == (1, 3, "index")
    assert np.isfinite(get(call(problem, framework)[0]).astype(np.float32)).all()


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["topk_length", "extra_topk_length"])
def test_a_length_in_host_memory_that_cannot_be_raises_at_once(framework, name):
    problem = problem_of("v4")
    pool = problem.pool if name == "topk_length" else problem.extra
    pool.topk_length[1] = 71
    out = here(framework, np.full((2, 2, 8, 512), 7, problem.q.dtype))
    with pytest.raises(errors.DeviceCheckError, match=f"refused request 1: its {name}"):
        call(problem, framework, out=out)
    assert (get(out) == 7).all()
    flashmla_cupy.check()


# --- dense decoding of FP8 caches --------------------------------------------------------------


def dense_problem(format: str, causal: bool = True, dtype: str = "bfloat16"):
    """An ordinary problem, its cache quantised; and the same with the cache's values."""
    problem = make_problem([70, 0, 130], s_q=2, h_q=5, page_size=32, causal=causal, poison=0.0,
                           dtype=dtype)  # fmt: skip
    width = FORMATS[format].d_qk
    problem.q = np.ascontiguousarray(problem.q[..., :width])
    values = problem.k_cache[..., :width]
    scale = np.array([0.02], np.float32) if format == "e4m3" else None
    cache = quantize_kv(values, format, descale_k=scale)
    return problem, cache, scale


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("format", FP8)
def test_dense_fp8_is_dense_attention_over_its_values(framework, format):
    problem, cache, scale = dense_problem(format)
    q, table, lengths = (here(framework, x) for x in (problem.q, *problem.arrays()[2:]))
    rows = problem.rows
    for made in (get_mla_metadata(), get_mla_metadata(lengths, rows, 1, is_fp8_kvcache=True)):
        out, lse = flash_mla_with_kvcache(
            q, here(framework, cache), table, lengths, 512, *made, causal=True,
            is_fp8_kvcache=True, descale_k=here(framework, scale),
        )  # fmt: skip
        want = reference.decode(
            problem.q, cache, *problem.arrays()[2:], causal=True, descale_k=scale
        )
        assert same_bits(out, want.out) and same_bits(lse, want.lse)
    exact = dequantize_kv(cache, descale_k=scale, dtype="float64")
    by_values = reference.decode(problem.q, exact, *problem.arrays()[2:], causal=True)
    assert np.array_equal(want.lse, by_values.lse)
    assert same_bits(want.out, by_values.out)


@pytest.mark.parametrize("framework", HERE)
def test_wide_products_are_the_same_by_the_definition(framework):
    """In host memory all is computed in float64."""
    problem = problem_of("v32")
    wide = call(problem, framework, wide_fp8=True)
    assert all(same_bits(a, b) for a, b in zip(wide, call(problem, framework), strict=True))
    dense, cache, _ = dense_problem("v32")
    arrays = [here(framework, x) for x in (dense.q, cache, *dense.arrays()[2:])]
    results = [
        flash_mla_with_kvcache(
            *arrays, 512, *get_mla_metadata(), causal=True, is_fp8_kvcache=True, wide_fp8=wide
        )
        for wide in (False, True)
    ]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_dense_fp8_beside_the_oracle_of_dense_attention():
    problem, cache, _ = dense_problem("v32")
    problem.k_cache = dequantize_kv(cache, dtype="bfloat16")
    exact = dequantize_kv(cache, dtype="float64")
    problem.k_cache = exact.astype(problem.q.dtype)  # powers of two: exact in bfloat16
    assert np.array_equal(problem.k_cache.astype(np.float64), exact)
    out, lse = flash_mla_with_kvcache(
        problem.q, cache, *problem.arrays()[2:], 512, *get_mla_metadata(), causal=True,
        is_fp8_kvcache=True,
    )  # fmt: skip
    assert_within_bound(out, lse, oracle(*problem.arrays(), causal=True))


def test_dense_fp8_refuses_as_dense_does():
    problem, cache, _ = dense_problem("v32")
    arguments = [problem.q, cache, *problem.arrays()[2:], 512]
    options = {"causal": True, "is_fp8_kvcache": True}
    before = flash_mla_with_kvcache(*arguments, *get_mla_metadata(), **options)
    problem.block_table[2, 1] = len(cache)
    out, _ = flash_mla_with_kvcache(*arguments, *get_mla_metadata(), **options)
    assert np.isnan(out[2].astype(np.float32)).all()
    assert same_bits(out[:2], before[0][:2])
    with pytest.raises(errors.DeviceCheckError, match="column 1 of its block_table row"):
        flashmla_cupy.check()
    problem.cache_seqlens[0] = 10**6
    with pytest.raises(errors.DeviceCheckError, match="refused request 0: its cache_seqlens"):
        flash_mla_with_kvcache(*arguments, *get_mla_metadata(), **options)


# --- prefill -----------------------------------------------------------------------------------


def prompt(s_q=5, h_q=3, d_qk=576, s_kv=90, topk=40, seed=0, dtype="bfloat16"):
    import ml_dtypes

    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return {
        "q": rng.standard_normal((s_q, h_q, d_qk)).astype(kind),
        "kv": (rng.standard_normal((s_kv, 1, d_qk)) / 5).astype(kind),
        "indices": rng.integers(-20, s_kv + 20, (s_q, 1, topk)).astype(np.int32),
        "sm_scale": 0.05,
        "attn_sink": rng.standard_normal(h_q).astype(np.float32),
        "topk_length": rng.integers(0, topk + 1, s_q).astype(np.int32),
    }


def of(framework: str, arguments: dict) -> dict:
    return {name: here(framework, value) for name, value in arguments.items()}


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefill_gives_the_definition(framework, d_qk, dtype):
    arguments = prompt(d_qk=d_qk, dtype=dtype)
    want = reference_sparse.prefill(**arguments)
    got = flash_mla_sparse_fwd(**of(framework, arguments))
    for array, expected in zip(got, want[:3], strict=True):
        assert same_bits(array, expected)
    del arguments["attn_sink"], arguments["topk_length"]
    want = reference_sparse.prefill(**arguments)
    got = flash_mla_sparse_fwd(**of(framework, arguments))
    assert all(same_bits(a, b) for a, b in zip(got, want[:3], strict=True))


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_prefill_writes_given_outputs(framework):
    arguments = prompt()
    want = flash_mla_sparse_fwd(**arguments)
    given = dict(zip(("out", "max_logits", "lse"), (np.full_like(x, 7) for x in want), strict=True))
    given = of(framework, given)
    got = flash_mla_sparse_fwd(**of(framework, arguments), **given)
    assert all(a is b for a, b in zip(got, given.values(), strict=True))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_prefill_over_pages_is_decoding_of_one_request(framework, format):
    problem = make_sparse_problem(
        format, batch=1, s_q=3, topk=70, page_size=52, lengths="query",
        q_dtype="float8_e4m3fn" if format == "e4m3" else "bfloat16",
    )  # fmt: skip
    want_out, want_lse = call(problem)
    out, max_logits, lse = (
        get(x) for x in flash_mla_sparse_fwd(**of(framework, as_prompt(problem)))
    )
    assert same_bits(out, want_out[0]) and same_bits(lse, np.ascontiguousarray(want_lse[0].T))
    np.testing.assert_allclose(max_logits, largest_logits(problem), rtol=1e-5, atol=1e-6)


def test_prefill_with_a_bad_length_raises_at_once():
    arguments = prompt()
    arguments["topk_length"][2] = 41
    with pytest.raises(errors.DeviceCheckError) as caught:
        flash_mla_sparse_fwd(**arguments)
    assert str(caught.value).startswith("flash_mla_sparse_fwd() refused request 2: its topk_length")


# --- mistakes ----------------------------------------------------------------------------------

LISTED = problem_of("v4")
V32 = problem_of("v32", extra=None)
PLAIN = problem_of("bfloat16", extra=None)
BAD_CALLS = [
    (V32, {"is_fp8_kvcache": False}, errors.OptionError, "is_fp8_kvcache", "True, as k_cache is"),
    (PLAIN, {"is_fp8_kvcache": True}, errors.OptionError, "is_fp8_kvcache", "False, as k_cache is"),
    (V32, {"is_fp8_kvcache": 1}, errors.OptionError, "is_fp8_kvcache", "int 1"),
    (V32, {"wide_fp8": 1}, errors.OptionError, "wide_fp8", "int 1"),
    (PLAIN, {"wide_fp8": True}, errors.OptionError, "wide_fp8", "no FP8 cache"),
    (
        V32,
        {"wide_fp8": True, "q": V32.q.astype(np.float16)},
        errors.DTypeError,
        "q",
        "bfloat16, with wide_fp8",
    ),
    (V32, {"causal": True}, errors.OptionError, "causal", "False with indices"),
    (V32, {"head_dim_v": 576}, errors.ShapeError, "head_dim_v", "512"),
    (V32, {"softmax_scale": -1.0}, errors.ScalarError, "softmax_scale", "positive"),
    (V32, {"indices": None}, errors.OptionError, "attn_sink", "without indices"),
    (V32, {"indices": [[1]]}, errors.ArgTypeError, "indices", "list"),
    (V32, {"indices": V32.pool.indices[:1]}, errors.ShapeError, "indices", "batch = 2, as q has"),
    (V32, {"indices": V32.pool.indices[:, :1]}, errors.ShapeError, "indices", "s_q = 2, as q"),
    (V32, {"indices": V32.pool.indices[..., :0]}, errors.ShapeError, "indices", "at least one"),
    (V32, {"indices": V32.pool.indices.astype("i8")}, errors.DTypeError, "indices", "int32"),
    (V32, {"indices": V32.pool.indices[..., ::-1]}, errors.StrideError, "indices", "stride 1"),
    (V32, {"topk_length": np.zeros(3, np.int32)}, errors.ShapeError, "topk_length", "batch = 2"),
    (
        V32,
        {"topk_length": np.zeros((2, 1, 1), np.int32)},
        errors.ShapeError,
        "topk_length",
        r"\[batch, s_q\] or \[batch\]",
    ),
    (V32, {"attn_sink": np.zeros(7, np.float32)}, errors.ShapeError, "attn_sink", "h_q = 8"),
    (V32, {"attn_sink": np.zeros(8)}, errors.DTypeError, "attn_sink", "float32"),
    (V32, {"descale_k": np.ones(1, np.float32)}, errors.OptionError, "descale_k", "needs none"),
    (V32, {"q": V32.q[..., :512].copy()}, errors.ShapeError, "q", "576"),
    (V32, {"q": V32.q.astype(np.float32)}, errors.DTypeError, "q", "bfloat16"),
    (PLAIN, {"q": PLAIN.q.astype(np.float16)}, errors.DTypeError, "q", "dtype of k_cache"),
    (V32, {"k_cache": V32.pool.k_cache[..., :655]}, errors.ShapeError, "k_cache", "656"),
    (PLAIN, {"k_cache": PLAIN.pool.k_cache[..., :80]}, errors.ShapeError, "k_cache", "576"),
    (V32, {"k_cache": V32.pool.k_cache[:, ::2]}, errors.StrideError, "k_cache", "behind one"),
    (
        LISTED,
        {"k_cache": np.zeros((3, 61, 1, 584), np.uint8)},
        errors.AlignmentError,
        "k_cache",
        "quantize_kv",
    ),
    (V32, {"k_cache": V32.pool.k_cache.repeat(2, 2)}, errors.ShapeError, "k_cache", "page_size, 1"),
    (LISTED, {"extra_k_cache": None}, errors.ArgTypeError, "extra_k_cache", "extra_indices"),
    (
        LISTED,
        {"extra_indices_in_kvcache": None},
        errors.ArgTypeError,
        "extra_indices_in_kvcache",
        "extra_k_cache",
    ),
    (
        V32,
        {"extra_topk_length": np.zeros(2, np.int32)},
        errors.ArgTypeError,
        "extra_indices_in_kvcache",
        "extra_topk_length",
    ),
    (
        LISTED,
        {"extra_k_cache": V32.pool.k_cache},
        errors.ShapeError,
        "extra_k_cache",
        "width = 584",
    ),
    (V32, {"out": np.zeros((2, 2, 8, 512), np.float16)}, errors.DTypeError, "out", "bfloat16"),
    (V32, {"lse": np.zeros((2, 2, 8), np.float32)}, errors.ShapeError, "lse", r"\(2, 8, 2\)"),
    (
        V32,
        {"tile_scheduler_metadata": None},
        errors.ArgTypeError,
        "tile_scheduler_metadata",
        "None",
    ),
]


@pytest.mark.parametrize(("problem", "bad", "error", "argument", "words"), BAD_CALLS)
def test_mistakes_are_named(problem, bad, error, argument, words):
    with pytest.raises(errors.ArgumentError, match=words) as caught:
        call(problem, **bad)
    assert type(caught.value) is error
    assert caught.value.argument == argument
    assert caught.value.function == "flash_mla_with_kvcache"


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["descale_q", "descale_k"])
def test_descales_in_host_memory_are_positive_and_finite(framework, wrong, name):
    """In calls like earlier ones as well, and before anything is written."""
    listed = make_sparse_problem("e4m3", batch=1, s_q=2, h_q=3)
    dense, cache, _ = dense_problem("e4m3")
    arrays = [here(framework, x) for x in (dense.q, cache, *dense.arrays()[2:])]

    def over_table(**descales):
        made = get_mla_metadata()
        return flash_mla_with_kvcache(*arrays, 512, *made, is_fp8_kvcache=True, **descales)

    def over_pages(**descales):
        return flash_mla_sparse_fwd(**(of(framework, as_prompt(listed)) | descales))

    for function in (over_table, over_pages, lambda **d: call(listed, framework, **d)):
        for _ in range(2):
            function(**{name: here(framework, np.array([0.5], np.float32))})
            with pytest.raises(errors.ScalarError, match="positive finite float32") as caught:
                function(**{name: here(framework, np.array([wrong], np.float32))})
            assert caught.value.argument == name
            assert caught.value.function.startswith("flash_mla_")


def test_outputs_share_no_memory():
    out = np.zeros((2, 2, 8, 512), V32.q.dtype)
    with pytest.raises(errors.AliasingError, match="lse"):
        call(V32, out=out, lse=out.reshape(-1).view(np.float32)[:32].reshape(2, 8, 2))


PAGES = as_prompt(make_sparse_problem("v32", batch=1, s_q=5, h_q=3, topk=40))
BAD_PROMPTS = [
    ({"sm_scale": None}, errors.ArgTypeError, "sm_scale", "real number"),
    ({"sm_scale": float("nan")}, errors.ScalarError, "sm_scale", "finite"),
    ({"sm_scale": 0}, errors.ScalarError, "sm_scale", r"such as q.shape\[-1\] \*\* -0.5.$"),
    ({"sm_scale": True}, errors.ArgTypeError, "sm_scale", "a real number, got bool True. Pass a P"),
    ({"d_v": 576}, errors.OptionError, "d_v", "512"),
    ({"q": prompt(d_qk=512)["q"]}, errors.ShapeError, "kv", "d_qk = 512, as q has"),
    ({"q": prompt()["q"].astype(np.float16)}, errors.DTypeError, "q", "dtype of kv"),
    (
        {"q": prompt()["q"][:, :, :80], "kv": prompt()["kv"][..., :80]},
        errors.ShapeError,
        "q",
        "576",
    ),
    ({"indices": prompt()["indices"][:, 0]}, errors.ShapeError, "indices", "s_q, 1, topk"),
    ({"indices": prompt()["indices"][:4]}, errors.ShapeError, "indices", "s_q = 5"),
    ({"indices": prompt()["indices"][..., :0]}, errors.ShapeError, "indices", "at least one"),
    ({"topk_length": np.zeros((5, 1), np.int32)}, errors.ShapeError, "topk_length", "s_q"),
    ({"attn_sink": np.zeros(4, np.float32)}, errors.ShapeError, "attn_sink", "h_q = 3"),
    ({"max_logits": np.zeros((3, 5), np.float32)}, errors.ShapeError, "max_logits", r"\(5, 3\)"),
    ({"descale_k": np.ones(1, np.float32)}, errors.OptionError, "descale_k", "without pages in kv"),
    ({"wide_fp8": True}, errors.OptionError, "wide_fp8", "without pages in kv"),
    ({"wide_fp8": np.ones(2)}, errors.OptionError, "wide_fp8", "True or False, got numpy.ndarray"),
    (
        {"kv": prompt()["kv"].repeat(2, 1)},
        errors.ShapeError,
        "kv",
        r"shape \[s_kv, 1, .* Axis 1 has to be of length 1, not 2",
    ),
    (PAGES | {"wide_fp8": 1}, errors.OptionError, "wide_fp8", "int 1"),
    (PAGES | {"descale_k": np.ones(1, np.float32)}, errors.OptionError, "descale_k", "since kv"),
    (PAGES | {"q": PAGES["q"][..., :512]}, errors.ShapeError, "q", "a key in kv"),
    (PAGES | {"wide_fp8": np.ones(2)}, errors.OptionError, "wide_fp8", "got numpy.ndarray"),
    (PAGES | {"kv": PAGES["kv"][..., :80]}, errors.ShapeError, "kv", "656"),
    (PAGES | {"sm_scale": None}, errors.ArgTypeError, "sm_scale", "real number"),
]


@pytest.mark.parametrize(("bad", "error", "argument", "words"), BAD_PROMPTS)
def test_mistakes_of_prefill_are_named(bad, error, argument, words):
    with pytest.raises(errors.ArgumentError, match=words) as caught:
        flash_mla_sparse_fwd(**(prompt() | bad))
    assert type(caught.value) is error
    assert caught.value.argument == argument
    assert caught.value.function == "flash_mla_sparse_fwd"


@pytest.mark.parametrize("kv", [(9, 1, 576), (3, 3, 1, 656)])
def test_more_query_tokens_of_a_prompt_than_a_split_has(kv):
    """Of arrays that are shapes alone."""
    jax = pytest.importorskip("jax")

    def shapes(s_q):
        dtypes = "bfloat16", "bfloat16" if len(kv) == 3 else "uint8", "int32"
        arrays = zip(((s_q, 1, 576), kv, (s_q, 1, 4)), dtypes, strict=True)
        return jax.eval_shape(
            lambda *arrays: flash_mla_sparse_fwd(*arrays, 0.1),
            *[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays],
        )

    assert shapes(MAX_BATCH)[0].shape == (MAX_BATCH, 1, 512)
    with pytest.raises(errors.ShapeError, match="q: expected at most 1048575 query tokens"):
        shapes(MAX_BATCH + 1)


def test_lists_of_more_tokens_together_than_int32_holds():
    """Of arrays that are shapes alone, of which the second list has the rest and one more."""
    jax = pytest.importorskip("jax")

    def shapes(width):
        shape = jax.ShapeDtypeStruct
        cache, lists = shape((3, 64, 1, 656), "uint8"), shape((1, 1, 2**30 - 7), "int32")
        extra = {"extra_k_cache": cache, "extra_indices_in_kvcache": shape((1, 1, width), "int32")}
        return jax.eval_shape(
            lambda q, k_cache, indices, extra: flash_mla_with_kvcache(
                q, k_cache, None, None, 512, *get_mla_metadata(), indices=indices,
                is_fp8_kvcache=True, **extra,
            ),
            shape((1, 1, 8, 576), "bfloat16"), cache, lists, extra,
        )  # fmt: skip

    assert shapes(2**30 - 1)[0].shape == (1, 1, 8, 512)
    with pytest.raises(errors.ShapeError, match=r"extra_indices_in_kvcache: .* in both lists"):
        shapes(2**30)


LENGTHS = np.zeros(2, np.int32)
BAD_METADATA = [
    ({"num_heads_q": None}, errors.ArgTypeError, "num_heads_q", "with topk"),
    ({"num_heads_q": 3}, errors.ScalarError, "num_q_tokens_per_head_k", "multiple"),
    ({"num_heads_k": 2}, errors.ScalarError, "num_heads_k", "1 with topk"),
    ({"topk": 0}, errors.ScalarError, "topk", "from 1"),
    ({"topk": 1.5}, errors.ArgTypeError, "topk", "float"),
    ({"topk_length": np.zeros(3, np.int32)}, errors.ShapeError, "topk_length", "batch = 2"),
    ({"topk_length": np.zeros((2, 3), np.int32)}, errors.ShapeError, "topk_length", "2"),
    ({"extra_topk_length": LENGTHS}, errors.ScalarError, "extra_topk", "at least 1"),
    ({"topk": 2**30, "extra_topk": 2**30}, errors.ScalarError, "extra_topk", "in both lists"),
    ({"topk": 2**31 - 65, "extra_topk": 64}, errors.ScalarError, "extra_topk", "2147483647"),
]


@pytest.mark.parametrize(("bad", "error", "argument", "words"), BAD_METADATA)
def test_mistakes_of_metadata_are_named(bad, error, argument, words):
    good = {
        "cache_seqlens": LENGTHS,
        "num_q_tokens_per_head_k": 16,
        "num_heads_k": 1,
        "num_heads_q": 8,
        "topk": 64,
    }
    with pytest.raises(errors.ArgumentError, match=words) as caught:
        get_mla_metadata(**(good | bad))
    assert type(caught.value) is error
    assert caught.value.argument == argument
    assert caught.value.function == "get_mla_metadata"


# --- arrays on a GPU ---------------------------------------------------------------------------
