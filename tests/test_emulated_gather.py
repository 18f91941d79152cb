"""The kernels over FP8 caches and lists of tokens, on the GPU in software (tests/emulator), by way
of the public functions and against the float64 oracle."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from emulator import device
from support import sparse_calls
from support.every_framework import in_threads
from support.oracle import UNIT_ROUNDOFF, assert_within_bound, oracle
from support.sparse_dense import dense_problem
from support.sparse_oracle import largest_logits, pool_values, sparse_oracle
from support.sparse_problems import Q_DTYPES, as_prompt, make_sparse_problem

from flashmla_cupy import (
    check,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from flashmla_cupy.errors import DeviceCheckError
from flashmla_cupy.formats.cache_format import FORMATS as CACHE_FORMATS
from flashmla_cupy.formats.quantize import quantize_kv

pytestmark = pytest.mark.skipif(
    device.host_compiler() is None, reason="needs a host C++ compiler: c++, g++ or clang++"
)
U16 = 2.0**-11  # unit round-off of float16, in which FP8 is multiplied
# Of a key as the kernel holds it: a scale that is no power of two is rounded to float16, and so is
# the product. Halves of a split request's results are rounded once more.
ROUNDED = 2 * U16
FORMATS = ("v32", "v4", "e4m3", "bfloat16", "float16_512")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return device.Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(monkeypatch, kernels):
    return lambda num_sms: device.install(monkeypatch, kernels, num_sms)


def expected(problem):
    """The oracle, for P in float16 where the cache is FP8."""
    fp8 = problem.format in sparse_calls.FP8
    return sparse_oracle(problem, p=U16 if fp8 else None, k=ROUNDED if fp8 else 0.0)


def q_dtype(format: str) -> str:
    return format if format in Q_DTYPES else "bfloat16"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_sms", [1, 5])
def test_lists_of_tokens(gpu, format, num_sms):
    """Lengths, sinks, -1, any page size; poison in all that no list names."""
    emulator = gpu(num_sms)
    for seed, sizes in enumerate(
        [
            {"h_q": 20, "topk": 130, "s_k": 300, "page_size": 53, "lengths": "query", "s_q": 2},
            {"h_q": 96, "topk": 65, "s_k": 90, "page_size": 1, "lengths": "request", "sink": False},
            {"h_q": 1, "topk": 1, "s_k": 3, "page_size": 2, "s_q": 3},
        ]
    ):
        problem = make_sparse_problem(
            format,
            **sizes,
            seed=seed,
            pow2_scales=format != "v32" or seed > 0,
            q_dtype=q_dtype(format),
        )
        want = expected(problem)
        seen = set()
        for order in range(2):
            emulator.seed, emulator.resident = order, 1 + 2 * order
            out, lse = sparse_calls.call(problem)
            assert_within_bound(out, lse, want)
            seen.add(out.tobytes() + lse.tobytes())
        assert len(seen) == 1, "the bits depend on the order of threads"
    check()


def test_values_beyond_float16(gpu):
    """Products in bfloat16 hold them; those in float16 do not, and show it."""
    gpu(num_sms=2)
    problem = make_sparse_problem(
        "v32", h_q=20, topk=70, s_k=90, kv_size=1e5, softmax_scale=1e-7, pow2_scales=False
    )
    u16 = UNIT_ROUNDOFF["bfloat16"]
    problem.wide_fp8 = True
    out, lse = sparse_calls.call(problem)
    assert_within_bound(out, lse, sparse_oracle(problem, p=u16, k=u16))
    assert np.abs(out.astype(np.float32)).max() > 2e4
    problem.wide_fp8 = False
    out, _ = sparse_calls.call(problem)
    assert not np.isfinite(out.astype(np.float32)).all(axis=-1).any()
    check()


@pytest.mark.parametrize("s_q", [1, 2])
def test_queries_in_e4m3(gpu, s_q):
    """With lists, and dense, where rows of several positions make one slab."""
    gpu(num_sms=3)
    problem = make_sparse_problem(
        "e4m3", s_q=s_q, h_q=40, topk=70, s_k=90, q_dtype="float8_e4m3fn", seed=s_q
    )
    problem.q[0, 0, 1, :2] = 448, 2**-9
    out, lse = sparse_calls.call(problem)
    assert out.dtype.name == "bfloat16"
    assert_within_bound(out, lse, expected(problem))
    dense, lists = dense_problem("e4m3", [70, 0, 3], s_q=s_q, h_q=40, page_size=16, causal=True)
    dense["q"] = lists.q = dense["q"].astype(Q_DTYPES["float8_e4m3fn"])
    out, lse = flash_mla_with_kvcache(
        **dense,
        head_dim_v=512,
        tile_scheduler_metadata=get_mla_metadata()[0],
        causal=True,
        is_fp8_kvcache=True,
    )
    assert_within_bound(out, lse, expected(lists))
    check()


@pytest.mark.parametrize("format", ["v32", "v4", "bfloat16"])
def test_two_lists_and_metadata_of_ones_own(gpu, format):
    gpu(num_sms=4)
    problem = make_sparse_problem(
        format,
        batch=2,
        h_q=16,
        topk=70,
        s_k=90,
        extra=(60, 100, 3),
        lengths="request",
        extra_lengths="request",
        q_dtype=q_dtype(format),
    )
    made = sparse_calls.schedule(problem)
    first = sparse_calls.call(problem, **made)
    assert_within_bound(*first, expected(problem))
    lazy = get_mla_metadata()[0]
    for _ in range(2):  # made by the first call, shared by the second
        out, lse = sparse_calls.call(problem, tile_scheduler_metadata=lazy)
        assert out.tobytes() == first[0].tobytes() and lse.tobytes() == first[1].tobytes()


@pytest.mark.parametrize("format", ["v32", "bfloat16"])
@pytest.mark.parametrize("h_q", [8, 20])
def test_metadata_of_lists_of_another_origin_is_reported(gpu, format, h_q):
    """Rows of it that are exchanged leave query tokens out, beside those that look stale."""
    gpu(num_sms=4)
    problem = make_sparse_problem(format, batch=3, h_q=h_q, topk=257, s_k=300, varlen=False)
    made = sparse_calls.schedule(problem)
    made["tile_scheduler_metadata"] = made["tile_scheduler_metadata"][::-1].copy()
    sparse_calls.call(problem, **made)
    with pytest.raises(DeviceCheckError) as caught:
        check()
    assert (caught.value.reason, caught.value.request) == ("foreign metadata", -1)


def metadata_of_lists(length):
    lengths = np.array(length, np.int32)
    return get_mla_metadata(
        np.zeros(len(lengths), np.int32), 8, 1, 8, topk=700, topk_length=lengths
    )


def test_metadata_of_no_lists(gpu):
    gpu(num_sms=2)
    made = metadata_of_lists([])
    assert [x.shape for x in made] == [(2, 8), (1,)]
    assert not any(x.any() for x in made)


def test_threads_make_metadata_of_lists_at_once(gpu):
    """One comes in between, each time that another is about to launch a kernel."""
    emulator = gpu(num_sms=2)
    mine, theirs = [700, 3, 65], [0, 650, 1]
    want = [metadata_of_lists(length) for length in (mine, theirs)]
    run, found = emulator._run, []

    def interrupted(launches):
        emulator._run = run
        in_threads(lambda _: found.append(metadata_of_lists(theirs)), 1)
        emulator._run = interrupted
        run(launches)

    emulator._run = interrupted
    got = metadata_of_lists(mine)
    emulator._run = run
    assert len(found) == 2
    for made, expected in zip((got, *found), (want[0], want[1], want[1]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))


def test_all_is_allocated_on_the_device_of_the_arrays(gpu):
    """Whichever device is current at the call."""
    emulator = gpu(num_sms=2)
    framework, current, devices = emulator.framework, [], []
    empty = framework.empty

    @contextlib.contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    def allocate(*of):
        devices.append(list(current))
        return empty(*of)

    framework.device_guard, framework.empty = guard, allocate
    problem = make_sparse_problem(topk=70, s_k=90, s_q=2, batch=1, varlen=False)
    sparse_calls.call(problem, **sparse_calls.schedule(problem))
    sparse_calls.call(problem)
    flash_mla_sparse_fwd(**as_prompt(problem))
    metadata_of_lists([])
    check()
    assert devices and all(of == [0] for of in devices)


@pytest.mark.parametrize("format", ["v32", "v4", "e4m3"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("h_q", [8, 24])
def test_a_dense_fp8_cache(gpu, format, causal, h_q):
    gpu(num_sms=3)
    rng = np.random.default_rng(causal)
    lengths, page_size, s_q = np.array([130, 0, 49, 16], np.int32), 16, 2
    pages = -(-lengths // page_size)
    table = np.full((4, pages.max() + 1), 2147480000, np.int32)
    order = rng.permutation(pages.sum() + 1).astype(np.int32)
    for b, n in enumerate(pages):
        table[b, :n], order = order[:n], order[n:]
    descale = {"descale_k": np.array([0.5], np.float32)} if format == "e4m3" else {}
    d_qk = CACHE_FORMATS[format].d_qk
    kv = rng.standard_normal((pages.sum() + 1, page_size, 1, d_qk)).astype(Q_DTYPES["bfloat16"])
    cache = quantize_kv(kv, format, **descale)
    q = rng.standard_normal((4, s_q, h_q, d_qk)).astype(
        Q_DTYPES["bfloat16" if format == "v4" else "float16"]
    )
    out, lse = flash_mla_with_kvcache(
        q,
        cache,
        table,
        lengths,
        512,
        get_mla_metadata()[0],
        causal=causal,
        is_fp8_kvcache=True,
        **descale,
    )
    values = pool_values(cache, format, float(descale.get("descale_k", [1.0])[0]))
    values = values.reshape(-1, page_size, 1, d_qk)
    want = oracle(q, values.astype(np.float64), table, lengths, causal=causal)
    spread = 4 * U16 * np.abs(values).max()  # of keys as the kernel holds them, and of scores
    assert_within_bound(
        out,
        lse,
        want._replace(out_bound=want.out_bound + spread, lse_bound=want.lse_bound + spread),
    )
    check()


@pytest.mark.parametrize(("dtype", "d_qk"), [("bfloat16", 576), ("float16", 512)])
def test_prefill(gpu, dtype, d_qk):
    """Indices outside of kv are no tokens; max_logits besides."""
    gpu(num_sms=2)
    rng = np.random.default_rng(5)
    s_q, h_q, s_kv, topk = 5, 20, 150, 100
    q = rng.standard_normal((s_q, h_q, d_qk)).astype(Q_DTYPES[dtype])
    kv = rng.standard_normal((s_kv, 1, d_qk)).astype(Q_DTYPES[dtype])
    indices = rng.integers(-3, s_kv + 3, (s_q, 1, topk)).astype(np.int32)
    indices[1, 0, :4] = -(2**31), 2**31 - 1, s_kv, -1
    indices[2] = -1
    length = np.array([100, 37, 100, 0, 1], np.int32)
    out, max_logits, lse = flash_mla_sparse_fwd(q, kv, indices, 0.05, topk_length=length)
    for i in range(s_q):
        listed = indices[i, 0, : length[i]].astype(np.int64)
        k = kv[listed[(listed >= 0) & (listed < s_kv)], 0].astype(np.float64)
        if not len(k):
            assert (
                not out[i].any() and np.isposinf(lse[i]).all() and np.isneginf(max_logits[i]).all()
            )
            continue
        logits = q[i].astype(np.float64) @ k.T * 0.05
        total = np.logaddexp.reduce(logits, axis=1)
        np.testing.assert_allclose(lse[i], total, atol=1e-4)
        np.testing.assert_allclose(max_logits[i], logits.max(axis=1), atol=1e-4)
        want = np.exp(logits - total[:, None]) @ k[:, :512]
        np.testing.assert_allclose(out[i].astype(np.float64), want, atol=3e-2, rtol=2e-2)
    check()


@pytest.mark.parametrize("format", ["v4", "e4m3"])
def test_prefill_over_pages(gpu, format):
    """Places outside of the pool are no tokens; max_logits besides."""
    gpu(num_sms=2)
    q = "float8_e4m3fn" if format == "e4m3" else "bfloat16"
    problem = make_sparse_problem(
        format, batch=1, s_q=3, h_q=20, topk=100, page_size=53, lengths="query", q_dtype=q
    )
    out, max_logits, lse = flash_mla_sparse_fwd(**as_prompt(problem))
    assert_within_bound(out[None], lse.T[None], expected(problem))
    np.testing.assert_allclose(max_logits, largest_logits(problem), rtol=1e-3, atol=1e-4)
    check()


@pytest.mark.parametrize("format", ["v32", "v4", "float16_512"])
def test_an_index_outside_the_pool_makes_its_query_token_nan(gpu, format):
    gpu(num_sms=2)
    problem = make_sparse_problem(
        format, batch=2, s_q=2, topk=70, s_k=90, varlen=False, sink=False, q_dtype=q_dtype(format)
    )
    right, right_lse = sparse_calls.call(problem)
    slots = problem.pool.k_cache.shape[0] * problem.pool.k_cache.shape[1]
    for bad in (slots, -2, 2**31 - 1, -(2**31)):
        problem.pool.indices[1, 0, 66] = bad
        out, lse = sparse_calls.call(problem)
        with pytest.raises(DeviceCheckError) as caught:
            check()
        assert (caught.value.request, caught.value.column) == (1, 66)
        assert caught.value.reason == "index"
        assert np.isnan(out[1, 0].astype(np.float32)).all() and np.isnan(lse[1, :, 0]).all()
        out[1, 0], lse[1, :, 0] = right[1, 0], right_lse[1, :, 0]
        assert out.tobytes() == right.tobytes() and lse.tobytes() == right_lse.tobytes()


def test_a_length_beyond_its_list_is_refused(gpu):
    gpu(num_sms=2)
    problem = make_sparse_problem(batch=2, topk=70, s_k=90, varlen=False, sink=False)
    problem.pool = problem.pool._replace(topk_length=np.array([70, 71], np.int32))
    out, lse = sparse_calls.call(problem)
    with pytest.raises(DeviceCheckError) as caught:
        check()
    assert (caught.value.request, caught.value.reason) == (1, "topk_length")
    assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
    assert not np.isnan(out[0].astype(np.float32)).any()
