"""merge_partials: results over parts of a sequence, merged into the result over all of it.

With out_i, lse_i the results over disjoint sets of keys, i = 0 .. n - 1:

    lse = log sum_i exp(lse_i)          out = sum_i exp(lse_i - lse) * out_i

A part in which a query sees no key (lse_i = +inf, or -inf as other libraries say it) counts for
nothing, whatever its out_i holds; where all parts are such, out = 0 and lse = +inf. A part that is
NaN, a refused request, makes the result NaN. This is
how a cache that is split over devices (context parallelism) gives the result of the whole: each
device decodes its own pages, all gather out and lse, each merges.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .errors import (
    ArgTypeError,
    DeviceMismatchError,
    DTypeError,
    FrameworkMismatchError,
    ShapeError,
)
from .frameworks import framework_of, name_of
from .sizes import HEAD_DIM_V

_FUNCTION = "merge_partials"
_MODULES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy"}
_FLOATS = ("bfloat16", "float16", "float32", "float64")


def merge_partials(outs: Any, lses: Any) -> tuple[Any, Any]:
    """(out, lse) over all keys, from n results of flash_mla_with_kvcache() over parts of them.

    outs    [n, batch, s_q, h_q, 512] of a float dtype, or a list of n arrays
    lses    [n, batch, h_q, s_q] float32, or a list of n arrays

    Returns out [batch, s_q, h_q, 512] in the dtype of outs and lse [batch, h_q, s_q] float32, in
    the framework and on the device of outs, computed in float32 (in NumPy in float64) by the
    framework's own operations, so that JAX and torch can trace and differentiate them. No key may
    be in two parts, and causal counts from the end of each part: split a sequence by tokens with
    s_q = 1, or decode all parts but the last without causal. Raises an ArgumentError.
    """
    xp = _namespace(outs, lses)
    outs, lses = _stacked(xp, "outs", outs), _stacked(xp, "lses", lses)
    _check(outs, lses)
    if xp is not np:
        return _merge(xp, outs, lses)
    with np.errstate(all="ignore"):  # NaN travels, and shares may underflow
        return _merge(xp, outs, lses)


def _merge(xp: Any, outs: Any, lses: Any) -> tuple[Any, Any]:
    wide = xp.float64 if xp.__name__ == "numpy" else xp.float32
    lse = _cast(lses, wide)
    has_no_key = xp.abs(lse) == float("inf")  # [n, batch, h_q, s_q]
    lse = xp.where(has_no_key, -float("inf"), lse)  # a weight of 0
    top = xp.amax(lse, 0)
    is_empty = top == -float("inf")
    weight = xp.exp(lse - xp.where(is_empty, 0.0, top))
    total = xp.where(is_empty, 1.0, xp.sum(weight, 0))
    share = xp.swapaxes(weight / total, 2, 3)[..., None]  # [n, batch, s_q, h_q, 1]
    counts = xp.swapaxes(~has_no_key, 2, 3)[..., None]
    out = xp.sum(xp.where(counts, share * _cast(outs, wide), 0.0), 0)
    lse = xp.where(is_empty, float("inf"), top + xp.log(total))
    return _cast(out, outs.dtype), _cast(lse, xp.float32)


def _namespace(outs: Any, lses: Any) -> Any:
    """The module whose functions take these arrays: numpy, cupy, torch or jax.numpy."""
    first: tuple[str, str, str] | None = None
    for name, value in (("outs", outs), ("lses", lses)):
        for array in value if isinstance(value, (list, tuple)) else [value]:
            found = name_of(array)
            if not found or (found == "numpy" and hasattr(array, "mask")):
                _refuse(name, array)
            device = _device(array)
            if first is None:
                first = name, found, device
            elif found != first[1]:
                raise FrameworkMismatchError(
                    name,
                    f"a {first[1]} array, as {first[0]} is",
                    f"a {found} array",
                    f"Convert it to {first[1]}; a call takes arrays of one framework.",
                    _FUNCTION,
                )
            elif device != first[2]:
                raise DeviceMismatchError(
                    name,
                    f"an array on {first[2]}, where {first[0]} is",
                    f"one on {device}",
                    f"Move it to {first[2]}; a call takes arrays of one device.",
                    _FUNCTION,
                )
    if first is None:
        remedy = "Pass the results over each part."
        raise ShapeError("outs", "at least one part", "an empty list", remedy, _FUNCTION)
    return sys.modules[_MODULES[first[1]]]  # imported: there are arrays of it


def _refuse(name: str, value: Any) -> None:
    """Raises what is wrong with something that is no array of a known framework, or has a mask."""
    try:
        framework_of(value, name)
    except (ArgTypeError, FrameworkMismatchError) as error:
        raise error.of(_FUNCTION) from None


def _device(array: Any) -> str:
    """Where an array is, for people; "" for one whose place is not known yet."""
    if isinstance(array, np.ndarray):
        return "the CPU"
    device = getattr(array, "device", "")
    return "" if callable(device) else str(device)


def _stacked(xp: Any, name: str, value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    shapes = {tuple(array.shape) for array in value}
    if len(shapes) != 1:
        got = ", ".join(map(str, sorted(shapes))) or "an empty list"
        remedy = "Decode every part with the same q."
        raise ShapeError(name, "parts of one shape", got, remedy, _FUNCTION)
    dtypes = {_dtype(array) for array in value}
    if len(dtypes) != 1:
        remedy = "Decode every part with a cache of the same dtype."
        got = ", ".join(sorted(dtypes))
        raise DTypeError(name, "parts of one dtype", got, remedy, _FUNCTION)
    return xp.stack(list(value))


def _check(outs: Any, lses: Any) -> None:
    shape = tuple(outs.shape)
    if len(shape) != 5 or shape[0] == 0 or shape[4] != HEAD_DIM_V:
        remedy = "Stack the out of each part, or pass a list of them."
        expected = f"shape [n, batch, s_q, h_q, {HEAD_DIM_V}], n at least 1"
        raise ShapeError("outs", expected, f"{shape}", remedy, _FUNCTION)
    if _dtype(outs) not in _FLOATS:
        remedy = "Pass the out as flash_mla_with_kvcache() returned it."
        raise DTypeError("outs", f"one of {', '.join(_FLOATS)}", _dtype(outs), remedy, _FUNCTION)
    n, batch, s_q, h_q, _ = shape
    if tuple(lses.shape) != (n, batch, h_q, s_q):
        remedy = "Stack the lse of each part, or pass a list of them."
        expected = f"shape {(n, batch, h_q, s_q)}, as outs has {shape}"
        raise ShapeError("lses", expected, f"{tuple(lses.shape)}", remedy, _FUNCTION)
    if _dtype(lses) != "float32":
        remedy = "Pass the lse as flash_mla_with_kvcache() returned it."
        raise DTypeError("lses", "float32", _dtype(lses), remedy, _FUNCTION)


def _dtype(x: Any) -> str:
    """ "float32", of any framework."""
    return str(x.dtype).removeprefix("torch.")


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "to") and not hasattr(x, "astype") else x.astype(dtype)
