"""The kernels for few query rows over FP8 caches, on the GPU in software (tests/emulator), by way
of the public functions and against the float64 oracle. Keys and scales are exact in them, so the
bound has no share for their rounding.

Each test has a scenario. The last ones break a kernel on purpose, one thing at a time, and run a
scenario with it: that has to fail, and to say why.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulator import device
from support import sparse_calls
from support.oracle import assert_within_bound
from support.sparse_dense import dense_problem
from support.sparse_oracle import largest_logits, sparse_oracle
from support.sparse_problems import Q_DTYPES, as_prompt, make_sparse_problem, token_bytes

from flashmla_cupy import check, flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.errors import DeviceCheckError

pytestmark = pytest.mark.skipif(
    device.host_compiler() is None, reason="needs a host C++ compiler: c++, g++ or clang++"
)
U16 = 2.0**-11  # of P, in float16
FORMATS = ("v32", "v4", "e4m3")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return device.Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(monkeypatch, kernels):
    return lambda num_sms: device.install(monkeypatch, kernels, num_sms)


def assert_right(problem, out, lse, what=""):
    assert_within_bound(out, lse, sparse_oracle(problem, p=U16, s=0), what)


# ---- scenarios: each makes emulated GPUs by gpu(num_sms) ---------------------------------------


def races(gpu, seeds=9):
    """Lists in several pieces, in several orders of threads, all of which give the same bits."""
    for seed in range(seeds):
        emulator = gpu(num_sms=1 + seed % 5)
        format = FORMATS[seed % 3]
        problem = make_sparse_problem(
            format,
            batch=3,
            h_q=(16, 1, 8, 3)[seed % 4],
            s_k=400,
            topk=(330, 65, 130)[seed // 3],
            page_size=(64, 1, 53)[seed % 3],
            lengths="request",
            pow2_scales=format != "v32" or seed % 2 > 0,
            q_dtype="float16" if seed // 3 == 1 and format != "e4m3" else "bfloat16",
            seed=seed,
        )
        results = set()
        for emulator.seed in (seed, seed + 100):
            emulator.resident = 1 + emulator.seed % 3
            out, lse = sparse_calls.call(problem)
            assert_right(problem, out, lse, f"seed {seed}")
            results.add(out.tobytes() + lse.tobytes())
        assert len(results) == 1, "the bits depend on the order of threads"
    check()


def short_lists(gpu):
    """Slots with few tokens, and then with many."""
    gpu(num_sms=1)
    problem = make_sparse_problem(batch=4, h_q=8, s_k=200, topk=150, varlen=False, sink=False)
    problem.pool.indices[::2, :, 140:] = -1
    assert_right(problem, *sparse_calls.call(problem))


def dense(gpu):
    """Pages in their order, causal or not, with blocks that have several pieces; query positions
    behind one another, in one block, and with gaps, which have blocks of their own."""
    for seed, (format, causal) in enumerate((f, c) for f in FORMATS for c in (False, True)):
        gpu(num_sms=3).seed = seed
        arrays, lists = dense_problem(
            format, [130, 0, 49, 16, 1], s_q=2, h_q=8, page_size=16, causal=causal
        )
        if causal:
            arrays["q"] = np.concatenate([lists.q, lists.q], axis=2)[:, :, :8]
        assert_right(lists, *decode_dense(arrays, causal=causal), f"{format} {causal}")
    check()


def decode_dense(arrays, causal=False):
    return flash_mla_with_kvcache(
        **arrays,
        head_dim_v=512,
        tile_scheduler_metadata=get_mla_metadata()[0],
        causal=causal,
        is_fp8_kvcache=True,
    )


def grow_scales(problem, exponents):
    """Multiplies the scales of all slots by powers of two."""
    cache, format = problem.pool.k_cache, problem.format
    views = token_bytes(cache, format, np.arange(len(exponents)))
    if format == "v4":
        for tail, exponent in zip(views[1::2], exponents, strict=True):
            tail[:7] += exponent.astype(np.uint8)
    else:
        for row, exponent in zip(views, exponents, strict=True):
            row[512:528].view(np.float32)[:] *= np.exp2(exponent).astype(np.float32)


def wide_scales(gpu):
    """Latents that float16 has not, and scales that grow from token to token."""
    for seed, (format, spread) in enumerate((f, s) for f in FORMATS[:2] for s in (0, 12)):
        gpu(num_sms=2).seed = seed
        problem = make_sparse_problem(
            format,
            batch=2,
            h_q=16,
            s_k=300,
            topk=200,
            varlen=False,
            pow2_scales=format == "v4",
            seed=seed,
        )
        slots = problem.pool.k_cache.shape[0] * problem.pool.k_cache.shape[1]
        grow_scales(problem, 23 + np.linspace(0, spread, slots).round())
        problem.softmax_scale = 2.0**-36
        problem.pool.indices[...] = np.sort(problem.pool.indices)
        out, lse = sparse_calls.call(problem)
        assert np.abs(out.astype(np.float32)).max() > 65504
        assert_right(problem, out, lse, f"{format}, spread {spread}")


def two_lists(gpu):
    """Of two pools, with lengths of their own."""
    for seed, format in enumerate(FORMATS):
        gpu(num_sms=4).seed = seed
        problem = make_sparse_problem(
            format,
            batch=2,
            h_q=16,
            topk=70,
            s_k=90,
            extra=(60, 100, 3),
            lengths="request",
            extra_lengths="request",
        )
        assert_right(problem, *sparse_calls.call(problem))
    check()


def prompts(gpu):
    """max_logits besides."""
    gpu(num_sms=2)
    for format in FORMATS:
        problem = make_sparse_problem(
            format, batch=1, s_q=3, h_q=8, topk=100, page_size=53, lengths="query"
        )
        out, max_logits, lse = flash_mla_sparse_fwd(**as_prompt(problem))
        assert_right(problem, out[None], lse.T[None])
        np.testing.assert_allclose(max_logits, largest_logits(problem), rtol=1e-3, atol=1e-4)
    check()


def queries_in_e4m3(gpu):
    """With lists, and dense, where rows of several positions make one slab."""
    for s_q in (1, 2):
        gpu(num_sms=3).seed = s_q
        problem = make_sparse_problem(
            "e4m3", s_q=s_q, h_q=7, topk=70, s_k=90, q_dtype="float8_e4m3fn", seed=s_q
        )
        problem.descale_q = np.array([0.7], np.float32)
        assert_right(problem, *sparse_calls.call(problem))
    arrays, lists = dense_problem("e4m3", [70, 0, 3], s_q=2, h_q=7, page_size=16, causal=True)
    lists.q = arrays["q"] = arrays["q"].astype(Q_DTYPES["float8_e4m3fn"])
    assert_right(lists, *decode_dense(arrays, causal=True))
    check()


# ---- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scenario", [races, short_lists, two_lists, dense, prompts, queries_in_e4m3, wide_scales]
)
def test_right(gpu, scenario):
    scenario(gpu)


@pytest.mark.parametrize("format", FORMATS)
def test_nan_in_a_row_that_counts_reaches_its_query(gpu, format):
    """In a latent, a scale or a rotary column; and in no other request."""
    gpu(num_sms=2)
    problem = make_sparse_problem(
        format, batch=2, s_q=1, h_q=16, topk=70, s_k=90, varlen=False, sink=False
    )
    right, right_lse = sparse_calls.call(problem)
    parts = token_bytes(problem.pool.k_cache, format, problem.pool.indices[1, 0, 66:67])
    e4m3, wide = {
        "v32": ((0, 511), (515, 531, 655)),  # wide: the last bytes of floats and of bfloat16
        "v4": ((0, 447), (449, 575)),
        "e4m3": ((0, 511, 575), ()),
    }[format]
    places = [(parts[0], i, (0xFF,)) for i in e4m3]
    places += [(parts[0], i - 1, (0xC0, 0x7F)) for i in wide]
    places += [(tail, i, (0xFF,)) for tail in parts[1:] for i in (0, 6)]
    for row, place, byte in places:
        kept = row[place : place + len(byte)].copy()
        row[place : place + len(byte)] = byte
        out, lse = sparse_calls.call(problem)
        assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all(), place
        assert out[0].tobytes() == right[0].tobytes() and lse[0].tobytes() == right_lse[0].tobytes()
        row[place : place + len(byte)] = kept
    out, lse = sparse_calls.call(problem)
    assert out.tobytes() == right.tobytes() and lse.tobytes() == right_lse.tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_page_outside_the_pool_makes_its_request_nan(gpu, format):
    gpu(num_sms=5)
    arrays, _ = dense_problem(format, [130, 70, 49], s_q=1, h_q=12, page_size=16, causal=False)
    right, _ = decode_dense(arrays)
    arrays["block_table"][1, 2] = arrays["k_cache"].shape[0]
    out, lse = decode_dense(arrays)
    with pytest.raises(DeviceCheckError) as caught:
        check()
    assert (caught.value.request, caught.value.column) == (1, 2)
    assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
    assert out[[0, 2]].tobytes() == right[[0, 2]].tobytes()


# ---- broken kernels ----------------------------------------------------------------------------

RACE = "out of bound|order of threads|deadlock|more arrivals|row is NaN|not finite"
BROKEN = {
    "K is read before it is there": (
        "sm90_few_fp8_scores.cuh",
        "        mbarrier_wait(full(place.slot), place.phase);\n",
        "",
        RACE,
        races,
    ),
    "V is read before it is there": (
        "sm90_few_fp8_values.cuh",
        "      mbarrier_wait(full(place.slot), place.phase);\n",
        "",
        RACE,
        races,
    ),
    "P is read before it is written": (
        "sm90_few_fp8_values.cuh",
        "      mbarrier_wait(p_ready(place.slot), place.phase);\n",
        "",
        RACE,
        races,
    ),
    "the score warps do not wait for each other's maxima": (
        "sm90_few_fp8_scores.cuh",
        "  mbarrier_wait(maxima_ready(slot), place.phase);\n",
        "",
        RACE,
        races,
    ),
    "a slot is filled while it is read": (
        "sm90_few_fp8_loader.cuh",
        "        mbarrier_wait(empty(place.slot), place.phase ^ 1);\n",
        "",
        RACE,
        races,
    ),
    "Q is replaced while it is read": (
        "sm90_few_fp8_loader.cuh",
        "  mbarrier_wait(q_empty(), phase ^ 1);\n",
        "",
        RACE,
        races,
    ),
    "the results of a piece are overwritten": (
        "sm90_few_fp8_scores.cuh",
        "      mbarrier_wait(results_free(), results_phase);\n",
        "",
        RACE,
        races,
    ),
    "scales of tokens that do not count are looked at": (
        "sm90_few_fp8_scales.cuh",
        "return (bits >> token % WARP_TOKENS & 0x10001) == 1;",
        "return true;",
        RACE,
        races,
    ),
    "V that does not count is not cleared": (
        "sm90_few_fp8_values.cuh",
        "      clear_rows<HAS_ROTARY>(place);\n",
        "",
        RACE,
        races,
    ),
    "rows are cleared without a fence": (
        "sm90_few_fp8_values.cuh",
        "  fence_proxy_async();",
        "",
        "without fence.proxy.async",
        short_lists,
    ),
    "O keeps its units when a scale grows": (
        "sm90_few_fp8_scores.cuh",
        "raise0 || raise1 || moves",
        "raise0 || raise1",
        "out of bound",
        wide_scales,
    ),
    "a row that is not causal is seen": (
        "sm90_few_fp8_scores.cuh",
        "if (params.causal) border -= SLOT_TOKENS;",
        "",
        "out of bound",
        dense,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(monkeypatch, tmp_path, kernels, what):
    name, right, wrong, reported, run = BROKEN[what]

    def edit(file, text):
        if file != name:
            return text
        assert text.count(right) == 1, f"{file} has changed"
        return text.replace(right, wrong)

    broken = device.Kernels(tmp_path, edit, kernels)
    with pytest.raises(AssertionError, match=reported), monkeypatch.context() as patch:
        run(lambda num_sms: device.install(patch, broken, num_sms))
