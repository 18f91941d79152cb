"""The kernels of cuda_src run without a GPU: compiled by a host C++ compiler against an emulated
machine (tests/emulator) that runs their threads in random orders, and driven by the library's own
front end. What only a GPU shows (its memory model, ptxas, speed) is the business of tests/gpu.

test_emulated_order.py has the order of threads, blocks and kernels, and what breaks it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import device
from support.emulated import bits, decode, metadata_of
from support.oracle import assert_within_bound, oracle
from support.problems import PAGE_SIZES, make_problem, random_problem

from flashmla_cupy import check, flash_mla_with_kvcache, get_mla_metadata, reference
from flashmla_cupy.errors import DeviceCheckError
from flashmla_cupy.schedule import split as schedule
from flashmla_cupy.schedule.sched_meta import stale_requests

pytestmark = pytest.mark.skipif(
    device.host_compiler() is None, reason="needs a host C++ compiler: c++, g++ or clang++"
)
MERGED_LSE = 0x7FC0FFEE  # merge.cuh


DECODE = ("dense_decode", "few_rows_decode", "combine", "schedule")


@pytest.fixture(scope="module", autouse=True)
def _compiled_side_by_side(kernels):
    """What the tests of this file launch, nearly all of it."""
    kernels.make_all(v for v in device.variants().values() if v.kernel in DECODE)


@pytest.mark.usefixtures("each_kernel")
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
            np.where(rng.random(batch) < 0.5, rng.integers(256, 1025, batch), 0).astype(np.int32),
        ][: 5 if batch < 9000 else 1]
    ):
        emulator.seed = seed
        metadata, num_splits = get_mla_metadata(lengths, rows, h_kv)
        expected, expected_splits = schedule.plan(lengths, len(metadata), rows, h_kv)
        np.testing.assert_array_equal(metadata, expected)
        np.testing.assert_array_equal(num_splits, expected_splits)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(("h_q", "parts"), [(2, 90), (16, 45), (40, 20), (170, 20)])
def test_one_request_in_many_parts(gpu, h_q, parts):
    """`combine` takes 8, 4 or 2 warps for a unit, of floats, then of halves."""
    gpu(num_sms=parts * -(-h_q // 64))
    problem = make_problem([64 * parts - 5], h_q=h_q, page_size=64)
    metadata = metadata_of(problem)
    assert metadata[1][-1] == parts, "few splits"
    out, lse = decode(problem, metadata)
    assert_within_bound(out, lse, oracle(*problem.arrays()))


@pytest.mark.parametrize("tokens", [600, 1000])
def test_many_rows_in_few_pieces(gpu, tokens):
    """`combine` gives a warp whole rows: halves, in 3 to 5 pieces."""
    emulator = gpu(num_sms=6 if tokens == 600 else 10)
    problem = make_problem([tokens, tokens], h_q=40, page_size=64)
    metadata = metadata_of(problem)
    pieces = np.diff(metadata[1])
    assert (pieces == pieces[0]).all() and 3 <= pieces[0] <= 5, "no such splits"
    expected, results = oracle(*problem.arrays()), set()
    for emulator.seed in range(2):
        out, lse = decode(problem, metadata)
        assert_within_bound(out, lse, expected)
        results.add(bits(out, lse))
    assert len(results) == 1


@pytest.mark.usefixtures("each_kernel")
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


@pytest.mark.usefixtures("each_kernel")
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


@pytest.mark.usefixtures("each_kernel")
def test_calls_after_the_first_are_one_graph(gpu):
    """With the arrays of each call, and with words of pairs that the call before has cleared."""
    emulator = gpu(num_sms=2)
    problems = [make_problem([1500, 64], h_q=8, seed=seed) for seed in range(3)]
    expected = [oracle(*problem.arrays()) for problem in problems]
    for problem, right in [*zip(problems, expected, strict=True)] * 2:
        assert_within_bound(*decode(problem), right)
    assert emulator.graphs.launched == 5


@pytest.mark.usefixtures("each_kernel")
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


@pytest.mark.usefixtures("each_kernel")
def test_requests_without_tokens(gpu):
    gpu(num_sms=3)
    problem = make_problem([0, 90, 0], h_q=5, s_q=2, causal=True)
    out, lse = decode(problem)
    assert not out[[0, 2]].astype(np.float32).any()
    assert np.isposinf(lse[[0, 2]]).all()
    assert_within_bound(out, lse, oracle(*problem.arrays(), causal=True))


@pytest.mark.usefixtures("each_kernel")
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


@pytest.mark.usefixtures("each_kernel")
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


@pytest.mark.usefixtures("each_kernel")
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


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("seed", range(12))
def test_metadata_of_another_origin_is_reported(gpu, seed):
    """It may lead to any result but must end, stay within the arrays, and be reported as such,
    whatever else is: results that are right beside it are so by luck."""
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
    assert (caught.value.reason, caught.value.request) == ("foreign metadata", -1)


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


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(("h_q", "num_sms"), [(8, 6), (100, 8)])
def test_a_batch_filled_up_behind_its_metadata(gpu, h_q, num_sms):
    """As serving engines fill up the batch of a captured graph: metadata of the real requests, then
    requests of length 0, and num_splits repeats its last value."""
    gpu(num_sms)
    problem = make_problem([900, 0, 330, 450], h_q=h_q)
    metadata, num_splits = metadata_of(problem)
    alone = decode(problem, (metadata, num_splits))
    padded = filled_up(problem, 7)
    out, lse = decode(padded, (metadata, np.append(num_splits, [num_splits[-1]] * 7)))
    check()
    assert bits(out[:4], lse[:4]) == bits(*alone)
    assert not out[4:].astype(np.float32).any() and np.isposinf(lse[4:]).all()

    for length in (1, -1, 2**30):
        padded.cache_seqlens[8] = length
        out, lse = decode(padded, (metadata, np.append(num_splits, [num_splits[-1]] * 7)))
        assert np.isnan(out[8].astype(np.float32)).all() and np.isnan(lse[8]).all()
        others = np.arange(4, 11) != 8
        assert bits(out[:4], lse[:4]) == bits(*alone)
        assert not out[4:][others].astype(np.float32).any() and np.isposinf(lse[4:][others]).all()
        with pytest.raises(DeviceCheckError) as caught:
            check()
        assert caught.value.request == 8
        assert caught.value.reason == ("stale metadata" if length == 1 else "length")


def filled_up(problem, more):
    """With so many requests of length 0 behind, whose table entries are no pages."""
    q = np.concatenate([problem.q, problem.q[:1].repeat(more, axis=0)])
    table = np.concatenate(
        [problem.block_table, np.full((more, problem.block_table.shape[1]), -1, np.int32)]
    )
    lengths = np.append(problem.cache_seqlens, np.zeros(more, np.int32))
    return replace(problem, q=q, block_table=table, cache_seqlens=lengths)


@pytest.mark.usefixtures("each_kernel")
def test_metadata_of_more_requests_than_the_batch_is_reported(gpu):
    gpu(num_sms=4)
    problem = make_problem([300, 500, 0], h_q=8)
    metadata, num_splits = metadata_of(problem)
    fewer = make_problem([300, 500], h_q=8)
    decode(fewer, (metadata, num_splits[:-1]))
    with pytest.raises(DeviceCheckError, match="metadata"):
        check()


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("lengths", "num_sms"), [([200, 130, 64], 1), ([1100, 300, 64], 12)])
def test_what_is_not_finite_is_where_the_reference_has_it(gpu, value, lengths, num_sms):
    """In keys of the first request that one or two of three queries do not see, and in its first,
    as a whole and split into pieces."""
    gpu(num_sms)
    problem = make_problem(lengths, s_q=3, h_q=6, h_kv=2, causal=True)
    metadata = metadata_of(problem)
    before = decode(problem, metadata)
    for position, column in [(lengths[0] - 1, 3), (lengths[0] - 2, 570), (0, 300)]:
        spoiled = replace(problem, k_cache=problem.k_cache.copy())
        page, slot = spoiled.token(0, position)
        spoiled.k_cache[page, slot, 1, column] = value
        out, lse = decode(spoiled, metadata)
        check()
        expected = reference.decode(*spoiled.arrays(), **spoiled.options())
        assert np.array_equal(np.isnan(out), np.isnan(expected.out))
        assert np.array_equal(np.isnan(lse), np.isnan(expected.lse))
        assert np.isnan(lse[0, 3:, : position - lengths[0]]).all()  # of those that do not see it
        assert bits(out[1:], lse[1:]) == bits(before[0][1:], before[1][1:])
        assert bits(out[0, :, :3], lse[0, :3]) == bits(before[0][0, :, :3], before[1][0, :3])


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("seed", range(16))
def test_the_kernels_refuse_what_stale_requests_says(gpu, seed):
    """Of metadata that was made for other lengths."""
    rng = np.random.default_rng([seed, 2])
    gpu(num_sms=int(rng.integers(1, 9)))
    lengths = rng.integers(0, 700, rng.integers(2, 7))
    problem = make_problem(np.maximum(lengths, 1).tolist(), h_q=3, extra_columns=4)
    problem.cache_seqlens[:] = lengths
    metadata = metadata_of(problem)
    change = rng.random(len(lengths)) < 0.5
    problem.cache_seqlens[change] = rng.integers(0, np.maximum(lengths, 1)[change] + 1)
    stale = stale_requests(metadata[0], problem.cache_seqlens)
    out, lse = decode(problem, metadata)
    assert np.isnan(lse).all(axis=(1, 2)).tolist() == stale.tolist()
    assert np.isnan(out.astype(np.float32)).all(axis=(1, 2, 3)).tolist() == stale.tolist()
    if stale.any():
        with pytest.raises(DeviceCheckError) as caught:
            check()
        assert caught.value.request == np.flatnonzero(stale)[0]
    check()
