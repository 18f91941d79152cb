"""A schedule to look at: its pieces, its balance and a chart, for notebooks and tests.

`flashmla_cupy.Schedule` wraps the two arrays that `schedule` documents; loads are in tiles of 64
tokens. `gantt` draws it. No call of the kernels comes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..sizes import NUM_SMS_CPU, TOKENS_PER_TILE, num_sm_parts
from .split import plan


class Piece(NamedTuple):
    """Tiles [begin, end) of a request, computed by one part."""

    part: int
    request: int
    begin: int
    end: int
    split: bool


@dataclass(frozen=True, eq=False)
class Schedule:
    """Who computes what: a schedule to look at. Notebooks draw it, a row a part.

    `tile_scheduler_metadata` and `num_splits` are NumPy arrays; `rows` is 0 where it is not known.
    """

    tile_scheduler_metadata: npt.NDArray[np.int32]
    num_splits: npt.NDArray[np.int32]
    cache_seqlens: npt.NDArray[np.int32]
    rows: int = 0

    @classmethod
    def of(
        cls,
        cache_seqlens: Any,
        num_q_tokens_per_head_k: int,
        num_heads_k: int = 1,
        num_sms: int = NUM_SMS_CPU,
    ) -> Schedule:
        """The schedule that get_mla_metadata() makes for these lengths on a GPU of `num_sms`."""
        lengths, rows = _on_host(cache_seqlens), max(1, num_q_tokens_per_head_k)
        parts = num_sm_parts(num_sms, rows, num_heads_k)
        return cls(*plan(lengths, parts, rows, num_heads_k), lengths, rows)

    @classmethod
    def from_metadata(cls, metadata: Any, num_splits: Any, cache_seqlens: Any) -> Schedule:
        """The schedule in the results of get_mla_metadata(); waits for arrays on a GPU."""
        return cls(_on_host(metadata), _on_host(num_splits), _on_host(cache_seqlens))

    @property
    def parts(self) -> int:
        return len(self.tile_scheduler_metadata)

    @property
    def pieces(self) -> list[Piece]:
        """All pieces that hold a tile, by part and request."""
        tiles = -(-np.maximum(self.cache_seqlens.astype(np.int64), 0) // TOKENS_PER_TILE)
        found = []
        for part, row in enumerate(self.tile_scheduler_metadata.tolist()):
            first, begin, last, end = row[:4]
            for request in range(max(first, 0), min(last + 1, len(tiles))):
                count = int(tiles[request])
                start = begin if request == first else 0
                stop = end if request == last else count
                if start < stop:
                    piece = Piece(part, request, start, stop, stop - start < count)
                    found.append(piece)
        return found

    @property
    def loads(self) -> list[int]:
        """Tiles of each part."""
        loads = [0] * self.parts
        for piece in self.pieces:
            loads[piece.part] += piece.end - piece.begin
        return loads

    @property
    def makespan(self) -> int:
        """Tiles of the part that has most."""
        return max(self.loads, default=0)

    @property
    def balance(self) -> float:
        """Mean load of the parts over the largest: 1 is perfect."""
        return sum(self.loads) / (self.parts * self.makespan) if self.makespan else 1.0

    def __repr__(self) -> str:
        rows = f"rows={self.rows}, " if self.rows else ""
        return (
            f"Schedule(batch={len(self.cache_seqlens)}, {rows}{self.parts} parts, "
            f"{len(self.pieces)} pieces, makespan {self.makespan} tiles, "
            f"balance {self.balance:.0%})"
        )

    def _repr_svg_(self) -> str:
        from .gantt import svg

        return svg(self)


def _on_host(x: Any) -> npt.NDArray[np.int32]:
    """An int32 copy in host memory of anything with .get() or .cpu(), or that NumPy reads."""
    for method in ("cpu", "get"):
        if not isinstance(x, np.ndarray) and hasattr(x, method):
            x = getattr(x, method)()
            break
    return np.array(x, np.int32)
