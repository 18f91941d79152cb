"""A schedule to look at: its pieces, its balance and a drawing, for notebooks and tests.

`flashmla_cupy.Schedule` wraps the two arrays that `split` documents. Loads are in tiles of 64
tokens. No call of the kernels comes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..calls.scalars import INT_LIMIT, integer
from ..errors import ArgTypeError, DTypeError, ScalarError, ShapeError
from ..frameworks.numpy_arrays import masked
from ..sizes import METADATA_COLUMNS, NUM_SMS_CPU, TOKENS_PER_TILE, num_sm_parts
from .split import plan

# The drawing, in pixels.
WIDTH, LEFT, TOP, BOTTOM = 760, 64, 22, 38  # of all; beside, above and below the bars
MOST_HEIGHT = 560  # of the bars: rows get thinner rather than the drawing taller
TICKS = 8  # at most
GREY = "#808080"  # of names and axes, on a light page or a dark one


class Piece(NamedTuple):
    """Tiles [begin, end) of a request, computed by one part."""

    part: int
    request: int
    begin: int
    end: int
    split: bool  # it is not all of its request


@dataclass(frozen=True, eq=False)
class Schedule:
    """Who computes what: a schedule to look at. Notebooks draw it, with a row for each part that
    has work and a bar for each piece.

    `tile_scheduler_metadata` and `num_splits` are NumPy arrays; `rows`, the query rows of a kv
    head, is 0 where it is not known.
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
        """The schedule that get_mla_metadata() makes for these lengths on a GPU of `num_sms`
        multiprocessors.

        cache_seqlens: tokens of each request, integers in a list or an array of any framework,
        which is waited for; num_q_tokens_per_head_k: s_q * h_q // h_kv, at least 1; num_heads_k:
        h_kv. Raises an ArgumentError.
        """
        function = "Schedule.of"
        lengths = _on_host("cache_seqlens", cache_seqlens, (None,), function)
        rows = integer("num_q_tokens_per_head_k", num_q_tokens_per_head_k, function, least=1)
        h_kv = integer("num_heads_k", num_heads_k, function, least=1)
        parts = num_sm_parts(integer("num_sms", num_sms, function, least=1), rows, h_kv)
        return cls(*plan(lengths, parts, rows, h_kv), lengths, rows)

    @classmethod
    def from_metadata(
        cls, tile_scheduler_metadata: Any, num_splits: Any, cache_seqlens: Any
    ) -> Schedule:
        """The schedule in the results of get_mla_metadata(), for the lengths that they were made
        for; waits for arrays on a GPU. Raises an ArgumentError."""
        function = "Schedule.from_metadata"
        lengths = _on_host("cache_seqlens", cache_seqlens, (None,), function)
        shape = (None, METADATA_COLUMNS)
        metadata = _on_host("tile_scheduler_metadata", tile_scheduler_metadata, shape, function)
        splits = _on_host("num_splits", num_splits, (len(lengths) + 1,), function)
        return cls(metadata, splits, lengths)

    @property
    def parts(self) -> int:
        """Rows of tile_scheduler_metadata."""
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
        return _svg(self)


def _on_host(
    argument: str, x: Any, shape: tuple[int | None, ...], function: str
) -> npt.NDArray[np.int32]:
    """An int32 copy in host memory of integers of that shape, in anything with .get() or .cpu(), or
    that NumPy reads. None in the shape is any length."""
    expected = f"integers of shape ({', '.join('n' if n is None else str(n) for n in shape)}"
    expected += ",)" if len(shape) == 1 else ")"
    remedy = f"Pass {argument} as a list or an array of integers."
    if isinstance(x, np.ndarray) and hasattr(x, "mask"):
        raise masked(x, argument).of(function)
    unread = ArgTypeError(argument, expected, f"{type(x).__name__}", remedy, function)
    if not isinstance(x, np.ndarray):
        try:
            for method in ("cpu", "get"):
                if hasattr(x, method):
                    x = getattr(x, method)()
                    break
        except (TypeError, ValueError, NotImplementedError):  # a dict; a tensor without values
            raise unread from None
    try:
        found = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):
        raise unread from None
    if found.size == 0 and found.ndim == len(shape):  # NumPy makes [] an array of floats
        found = found.astype(np.int32)
    got = f"{found.dtype} {found.shape}"
    if found.dtype.kind == "O":
        raise unread
    if found.dtype.kind not in "iu":
        raise DTypeError(argument, expected, got, remedy, function)
    if found.ndim != len(shape) or any(
        n not in (None, m) for n, m in zip(shape, found.shape, strict=True)
    ):
        raise ShapeError(argument, expected, got, remedy, function)
    low, high = (int(found.min()), int(found.max())) if found.size else (0, 0)
    if low < -INT_LIMIT - 1 or high > INT_LIMIT:
        wrong = high if high > INT_LIMIT else low
        raise ScalarError(argument, "what int32 holds", f"{wrong}", remedy, function)
    return found.astype(np.int32)


# ---- the drawing -----------------------------------------------------------------------------


def _svg(schedule: Schedule) -> str:
    """A chart of the parts that have work, from top to bottom. Tiles run to the right, as time does
    where the tensor cores set the pace; the tooltip of each bar says what it is."""
    pieces = schedule.pieces
    parts = sorted({piece.part for piece in pieces})
    row = max(3, min(16, MOST_HEIGHT // max(1, len(parts))))
    scale = (WIDTH - LEFT - 12) / max(1, schedule.makespan)
    below = TOP + row * len(parts)
    height = below + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" font-size="11">'
        f"<title>{schedule!r}</title>"
        f"{_text(LEFT, 14, _heading(schedule, len(parts)), 'start')}"
        f"{''.join(_axis(schedule.makespan, scale, below))}"
        f"{''.join(_names(parts, row))}"
        f"{''.join(_bars(pieces, parts, scale, row))}</svg>"
    )


def _heading(schedule: Schedule, busy: int) -> str:
    split = len({piece.request for piece in schedule.pieces if piece.split})
    return (
        f"{len(schedule.cache_seqlens)} requests over {busy} of {schedule.parts} parts. A colour is"
        f" a request, with its number where it fits; those that are split are pale ({split})."
    )


def _axis(makespan: int, scale: float, below: int) -> Iterator[str]:
    """The scale in tiles, below the bars, with lines through them."""
    step = next(
        digit * 10**power
        for power in range(10)
        for digit in (1, 2, 5)
        if makespan <= digit * 10**power * TICKS
    )
    for tile in range(0, makespan + 1, step):
        x = LEFT + tile * scale
        yield f'<path d="M{x:.1f} {TOP}V{below + 4}" stroke="{GREY}" stroke-opacity="0.4"/>'
        yield _text(x, below + 16, f"{tile}", "middle")
    yield _text(LEFT, below + 31, f"tiles of {TOKENS_PER_TILE} tokens", "start")


def _names(parts: list[int], row: int) -> Iterator[str]:
    """The numbers of the parts, as many as there is room for."""
    every = next(step for step in (1, 2, 5) if step * row >= 13)
    for place in range(0, len(parts), every):
        yield _text(LEFT - 6, TOP + (place + 0.5) * row + 4, f"part {parts[place]}", "end")


def _bars(pieces: list[Piece], parts: list[int], scale: float, row: int) -> Iterator[str]:
    """Neighbouring requests differ in hue by the golden angle; split ones are paler."""
    places = {part: place for place, part in enumerate(parts)}
    filled = dict.fromkeys(parts, 0)  # tiles of each part so far
    for piece in pieces:
        tiles, hue = piece.end - piece.begin, piece.request * 137 % 360
        x, width = LEFT + filled[piece.part] * scale, max(0.2, tiles * scale - 0.3)
        y = TOP + places[piece.part] * row
        filled[piece.part] += tiles
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{row - 1}" '
            f'fill="hsl({hue} 60% {78 if piece.split else 60}%)"><title>part {piece.part}: request '
            f"{piece.request}, tiles {piece.begin}:{piece.end} "
            f"({'split' if piece.split else 'whole'})</title></rect>"
        )
        name = f"{piece.request}"
        if row >= 12 and width >= 7 * len(name) + 4:
            yield _text(x + width / 2, y + row / 2 + 3.5, name, "middle", "#202020")


def _text(x: float, y: float, text: str, anchor: str, fill: str = GREY) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'pointer-events="none">{text}</text>'
    )
