"""Scheduling metadata: FlashMLA's lazy object, and whether metadata fits a batch (on the host).

The records themselves are made by `split.plan` on the host and by the schedule kernel on the
device; `split` documents their eight columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import StaleMetadataError
from ..locks import Lock
from ..sizes import TOKENS_PER_TILE

bind_lock = Lock()  # whoever makes the metadata of a SchedMeta has it, of whatever kind of call


class Configuration(NamedTuple):
    """What metadata made by the no-argument get_mla_metadata() is bound to."""

    framework: str
    device: int
    batch: int
    s_q: int
    h_q: int
    h_kv: int
    page_size: int
    causal: bool
    format: str = ""  # of an FP8 cache, or of one that lists of tokens look into
    topk: int = 0  # of the lists
    extra_page_size: int = 0
    extra_topk: int = 0


class SchedMeta:
    """Metadata that is made at the first flash_mla_with_kvcache() call that uses it.

    From then on it serves calls of the same configuration with the same cache_seqlens, such as
    the layers of one decoding step. Make a new one, with get_mla_metadata(), for the next step.

    A copy, in this process or pickled to another one, is not bound: its first call makes metadata
    of its own, where and for which lengths that call is.
    """

    __slots__ = ("bound", "num_splits", "of_trace", "tile_scheduler_metadata")

    def __init__(self) -> None:
        self.bound: Configuration | None = None
        self.tile_scheduler_metadata: Any = None  # int32 [num_sm_parts, 8]
        self.num_splits: Any = None  # int32 [batch + 1]
        # Of the last trace with fake tensors: its mode, and both in it.
        self.of_trace: tuple[Any, Any, Any] = None, None, None

    @property
    def have_initialized(self) -> bool:
        """Whether a call has made the metadata."""
        return self.bound is not None

    def __reduce__(self) -> tuple[type[SchedMeta], tuple[()]]:
        return SchedMeta, ()

    def __repr__(self) -> str:
        return f"SchedMeta({self.bound or 'made at the first call'})"

    def bind(
        self, configuration: Configuration, tile_scheduler_metadata: Any, num_splits: Any
    ) -> None:
        """Takes the metadata that was just made for this configuration."""
        self.tile_scheduler_metadata, self.num_splits = tile_scheduler_metadata, num_splits
        self.bound = configuration  # last: another thread may be looking

    def require(self, configuration: Configuration) -> None:
        """Raises StaleMetadataError, naming what changed, unless bound to this configuration."""
        if self.bound == configuration or self.bound is None:
            return
        changed = [
            f"{name} {ours!r} -> {theirs!r}"
            for name, ours, theirs in zip(
                Configuration._fields, self.bound, configuration, strict=True
            )
            if ours != theirs
        ]
        raise StaleMetadataError(
            "tile_scheduler_metadata",
            "metadata of this configuration",
            f"metadata bound by an earlier call with another one ({', '.join(changed)})",
            "Call get_mla_metadata() again for each configuration.",
        )


def stale_requests(
    tile_scheduler_metadata: npt.NDArray[np.int32], cache_seqlens: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Which requests the metadata does not fit: [batch] bool.

    A request fits when parts cover its tiles 0, 1, ... without a gap, and every part that begins
    or ends in it has recorded the number of tiles it has now. A request after all that the metadata
    has fits if it has no tokens: metadata may be of the first requests of a batch alone, as when a
    serving engine fills up the batch of a captured graph. Lengths are clamped at 0.
    """
    batch = len(cache_seqlens)
    tiles = -(-np.maximum(cache_seqlens.astype(np.int64), 0) // TOKENS_PER_TILE)
    covered = np.zeros(batch, np.int64)
    seen = np.zeros(batch, bool)
    stale = np.zeros(batch, bool)
    for first, begin, last, end, _, first_tiles, last_tiles, _ in tile_scheduler_metadata.tolist():
        if not 0 <= first <= last < batch:
            continue
        stale[first] |= first_tiles != tiles[first]
        stale[last] |= last_tiles != tiles[last]
        for request in range(first, last + 1):
            start = begin if request == first else 0
            stop = end if request == last else tiles[request]
            stale[request] |= start != covered[request]
            covered[request] = stop
            seen[request] = True
    padding = np.arange(batch) > np.flatnonzero(seen).max(initial=-1)
    stale |= (~seen & ~padding) | (covered != tiles)
    return stale
