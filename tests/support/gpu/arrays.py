"""Arrays for the GPU tests: made and compared on the GPU, with CuPy and NVRTC alone.

FLASHMLA_CUPY_TEST_XP=numpy runs the tests on NumPy instead, through the CPU backend and on small
sizes: a dry run of the tests' own logic, for machines without a GPU.

bfloat16 is converted by its bits, so nothing here rests on CuPy's support of that type. Random
numbers come from a hash of (seed, index): CuPy's own need cuRAND, which the extras do not install.
"""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

DRY = os.environ.get("FLASHMLA_CUPY_TEST_XP") == "numpy"
xp = np if DRY else pytest.importorskip("cupy")
mark = [] if DRY else pytest.mark.gpu  # the pytestmark of every test module here

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
_NAN_BITS = {2: 0x7FC1, 4: 0xFFFFFFFF}  # NaN as bfloat16, float16 and float32
# Quiet, negative and signalling NaN, and the two infinities.
_POISON = {
    "bfloat16": (0x7FC1, 0xFFFF, 0x7F81, 0x7F80, 0xFF80),
    "float16": (0x7E01, 0xFFFF, 0x7C01, 0x7C00, 0xFC00),
}
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_DEVICE = """
    __device__ unsigned long long mixed(unsigned long long z) {  // splitmix64
        z *= 0x9E3779B97F4A7C15ULL;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
        return z ^ (z >> 31);
    }
    __device__ unsigned short rounded(float x, int is_half) {
        unsigned short b;
        if (is_half) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(x)); return b; }
        unsigned u = __float_as_uint(x);
        if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 0x40;  // NaN stays NaN
        return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    }
    __device__ float widened(unsigned short b, int is_half) {
        float x;
        if (is_half) asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(b));
        else x = __uint_as_float((unsigned)b << 16);
        return x;
    }
    """
_kernels: dict = {}


def _kernel(name: str, inputs: str, output: str, body: str):
    """A CuPy ElementwiseKernel, made once; `i` is the index in C order whatever the strides."""
    if name not in _kernels:
        _kernels[name] = xp.ElementwiseKernel(inputs, output, body, name, preamble=_DEVICE)
    return _kernels[name]


# --- bits and conversions ----------------------------------------------------------------------


def is_half(x) -> bool:
    return x.dtype == np.float16


def bits(x):
    """The same memory as unsigned integers."""
    return x.view(f"uint{8 * x.dtype.itemsize}")


def same(a, b) -> bool:
    """Bit for bit."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return bool((bits(a) == bits(b)).all())


def differing(a, b):
    """How many elements differ in any bit: a 0-d array, without waiting for the device."""
    return (bits(a) != bits(b)).sum()


def all_nan(x) -> bool:
    return bool(xp.isnan(to_float(x)).all())


def to_float(x, real="float32"):
    """float32 or float64 of the same values, contiguous."""
    if DRY or x.dtype in (np.float32, np.float64):
        return xp.ascontiguousarray(x.astype(real))
    y = xp.empty(x.shape, real)
    body = "y = widened(b, half_);"
    return _kernel(f"widen_{real}", "uint16 b, int32 half_", f"{real} y", body)(
        bits(x), int(is_half(x)), y
    )


def from_float(x, dtype: str):
    """float32 or float64 rounded to `dtype`."""
    x = x.astype("float32")
    if DRY:
        return x.astype(DTYPES[dtype])
    b = xp.empty(x.shape, "uint16")
    body = "b = rounded(x, half_);"
    _kernel("narrow", "float32 x, int32 half_", "uint16 b", body)(x, int(dtype == "float16"), b)
    return b.view(DTYPES[dtype])


def host(x) -> np.ndarray:
    return np.asarray(x) if DRY else xp.asnumpy(x)


def synchronize() -> None:
    if not DRY:
        xp.cuda.Device().synchronize()


def release_memory() -> None:
    """Unused blocks of CuPy's pool go back to the device."""
    if not DRY:
        synchronize()
        xp.get_default_memory_pool().free_all_blocks()


# --- contents ----------------------------------------------------------------------------------


def _base(seed: int) -> int:
    return seed * 0xD1342543DE82EF95 % 2**64


def _hashes(seed: int, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(_base(seed))) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[0])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[1])
    return z ^ (z >> np.uint64(31))


def fill_nan(x) -> None:
    """A NaN that no kernel computes, so that an element which is not written shows."""
    bits(x)[...] = _NAN_BITS[x.dtype.itemsize]


def fill_poison(x) -> None:
    """NaN, +Inf and -Inf in turns, slot by slot of 576 elements."""
    b, patterns = bits(x), _POISON[x.dtype.name]
    if DRY:
        index = np.arange(b.size).reshape(b.shape) // 576 % len(patterns)
        b[...] = np.array(patterns, np.uint16)[index]
        return
    table = xp.asarray(np.array(patterns, np.uint16))
    _kernel("poison", "raw uint16 patterns", "uint16 b", "b = patterns[i / 576 % 5];")(table, b)


def fill_normal(x, seed: int, std: float = 1.0, limit: float = np.inf, live=None) -> None:
    """Normal numbers, clamped to +-limit, where live; nothing elsewhere.

    x [..., 576] of 16-bit floats, at any strides. `live` [x.shape[0]] int32 on the host: of each
    x[p], viewed as [slots, rest], the first live[p] slots are written; all if None.
    """
    b, half = bits(x), int(is_half(x))
    slots = x.shape[1]
    live = np.full(x.shape[0], slots, np.int32) if live is None else live.astype(np.int32)
    slot_size = int(np.prod(x.shape[2:]))
    if DRY:
        z = _hashes(seed, x.size)
        u = ((z >> np.uint64(40)) + np.uint64(1)).astype(np.float64) * 2.0**-24
        angle = (z & np.uint64(0xFFFFFF)).astype(np.float64) * (2.0**-24 * 2 * np.pi)
        value = np.clip(std * np.sqrt(-2 * np.log(u)) * np.cos(angle), -limit, limit)
        value = value.astype(np.float32).reshape(x.shape).astype(x.dtype)
        mask = np.arange(slots)[None, :] < live[:, None]
        x[mask] = value[mask]
        return
    body = """
        long long page = i / (slots * slot_size), slot = i / slot_size % slots;
        if (slot < live[page]) {
            unsigned long long z = mixed(seed + (unsigned long long)i);
            float u = (float)((z >> 40) + 1) * 5.9604645e-8f;
            float value = deviation * sqrtf(-2.0f * logf(u))
                * cospif((float)(z & 0xFFFFFF) * 1.1920929e-7f);
            b = rounded(fminf(fmaxf(value, -limit), limit), half_);
        }
    """
    inputs = (
        "raw int32 live, int64 slots, int64 slot_size, uint64 seed, float32 deviation, "
        "float32 limit, int32 half_"
    )
    _kernel("normal", inputs, "uint16 b", body)(
        xp.asarray(live), slots, slot_size, np.uint64(_base(seed)), np.float32(std),
        np.float32(min(limit, 3e38)), half, b,
    )  # fmt: skip


def gather(k_cache, table: np.ndarray, lengths: np.ndarray, n: int, real: str):
    """[requests, h_kv, n, 576] float32 or float64: the live tokens of each request, then zeros.

    `table` and `lengths` are on the host, one row a request. Nothing that is not live is read.
    """
    page_size, h_kv, columns = k_cache.shape[1:]
    count = len(lengths)
    if DRY:
        k = np.zeros((count, h_kv, n, columns), real)
        for r, length in enumerate(lengths.tolist()):
            token = np.arange(length)
            live = k_cache[table[r, token // page_size], token % page_size]
            k[r, :, :length] = live.astype(real).swapaxes(0, 1)
        return k
    k = xp.empty((count, h_kv, n, columns), real)
    width = max(1, -(-n // page_size))
    used = np.zeros((count, width), np.int32)
    used[:, : table.shape[1]] = table[:, :width]
    page_stride, slot_stride, head_stride, _ = (s // 2 for s in k_cache.strides)
    body = """
        long long column = i % columns, t = i / columns % tokens;
        long long g = i / (columns * tokens) % heads, r = i / (columns * tokens * heads);
        k = 0;
        if (t < lengths[r]) {
            long long page = table[r * width + t / page_size];
            const unsigned short* slot = (const unsigned short*)base + page * page_stride
                + t % page_size * slot_stride + g * head_stride;
            k = widened(slot[column], half_);
        }
    """
    inputs = (
        "raw int32 table, raw int32 lengths, uint64 base, int64 width, int64 tokens, int64 heads, "
        "int64 columns, int64 page_size, int64 page_stride, int64 slot_stride, "
        "int64 head_stride, int32 half_"
    )
    _kernel(f"gather_{real}", inputs, f"{real} k", body)(
        xp.asarray(used), xp.asarray(lengths.astype(np.int32)), np.uint64(k_cache.data.ptr), width,
        n, h_kv, columns, page_size, page_stride, slot_stride, head_stride,
        int(is_half(k_cache)), k,
    )  # fmt: skip
    return k


def put_tokens(k_cache, pages, slots, head: int, rows) -> None:
    """k_cache[pages[j], slots[j], head] = rows[j], of the same dtype, for host arrays of ints."""
    if DRY:
        k_cache[pages, slots, head] = rows
        return
    page_stride, slot_stride, head_stride, _ = (s // 2 for s in k_cache.strides)
    rows = xp.ascontiguousarray(bits(rows))
    body = """
        long long j = i / 576, column = i % 576;
        ((unsigned short*)base)[pages[j] * page_stride + slots[j] * slot_stride + head + column]
            = row;
        done = 1;
    """
    inputs = (
        "uint16 row, raw int64 pages, raw int64 slots, uint64 base, int64 page_stride, "
        "int64 slot_stride, int64 head"
    )
    _kernel("put_tokens", inputs, "uint8 done", body)(
        rows, xp.asarray(np.asarray(pages, np.int64)), xp.asarray(np.asarray(slots, np.int64)),
        np.uint64(k_cache.data.ptr), page_stride, slot_stride, head * head_stride,
        xp.empty(rows.shape, "uint8"),
    )  # fmt: skip
