"""Sparse attention for the split: each query token is a request of its own.

A query token's work is the tokens of its lists, so it stands in `split.plan` as a request of that
length with h_q rows and one kv head: request b * s_q + i is query token i of request b of the call.
Parts, pieces, pairs and the merge know nothing of it. The tokens of one request of the call may
thus be split differently, which FlashMLA's scheduler, with one split for all s_q, cannot.

The second list, if there is one, begins with a new tile: no tile has rows of two pools.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..sizes import TOKENS_PER_TILE, ceil_div

Lengths = npt.NDArray[np.int32]


def list_lengths(
    batch: int,
    s_q: int,
    topk: int,
    topk_length: npt.NDArray[Any] | None = None,
    extra_topk: int = 0,
    extra_topk_length: npt.NDArray[Any] | None = None,
) -> Lengths:
    """The lengths of the split's requests: int32 [batch * s_q].

    topk and extra_topk are the widths of the lists; topk_length and extra_topk_length, [batch] or
    [batch, s_q], say how much of them counts. A length outside its list, with which a query token
    is refused, counts as 0.
    """
    main = _counted(batch, s_q, topk, topk_length)
    if extra_topk:
        main = -(-main // TOKENS_PER_TILE) * TOKENS_PER_TILE
        main = main + _counted(batch, s_q, extra_topk, extra_topk_length)
    return main.reshape(batch * s_q).astype(np.int32)


def longest(topk: int, extra_topk: int = 0) -> int:
    """The largest length that lists of these widths make; the calls refuse it where int32 does not
    hold it."""
    return ceil_div(topk, TOKENS_PER_TILE) * TOKENS_PER_TILE + extra_topk if extra_topk else topk


def _counted(
    batch: int, s_q: int, topk: int, length: npt.NDArray[Any] | None
) -> npt.NDArray[np.int64]:
    """[batch, s_q]"""
    if length is None:
        return np.full((batch, s_q), topk, np.int64)
    wide = length.astype(np.int64)
    wide = wide[:, None] if wide.ndim == 1 else wide
    return np.broadcast_to(np.where((wide < 0) | (wide > topk), 0, wide), (batch, s_q))
