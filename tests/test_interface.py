"""The public functions: the results on the host, and what a pretended GPU is asked to do."""

from __future__ import annotations

import numpy as np
import pytest
from support.every_framework import CASES, decode, get, in_threads, put, same_bits
from support.fake_device import STREAM, FakeLaunch, install
from support.oracle import assert_within_bound, oracle
from support.problems import make_problem

import flashmla_cupy
from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata, interface
from flashmla_cupy.calls import decode as decode_calls
from flashmla_cupy.errors import (
    AlignmentError,
    ArgTypeError,
    ArgumentError,
    DeviceCheckError,
    OptionError,
    StaleMetadataError,
)


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch)


# --- on the host -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table_lies_within_the_bound(case):
    p = case.problem()
    out, lse = decode(*p.arrays(), **p.options())
    assert out.dtype == p.q.dtype
    assert_within_bound(out, lse, oracle(*p.arrays(), **p.options()), str(case))


def test_both_styles_of_metadata_agree():
    p = make_problem([70, 0, 200], s_q=2, h_q=4, causal=True)
    lazy, none = get_mla_metadata()
    assert none is None
    assert not lazy.have_initialized
    out, lse = flash_mla_with_kvcache(*p.arrays(), 512, lazy, None, causal=True)
    assert lazy.have_initialized
    metadata, num_splits = get_mla_metadata(p.cache_seqlens, p.rows, p.h_kv)
    assert np.array_equal(metadata, lazy.tile_scheduler_metadata)
    assert np.array_equal(num_splits, lazy.num_splits)
    again, lse_again = flash_mla_with_kvcache(*p.arrays(), 512, metadata, num_splits, causal=True)
    assert again.tobytes() == out.tobytes()
    assert lse_again.tobytes() == lse.tobytes()


def test_outputs_of_the_caller_are_written_and_returned():
    p = make_problem([70, 5], h_q=4)
    expected = decode(*p.arrays())
    lazy, _ = get_mla_metadata()
    out, lse = np.zeros_like(expected[0]), np.zeros_like(expected[1])
    got = flash_mla_with_kvcache(*p.arrays(), 512, lazy, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    assert out.tobytes() == expected[0].tobytes()
    (fresh, same_lse) = flash_mla_with_kvcache(*p.arrays(), 512, lazy, lse=lse)
    assert fresh is not out
    assert same_lse is lse


def test_inputs_are_not_written_and_may_be_read_only():
    p = make_problem([70, 5], h_q=4)
    for array in p.arrays():
        array.flags.writeable = False
    before = [array.tobytes() for array in p.arrays()]
    decode(*p.arrays())
    assert before == [array.tobytes() for array in p.arrays()]


@pytest.mark.parametrize("shape", [(0, 1, 8), (2, 0, 8), (2, 1, 0)], ids=["batch", "s_q", "h_q"])
def test_an_empty_axis_gives_empty_results(shape):
    batch, s_q, h_q = shape
    p = make_problem([3] * batch, s_q=s_q, h_q=h_q)
    out, lse = flash_mla_with_kvcache(*p.arrays(), 512, get_mla_metadata()[0])
    assert out.shape == (batch, s_q, h_q, 512)
    assert lse.shape == (batch, h_q, s_q)


def test_a_refused_request_is_reported_by_the_next_call():
    p = make_problem([70, 5], h_q=4)
    p.block_table[1, 0] = 99
    out, _ = decode(*p.arrays())
    assert np.isnan(out[1].astype(np.float32)).all()
    assert np.isfinite(out[0].astype(np.float32)).all()
    good = make_problem([70, 5], h_q=4)
    with pytest.raises(DeviceCheckError) as caught:
        decode(*good.arrays())
    assert (caught.value.request, caught.value.column) == (1, 0)
    decode(*good.arrays())  # reported once
    flashmla_cupy.check()


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("style", ["arrays", "lazy"])
@pytest.mark.parametrize("length", [-1, 129, 2**31 - 1])
def test_a_bad_length_in_host_memory_is_refused_in_the_call(name, style, length):
    """Its value is at hand: nothing is computed, and nothing is left for the next call to say."""
    pytest.importorskip(name)
    p = make_problem([70, 5], h_q=4, extra_columns=0)
    lengths = p.cache_seqlens.copy()
    lengths[1] = length
    assert p.block_table.shape[1] * 64 == 128
    arrays = [put(name, x, -1) for x in (p.q, p.k_cache, p.block_table, lengths)]
    metadata = get_mla_metadata(put(name, p.cache_seqlens, -1), p.rows, p.h_kv)
    if style == "lazy":
        metadata = get_mla_metadata()
    out = put(name, np.full((2, 1, 4, 512), 7, np.float32).astype(p.q.dtype), -1)
    with pytest.raises(
        DeviceCheckError, match=r"^flash_mla_with_kvcache\(\) refused request 1"
    ) as caught:
        flash_mla_with_kvcache(*arrays, 512, *metadata, out=out)
    assert (caught.value.request, caught.value.reason, caught.value.column) == (1, "length", -1)
    assert (get(out).astype(np.float32) == 7).all()
    flashmla_cupy.check()


def test_nothing_is_said_of_the_callers_floating_point():
    """NaN in live data, overflow and underflow are results, whatever np.errstate the caller set."""
    p = make_problem([70, 5], h_q=4, dtype="float16")
    expected = decode(*p.arrays(), 1e30, False)
    with np.errstate(all="raise"):
        got = decode(*p.arrays(), 1e30, False)
        get_mla_metadata(np.array([2**31 - 1] * 40, np.int32), 16, 1)
    for one, other in zip(got, expected, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("table", [np.zeros((0, 5), np.int32), np.zeros((0, 0), np.int32)])
def test_an_empty_batch_has_a_table_of_any_strides(table):
    """NumPy gives an empty array strides of 0."""
    p = make_problem([], h_q=4)
    out, _ = flash_mla_with_kvcache(
        p.q, p.k_cache, table, p.cache_seqlens, 512, get_mla_metadata()[0]
    )
    assert out.shape == (0, 1, 4, 512)


def test_a_masked_array_is_refused():
    """Behind a call of the same shapes, too, whose checks are not made again."""
    p = make_problem([70, 5], h_q=4)
    for _ in range(2):
        for i, name in enumerate(("q", "k_cache", "block_table", "cache_seqlens")):
            arrays = list(p.arrays())
            arrays[i] = np.ma.masked_array(arrays[i], False)
            with pytest.raises(ArgTypeError, match=f"{name}: expected an array without a mask"):
                flash_mla_with_kvcache(*arrays, 512, get_mla_metadata()[0])
        decode(*p.arrays())


def test_metadata_of_other_lengths_refuses_the_request():
    p = make_problem([70, 5], h_q=4)
    metadata, num_splits = get_mla_metadata(np.array([200, 5], np.int32), p.rows, p.h_kv)
    out, _ = flash_mla_with_kvcache(*p.arrays(), 512, metadata, num_splits)
    assert np.isnan(out[0].astype(np.float32)).all()
    with pytest.raises(DeviceCheckError, match="other cache_seqlens"):
        flashmla_cupy.check()


def test_threads_may_share_everything():
    problems = [make_problem([70 + i, 5], h_q=4, seed=i) for i in range(4)]
    expected = [decode(*p.arrays())[0].tobytes() for p in problems]
    wrong = []

    def work(i):
        for _ in range(20):
            if decode(*problems[i].arrays())[0].tobytes() != expected[i]:
                wrong.append(i)

    in_threads(work, 4)
    assert wrong == []


# --- on a pretended GPU ------------------------------------------------------------------------


def test_a_call_is_one_launch_with_these_arguments(gpu):
    call = gpu.arguments(device=1)
    out, lse = flash_mla_with_kvcache(**call)
    assert out is call["out"]
    assert lse is call["lse"]
    assert gpu.engines[0].launches == []
    ((what, stream, addresses, geometry, scale, causal, new_splits),) = gpu.launches
    assert (what, stream, new_splits) == ("decode", STREAM + 1, 0)
    (scratch,) = gpu.framework.allocated
    for name, address in addresses._asdict().items():
        assert address == (scratch if name == "scratch" else call[name]).ptr, name
    assert (scratch.shape, scratch.dtype, scratch.device) == ((1000,), "float32", 1)
    assert (geometry.batch, geometry.s_q, geometry.h_q, geometry.h_kv) == (3, 2, 16, 2)
    assert (scale, causal) == (576**-0.5, True)


def test_one_query_token_needs_no_mask(gpu):
    flash_mla_with_kvcache(**gpu.arguments(s_q=1))
    assert gpu.launches[0][5] is False


def test_missing_outputs_are_allocated_on_the_device(gpu):
    call = gpu.arguments(device=1) | {"out": None, "lse": None}
    out, lse = flash_mla_with_kvcache(**call)
    assert (out.shape, out.dtype, out.device) == ((3, 2, 16, 512), "bfloat16", 1)
    assert (lse.shape, lse.dtype, lse.device) == ((3, 16, 2), "float32", 1)
    assert gpu.launches[0][2][5:7] == (out.ptr, lse.ptr)
    assert gpu.framework.current == 0


def test_a_seen_signature_is_not_checked_again(gpu, monkeypatch):
    flash_mla_with_kvcache(**gpu.arguments())
    monkeypatch.setattr(decode_calls, "_make", None)
    monkeypatch.setattr(decode_calls, "elsewhere", None)
    flash_mla_with_kvcache(**gpu.arguments())  # other addresses
    assert len(gpu.launches) == 2


def test_metadata_is_one_launch(gpu):
    lengths = gpu.arguments(device=1)["cache_seqlens"]
    metadata, num_splits = get_mla_metadata(lengths, 16, 1)
    assert (metadata.shape, num_splits.shape) == ((132, 8), (4,))
    assert gpu.launches == [
        ("schedule", STREAM + 1, lengths.ptr, 3, 132, 16, 1, metadata.ptr, num_splits.ptr)
    ]


def test_a_seen_signature_of_metadata_is_not_checked_again(gpu, monkeypatch):
    lengths = gpu.arguments()["cache_seqlens"]
    get_mla_metadata(lengths, 16, 1)
    with pytest.raises(ArgumentError, match="num_heads_k"):  # equal to 1, and yet no integer
        get_mla_metadata(lengths, 16, True)
    with pytest.raises(AlignmentError, match="4 bytes"):
        get_mla_metadata(lengths.but(ptr=lengths.ptr + 2), 16, 1)
    monkeypatch.setattr(interface.checks, "describe", None)
    metadata, _ = get_mla_metadata(gpu.arguments()["cache_seqlens"], 16, 1)
    assert [launch[0] for launch in gpu.launches] == ["schedule"] * 2
    assert gpu.launches[1][-2] == metadata.ptr


def test_lazy_metadata_is_made_once(gpu):
    """By the launch of the first call."""
    lazy = get_mla_metadata()[0]
    call = gpu.arguments() | {"tile_scheduler_metadata": lazy, "num_splits": None}
    for _ in range(3):
        flash_mla_with_kvcache(**call)
    metadata, num_splits = lazy.tile_scheduler_metadata.ptr, lazy.num_splits.ptr
    assert [launch[0] for launch in gpu.launches] == ["decode"] * 3
    assert [launch[-1] for launch in gpu.launches] == [num_splits, 0, 0]
    assert {launch[2].tile_scheduler_metadata for launch in gpu.launches} == {metadata}
    assert lazy.num_splits.shape == (4,)
    other = gpu.arguments(h_q=32) | {"tile_scheduler_metadata": lazy, "num_splits": None}
    with pytest.raises(StaleMetadataError, match="h_q 16 -> 32"):
        flash_mla_with_kvcache(**other)


def test_lazy_metadata_comes_without_num_splits(gpu):
    """Refused whether or not the same call without them was seen before."""
    call = gpu.arguments()
    for seen in (False, True):
        lazy = {"tile_scheduler_metadata": get_mla_metadata()[0]}
        with pytest.raises(OptionError, match="num_splits: expected None"):
            flash_mla_with_kvcache(**(call | lazy))
        if not seen:
            flash_mla_with_kvcache(**(call | lazy | {"num_splits": None}))
    assert len(gpu.launches) == 1


def test_a_first_call_that_fails_leaves_lazy_metadata_unmade(gpu, monkeypatch):
    lazy = get_mla_metadata()[0]
    call = gpu.arguments() | {"tile_scheduler_metadata": lazy, "num_splits": None}
    with monkeypatch.context() as patch:
        patch.setattr(FakeLaunch, "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            flash_mla_with_kvcache(**call)
    assert not lazy.have_initialized
    flash_mla_with_kvcache(**call)
    assert gpu.launches[0][-1] == lazy.num_splits.ptr


def test_a_pending_refusal_is_raised_before_the_launch(gpu):
    flash_mla_with_kvcache(**gpu.arguments())
    gpu.engines[0].pending = DeviceCheckError(2, 1, "page id")
    with pytest.raises(DeviceCheckError):
        flash_mla_with_kvcache(**gpu.arguments())
    assert len(gpu.launches) == 1
    gpu.engines[1].pending = DeviceCheckError(0, -1, "length")
    with pytest.raises(DeviceCheckError, match="request 0"):
        flashmla_cupy.check()


def test_nothing_is_launched_for_an_empty_batch(gpu):
    call = gpu.arguments(batch=0)
    out, _ = flash_mla_with_kvcache(**call)
    assert out is call["out"]
    metadata, num_splits = get_mla_metadata(call["cache_seqlens"], 16, 1)
    assert (metadata.filled, num_splits.filled) == (0, 0)
    assert gpu.launches == []
