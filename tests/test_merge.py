"""merge_partials: parts of a sequence give the result of the whole, in every framework."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest
from support.every_framework import get, put
from support.oracle import assert_within_bound, oracle
from support.problems import make_problem

from flashmla_cupy import reference
from flashmla_cupy.errors import (
    ArgTypeError,
    DeviceMismatchError,
    DTypeError,
    FrameworkMismatchError,
    ShapeError,
)
from flashmla_cupy.partials import merge_partials


def parts_of(problem, n, tokens=64):
    """(outs, lses) of the problem with its pages dealt out to n parts, whole pages each."""
    page_size = problem.k_cache.shape[1]
    outs, lses = [], []
    for part in range(n):
        table = np.zeros_like(problem.block_table)
        lengths = np.zeros_like(problem.cache_seqlens)
        for b, length in enumerate(problem.cache_seqlens):
            mine = range(part, -(-int(length) // page_size), n)
            for column, page in enumerate(mine):
                table[b, column] = problem.block_table[b, page]
                lengths[b] += min(page_size, length - page * page_size)
        out, lse, violation = reference.decode(problem.q, problem.k_cache, table, lengths)
        assert violation is None
        outs.append(out)
        lses.append(lse)
    return outs, lses


@pytest.fixture(params=["numpy", "torch", "jax"])
def framework(request):
    pytest.importorskip(request.param)
    return request.param


def test_parts_make_the_whole(framework):
    """Ragged lengths, one empty request, and requests that some parts hold nothing of."""
    p = make_problem([0, 1, 65, 640], s_q=2, h_q=4, page_size=16)
    outs, lses = parts_of(p, 3)
    assert np.isposinf(lses[2][1]).all()  # the request of one token is all in part 0
    out, lse = merge_partials(*([put(framework, x, -1) for x in xs] for xs in (outs, lses)))
    assert type(out).__module__.partition(".")[0].startswith(framework)
    expected = oracle(*p.arrays())
    # Each part's out was rounded once, and the merged one again.
    looser = expected._replace(out_bound=3 * expected.out_bound, lse_bound=2 * expected.lse_bound)
    assert_within_bound(get(out), get(lse), looser)
    assert get(out).dtype == ml_dtypes.bfloat16
    assert np.isposinf(get(lse)[0]).all()
    assert (get(out)[0] == 0).all()


def test_lists_and_stacked_arrays_are_the_same(framework):
    outs, lses = parts_of(make_problem([200], h_q=2), 2)
    listed = merge_partials(*([put(framework, x, -1) for x in xs] for xs in (outs, lses)))
    stacked = merge_partials(*(put(framework, np.stack(x), -1) for x in (outs, lses)))
    for a, b in zip(listed, stacked, strict=True):
        assert get(a).tobytes() == get(b).tobytes()


def test_one_part_is_itself(framework):
    (out,), (lse,) = parts_of(make_problem([7, 0, 100], h_q=3), 1)
    merged = merge_partials(put(framework, out[None], -1), put(framework, lse[None], -1))
    assert get(merged[0]).tobytes() == out.tobytes()
    assert get(merged[1]).tobytes() == lse.tobytes()


def test_a_refused_request_stays_refused(framework):
    outs, lses = (np.stack(x) for x in parts_of(make_problem([100, 50], h_q=3), 2))
    outs[1, 0], lses[1, 0] = np.nan, np.nan
    out, lse = map(get, merge_partials(put(framework, outs, -1), put(framework, lses, -1)))
    assert np.isnan(out[0].astype(np.float32)).all()
    assert np.isnan(lse[0]).all()
    assert np.isfinite(out[1].astype(np.float32)).all()
    assert np.isfinite(lse[1]).all()


def test_weights_neither_overflow_nor_vanish(framework):
    """lse far apart, as softmax_scale may make them: float32 holds exp(lse) of none of them."""
    outs = np.array([1, 2, 4], np.float32).reshape(3, 1, 1, 1, 1).repeat(512, -1)
    lses = np.array([1e4, 1e4, -1e4], np.float32).reshape(3, 1, 1, 1)
    out, lse = map(get, merge_partials(put(framework, outs, -1), put(framework, lses, -1)))
    assert np.allclose(out, 1.5)
    assert np.allclose(lse, 1e4 + np.log(2))


def test_jax_traces_it():
    jax = pytest.importorskip("jax")
    outs, lses = (np.stack(x) for x in parts_of(make_problem([100, 50], h_q=3), 2))
    traced = jax.jit(merge_partials)(outs, lses)
    for a, b in zip(traced, merge_partials(outs, lses), strict=True):
        assert np.allclose(get(a).astype(np.float32), b.astype(np.float32), atol=1e-2)


def test_torch_compiles_it():
    torch = pytest.importorskip("torch")
    outs, lses = (
        put("torch", np.stack(x), -1) for x in parts_of(make_problem([100, 50], h_q=3), 2)
    )
    compiled = torch.compile(merge_partials, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(outs, lses), merge_partials(outs, lses), strict=True):
        assert get(a).tobytes() == get(b).tobytes()


OUTS, LSES = np.zeros((2, 3, 1, 4, 512), np.float32), np.zeros((2, 3, 4, 1), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "words"),
    [
        (OUTS[0], LSES, ShapeError, "outs: expected shape [n, batch, s_q, h_q, 512]"),
        (OUTS[:0], LSES[:0], ShapeError, "n at least 1"),
        ([], [], ShapeError, "at least one part"),
        (OUTS, LSES[0], ShapeError, "lses: expected shape (2, 3, 4, 1)"),
        (OUTS, LSES.swapaxes(2, 3), ShapeError, "(2, 3, 1, 4)"),
        (OUTS, LSES.astype(np.float64), DTypeError, "float64"),
        ([OUTS[0], OUTS[0, :2]], LSES, ShapeError, "parts of one shape"),
        (OUTS.astype(np.int32), LSES, DTypeError, "outs: expected one of bfloat16"),
        (OUTS.astype(bool), LSES, DTypeError, "got bool"),
        (OUTS.astype(np.complex64), LSES, DTypeError, "got complex64"),
        (OUTS.astype(object), LSES, DTypeError, "got object"),
        (OUTS[..., :511], LSES, ShapeError, "expected shape [n, batch, s_q, h_q, 512]"),
        (OUTS[..., :0], LSES, ShapeError, "(2, 3, 1, 4, 0)"),
        ([OUTS[0], OUTS[1].astype(np.float16)], LSES, DTypeError, "parts of one dtype"),
        (OUTS, "lse", ArgTypeError, "lses: expected a NumPy array"),
        (OUTS, [1.0], ArgTypeError, "float 1.0"),
        (np.ma.array(OUTS, mask=True), LSES, ArgTypeError, "outs: expected an array without"),
        (list(OUTS), list(np.ma.array(LSES)), ArgTypeError, "lses: expected an array without"),
    ],
)
def test_bad_parts(outs, lses, error, words):
    with pytest.raises(error) as caught:
        merge_partials(outs, lses)
    assert words in str(caught.value)
    assert str(caught.value).startswith("merge_partials(): ")


def test_parts_on_two_devices():
    torch = pytest.importorskip("torch")
    outs, lses = torch.from_numpy(OUTS), torch.from_numpy(LSES)
    with pytest.raises(DeviceMismatchError, match=r"outs: expected an array on cpu.*on meta"):
        merge_partials([outs[0], outs[1].to("meta")], lses)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("empty", [np.inf, -np.inf])
def test_an_empty_part_counts_for_nothing_whatever_its_out_holds(name, empty):
    """Other libraries say -inf, and may leave what was in memory."""
    pytest.importorskip(name)
    rng = np.random.default_rng(7)
    outs = rng.standard_normal(OUTS.shape).astype(np.float32)
    lses = rng.standard_normal(LSES.shape).astype(np.float32)
    lses[1], outs[1] = empty, np.nan
    out, lse = map(get, merge_partials(put(name, outs, -1), put(name, lses, -1)))
    assert np.allclose(out, outs[0])
    assert np.allclose(lse, lses[0])
    lses[0], outs[0] = empty, np.inf
    out, lse = map(get, merge_partials(put(name, outs, -1), put(name, lses, -1)))
    assert (out == 0).all()
    assert (lse == np.inf).all()


def test_nothing_is_said_of_the_callers_floating_point():
    outs = np.full(OUTS.shape, 60000, np.float16)
    lses = np.stack([LSES[0], LSES[0] - 1000])
    with np.errstate(all="raise"):
        out, _ = merge_partials(outs, lses)
    assert (out == outs[0]).all()


def test_parts_of_two_frameworks():
    torch = pytest.importorskip("torch")
    with pytest.raises(FrameworkMismatchError, match="a numpy array, as outs is, got a torch"):
        merge_partials(OUTS, torch.from_numpy(LSES))
    assert importlib.import_module("flashmla_cupy.partials").merge_partials is merge_partials
