"""The definition of append_mla_kv(), in NumPy; append.cu gives the same bits.

Token i of the new rows goes to slot_mapping[i] = page * page_size + slot of k_cache; a negative one
is skipped, and one beyond the pool too. With tables of cosines and sines the 64 columns behind the
latent ones are rotated on their way, in float32, each product and each sum rounded, then to the
dtype of the row; NaN becomes 0x7fff:

    (a, b) -> (a cos - b sin, a sin + b cos)

A pair is columns (2j, 2j + 1), the order of DeepSeek's checkpoints, or (j, j + 32) if it is not
`interleaved`; cos and sin are column j of row positions[i]. A position outside of the tables gives
NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .sizes import HEAD_DIM_V

Array = npt.NDArray[Any]

_NAN_BITS = 0x7FFF  # what the kernel writes


def append(
    k_cache: Array,
    rows: Array,
    slot_mapping: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    positions: Array | None = None,
    interleaved: bool = True,
) -> None:
    """Writes rows [n, h_kv, 576] into k_cache [num_pages, page_size, h_kv, 576] by slot_mapping
    [n]. cos and sin float32 [num_positions, 32] with positions [n]. The arguments are taken to fit
    together."""
    num_pages, page_size = k_cache.shape[:2]
    kept = (slot_mapping >= 0) & (slot_mapping < num_pages * page_size)
    slots = slot_mapping[kept]
    new = np.ascontiguousarray(rows[kept])
    if cos is not None and sin is not None and positions is not None:
        new = rotated(new, cos, sin, positions[kept], interleaved)
    to, page, slot = k_cache, slots // page_size, slots % page_size
    if new.dtype.itemsize == 2:  # as bits, so that NaN stays what it is
        to, new = k_cache.view(np.uint16), new.view(np.uint16)
    to[page, slot] = new


def rotated(rows: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> Array:
    """rows [n, h_kv, 576] with the rotary columns turned."""
    known = (positions >= 0) & (positions < len(cos))
    at = np.where(known, positions, 0)
    c, s = (cos[at][:, None], sin[at][:, None]) if len(cos) else (np.float32(0), np.float32(0))
    x = rows[..., HEAD_DIM_V:].astype(np.float32)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    with np.errstate(all="ignore"):  # NaN and Inf are the caller's, and travel
        first, second = a * c - b * s, a * s + b * c
        turned = np.empty_like(x)
        if interleaved:
            turned[..., 0::2], turned[..., 1::2] = first, second
        else:
            turned[..., :half], turned[..., half:] = first, second
        new = rows.copy()
        new[..., HEAD_DIM_V:] = turned.astype(rows.dtype)
    bits = new.view(np.uint16)[..., HEAD_DIM_V:]
    bits[np.isnan(turned)] = _NAN_BITS
    bits[~known] = _NAN_BITS
    return new
