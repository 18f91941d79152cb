"""Writers and readers of cache formats on a GPU: NumPy's bytes, in every framework."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.every_framework import first_difference, get, put

from flashmla_cupy import dequantize_kv, quantize_kv, write_kv
from flashmla_cupy.formats.cache_format import FORMATS

pytestmark = pytest.mark.gpu


def values(format: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((*shape, 1, FORMATS[format].d_qk))
    kv *= 10.0 ** rng.integers(-6, 3, (*shape, 1, 1))
    kv[0, ..., 5] = np.nan
    return kv.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def bits(x) -> np.ndarray:
    """Those of a 16-bit cache by its values, else the bytes."""
    if type(x).__module__ == "torch" and "float8" not in str(x.dtype):
        x = x.contiguous()
    x = np.ascontiguousarray(get(x))
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_numpys(framework, format, dtype):
    kv = values(format, (3, 16), dtype)
    options = [{}]
    if format == "v32":
        options.append({"pow2_scales": False})
    if FORMATS[format].has_descale:
        options.append({"descale_k": 0.37})
    for given in options:
        want = quantize_kv(kv, format, **given)
        got = quantize_kv(put(framework, kv), format, **given)
        assert not first_difference(bits(got), bits(want)), given
        given.pop("pow2_scales", None)
        read = get(dequantize_kv(got, **given)).astype(np.float32)
        exact = dequantize_kv(want, **given)
        normal = np.abs(exact) >= 2.0**-126
        assert np.array_equal(np.isnan(read), np.isnan(exact))
        assert np.array_equal(read[normal], exact[normal])


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_are_written_into_their_slots(framework, format):
    kv, new = values(format, (3, 16), "bfloat16"), values(format, (7,), "bfloat16")
    slots = np.array([4, -1, 47, 0, -1, 33, 16], np.int32)
    want = quantize_kv(kv, format)
    write_kv(want, new, slots)
    slots[1] = 48  # past the end: not looked at on a GPU, and not written
    cache = quantize_kv(put(framework, kv), format)
    got = write_kv(cache, put(framework, new), put(framework, slots))
    assert not first_difference(bits(got), bits(want))
    none = put(framework, np.full(7, -1, np.int32))
    again = write_kv(got, put(framework, new), none)
    assert not first_difference(bits(again), bits(want))
