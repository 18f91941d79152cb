"""quantize_kv and dequantize_kv: a cache of any format from the values of its tokens, and back.

For a group of neighbouring latent columns x, and top = max |x| over the finite ones:

    scale   2^ceil(log2(max(top / 448, 2^-13)))     power of two, as FlashMLA's tests/quant.py
            max(top / 448, 2^-60)                   raw, as vLLM's cache writer
    code    e4m3(x / scale)

Rotary columns are rounded to bfloat16 in v32 and v4. In e4m3 every column is e4m3(x / descale_k).
The value that is read back is that of the code times the scale.

All of it in float32. A division is a multiplication by the reciprocal, rounded to float32, since
compilers make it one where they like: so all frameworks give the same bytes, traced or not. With
powers of two both are exact; a raw scale may differ from a writer's that divides in its last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DTypeError
from .arguments import VALUES, cache_format, descale, dtype_name, known_format, option, pow2, values
from .cache_format import CacheFormat, Columns
from .codes import E4M3_MAX, Codes
from .layout import new_cache, rows_and_tail
from .memory import whole_pages

POW2_FLOOR = 2.0**-13  # the power of two above FlashMLA's 1e-4
FLOAT32_MAX = float(np.finfo(np.float32).max)
RAW_FLOOR = 2.0**-60  # a group of zeros has a scale that one can divide by


def quantize_kv(
    kv: Any, format: CacheFormat | str, *, pow2_scales: bool = True, descale_k: Any = None
) -> Any:
    """A new cache with these values.

    kv           [num_pages, page_size, h_kv, d_qk] bfloat16, float16 or float32 (rotary columns
                 last); h_kv is 1 but in 16-bit formats
    format       a CacheFormat or its name: "v32", "e4m3", "v4", ...
    pow2_scales  v32: scales are powers of two, else top / 448 itself; v4 has no others
    descale_k    e4m3: what values are divided by, a number or a float32 array of one element; 1 by
                 default. Pass it to flash_mla_with_kvcache() too.

    Returns [num_pages, page_size, h_kv, width] of the format's first dtype, in memory of its own,
    in the framework and on the device of kv, computed by the framework's own operations: it can be
    traced, and all frameworks give the same bytes. A finite e4m3 column beyond its scale times 448
    becomes that; NaN and infinities become NaN. JAX takes subnormal float32 numbers for 0. Values
    that are rounded to a 16-bit format keep infinities, and of NaN, whatever its sign and payload,
    make 0x7fc0 in bfloat16 and 0x7e00 in float16; those of the format's own dtype keep their bits.
    Raises an ArgumentError.
    """
    function = "quantize_kv"
    format = known_format(format, function)
    codes = values("kv", kv, format, "[num_pages, page_size, h_kv, d_qk]", function)
    pow2(pow2_scales, format, function)
    divisor = descale(descale_k, format, codes, function)
    with codes.quiet():
        row, tail = encoded(codes, kv, format, pow2_scales, divisor)
    if row is kv:  # values of the format's own dtype; the cache is written to, and kv is not
        row = codes.copy(kv)
    return new_cache(codes, format, row, tail)


def dequantize_kv(
    k_cache: Any,
    format: CacheFormat | str | None = None,
    *,
    descale_k: Any = None,
    dtype: str = "float32",
) -> Any:
    """The values of a cache: [num_pages, page_size, h_kv, d_qk] of that dtype.

    k_cache      [num_pages, page_size, h_kv, width] of a format (see CacheFormat); pages of v4
                 whole, since their scales lie behind all of their tokens
    format       None: the one that its width and dtype say
    descale_k    e4m3: as in quantize_kv()
    dtype        "float32", "bfloat16", "float16"; for NumPy arrays also "float64", which is exact

    In the framework and on the device of k_cache, by the framework's own operations. JAX and GPUs
    may flush float32's subnormal numbers to 0. Raises an ArgumentError.
    """
    function = "dequantize_kv"
    codes, format = cache_format(k_cache, format, function)
    factor = descale(descale_k, format, codes, function)
    known = (*VALUES, "float64") if codes.name == "numpy" else VALUES
    if not isinstance(dtype, str) or dtype not in known:
        remedy = "Pass one of these names."
        raise DTypeError("dtype", ", ".join(VALUES), option(dtype), remedy, function)
    whole_pages(codes, k_cache, format, function)
    row, tail = rows_and_tail(codes, k_cache, format)
    with codes.quiet():
        return decoded(codes, row, tail, format, factor, dtype)


def encoded(
    codes: Codes, kv: Any, format: CacheFormat, pow2_scales: bool, descale_k: Any
) -> tuple[Any, Any]:
    """kv [..., d_qk] as (bytes of its rows [..., row_bytes], of their scales behind the page
    [..., tail_bytes] or None); in 16-bit formats (values [..., d_qk] of the dtype, None)."""
    x = codes.widen(kv)
    if not format.is_fp8:
        same = dtype_name(kv) == format.dtypes[0]
        return (kv if same else codes.narrow(x, format.dtypes[0])), None
    if format.scales is None:
        return codes.e4m3(x if descale_k is None else _divided(codes, x, descale_k), x), None
    nope, scales = format.nope, format.scales
    groups = x[..., : nope.count].reshape(*x.shape[:-1], scales.count, scales.group)
    scale = codes.at_least(RAW_FLOOR, codes.largest(groups) * np.float32(1 / E4M3_MAX))
    if pow2_scales:
        scale = codes.at_least(POW2_FLOOR, codes.power_of_two_above(scale))
    latent = codes.e4m3(groups * (1 / scale)[..., None]).reshape(*x.shape[:-1], nope.count)
    kept = dtype_name(kv) == "bfloat16"  # then its bits are, those of NaN too
    rotary = kv[..., nope.count :]
    rotary = codes.to_bytes(rotary) if kept else codes.bfloat16(codes.widen(rotary))
    if scales.offset is not None:
        return codes.concatenate([latent, codes.to_bytes(scale), rotary]), None
    padding = codes.zeros((*x.shape[:-1], scales.nbytes - scales.count), kv)
    tail = codes.concatenate([codes.e8m0(scale), padding])
    return codes.concatenate([latent, rotary]), tail


def _divided(codes: Codes, x: Any, descale_k: Any) -> Any:
    """x / descale_k, for any positive finite float32, with infinities for what is too large.

    The reciprocal of a tiny number is infinite, and that of a huge one subnormal, of which some
    frameworks make 0. So both are first multiplied by a power of two, which changes no bit of the
    quotient. The limit keeps compilers from making one factor of the two."""
    if isinstance(descale_k, float):
        shift: Any = 2.0**64 if descale_k < 1 else 2.0**-64
    else:
        shift = codes.narrow(descale_k < 1, "float32") * 2.0**64 + 2.0**-64  # rounds to one of them
    return codes.xp.clip(x * shift, -FLOAT32_MAX, FLOAT32_MAX) * (1 / (descale_k * shift))


def decoded(
    codes: Codes, row: Any, tail: Any, format: CacheFormat, descale_k: Any, dtype: str
) -> Any:
    """The values [..., d_qk] of what `encoded` returns."""
    if not format.is_fp8:
        return codes.narrow(codes.widen(row), dtype)
    nope, rope, scales = format.nope, format.rope, format.scales
    wide = "float64" if dtype == "float64" else "float32"
    latent = codes.narrow(codes.from_e4m3(row[..., : nope.count]), wide)
    rotary = codes.narrow(_rotary(codes, row, rope), wide)
    if scales is None:
        values = codes.concatenate([latent, rotary])
        return codes.narrow(values if descale_k is None else values * descale_k, dtype)
    if scales.offset is None:
        scale = codes.from_e8m0(tail[..., : scales.count])
    else:
        scale = codes.from_float32(row[..., scales.offset : scales.offset + scales.nbytes])
    scale = codes.narrow(scale, wide)[..., None]
    groups = latent.reshape(*latent.shape[:-1], scales.count, scales.group) * scale
    return codes.narrow(codes.concatenate([groups.reshape(latent.shape), rotary]), dtype)


def _rotary(codes: Codes, row: Any, rope: Columns) -> Any:
    part = row[..., rope.offset : rope.offset + rope.nbytes]
    return codes.from_bfloat16(part) if rope.dtype == "bfloat16" else codes.from_e4m3(part)
