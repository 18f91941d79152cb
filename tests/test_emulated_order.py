"""The order of threads, thread blocks and kernels on the emulated GPU (tests/emulator): replays of
a graph, programmatic dependent launches, partial results that blocks hand to one another, the
bounds of every array.

Each test has a scenario. The last ones break a kernel on purpose, one thing at a time, and run a
scenario with it: that has to fail, and to say why.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import device
from support.emulated import bits, decode, decode_into, metadata_of, refusal
from support.oracle import assert_within_bound, oracle
from support.problems import PAGE_SIZES, make_problem

from flashmla_cupy import get_mla_metadata
from flashmla_cupy.gpu import decode_launch
from flashmla_cupy.gpu.kernels import DENSE_DECODE
from flashmla_cupy.schedule import split

pytestmark = pytest.mark.skipif(
    device.host_compiler() is None, reason="needs a host C++ compiler: c++, g++ or clang++"
)


def arrays_of(problem):
    return {name: x for name, x in vars(problem).items() if isinstance(x, np.ndarray)}


# ---- scenarios: each makes emulated GPUs by gpu(num_sms) ---------------------------------------


def races(gpu):
    """Requests of several pieces, in many orders of threads, all of which give the same bits."""
    for seed in range(20):
        lengths, num_sms = ([900, 330, 450], 5) if seed % 2 else ([1100], 16)
        emulator = gpu(num_sms)
        problem = make_problem(lengths, h_q=8 if seed % 2 else 3, seed=seed)
        results = set()
        for emulator.seed in (seed, seed + 100):
            results.add(bits(*decode(problem)))
        out, lse = decode(problem)
        assert_within_bound(out, lse, oracle(*problem.arrays()))
        assert len(results) == 1, "the bits depend on the order of threads"


def races_of_short_pieces(gpu):
    """The same, with pieces of one slot of the ring, or two."""
    for seed in range(20):
        emulator = gpu(num_sms=5)
        problem = make_problem([900, 330, 10, 40, 30, 5], h_q=8, seed=seed)
        emulator.seed = seed
        out, lse = decode(problem)
        assert_within_bound(out, lse, oracle(*problem.arrays()))


def pairs(gpu):
    """A front merges its back, which another block has just written; or `combine` does."""
    emulator = gpu(num_sms=2)
    problem = make_problem([1500, 64], h_q=8)
    metadata = metadata_of(problem)
    results = set()
    for emulator.seed in range(12):
        emulator.resident = 1 + emulator.seed % 3
        results.add(bits(*decode(problem, metadata)))
    assert_within_bound(*decode(problem, metadata), oracle(*problem.arrays()))
    assert len(results) == 1, "the bits depend on the order of threads"


def replays(gpu, lengths=(1500,), num_sms: int = 2, h_kv: int = 1, seeds=(0, 2, 1, 3, 5)):
    """A graph that is replayed with other keys. Blocks come one after another, so that a front ends
    before its back has begun: it must not take the back of the replay before. For odd seeds combine
    begins while dense_decode ends, for even ones before it."""
    emulator = gpu(num_sms)

    def made(seed):
        return make_problem(list(lengths), h_q=8, h_kv=h_kv, seed=seed)

    problem = made(0)
    metadata = metadata_of(problem)
    pieces = np.diff(metadata[1])
    assert (pieces == 2).any() and len(pieces) == len(lengths), "no pair"
    out = np.empty((len(lengths), 1, 8, 512), problem.q.dtype)
    lse = np.empty((len(lengths), 8, 1), np.float32)
    for _ in range(2):  # the second call is a graph
        decode_into(problem, metadata, out, lse)
    emulator.resident = 1
    for seed in seeds:
        emulator.seed, other = seed, made(seed + 1)
        problem.k_cache[...], problem.block_table[...] = other.k_cache, other.block_table
        emulator.graphs.launch(emulator.graphs.last)
        assert_within_bound(out, lse, oracle(*problem.arrays()))


def replays_beside_many_pieces(gpu):
    """So few rows are in six pieces, and so many blocks merge them, that most warps of combine's
    first block have nothing to merge, and clear words at once."""
    replays(gpu, lengths=(1152, 384), num_sms=64, h_kv=8, seeds=(1, 3))


def waits(gpu, *, lazy: bool, lengths, num_sms: int, h_q: int):
    """What the kernel ahead of a call writes, the call reads: lengths, tables, q and the cache. The
    kernels of the call are one graph and begin as early as they may. In a call with a SchedMeta its
    first kernel is schedule, else dense_decode."""
    emulator = gpu(num_sms)
    right = make_problem(lengths, h_q=h_q)
    metadata = metadata_of(right)
    late = replace(right, **{name: x.copy() for name, x in arrays_of(right).items()})

    def ahead():
        for name, array in arrays_of(right).items():
            getattr(late, name)[...] = array

    for seed, resident in ((0, 3), (2, 1), (1, 3), (4, 8)):  # a graph from the second call on
        emulator.seed, emulator.resident = seed, resident
        for array in arrays_of(late).values():
            array[...] = 0
        emulator.ahead = ahead
        out, lse = decode(late, get_mla_metadata() if lazy else metadata)
        assert emulator.ahead is None, "nothing was launched"
        assert_within_bound(out, lse, oracle(*right.arrays()))
    assert emulator.graphs.launched == 3
    assert refusal() is None


def split_in_many(gpu):
    waits(gpu, lazy=False, lengths=[1500], num_sms=8, h_q=40)


def split_in_pairs(gpu):
    waits(gpu, lazy=False, lengths=[1500, 64], num_sms=2, h_q=8)


def with_schedule(gpu):
    waits(gpu, lazy=True, lengths=[1500, 64, 900], num_sms=6, h_q=8)


def metadata_of_late_lengths(gpu):
    """get_mla_metadata() after a kernel that writes cache_seqlens."""
    emulator = gpu(num_sms=7)
    right = np.array([700, 0, 300, 64], np.int32)
    lengths = np.zeros_like(right)
    emulator.ahead = lambda: lengths.__setitem__(slice(None), right)
    made = get_mla_metadata(lengths, 16, 1)
    expected = split.plan(right, 7, 16, 1)
    assert all(map(np.array_equal, made, expected)), "metadata of other lengths"


def edges(gpu, page_size: int = 16, at_end: bool = True):
    """Every array, scratch memory among them, ends or begins at memory that may not be touched."""
    emulator = gpu(num_sms=5)
    hedge(emulator, at_end)

    def hedged(array):
        return device.guarded(array, at_end=at_end)

    problem = make_problem([64, 130, 333], h_q=5, s_q=2, page_size=page_size, extra_columns=0)
    for name, array in arrays_of(problem).items():
        setattr(problem, name, hedged(array))
    out, lse = hedged(np.empty((3, 2, 5, 512), problem.q.dtype)), hedged(np.empty((3, 5, 2), "f4"))
    for lengths in ([64, 130, 333], [0, 128, 333]):
        problem.cache_seqlens[:] = lengths
        metadata = tuple(map(hedged, metadata_of(problem)))
        for _ in range(2):  # kernel by kernel, and as a graph
            decode_into(problem, metadata, out, lse)
        assert_within_bound(out, lse, oracle(*problem.arrays()))
    # What cannot be; and what begins so little behind the table that no other memory is there.
    for lengths, first in (((-1, 2**31 - 1, 333 + page_size), 0), ((0, 0, 200 * 64), 2)):
        problem.cache_seqlens[:] = lengths
        decode_into(problem, tuple(map(hedged, metadata_of(problem))), out, lse)
        assert np.isnan(lse[first:]).all() and refusal() == (first, "length")


def hedge(emulator, at_end: bool = True):
    """From now on, what is allocated ends or begins at memory that may not be touched."""
    empty = emulator.framework.empty
    emulator.framework.empty = lambda *of: device.guarded(empty(*of), at_end=at_end)


def slots(gpu):
    """Metadata, sealed, with a slot that is the first one out of range, or the next."""
    for more in (0, 1):
        hedge(gpu(num_sms=3))
        problem = make_problem([1500], h_q=3)
        metadata, num_splits = metadata_of(problem)
        assert num_splits[-1] == 3
        slot = 2 * (len(metadata) - 1) + more
        metadata[1, 4] = metadata[1, 4] & ~0xFFFF | slot  # the middle one of three pieces
        decode(problem, (split.sealed(metadata, 1), num_splits))
        assert refusal() == (0, "stale metadata"), "a slot out of range is not refused"


def hidden_nan(gpu):
    """In a key that two of three queries do not see, in a tile of its own."""
    gpu(num_sms=1)
    for length in (65, 100):
        problem = make_problem([length, 64], s_q=3, h_q=4, causal=True)  # 12 rows
        page, slot = problem.token(0, length - 1)
        problem.k_cache[page, slot, 0, 3] = np.nan
        out, lse = decode(problem)
        nan = np.isnan(out.astype(np.float32))
        assert nan[0].all() and np.isnan(lse[0]).all(), "a NaN did not reach all queries"
        assert not nan[1].any()


# ---- the kernels pass --------------------------------------------------------------------------


@pytest.mark.usefixtures("each_kernel")
def test_pairs_in_many_orders(gpu):
    pairs(gpu)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("scenario", [replays, replays_beside_many_pieces])
def test_a_replay_merges_no_back_of_the_replay_before(gpu, scenario):
    scenario(gpu)


def test_a_call_clears_the_words_of_pairs(gpu):
    emulator = gpu(num_sms=2)
    decode(make_problem([1500, 64], h_q=8))
    assert not emulator.framework.allocated[-1].view(np.uint64)[-2:].any()


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("scenario", [split_in_many, split_in_pairs, with_schedule])
def test_kernels_wait_for_those_ahead(gpu, scenario):
    scenario(gpu)


def test_metadata_waits_for_the_lengths(gpu):
    metadata_of_late_lengths(gpu)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_no_byte_next_to_an_array_is_touched(gpu, page_size, at_end):
    edges(gpu, page_size, at_end)


@pytest.mark.usefixtures("each_kernel")
def test_a_slot_out_of_range_is_refused(gpu):
    slots(gpu)


@pytest.mark.usefixtures("each_kernel")
def test_a_nan_that_a_query_does_not_see_reaches_it(gpu):
    hidden_nan(gpu)


# ---- broken kernels ----------------------------------------------------------------------------

RACE = (
    "without fence.proxy.async|more arrivals|deadlock|no end in sight|out of bound|order of threads"
)
# What is broken: (file, text, what stands there instead, what is reported), and the scenario if it
# is not `races`.
BROKEN = {
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
        "(uint64_t)(BLOCK_BYTES >> 4) << 16",
        "(uint64_t)(BLOCK_BYTES >> 5) << 16",
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
    "a back is announced without a fence of GPU scope": (
        "sm90_pair_words.cuh",
        "  fence_acq_rel_gpu();\n",
        "",
        "out of bound|order of threads",
        pairs,
    ),
    "a back is announced without a proxy fence": (
        "sm90_pair.cuh",
        "  fence_proxy_async_all();\n  announce_back(params);\n",
        "  announce_back(params);\n",
        "bulk copy of global memory, which block 1 wrote without fence.proxy.async",
        pairs,
    ),
    "a back is copied without a proxy fence": (
        "sm90_pair.cuh",
        "  __syncwarp();\n  fence_proxy_async_all();\n",
        "  __syncwarp();\n",
        "bulk copy of global memory without fence.proxy.async since its block acquired",
        pairs,
    ),
    "the words of pairs are not cleared": (
        "combine.cu",
        "pairs[i] = 0;",
        ";",
        "out of bound",
        replays,
    ),
    "the words of pairs are cleared before dense_decode has ended": (
        "combine.cu",
        "    griddepcontrol_wait();\n#pragma unroll 1\n    for (int i = threadIdx.x; i < words;",
        "#pragma unroll 1\n    for (int i = threadIdx.x; i < words;",
        "out of bound",
        replays_beside_many_pieces,
    ),
    "combine does not wait before it merges pairs": (
        "combine.cu",
        "  griddepcontrol_wait();\n#pragma unroll 1\n  for (int begin = first;",
        "#pragma unroll 1\n  for (int begin = first;",
        "out of bound",
        split_in_pairs,
    ),
    "combine does not wait before it merges many pieces": (
        "combine.cu",
        "  griddepcontrol_wait();\n\n  Splits<HALVES> all;",
        "  Splits<HALVES> all;",
        "out of bound",
        split_in_many,
    ),
    "dense_decode does not wait for schedule": (
        "sm90_dense_decode.cu",
        "  griddepcontrol_wait();\n",
        "",
        "out of bound|no array",
        with_schedule,
    ),
    "dense_decode does not wait for what writes its inputs": (
        "sm90_dense_decode.cu",
        "  griddepcontrol_wait();\n",
        "",
        "out of bound|no array",
        split_in_many,
    ),
    "schedule does not wait for the lengths": (
        "schedule.cu",
        "  griddepcontrol_wait();  // the lengths may be the work of a kernel\n",
        "",
        "metadata of other lengths",
        metadata_of_late_lengths,
    ),
    "a NaN that a query does not see is dropped": (
        "sm90_softmax.cuh",
        "spoils ? 0xffc00000 : 0xff800000",
        "0xff800000",
        "a NaN did not reach all queries",
        hidden_nan,
    ),
    "the slot after the last one is let through": (
        "sm90_pieces.cuh",
        "piece.slot >= params.slots",
        "piece.slot > params.slots",
        "a slot out of range is not refused|no array",
        slots,
    ),
    "small pages are looked up beyond the table": (
        "sm90_tma_producer.cuh",
        "  if (PAGES_PER_TILE > 1) in_row &= column * PAGE_SIZE < params.max_length;\n",
        "",
        "access to memory where no array is",
        edges,
    ),
    "pages are looked up beyond the table": (
        "sm90_tma_producer.cuh",
        "  bool in_row = cursor.tile <= (params.max_length - 1) >> 6;\n",
        "  bool in_row = true;\n",
        "access to memory where no array is",
        lambda gpu: edges(gpu, 64),
    ),
}
BROKEN_FEW_ROWS = {
    "K is read before it is there": (
        "sm90_few_rows_scores.cuh",
        "      mbarrier_wait(full(place.slot), place.phase);\n      scores(",
        "      scores(",
        RACE,
    ),
    "P is read before it is written": (
        "sm90_few_rows_values.cuh",
        "      mbarrier_wait(p_ready(place.slot), place.phase);\n",
        "",
        RACE,
    ),
    "the score warps do not wait for each other's maxima": (
        "sm90_few_rows_scores.cuh",
        "  bar_sync(SCORE_BARRIER, GROUP_THREADS);\n  arrive(empty(slot));",
        "  arrive(empty(slot));",
        RACE,
    ),
    "Q's slot has no phase of p_ready": (
        "sm90_few_rows_scores.cuh",
        "  arrive(p_ready(place.slot));  // every use",
        "  // every use",
        RACE,
    ),
    "V past the end is not cleared": (
        "sm90_few_rows_values.cuh",
        "if (left < SLOT_TOKENS)",
        "if (false)",
        RACE,
    ),
    "rows are cleared without a fence": (
        "sm90_few_rows_values.cuh",
        "  fence_proxy_async();",
        "",
        "without fence.proxy.async",
    ),
    "a slot is filled while it is read": (
        "sm90_few_rows_loader.cuh",
        "      mbarrier_wait(empty(place.slot), place.phase ^ 1);\n      if (lane == 0) mbarrier",
        "      if (lane == 0) mbarrier",
        RACE,
    ),
    "the results of a piece are overwritten": (
        "sm90_few_rows_scores.cuh",
        "      mbarrier_wait(results_free(), results_phase);\n",
        "",
        RACE,
        races_of_short_pieces,
    ),
    "a back is announced without a fence of GPU scope": (
        "sm90_pair_words.cuh",
        "  fence_acq_rel_gpu();\n",
        "",
        "out of bound|order of threads",
        pairs,
    ),
    "few_rows_decode does not wait for schedule": (
        "sm90_few_rows_decode.cu",
        "  griddepcontrol_wait();\n",
        "",
        "out of bound|no array",
        with_schedule,
    ),
    "a NaN that a query does not see is dropped": (
        "sm90_few_rows_scores.cuh",
        "spoils ? QUIET_NAN : NEG_INF",
        "NEG_INF",
        "a NaN did not reach all queries",
        hidden_nan,
    ),
    "pages are looked up beyond the table": (
        "sm90_few_rows_loader.cuh",
        "  if (token >= params.max_length) return -1;\n",
        "",
        "access to memory where no array is",
        edges,
    ),
    "the back is announced before it is written": (
        "sm90_few_rows_values.cuh",
        "      bar_sync(BACK_BARRIER, BACK_BARRIER_THREADS);\n",
        "",
        RACE,
        pairs,
    ),
}


@pytest.mark.parametrize("what", BROKEN_FEW_ROWS)
def test_a_broken_kernel_of_few_rows_is_noticed(monkeypatch, tmp_path, kernels, what):
    is_noticed(monkeypatch, tmp_path, kernels, *BROKEN_FEW_ROWS[what])


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(monkeypatch, tmp_path, kernels, what):
    monkeypatch.setattr(decode_launch, "decode_kernel", lambda slab_rows: DENSE_DECODE)
    is_noticed(monkeypatch, tmp_path, kernels, *BROKEN[what])


def is_noticed(monkeypatch, tmp_path, kernels, name, right, wrong, reported, run=races):
    def edit(file, text):
        if file != name:
            return text
        assert text.count(right) == 1, f"{file} has changed"
        return text.replace(right, wrong)

    broken = device.Kernels(tmp_path, edit, kernels)
    with pytest.raises(AssertionError, match=reported), monkeypatch.context() as patch:
        run(lambda num_sms: device.install(patch, broken, num_sms))
