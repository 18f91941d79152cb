"""Where the bytes of a cache lie: what a format can be read from, and what can be written.

In v4 a page is one unit: its scales lie behind all of its rows, so its bytes have to lie in one
piece, whatever pages lie apart. A cache that is written has a place of its own for each element.
JAX's arrays have no strides to look at.
"""

from __future__ import annotations

from typing import Any

from ..errors import ReadOnlyError, StrideError
from .cache_format import CacheFormat
from .codes import Codes

_NAME = "k_cache"


def whole_pages(codes: Codes, k_cache: Any, format: CacheFormat, function: str) -> None:
    """Pages whose scales lie behind the rows are read and written through another view of them."""
    if not format.tail_bytes or codes.name == "jax" or 0 in k_cache.shape:
        return
    strides = _strides(codes, k_cache)
    _, page_size, _, width = k_cache.shape
    if strides[3] != 1 or (page_size > 1 and strides[1] != width):
        expected = f"tokens of {width} bytes behind one another: strides (any, {width}, any, 1)"
        remedy = "Pass pages that are contiguous, as quantize_kv() makes them."
        raise StrideError(_NAME, expected, f"{strides}", remedy, function)


def writable(codes: Codes, k_cache: Any, function: str) -> None:
    """Memory that may be written, each element its own."""
    if codes.name == "jax" or 0 in k_cache.shape:
        return
    copy = f"Pass a contiguous copy of {_NAME}."
    if codes.name == "numpy" and not k_cache.flags.writeable:
        remedy = f"Pass a copy of {_NAME}."
        raise ReadOnlyError(_NAME, "a writable array", "a read-only one", remedy, function)
    strides = _strides(codes, k_cache)
    outer = [(abs(s), n) for s, n in zip(strides, k_cache.shape, strict=True) if n > 1]
    if any(stride == 0 for stride, _ in outer):
        expected = "no broadcast axis (stride 0)"
        raise StrideError(_NAME, expected, f"{strides}", copy, function)
    unit = 1 if codes.name == "torch" else k_cache.dtype.itemsize  # tensors count elements
    for axis, (stride, _) in enumerate(outer):  # unsorted: torch.compile sorts no symbols
        others = outer[:axis] + outer[axis + 1 :]
        if stride < unit + sum([(n - 1) * s for s, n in others if s <= stride]):
            expected = "slots that do not overlap"
            got = f"strides {strides} for shape {tuple(k_cache.shape)}"
            raise StrideError(_NAME, expected, got, copy, function)


def _strides(codes: Codes, x: Any) -> tuple[int, ...]:
    return tuple(x.stride() if codes.name == "torch" else x.strides)
