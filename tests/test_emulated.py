"""The kernels of cuda_src run without a GPU: compiled by a host C++ compiler against an emulated
machine (tests/emulator) that runs their threads in random orders, and driven by the library's own
front end. What only a GPU shows (its memory model, ptxas, speed) is the business of tests/gpu.

The last tests break the kernels on purpose: the emulator has to notice.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulator import device
from support.oracle import assert_within_bound, oracle
from support.problems import PAGE_SIZES, make_problem, random_problem

from flashmla_cupy import check, flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.errors import DeviceCheckError
from flashmla_cupy.schedule import split as schedule

pytestmark = pytest.mark.skipif(
    device.host_compiler() is None, reason="needs a host C++ compiler: c++, g++ or clang++"
)
MERGED_LSE = 0x7FC0FFEE  # merge.cuh


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    made = device.Kernels(tmp_path_factory.mktemp("kernels"))
    made.make_all(device.variants().values())
    return made


@pytest.fixture
def gpu(monkeypatch, kernels):
    """gpu(num_sms) -> an Emulator of that size."""
    return lambda num_sms: device.install(monkeypatch, kernels, num_sms)


def decode(problem, metadata=None):
    """(out, lse) of one call, into arrays that held NaN."""
    batch, s_q, h_q, _ = problem.q.shape
    out = np.full((batch, s_q, h_q, 512), np.nan, problem.q.dtype)
    lse = np.full((batch, h_q, s_q), np.nan, np.float32)
    metadata = metadata or metadata_of(problem)
    return flash_mla_with_kvcache(
        *problem.arrays(), 512, *metadata, **problem.options(), out=out, lse=lse
    )


def metadata_of(problem):
    return get_mla_metadata(problem.cache_seqlens, problem.rows, problem.h_kv)


def bits(out, lse) -> bytes:
    return out.tobytes() + lse.tobytes()


@pytest.mark.parametrize("seed", range(24))
def test_random_problems_in_two_orders(gpu, seed):
    rng = np.random.default_rng([seed, 1])
    problem = random_problem(seed, longest=1500)
    emulator = gpu(num_sms=int(rng.integers(1, 13)))
    seen = set()
    for order in range(2):
        emulator.seed, emulator.resident = 2 * seed + order, int(rng.integers(1, 6))
        out, lse = decode(problem)
        seen.add(bits(out, lse))
    check()
    assert_within_bound(out, lse, oracle(*problem.arrays(), **problem.options()))
    assert len(seen) == 1, "the bits depend on the order of threads"


@pytest.mark.parametrize("batch", [1, 2, 5, 33, 132, 1000, 9000, 40000])
@pytest.mark.parametrize(("rows", "h_kv"), [(16, 1), (128, 1), (256, 2), (8192, 2)])
def test_schedules_are_those_of_the_host(gpu, batch, rows, h_kv):
    """132, 66, 16 and 1 parts; above 32768 requests the prefix is kept at every second one."""
    emulator = gpu(num_sms=132)
    rng = np.random.default_rng(batch + rows)
    for seed, lengths in enumerate(
        [
            np.exp(rng.uniform(0, 14, batch)).astype(np.int32) - 1,
            np.full(batch, rng.integers(1, 9000), np.int32),
            np.where(rng.random(batch) < 0.1, 70000, 300).astype(np.int32),
            rng.integers(-(2**31), 2**31, batch).astype(np.int32),  # whatever a buffer holds
        ][: 4 if batch < 9000 else 1]
    ):
        emulator.seed = seed
        metadata, num_splits = get_mla_metadata(lengths, rows, h_kv)
        expected, expected_splits = schedule.plan(lengths, len(metadata), rows, h_kv)
        np.testing.assert_array_equal(metadata, expected)
        np.testing.assert_array_equal(num_splits, expected_splits)


@pytest.mark.parametrize(("h_q", "parts"), [(2, 90), (16, 45), (40, 20), (170, 20)])
def test_one_request_in_many_parts(gpu, h_q, parts):
    """`combine` takes 8, 4 or 2 warps for a unit, of floats, then of halves."""
    gpu(num_sms=parts * -(-h_q // 64))
    problem = make_problem([64 * parts - 5], h_q=h_q, page_size=64)
    metadata = metadata_of(problem)
    assert metadata[1][-1] == parts, "few splits"
    out, lse = decode(problem, metadata)
    assert_within_bound(out, lse, oracle(*problem.arrays()))


@pytest.mark.parametrize("h_q", [1, 20])
def test_a_long_request_among_short_ones(gpu, h_q):
    """Split: the long one, in many pieces, and some short ones in two."""
    emulator = gpu(num_sms=16)
    problem = make_problem([450] * 7 + [3000], h_q=h_q)
    metadata = metadata_of(problem)
    pieces = np.diff(metadata[1])
    assert pieces.max() >= 6 and (pieces == 2).any(), "no such splits"
    expected = oracle(*problem.arrays())
    for emulator.resident in (1, 16):  # pairs are merged by combine, or in place
        assert_within_bound(*decode(problem, metadata), expected)


def test_a_pair_has_the_same_bits_whoever_merges_it(gpu):
    emulator = gpu(num_sms=2)
    problem = make_problem([1500, 64], h_q=8)  # in two parts: one request is cut
    results, merged_in_place = set(), set()
    for seed in range(8):
        emulator.seed, emulator.resident = seed, 1 + seed % 2
        results.add(bits(*decode(problem)))
        scratch = emulator.framework.allocated[-1].view(np.uint32)
        merged_in_place.add(bool((scratch == MERGED_LSE).any()))
    assert merged_in_place == {False, True}, "only one of the two ways was taken"
    assert len(results) == 1


def test_calls_after_the_first_are_one_graph(gpu):
    """With the arrays of each call, and with words of pairs that the call before has cleared."""
    emulator = gpu(num_sms=2)
    problems = [make_problem([1500, 64], h_q=8, seed=seed) for seed in range(3)]
    expected = [oracle(*problem.arrays()) for problem in problems]
    for problem, right in [*zip(problems, expected, strict=True)] * 2:
        assert_within_bound(*decode(problem), right)
    assert emulator.graphs.launched == 5


def test_metadata_of_the_newer_style(gpu):
    """Made anew for the lengths of each step, and shared by its layers."""
    gpu(num_sms=4)
    for step in range(3):
        problem = make_problem([900 - 64 * step, 40 + step, 0], h_q=8, seed=step)
        lazy = get_mla_metadata()
        layers = [bits(*decode(problem, lazy)) for _ in range(2)]
        assert layers == [bits(*decode(problem))] * 2
        assert_within_bound(*decode(problem, lazy), oracle(*problem.arrays()))
        made = lazy[0].tile_scheduler_metadata, lazy[0].num_splits
        assert all(map(np.array_equal, made, metadata_of(problem)))


def test_requests_without_tokens(gpu):
    gpu(num_sms=3)
    problem = make_problem([0, 90, 0], h_q=5, s_q=2, causal=True)
    out, lse = decode(problem)
    assert not out[[0, 2]].astype(np.float32).any()
    assert np.isposinf(lse[[0, 2]]).all()
    assert_within_bound(out, lse, oracle(*problem.arrays(), causal=True))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("entry", [-1, 2147480000, "num_pages"])
def test_a_bad_page_id_is_refused(gpu, page_size, entry):
    gpu(num_sms=4)
    problem = make_problem([300, 500, 200], h_q=3, page_size=page_size)
    right = decode(problem)
    problem.block_table[1, 1] = problem.k_cache.shape[0] if entry == "num_pages" else entry
    out, lse = decode(problem)
    assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
    others = [0, 2]
    assert bits(out[others], lse[others]) == bits(right[0][others], right[1][others])
    with pytest.raises(DeviceCheckError) as caught:
        check()
    assert (caught.value.request, caught.value.column) == (1, 1)


@pytest.mark.parametrize("length", [-1, 2**31 - 1, -(2**31), 641])
def test_a_bad_length_is_refused(gpu, length):
    gpu(num_sms=4)
    problem = make_problem([300, 500, 200], h_q=3, extra_columns=2)
    right = decode(problem)
    problem.cache_seqlens[1] = length
    out, lse = decode(problem)
    assert np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
    assert bits(out[0], lse[0]) == bits(right[0][0], right[1][0])
    with pytest.raises(DeviceCheckError, match="length"):
        check()


def test_stale_metadata_is_refused(gpu):
    gpu(num_sms=4)
    problem = make_problem([300, 500, 200], h_q=3)
    metadata = metadata_of(problem)
    problem.cache_seqlens[:] = [300, 100, 200]
    out, lse = decode(problem, metadata)
    refused = np.isnan(lse).all(axis=(1, 2))
    assert refused[1]
    live = ~refused
    expected = oracle(*problem.arrays())
    assert_within_bound(
        out[live],
        lse[live],
        expected._replace(**{name: getattr(expected, name)[live] for name in expected._fields}),
    )
    with pytest.raises(DeviceCheckError):
        check()


@pytest.mark.parametrize("seed", range(12))
def test_metadata_of_another_origin_is_reported(gpu, seed):
    """It may lead to any result but must end, stay within the arrays, and not pass in silence."""
    rng = np.random.default_rng(seed)
    emulator = gpu(num_sms=int(rng.integers(2, 9)))
    emulator.seed = seed
    problem = make_problem(rng.integers(0, 700, rng.integers(1, 6)).tolist(), h_q=8, seed=seed)
    metadata, num_splits = metadata_of(problem)
    garbage = [
        np.zeros_like(metadata),
        rng.integers(-(2**31), 2**31, metadata.shape),
        rng.integers(0, 12, metadata.shape),
        np.roll(metadata, 1, axis=0),
    ][seed % 4]
    decode(problem, (garbage.astype(np.int32), num_splits))
    with pytest.raises(DeviceCheckError) as caught:
        check()
    assert caught.value.reason in ("foreign metadata", "stale metadata")


@pytest.mark.parametrize("seed", range(24))
def test_a_list_of_another_origin_leads_nowhere_else(gpu, seed):
    """`combine` follows column 7, whatever it holds, within the arrays."""
    rng = np.random.default_rng(seed)
    gpu(num_sms=int(rng.integers(3, 12)))
    lengths = rng.integers(300, 900, rng.integers(1, 5)).tolist()
    problem = make_problem(lengths, h_q=int(rng.integers(1, 9)), seed=seed)
    metadata, num_splits = metadata_of(problem)
    parts = len(metadata)
    slots = rng.integers(0, 2 * parts - 1, parts)
    slots[-1] = rng.integers(2, 2 * parts - 1)  # so many are used
    metadata[:, 7] = slots << 20 | rng.integers(0, len(lengths), parts)

    batch, s_q, h_q, _ = problem.q.shape
    guard = 1 << 16
    around = np.full(batch * s_q * h_q * 512 + 2 * guard, 7, np.uint16)
    around_lse = np.full(batch * h_q * s_q + 2 * guard, 7, np.float32)
    out = around[guard:-guard].view(problem.q.dtype).reshape(batch, s_q, h_q, 512)
    lse = around_lse[guard:-guard].reshape(batch, h_q, s_q)
    flash_mla_with_kvcache(
        *problem.arrays(), 512, metadata, num_splits, **problem.options(), out=out, lse=lse
    )
    for x in (around, around_lse):
        assert (x[:guard] == 7).all() and (x[-guard:] == 7).all()
    with pytest.raises(DeviceCheckError, match="metadata"):
        check()


# ---- broken kernels -------------------------------------------------------------------------

RACE = (
    "without fence.proxy.async|more arrivals|deadlock|no end in sight|out of bound|order of threads"
)
BROKEN = {  # what is broken: (file, text, what stands there instead, what is reported)
    "P is not fenced": (
        "sm90_softmax.cuh",
        "DEVICE void release(uint32_t barrier) {\n  fence_proxy_async();",
        "DEVICE void release(uint32_t barrier) {",
        "without fence.proxy.async",
    ),
    "P is released before all lanes wrote it": (
        "sm90_softmax.cuh",
        "  __syncwarp();\n  if (arrives()) mbarrier_arrive(barrier);",
        "  if (arrives()) mbarrier_arrive(barrier);",
        RACE,
    ),
    "scores are read before they are there": (
        "sm90_softmax.cuh",
        "      wgmma_wait_all();\n",
        "",
        RACE,
    ),
    "K is read before it is there": (
        "sm90_softmax.cuh",
        "  mbarrier_wait(full(1, place.stage), place.phase);\n  wgmma_fence();",
        "",
        RACE,
    ),
    "a stage is never freed": (
        "sm90_accumulate.cuh",
        "if (half == 0) mbarrier_arrive(empty(0, place.stage));",
        "",
        "deadlock: .* in mbarrier_wait",
    ),
    "a stage is freed twice": (
        "sm90_accumulate.cuh",
        "if (half == 0) mbarrier_arrive(empty(0, place.stage));",
        "mbarrier_arrive(empty(0, place.stage));",
        RACE,
    ),
    "a stage is filled while it is read": (
        "sm90_tma_producer.cuh",
        "if (wait) mbarrier_wait(empty(half, place.stage), place.phase);",
        "",
        RACE,
    ),
    "the matrix warpgroups wait for Q's slot, which may be long past": (
        "sm90_accumulate.cuh",
        "    place.advance();  // past Q\n",
        "    mbarrier_wait(p_ready(place.stage), place.phase), place.advance();\n",
        "deadlock: .* in mbarrier_wait|no end in sight",
    ),
    "a descriptor says the wrong distance": (
        "sm90_fragments.cuh",
        "(uint64_t)512 << 16",
        "(uint64_t)256 << 16",
        "out of bound",
    ),
    "V past the end is not cleared": (
        "sm90_accumulate.cuh",
        "if (i + 1 == tiles && last_tokens < TOKENS)",
        "if (false)",
        RACE,
    ),
    "the other piece of a pair is not waited for": (
        "sm90_accumulate.cuh",
        "    mbarrier_wait(back_full(), 0);\n",
        "",
        RACE,
    ),
    "the warps of a row are added too early": (
        "combine.cu",
        "    bar_sync(1 + (warp >> warps_log2), 32 * warps);\n",
        "",
        RACE,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(monkeypatch, tmp_path, what):
    name, right, wrong, reported = BROKEN[what]

    def edit(file, text):
        if file != name:
            return text
        assert text.count(right) == 1, f"{file} has changed"
        return text.replace(right, wrong)

    kernels = device.Kernels(tmp_path, edit)
    with pytest.raises(AssertionError, match=reported):
        for seed in range(20):
            with monkeypatch.context() as patch:
                lengths, num_sms = ([900, 330, 450], 5) if seed % 2 else ([1100], 16)
                emulator = device.install(patch, kernels, num_sms)
                emulator.seed = seed
                problem = make_problem(lengths, h_q=8 if seed % 2 else 3, seed=seed)
                results = {bits(*decode(problem)) for emulator.seed in (seed, seed + 100)}
                out, lse = decode(problem)
                assert_within_bound(out, lse, oracle(*problem.arrays()))
                assert len(results) == 1, "the bits depend on the order of threads"
