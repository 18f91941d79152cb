"""The same bits in all frameworks, without a copy.

    pytest -m gpu tests/gpu/interop            (-s prints the measured times)

What needs torch or JAX is skipped without them.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from support.every_framework import CASES, decode, get, put, same_bits
from support.gpu.sides import Foreign, arrays_of, cupy
from support.oracle import assert_within_bound, oracle
from support.problems import make_problem

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.errors import DeviceMismatchError
from flashmla_cupy.partials import merge_partials

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table(case):
    """NumPy within the bound; CuPy within it; torch and JAX, eager and jitted, equal to CuPy."""
    p = case.problem()
    results = {"cupy": decode(*arrays_of("cupy", p), **p.options())}
    expected = oracle(*p.arrays(), **p.options())
    assert_within_bound(*decode(*p.arrays(), **p.options()), expected, f"numpy {case}")
    assert_within_bound(*map(get, results["cupy"]), expected, f"cupy {case}")
    if find_spec("torch"):
        results["torch"] = decode(*arrays_of("torch", p), **p.options())
    if find_spec("jax"):
        import jax

        arrays = arrays_of("jax", p)
        results["jax"] = decode(*arrays, **p.options())
        results["jax.jit"] = jax.jit(lambda *a: decode(*a, **p.options()))(*arrays)
    for name, pair in results.items():
        for got, want in zip(pair, results["cupy"], strict=True):
            assert same_bits(got, want), f"{name} {case}"


def address(x) -> int:
    if hasattr(x, "data_ptr"):
        return x.data_ptr()
    return x.unsafe_buffer_pointer() if hasattr(x, "unsafe_buffer_pointer") else x.data.ptr


def test_nothing_is_copied(framework, launches):
    """The kernel gets the addresses of q and of the cache, and writes where the result lies."""
    q, k_cache, *rest = arrays_of(framework, make_problem([300, 70], s_q=2, h_q=16))
    out, _ = decode(q, k_cache, *rest)
    get(out)  # JAX launches when it likes
    assert launches[-1][1:] == (address(q), address(k_cache), address(out))


def test_foreign_arrays_are_not_copied_and_give_cupy_results(launches):
    p = make_problem([300, 70], s_q=2, h_q=16)
    owners = arrays_of("cupy", p)
    out, lse = decode(*map(Foreign, owners))
    assert isinstance(out, cupy.ndarray)
    assert launches[-1][1:3] == (owners[0].data.ptr, owners[1].data.ptr)
    for got, want in zip((out, lse), decode(*owners), strict=True):
        assert same_bits(got, want)


def test_merged_parts_agree_in_all_frameworks(framework):
    """The first pages of each request, then the others."""
    p = make_problem([300, 70], h_q=16)
    whole = decode(*p.arrays())
    q, k_cache, *_ = arrays_of(framework, p)
    rest = np.stack([np.roll(p.block_table[0], -2), np.roll(p.block_table[1], -1)])
    parts = (p.block_table, [128, 64]), (rest, [172, 6])
    outs, lses = zip(
        *(
            decode(q, k_cache, put(framework, table), put(framework, np.int32(lengths)))
            for table, lengths in parts
        ),
        strict=True,
    )
    out, lse = map(get, merge_partials(outs, lses))
    assert np.abs(out.astype(np.float32) - whole[0].astype(np.float32)).max() < 2e-2
    assert np.abs(lse - whole[1]).max() < 1e-4


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_another_device_than_the_current_one(name, launches):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    pytest.importorskip(name)
    p = make_problem([300, 70], h_q=16)
    out, _ = decode(*(put(name, x, 1) for x in p.arrays()))
    assert cupy.cuda.runtime.getDevice() == 0
    with cupy.cuda.Device(1):
        cupy.cuda.Device().synchronize()
    assert same_bits(out, decode(*arrays_of(name, p))[0])


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_host_and_gpu_arrays_do_not_mix(name):
    pytest.importorskip(name)
    q, *rest = make_problem([300, 70], h_q=16).arrays()
    rest = [put(name, x) for x in rest]
    metadata = get_mla_metadata(rest[2], 16, 1)
    with pytest.raises(DeviceMismatchError, match="k_cache"):
        flash_mla_with_kvcache(put(name, q, -1), *rest, 512, *metadata)
