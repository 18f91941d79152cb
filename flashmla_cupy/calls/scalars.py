"""Checks of the arguments that are no arrays: numbers, flags and FlashMLA's other options."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ArgTypeError, OptionError, ScalarError, ShapeError
from ..formats.arguments import no_scale
from ..sizes import HEAD_DIM, HEAD_DIM_V
from .arguments import DECODE
from .wording import digits, kind

INT_LIMIT = 2**31 - 1
_FLOAT32 = np.finfo(np.float32)
_OF_V = "V is the first 512 columns; pass 512."
_REMEDIES = {  # for integers out of their range
    "accepted": "A count of tokens is not negative.",
    "counts": "A count of tokens is not negative.",
    "d_v": _OF_V,
    "device": "Pass 0 for the first GPU.",
    "extra_topk": "Pass the width of extra_indices_in_kvcache.",
    "head_dim_v": _OF_V,
    "layer": "The first layer is 0.",
    "length": "See seqlen().",
    "num_heads_k": "Pass the kv heads of the model.",
    "num_heads_kv": "Pass the kv heads of the model.",
    "num_heads_q": "Pass the query heads of the model.",
    "num_layers": "Pass the layers of the model.",
    "num_q_tokens_per_head_k": "Pass s_q * h_q // h_kv.",
    "page_size": "FlashMLA's own page size is 64.",
    "topk": "Pass the width of indices.",
}


def head_dim_v(value: Any) -> None:
    """512, the width of V."""
    if integer("head_dim_v", value, DECODE.function) != HEAD_DIM_V:
        raise ShapeError(
            "head_dim_v",
            f"{HEAD_DIM_V}",
            f"{value}",
            f"V is the first {HEAD_DIM_V} columns of k_cache; pass {HEAD_DIM_V}.",
        )


def softmax_scale(value: Any, head_dim: int = HEAD_DIM, name: str = "softmax_scale") -> float:
    """A positive number that float32 holds as a normal number; None stands for head_dim ** -0.5,
    but not for the argument called sm_scale."""
    expected, remedy = "a real number", "Pass a Python float, such as q.shape[-1] ** -0.5."
    if name == "softmax_scale":  # which has a default, and a flag behind it
        if value is None:
            return float(head_dim**-0.5)
        expected, remedy = (
            "a real number or None",
            f"Pass a Python float, or None for {head_dim} ** -0.5.",
        )
        if isinstance(value, bool):
            remedy = "It comes before causal; pass causal by keyword: causal=True."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgTypeError(name, expected, kind(value), remedy)
    try:
        scale = float(value)
    except OverflowError:
        scale = math.inf
    if not -math.inf < scale < math.inf:  # which a compiler can trace, unlike math.isfinite
        raise ScalarError(name, "a finite number", f"{scale}", remedy)
    if scale <= 0:
        raise ScalarError(name, "a positive number", f"{scale}", remedy)
    if not float(_FLOAT32.tiny) <= scale <= float(_FLOAT32.max):
        raise ScalarError(
            name,
            f"a number from {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g}, what float32 holds",
            f"{scale}",
            remedy,
        )
    return scale


def descales(views: Mapping[str, Any], function: str) -> None:
    """descale_q and descale_k in host memory, float32 [1], are positive and finite."""
    for name in ("descale_q", "descale_k"):
        view = views.get(name)
        if view is not None and not 0 < view[0] < math.inf:
            raise no_scale(name, f"{view[0]}", function)


def causal(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ArgTypeError("causal", "True or False", kind(value), "Pass bool(causal).")
    return value


def is_fp8_kvcache(value: Any, function: str = DECODE.function) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        remedy = "Pass True for an FP8 cache, which holds bytes."
        raise OptionError("is_fp8_kvcache", "True or False", kind(value), remedy, function)
    return value


def wide_fp8(value: Any, function: str = DECODE.function) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        remedy = "Pass True for products in bfloat16."
        raise OptionError("wide_fp8", "True or False", kind(value), remedy, function)
    return value


def says_fp8(value: Any, is_fp8: bool, got: str) -> None:
    """is_fp8_kvcache says whether the cache is one; got: what k_cache is."""
    if is_fp8_kvcache(value) is not is_fp8:
        remedy = f"Pass is_fp8_kvcache={is_fp8}, or a k_cache of the other kind."
        expected = f"{is_fp8}, as k_cache is {got}"
        raise OptionError("is_fp8_kvcache", expected, f"{value}", remedy)


def without(what: str, function: str, **given: Any) -> None:
    """Arguments that have no meaning where the argument `what` is not given."""
    for name, value in given.items():
        if value is not None:
            remedy = f"Leave {name} out, or pass {what} too."
            raise OptionError(name, f"None without {what}", kind(value), remedy, function)


def integer(name: str, value: Any, function: str, least: int = 0) -> int:
    """A Python or NumPy integer from `least` to 2**31 - 1; no bool, no array."""
    try:
        if type(value) is not int and (  # which a compiler can trace, unlike np.isscalar
            isinstance(value, bool)
            or (hasattr(value, "shape") and not isinstance(value, np.generic))
        ):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        remedy = f"Pass a Python int as {name}."
        raise ArgTypeError(name, "an integer", kind(value), remedy, function) from None
    if not least <= number <= INT_LIMIT:
        expected = f"an integer from {least} to {INT_LIMIT}"
        remedy = _REMEDIES.get(name, "Pass an integer in this range.")
        raise ScalarError(name, expected, digits(number), remedy, function)
    return number
