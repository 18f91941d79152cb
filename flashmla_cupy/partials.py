"""merge_partials: results over parts of a sequence, merged into the result over all of it.

With out_i, lse_i the results over disjoint sets of keys, i = 0 .. n - 1:

    lse = log sum_i exp(lse_i)          out = sum_i exp(lse_i - lse) * out_i

A part in which a query sees no key (out_i = 0, lse_i = +inf) counts for nothing; where all parts
are such, the result is too. A part that is NaN, a refused request, makes the result NaN. This is
how a cache that is split over devices (context parallelism) gives the result of the whole: each
device decodes its own pages, all gather out and lse, each merges.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .errors import ArgTypeError, DTypeError, FrameworkMismatchError, ShapeError
from .frameworks import framework_of

_FUNCTION = "merge_partials"
_MODULES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy"}


def merge_partials(outs: Any, lses: Any) -> tuple[Any, Any]:
    """(out, lse) over all keys, from n results of flash_mla_with_kvcache() over parts of them.

    outs    [n, batch, s_q, h_q, 512] of any float dtype, or a list of n arrays
    lses    [n, batch, h_q, s_q] float32, or a list of n arrays

    Returns out [batch, s_q, h_q, 512] in the dtype of outs and lse [batch, h_q, s_q] float32, in
    the framework and on the device of outs, computed in float32 (in NumPy in float64) by the
    framework's own operations, so that JAX and torch can trace and differentiate them. No key may
    be in two parts, and causal counts from the end of each part: split a sequence by tokens with
    s_q = 1, or decode all parts but the last without causal. Raises an ArgumentError.
    """
    xp = _namespace(outs, lses)
    outs, lses = _stacked(xp, "outs", outs), _stacked(xp, "lses", lses)
    _check(xp, outs, lses)
    wide = xp.float64 if xp.__name__ == "numpy" else xp.float32
    lse = _cast(lses, wide)
    lse = xp.where(lse == float("inf"), -float("inf"), lse)  # no key: a weight of 0
    top = xp.amax(lse, 0)
    is_empty = top == -float("inf")
    weight = xp.exp(lse - xp.where(is_empty, 0.0, top))  # [n, batch, h_q, s_q]
    total = xp.where(is_empty, 1.0, xp.sum(weight, 0))
    share = xp.swapaxes(weight / total, 2, 3)[..., None]  # [n, batch, s_q, h_q, 1]
    out = xp.sum(share * _cast(outs, wide), 0)
    lse = xp.where(is_empty, float("inf"), top + xp.log(total))
    return _cast(out, outs.dtype), _cast(lse, xp.float32)


def _namespace(outs: Any, lses: Any) -> Any:
    """The module whose functions take these arrays: numpy, cupy, torch or jax.numpy."""
    first: tuple[str, str] | None = None
    for name, value in (("outs", outs), ("lses", lses)):
        arrays = value if isinstance(value, Sequence) else [value]
        for array in arrays:
            try:
                found = framework_of(array, name).name
            except (ArgTypeError, FrameworkMismatchError) as error:
                raise error.of(_FUNCTION) from None
            if first is None:
                first = name, found
            elif found != first[1]:
                raise FrameworkMismatchError(
                    name,
                    f"a {first[1]} array, as {first[0]} is",
                    f"a {found} array",
                    f"Convert it to {first[1]}; a call takes arrays of one framework.",
                    _FUNCTION,
                )
    if first is None:
        remedy = "Pass the results over each part."
        raise ShapeError("outs", "at least one part", "an empty list", remedy, _FUNCTION)
    return sys.modules[_MODULES[first[1]]]  # imported: there are arrays of it


def _stacked(xp: Any, name: str, value: Any) -> Any:
    if not isinstance(value, Sequence):
        return value
    shapes = {tuple(array.shape) for array in value}
    if len(shapes) != 1:
        got = ", ".join(map(str, sorted(shapes))) or "an empty list"
        remedy = "Decode every part with the same q."
        raise ShapeError(name, "parts of one shape", got, remedy, _FUNCTION)
    return xp.stack(list(value))


def _check(xp: Any, outs: Any, lses: Any) -> None:
    if len(outs.shape) != 5 or outs.shape[0] == 0:
        remedy = "Stack the out of each part, or pass a list of them."
        expected = "shape [n, batch, s_q, h_q, 512], n at least 1"
        raise ShapeError("outs", expected, f"{tuple(outs.shape)}", remedy, _FUNCTION)
    n, batch, s_q, h_q, _ = outs.shape
    if tuple(lses.shape) != (n, batch, h_q, s_q):
        remedy = "Stack the lse of each part, or pass a list of them."
        expected = f"shape {(n, batch, h_q, s_q)}, as outs has {tuple(outs.shape)}"
        raise ShapeError("lses", expected, f"{tuple(lses.shape)}", remedy, _FUNCTION)
    if lses.dtype != xp.float32:
        remedy = "Pass the lse as flash_mla_with_kvcache() returned it."
        raise DTypeError("lses", "float32", f"{lses.dtype}", remedy, _FUNCTION)


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "to") and not hasattr(x, "astype") else x.astype(dtype)
