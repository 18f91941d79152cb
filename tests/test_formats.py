"""Formats of a cache, byte by byte; writers and readers in every framework, to the bit."""

from __future__ import annotations

import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.every_framework import first_difference, put
from support.sparse_oracle import pool_values
from support.sparse_problems import token_bytes

from flashmla_cupy import errors
from flashmla_cupy.formats import arguments
from flashmla_cupy.formats.cache_format import FORMATS, V4, V32, CacheFormat, format_of
from flashmla_cupy.formats.codes import Codes, codes_of
from flashmla_cupy.formats.layout import as_cache
from flashmla_cupy.formats.quantize import dequantize_kv, quantize_kv
from flashmla_cupy.formats.write import write_kv

BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
FP8 = ("v32", "e4m3", "v4")
HERE = ("numpy", "torch", "jax")
NUMPY = codes_of("numpy")
CUPY = Codes("cupy", np)  # what CuPy's functions do, by those of the same names


def here(framework: str, x: np.ndarray):
    """x on the CPU, as an array of the framework."""
    return put(framework, x, -1)


def as_bytes(x) -> np.ndarray:
    """The bytes of an array of any framework, in their logical order."""
    if type(x).__module__ == "torch":
        import torch

        x = x.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def some_values(format: str, pages: int = 3, page_size: int = 5, seed: int = 0) -> np.ndarray:
    """Groups of all sizes, zeros, NaN and infinities: float32 [pages, page_size, 1, d_qk]."""
    rng = np.random.default_rng(seed)
    shape = (pages, page_size, 1, FORMATS[format].d_qk)
    kv = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 4, (*shape[:3], 1))
    kv[0, 0] = 0
    kv[0, 1, 0, :64] = 0
    kv[-1, 0, 0, [3, 300, 500]] = np.nan, np.inf, -np.inf
    kv[-1, 2, 0, 500] = -3e38
    return kv.astype(np.float32)


# --- the table ---------------------------------------------------------------------------------


def test_sizes_are_those_of_the_formats():
    sizes = {name: (f.width, f.token_bytes, f.d_qk, f.is_fp8) for name, f in FORMATS.items()}
    assert sizes == {
        "bfloat16": (576, 1152, 576, False),
        "float16": (576, 1152, 576, False),
        "bfloat16_512": (512, 1024, 512, False),
        "float16_512": (512, 1024, 512, False),
        "v32": (656, 656, 576, True),
        "e4m3": (576, 576, 576, True),
        "v4": (584, 584, 512, True),
    }
    assert [FORMATS[name].has_descale for name in FP8] == [False, True, False]


@pytest.mark.parametrize("page_size", [1, 2, 53, 64, 72, 256])
def test_new_pages_of_v4_are_padded(page_size):
    assert V4.page_bytes(page_size) % 576 == 0
    assert 0 <= V4.page_bytes(page_size) - 584 * page_size < 576
    assert V32.page_bytes(page_size) == 656 * page_size


def test_the_format_follows_from_width_and_dtype():
    assert format_of("uint8", 656) is V32
    assert format_of("float8_e4m3fn", 584) is V4
    assert format_of("bfloat16", 576) is FORMATS["bfloat16"]
    for dtype, width in (("bfloat16", 656), ("uint8", 512), ("float32", 576), ("uint8", 655)):
        assert format_of(dtype, width) is None


def test_a_format_shows_what_it_is():
    assert repr(V32) == "CacheFormat('v32', 656 bytes a token, d_qk 576)"


def test_formats_are_told_apart():
    assert isinstance(V32, CacheFormat)
    assert len({id(f) for f in FORMATS.values()}) == len(FORMATS)


# --- numbers and codes -------------------------------------------------------------------------


def e4m3_number(code: int) -> float:
    """By the definition of OCP 8-bit Floating Point."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


@pytest.mark.parametrize("framework", HERE)
def test_every_code_of_e4m3_is_its_number_and_comes_back(framework):
    pytest.importorskip(framework)
    lib, code = codes_of(framework), np.arange(256, dtype=np.uint8)
    got = np.asarray(lib.from_e4m3(here(framework, code)))
    want = np.array([e4m3_number(c) for c in range(256)], np.float32)
    assert got.dtype == np.float32
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got[[0, 0x80]]), [False, True])
    back = np.asarray(lib.e4m3(here(framework, got)))
    assert np.array_equal(back, np.where(code & 0x7F == 0x7F, 0x7F, code))


@pytest.mark.parametrize("framework", HERE)
def test_every_code_of_e8m0_is_its_number_and_comes_back(framework):
    pytest.importorskip(framework)
    lib, code = codes_of(framework), np.arange(256, dtype=np.uint8)
    got = np.asarray(lib.from_e8m0(here(framework, code)))
    want = np.array([2.0 ** (c - 127) for c in range(255)] + [np.nan])
    assert np.array_equal(got.astype(np.float64), want, equal_nan=True)
    back = np.asarray(lib.e8m0(here(framework, got[1:255])))
    assert np.array_equal(back, code[1:255])


def interesting_floats() -> np.ndarray:
    """All upper halves of a float32 with lower halves around ties, and random ones."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    ties = np.arange(0x3A000000, 0x44000000, 0x8000, dtype=np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint64).astype(np.uint32)
    every = [(upper[:, None] + lower).reshape(-1), ties - 1, ties, ties + 1, random]
    return np.concatenate(every).view(np.float32)


def test_rounding_to_e4m3_is_that_of_ml_dtypes_within_the_range():
    x = interesting_floats()
    with np.errstate(all="ignore"):
        want = np.clip(x, -448, 448).astype(E4M3).view(np.uint8)
    want = np.where(np.isfinite(x), want, 0x7F)
    assert np.array_equal(NUMPY.e4m3(x), want)


@pytest.mark.parametrize("framework", HERE[1:])
def test_frameworks_round_alike(framework):
    pytest.importorskip(framework)
    x, lib = interesting_floats(), codes_of(framework)
    with np.errstate(all="ignore"):
        for name in ("e4m3", "bfloat16", "float16"):
            got, want = (getattr(c, name)(y) for c, y in ((lib, here(framework, x)), (NUMPY, x)))
            assert not first_difference(np.asarray(got), want), name
        for dtype in ("bfloat16", "float16"):
            got, want = lib.narrow(here(framework, x), dtype), NUMPY.narrow(x, dtype)
            assert not first_difference(as_bytes(got), as_bytes(want)), dtype


@pytest.mark.parametrize(("dtype", "nan"), [(BFLOAT16, 0x7FC0), (np.dtype(np.float16), 0x7E00)])
def test_rounding_to_16_bits_is_that_of_ml_dtypes_and_numpy_with_one_nan(dtype, nan):
    x = interesting_floats()
    with np.errstate(all="ignore"):
        want = np.where(np.isnan(x), nan, x.astype(dtype).view(np.uint16)).astype(np.uint16)
        got = NUMPY.narrow(x, dtype.name)
    assert not first_difference(got.view(np.uint16), want)


@given(st.floats(2.0**-60, 2.0**120, width=32))
def test_the_power_of_two_above(x):
    got = float(NUMPY.power_of_two_above(np.array([x], np.float32))[0])
    assert got >= x > got / 2
    assert np.frexp(got)[0] == 0.5


# --- bytes -------------------------------------------------------------------------------------


def expected_v32(values: np.ndarray, is_pow2: bool) -> bytes:
    """One token of finite values that are large enough for no floor to matter."""
    codes, scales = b"", b""
    for group in values[:512].reshape(4, 128):
        scale = np.abs(group).max() * np.float32(1 / 448)
        if is_pow2:
            scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
        codes += np.clip(group * (1 / scale), -448, 448).astype(E4M3).tobytes()
        scales += struct.pack("<f", scale)
    return codes + scales + values[512:].astype(BFLOAT16).tobytes()


@pytest.mark.parametrize("is_pow2", [True, False])
def test_v32_byte_by_byte(is_pow2):
    kv = np.random.default_rng(1).standard_normal((2, 3, 1, 576)).astype(np.float32)
    cache = quantize_kv(kv, "v32", pow2_scales=is_pow2)
    assert cache.shape == (2, 3, 1, 656) and cache.dtype == np.uint8
    for page, offset in np.ndindex(2, 3):
        assert cache[page, offset, 0].tobytes() == expected_v32(kv[page, offset, 0], is_pow2)


def test_v4_byte_by_byte():
    kv = np.random.default_rng(1).standard_normal((2, 3, 1, 512)).astype(np.float32)
    cache = quantize_kv(kv, V4)
    assert cache.shape == (2, 3, 1, 584)
    assert cache.strides == (4 * 576, 584, 584, 1)  # 3 * 584 bytes, padded
    for page in range(2):
        whole = cache[page].tobytes()
        for t in range(3):
            token = kv[page, t, 0]
            row, tail = whole[576 * t : 576 * (t + 1)], whole[3 * 576 + 8 * t :][:8]
            for g in range(7):
                group = token[64 * g : 64 * (g + 1)]
                exponent = int(np.ceil(np.log2(np.abs(group).max() / 448)))
                assert tail[g] == exponent + 127
                codes = (group * 2.0**-exponent).astype(E4M3)
                assert row[64 * g : 64 * (g + 1)] == codes.tobytes()
            assert tail[7] == 0
            assert row[448:] == token[448:].astype(BFLOAT16).tobytes()


def test_e4m3_byte_by_byte():
    kv = np.random.default_rng(1).standard_normal((2, 3, 1, 576)).astype(np.float32)
    cache = quantize_kv(kv, "e4m3", descale_k=0.25)
    assert cache.tobytes() == (kv * 4).astype(E4M3).tobytes()
    assert quantize_kv(kv, "e4m3").tobytes() == kv.astype(E4M3).tobytes()


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["bfloat16", "float16", "float16_512"])
def test_values_of_16_bit_formats_are_of_their_dtype(framework, given, format):
    kv = np.random.default_rng(0).standard_normal((1, 2, 1, FORMATS[format].d_qk), np.float32)
    kv = kv.astype(BFLOAT16 if given == "bfloat16" else given)
    dtype = FORMATS[format].dtypes[0]
    cache = quantize_kv(here(framework, kv), format)
    assert str(cache.dtype).removeprefix("torch.") == dtype
    want = kv.astype(np.float32).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    assert np.array_equal(as_bytes(cache), as_bytes(want))


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("format", [name for name in FORMATS if name not in FP8])
def test_a_cache_of_the_dtype_of_its_values_has_memory_of_its_own(framework, format):
    pytest.importorskip(framework)
    columns = FORMATS[format].d_qk
    kv = np.ones((2, 3, 1, columns), BFLOAT16 if "bfloat" in format else np.float16)
    given = here(framework, kv)
    cache = quantize_kv(given, format)
    if framework == "jax":  # whose arrays may be donated
        assert cache.unsafe_buffer_pointer() != given.unsafe_buffer_pointer()
    new, slots = np.zeros((6, 1, columns), np.float32), np.arange(6)
    write_kv(cache, here(framework, new), here(framework, slots))
    assert np.array_equal(as_bytes(given), as_bytes(kv))


def test_what_is_large_saturates_and_what_is_not_finite_becomes_nan():
    kv = np.zeros((1, 1, 1, 576), np.float32)
    kv[..., :5] = 449, -1e30, np.inf, -np.inf, np.nan
    cache = quantize_kv(kv, "e4m3")
    assert cache[0, 0, 0, :5].tolist() == [0x7E, 0xFE, 0x7F, 0x7F, 0x7F]
    values = dequantize_kv(quantize_kv(kv, "v32"))  # the group's scale is that of finite ones
    assert np.isnan(values[0, 0, 0, 2:5]).all()
    assert values[0, 0, 0, 1] <= -0.9e30 and (values[0, 0, 0, 5:] == 0).all()


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize("scale", [1e-39, 1e-37, 0.37, 0.5, 1e30, 2.9e38])
def test_any_positive_descale_divides_and_what_is_too_large_is_limited(framework, is_array, scale):
    pytest.importorskip(framework)
    if framework == "jax" and is_array and scale < 2.0**-126:
        pytest.skip("a subnormal number, which XLA takes for 0")
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((1, 40, 1, 576)) * 10.0 ** rng.integers(-36, 38, (1, 40, 1, 1))
    kv[0, 0, 0, :8] = 3e38, -3e38, 500, -0.0, 464, np.inf, -np.inf, np.nan
    kv = np.where(np.abs(kv) < 2.0**-126, 0, kv).astype(np.float32)
    with np.errstate(all="ignore"):
        quotient = np.clip(kv.astype(np.float64) / np.float32(scale), -448, 448)
        want = np.where(np.isfinite(kv), quotient.astype(np.float32).astype(E4M3).view("u1"), 0x7F)
    descale = here(framework, np.array([scale], np.float32)) if is_array else scale
    given = here(framework, kv)
    assert np.array_equal(as_bytes(quantize_kv(given, "e4m3", descale_k=descale)), want)
    if framework == "jax":
        import jax

        traced = jax.jit(lambda x: quantize_kv(x, "e4m3", descale_k=descale))(given)
        assert np.array_equal(as_bytes(traced), want)
    cache = here(framework, np.zeros_like(want))
    slots = here(framework, np.arange(40))
    written = write_kv(cache, here(framework, kv[0]), slots, descale_k=descale)
    assert np.array_equal(as_bytes(written), want)


def test_bits_of_rotary_columns_are_kept():
    kv = np.zeros((1, 2, 1, 576), BFLOAT16)
    kv.view(np.uint16)[..., 512:] = np.arange(128).reshape(2, 1, 64) + 0x7F80  # Inf and NaN
    cache = quantize_kv(kv, "v32")
    assert cache[0, :, 0, 528:].tobytes() == kv[..., 512:].tobytes()


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_what_an_independent_reader_reads(format):
    kv = some_values(format)
    scale = 0.5 if format == "e4m3" else None
    cache = quantize_kv(kv, format, descale_k=scale)
    got = dequantize_kv(cache, descale_k=scale, dtype="float64")
    want = pool_values(cache, format, 1.0 if scale is None else scale)
    assert got.dtype == np.float64
    assert np.array_equal(got.reshape(want.shape), want, equal_nan=True)
    with np.errstate(over="ignore"):
        narrow = want.astype(np.float32)
    read = dequantize_kv(cache, descale_k=scale)
    assert np.array_equal(read.reshape(want.shape), narrow, equal_nan=True)


@pytest.mark.parametrize("format", FP8)
def test_any_bytes_read_the_same_in_all_frameworks(format):
    rng = np.random.default_rng(3)
    cache = rng.integers(0, 256, (4, 6, 1, FORMATS[format].width), np.uint8)
    if format == "v4":  # but for scales so small that float32 has subnormal values
        for tail in token_bytes(cache, format, np.arange(24))[1::2]:
            tail[:7] = rng.integers(12, 256, 7)
    if format == "v32":
        cache[..., 512:528] = rng.standard_normal((4, 6, 1, 4)).astype("<f4").view(np.uint8)
    want = dequantize_kv(cache)
    for framework in HERE[1:]:
        got = np.asarray(dequantize_kv(here(framework, cache)))
        finite = np.abs(want) >= 2.0**-126  # bfloat16 has subnormal numbers, too
        assert np.array_equal(np.isnan(got), np.isnan(want))
        assert np.array_equal(got[finite], want[finite])


@pytest.mark.parametrize("framework", HERE[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", FORMATS)
def test_frameworks_write_the_same_bytes(framework, dtype, format):
    with np.errstate(over="ignore"):
        kv = some_values(format).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    for options in ({}, {"pow2_scales": False}, {"descale_k": 0.37}):
        if "pow2_scales" in options and format != "v32":
            continue
        if "descale_k" in options and format != "e4m3":
            continue
        want = as_bytes(quantize_kv(kv, format, **options))
        got = quantize_kv(here(framework, kv), format, **options)
        assert np.array_equal(as_bytes(got), want)
        if framework == "jax":
            import jax

            traced = jax.jit(lambda x, o=options: quantize_kv(x, format, **o))(here("jax", kv))
            assert np.array_equal(as_bytes(traced), want)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(-9, 3),
    st.integers(0, 2**32 - 1),
)
def test_round_trips_lose_what_rounding_loses(format, pages, page_size, magnitude, seed):
    rng = np.random.default_rng(seed)
    shape = (pages, page_size, 1, FORMATS[format].d_qk)
    kv = (rng.standard_normal(shape) * 10.0**magnitude).astype(np.float32)
    descale = None
    if format == "e4m3":
        descale = float(np.abs(kv).max() / 448)
    cache = quantize_kv(kv, format, descale_k=descale)
    read = dequantize_kv(cache, descale_k=descale)
    # Half a step: 2^-4 of e4m3, 2^-8 and 2^-11 else; below the normal numbers half the least one.
    latent = FORMATS[format].nope.count
    if FORMATS[format].is_fp8:
        floor = 2.0**-10 * (descale or max(2.0**-13, 2 * np.abs(kv).max() / 448))
        bound = np.abs(kv) * 2.0**-4 * (1 + 1e-6) + floor
    else:
        step, floor = (2.0**-11, 2.0**-25) if format.startswith("float16") else (2.0**-8, 0)
        bound = np.abs(kv) * step + floor
    assert (np.abs(read - kv) <= bound)[..., :latent].all()
    again = quantize_kv(read, format, descale_k=descale)
    if format not in ("v32", "v4"):
        assert np.array_equal(as_bytes(again), as_bytes(cache))
    # The largest of a group may round up to another power of two's share: the values stay.
    assert np.array_equal(dequantize_kv(again, descale_k=descale), read)


# --- writing tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_tokens_are_written_into_their_slots_and_nowhere_else(framework, format):
    kv, new = some_values(format, 3, 6), some_values(format, 1, 7, seed=1)[0]
    before = quantize_kv(kv, format)
    whole = quantize_kv(new[None], format)  # one page of the new tokens
    slots = np.array([4, -1, 17, 0, -1, 9, 6], np.int32)
    if framework == "torch":
        import torch

        pages = torch.full((3, V4.page_bytes(6)), 0xAB, dtype=torch.uint8)
        cache = here("torch", before)
        if format == "v4":
            cache = as_cache(pages, V4, 6)
            cache.copy_(here("torch", before))
    else:
        cache = here(framework, before.copy() if format != "v4" else _padded_copy(before))
    got = write_kv(cache, here(framework, new), here(framework, slots))
    assert (got is cache) == (framework != "jax")
    want = _padded_copy(before)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for to, part in zip(
                token_bytes(want, format, [slot]), token_bytes(whole, format, [i]), strict=True
            ):
                to[:] = part
    assert np.array_equal(as_bytes(got), as_bytes(want))
    if framework == "torch" and format == "v4":
        assert (pages[:, 6 * 584 :] == 0xAB).all()


def _padded_copy(cache: np.ndarray) -> np.ndarray:
    """A copy with the strides of the original."""
    if cache.strides[0] == cache[0].size * cache.itemsize:
        return cache.copy()
    pages = np.zeros((len(cache), V4.page_bytes(cache.shape[1])), np.uint8)
    copy = as_cache(pages, V4, cache.shape[1])
    copy[...] = cache
    return copy


@pytest.mark.parametrize("format", FORMATS)
def test_writing_without_a_look_at_the_slots_is_the_same(format, monkeypatch):
    """What CuPy's arrays go through, with NumPy's functions: no length depends on a value."""
    rng = np.random.default_rng(2)
    kv, new = some_values(format, 3, 6), some_values(format, 1, 7, seed=1)[0]
    for share in (0.0, 0.5, 1.0):
        slots = np.where(rng.random(7) < share, rng.permutation(18)[:7], -1).astype(np.int32)
        want, got = _padded_copy(quantize_kv(kv, format)), _padded_copy(quantize_kv(kv, format))
        write_kv(want, new, slots)
        slots[slots < 0] = rng.choice([-1, -7, 18, 2**31 - 1])
        with monkeypatch.context() as patch:
            patch.setattr(arguments, "codes_of", lambda name: CUPY)
            write_kv(got, new, slots)
        assert np.array_equal(as_bytes(got), as_bytes(want))


@pytest.mark.parametrize("framework", HERE)
def test_no_slot_at_all_writes_nothing(framework):
    before = quantize_kv(some_values("v32"), "v32")
    cache = here(framework, before.copy())
    new = here(framework, np.ones((3, 1, 576), np.float32))
    got = write_kv(cache, new, here(framework, np.full(3, -1, np.int64)))
    assert np.array_equal(as_bytes(got), before)


@pytest.mark.parametrize("framework", HERE)
@pytest.mark.parametrize("format", FORMATS)
def test_caches_without_pages_or_slots(framework, format):
    for pages, page_size in (0, 5), (3, 0), (0, 0):
        cache = quantize_kv(here(framework, some_values(format)[:pages, :page_size]), format)
        assert cache.shape == (pages, page_size, 1, FORMATS[format].width)
        assert dequantize_kv(cache).shape == (pages, page_size, 1, FORMATS[format].d_qk)


def test_torch_vmap_writes_a_cache_a_time():
    torch = pytest.importorskip("torch")
    caches = here("torch", np.stack([quantize_kv(some_values("v32"), "v32")] * 2))
    new, slots = torch.randn(2, 3, 1, 576), torch.tensor([[3, -1, 7], [0, 1, -1]])
    want = torch.stack([write_kv(caches[i].clone(), new[i], slots[i]) for i in range(2)])
    assert torch.equal(torch.vmap(write_kv)(caches, new, slots), want)


def test_a_slot_outside_the_cache_is_named_and_nothing_is_written():
    cache = quantize_kv(some_values("v32"), "v32")
    before = cache.copy()
    new = np.ones((2, 1, 576), np.float32)
    for slot in (15, -2, 2**31 - 1):
        with pytest.raises(errors.ScalarError, match=f"from 0 to 14, or -1, got {slot}"):
            write_kv(cache, new, np.array([1, slot]))
    assert np.array_equal(cache, before)


def test_traced_code_does_not_write_outside_the_cache():
    import jax

    cache = quantize_kv(some_values("v4"), "v4")
    new = np.ones((3, 1, 512), np.float32)
    slots = np.array([15, 2**31 - 1, -2])
    got = jax.jit(write_kv)(here("jax", cache), here("jax", new), here("jax", slots))
    assert np.array_equal(as_bytes(got), as_bytes(cache))


COMPILED = """
import torch
from flashmla_cupy import dequantize_kv, quantize_kv, write_kv

kv, new = torch.randn(3, 5, 1, 576), torch.ones(2, 1, 576)
slots = torch.tensor([3, -1])

def step(kv, new, slots):
    return dequantize_kv(write_kv(quantize_kv(kv, "v32"), new, slots))

want = step(kv, new, slots)
got = torch.compile(step, fullgraph=True, backend="aot_eager")(kv, new, slots)
assert torch.equal(got, want)
for is_dynamic in (False, True):
    compiled = torch.compile(write_kv, fullgraph=True, backend="aot_eager", dynamic=is_dynamic)
    want = write_kv(quantize_kv(kv, "v32"), new, slots)
    assert torch.equal(compiled(quantize_kv(kv, "v32"), new, slots), want)

values = kv.half()
made = torch.compile(lambda x: quantize_kv(x, "float16"), fullgraph=True, backend="aot_eager")
assert made(values).data_ptr() != values.data_ptr()

def scaled(kv, scale):
    return quantize_kv(kv, "e4m3", descale_k=scale)

from torch.fx.experimental.proxy_tensor import make_fx

where = torch.tensor([0.37]), torch.tensor([0.9])
assert torch.equal(make_fx(scaled)(kv, where[0])(kv, where[1]), scaled(kv, where[1]))
cache = torch.zeros(3, 5, 1, 656, dtype=torch.uint8)
traced = make_fx(lambda *given: write_kv(*given))(cache.clone(), new, slots)
assert torch.equal(traced(cache.clone(), new, slots), write_kv(cache, new, slots))

for scale in (0.37, 1e-39, torch.tensor([0.37])):
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(kv, scale), scaled(kv, scale))
"""


def test_torch_compiles_the_writers():
    """In a process of its own: tracing has a memory."""
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
