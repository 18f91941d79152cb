"""The checks of quantize_kv, dequantize_kv and write_kv: one named error for each mistake."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from ..errors import ArgTypeError, ArgumentError, DTypeError, OptionError, ScalarError, ShapeError
from ..frameworks import framework_of, name_of
from ..values import kind
from .cache_format import FORMATS, CacheFormat, format_of
from .codes import Codes, codes_of

_LEAST, _MOST = 2.0**-149, float(np.finfo(np.float32).max)  # of the positive float32 numbers
VALUES = ("bfloat16", "float16", "float32")  # dtypes of values; NumPy reads to float64 as well


def known_format(format: Any, function: str) -> CacheFormat:
    """The CacheFormat, or the one of that name."""
    if isinstance(format, CacheFormat):
        return format
    found = FORMATS.get(format) if isinstance(format, str) else None
    if found is None:
        remedy = "Pass one of these names, or a CacheFormat; vLLM's fp8_ds_mla is v32."
        raise OptionError("format", ", ".join(FORMATS), option(format), remedy, function)
    return found


def library(name: str, x: Any, function: str) -> Codes:
    """The arithmetic of the framework of x."""
    try:
        return codes_of(framework_of(x, name).name)
    except ArgumentError as error:
        raise error.of(function) from None


def dtype_name(x: Any) -> str:
    """ "uint8", "bfloat16", ... of an array of any framework."""
    return str(x.dtype).removeprefix("torch.")


def show(x: Any) -> str:
    """ "uint8 (8, 64, 1, 656)" """
    return f"{dtype_name(x)} {tuple(x.shape)}"


def option(value: Any) -> str:
    """What came for an option; arrays by dtype and shape."""
    return f"an array, {show(value)}" if name_of(value) else kind(value)


def values(name: str, x: Any, format: CacheFormat, axes: str, function: str) -> Codes:
    """Values of tokens, in these axes, the last two of them h_kv and d_qk; their arithmetic."""
    codes = library(name, x, function)
    if dtype_name(x) not in VALUES:
        remedy = f"Convert {name} to one of the three."
        raise DTypeError(name, ", ".join(VALUES), show(x), remedy, function)
    if len(x.shape) != axes.count(",") + 1:
        raise ShapeError(name, axes, show(x), "Give it these axes.", function)
    if x.shape[-1] != format.d_qk:
        expected = f"{axes} with d_qk = {format.d_qk}, the columns of {format.name}"
        remedy = "Concatenate the latent part and the rotary part of a token."
        raise ShapeError(name, expected, show(x), remedy, function)
    if format.is_fp8 and x.shape[-2] != 1:
        expected = f"an h_kv of 1, since {format.name} has one kv head"
        raise ShapeError(name, expected, show(x), "Make a cache for each kv head.", function)
    return codes


def cache_format(k_cache: Any, format: Any, function: str) -> tuple[Codes, CacheFormat]:
    """The arithmetic and the format of k_cache [num_pages, page_size, h_kv, width]."""
    name = "k_cache"
    codes = library(name, k_cache, function)
    if len(k_cache.shape) != 4:
        expected = "four axes, [num_pages, page_size, h_kv, width]"
        raise ShapeError(name, expected, show(k_cache), "Give it these axes.", function)
    found = format_of(dtype_name(k_cache), k_cache.shape[3])
    if found is None:
        known = "; ".join(f"{f.name}: {f.dtypes[0]}, {f.width}" for f in FORMATS.values())
        expected = f"a dtype and a last axis of a format ({known})"
        remedy = "quantize_kv() makes such a cache."
        raise ShapeError(name, expected, show(k_cache), remedy, function)
    if format is not None and known_format(format, function) != found:
        remedy = "Leave format out, or pass a cache of that format."
        expected = f"a cache of the format {known_format(format, function).name}"
        raise OptionError(name, expected, f"{show(k_cache)}, {found.name}", remedy, function)
    if found.is_fp8 and k_cache.shape[2] != 1:
        expected = f"an h_kv of 1, since {found.name} has one kv head"
        raise ShapeError(name, expected, show(k_cache), "Make a cache for each kv head.", function)
    return codes, found


def pow2(value: Any, format: CacheFormat, function: str) -> None:
    """pow2_scales: True, or False where scales are float32."""
    name = "pow2_scales"
    if not isinstance(value, bool):
        raise ArgTypeError(name, "True or False", option(value), "Pass a bool.", function)
    has_raw = format.scales is not None and format.scales.dtype == "float32"
    if not value and not has_raw:
        remedy = "Leave it out; v32 has scales of either kind."
        raise OptionError(name, f"True for {format.name}", "False", remedy, function)


def descale(value: Any, format: CacheFormat, codes: Codes, function: str) -> Any:
    """descale_k, a float that float32 holds, or float32 of no axis; None: 1."""
    name = "descale_k"
    if value is None:
        return None
    if not format.has_descale:
        expected = f"None, since {format.name} has its scales in the cache"
        if not format.is_fp8:
            expected = f"None, since {format.name} has no scales"
        raise OptionError(name, expected, option(value), "Leave it out.", function)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not _LEAST <= number <= _MOST:
            raise no_scale(name, f"{number}", function)
        return float(np.float32(number))
    if library(name, value, function) is not codes:
        remedy = "Pass a Python float."
        expected = "a number, or an array of the framework of the others"
        raise ArgTypeError(name, expected, type(value).__name__, remedy, function)
    if dtype_name(value) != "float32" or math.prod(value.shape) != 1:
        remedy = "Pass one float32 for the whole cache."
        raise ShapeError(name, "float32, one element", show(value), remedy, function)
    if codes.can_look_at(value) and not 0 < value.item() < math.inf:
        raise no_scale(name, f"{value.item()}", function)
    return value.reshape(())


def no_scale(name: str, got: str, function: str) -> ScalarError:
    """For descale_q or descale_k with a value that no scale has."""
    of = "q" if name == "descale_q" else "the keys"
    remedy = f"Pass the largest absolute value of {of} divided by 448."
    return ScalarError(name, "a positive finite float32", got, remedy, function)
