"""The split of a ragged batch over parts of the GPU, on the host; the definition of the device's.

All tiles (64 tokens) of all requests lie on one line, request by request, each request with a
fixed cost in front. The line is cut into `parts` pieces of equal cost; a cut inside a request
splits it, and the partial results are merged afterwards. A cut that would leave a piece of fewer
than `least` tiles moves to the nearest boundary of the request; `least` is chosen by a small model
of the time that the launch will take. All arithmetic is in integers, so that host and device agree.

tile_scheduler_metadata int32 [parts, 8], a row a part; a part without work has last_request -1:

    0 first_request   1 begin_tile, in the first request
    2 last_request    3 end_tile, in the last request, exclusive
    4 slot            split pieces in all earlier parts: where partial results of this one begin
    5, 6              tiles of the first and of the last request, to detect stale metadata
    7                 0

num_splits int32 [batch + 1]: prefix sum of the pieces of each request.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .geometry import TOKENS_PER_TILE, num_sm_parts

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# Cost units on the line.
UNITS_PER_TILE = 8
UNITS_PER_REQUEST = 4
# The time model, in units of 0.1 ns, measured on an H200.
TILE = 14500  # one tile on one multiprocessor that waits for nothing
TILE_MEMORY = 178  # one tile's 72 KB at the bandwidth of the whole GPU
PARTIAL = 18000  # writing one partial result
COMBINE = 40000  # a combine kernel with work to do
GAIN = 1000  # a finer split must win so much
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)  # of the least piece, in tiles
PARTIALS_PER_TILE = 18  # 73728 bytes of a tile / 4096 to write and read one row of a partial


class _Cuts(NamedTuple):
    """Where each part begins, and where the last one ends: [parts + 1] each."""

    request: Int64
    tile: Int64


def plan(cache_seqlens: Int32, parts: int, rows: int, h_kv: int) -> tuple[Int32, Int32]:
    """(tile_scheduler_metadata, num_splits) for cache_seqlens [batch].

    `rows` is s_q * h_q // h_kv. Negative lengths count as 0; the decode refuses them itself."""
    metadata = np.zeros((parts, 8), np.int32)
    metadata[:, 2] = -1
    batch = len(cache_seqlens)
    if batch == 0:
        return metadata, np.zeros(1, np.int32)
    tiles = -(-np.maximum(cache_seqlens.astype(np.int64), 0) // TOKENS_PER_TILE)
    line = np.zeros(batch + 1, np.int64)
    np.cumsum(np.where(tiles > 0, tiles * UNITS_PER_TILE + UNITS_PER_REQUEST, 0), out=line[1:])
    cuts = _best_cuts(tiles, line, parts, rows, h_kv)

    first, begin = cuts.request[:-1], cuts.tile[:-1]
    last, end = cuts.request[1:].copy(), cuts.tile[1:].copy()
    whole = end == 0  # the part ends with a request
    last[whole] -= 1
    end[whole] = tiles[np.maximum(last[whole], 0)]
    works = (cuts.request[1:] > first) | (cuts.tile[1:] > begin)
    first, begin, last, end = (np.where(works, x, 0) for x in (first, begin, last, end))
    last_tiles = tiles[last]
    one = first == last
    first_split = works & ((begin > 0) | (one & (end < last_tiles)))
    last_split = works & ~one & (end < last_tiles)
    split_pieces = first_split.astype(np.int64) + last_split
    slot = np.cumsum(split_pieces) - split_pieces
    rows_of_metadata = (first, begin, last, end, slot, tiles[first], last_tiles)
    for column, values in enumerate(rows_of_metadata):
        metadata[works, column] = values[works]

    pieces = np.ones(batch, np.int64)
    np.add.at(pieces, first[works & (begin > 0)], 1)
    num_splits = np.zeros(batch + 1, np.int32)
    num_splits[1:] = np.cumsum(pieces)
    return metadata, num_splits


def _best_cuts(tiles: Int64, line: Int64, parts: int, rows: int, h_kv: int) -> _Cuts:
    """The cuts of the candidate for the least piece with the smallest modelled time."""
    total = int(tiles.sum())
    best: tuple[int, _Cuts] | None = None
    for least in CANDIDATES:
        cuts = _cut(tiles, line, total, parts, least)
        cost = _modelled_time(cuts, line, total, parts, rows, h_kv)
        if best is None or cost < best[0] - GAIN:
            best = cost, cuts
    assert best is not None
    return best[1]


def _cut(tiles: Int64, line: Int64, total: int, parts: int, least: int) -> _Cuts:
    used = min(max(total // least, 1), parts)
    batch = len(tiles)
    at = int(line[-1]) * np.arange(used, dtype=np.int64) // used
    request = np.minimum(np.searchsorted(line, at, side="right") - 1, batch - 1)
    request[0] = 0  # requests of no tiles in front belong to the first part
    units = at - line[request] + (UNITS_PER_TILE - UNITS_PER_REQUEST) // 2
    tile = units // UNITS_PER_TILE
    tile[tile < least] = 0
    skip = (tile > 0) & (tiles[request] - tile < least)
    request[skip] += 1
    tile[skip] = 0
    pad = parts + 1 - used
    return _Cuts(
        np.append(request, np.full(pad, batch)).astype(np.int64),
        np.append(tile, np.zeros(pad, np.int64)),
    )


def _modelled_time(cuts: _Cuts, line: Int64, total: int, parts: int, rows: int, h_kv: int) -> int:
    """Bound by memory until the average part ends, then by the longest part."""
    request, tile = cuts
    inside = tile > 0
    begin = line[request[:-1]] + tile[:-1] * UNITS_PER_TILE  # a piece pays its request's cost
    end = line[request[1:]] + np.where(inside[1:], tile[1:] * UNITS_PER_TILE + UNITS_PER_REQUEST, 0)
    one_piece = inside[:-1] & (request[:-1] == request[1:])
    pieces = inside[:-1].astype(np.int64) + (inside[1:] & ~one_piece)
    works = end > begin
    pieces = np.where(works, pieces, 0)
    time = np.where(works, (end - begin) * TILE // UNITS_PER_TILE + pieces * PARTIAL, 0)
    longest, splits = int(time.max()), int(pieces.sum())
    memory = (total + splits * rows // PARTIALS_PER_TILE) * h_kv * TILE_MEMORY
    tail = longest - total * TILE // parts
    return max(longest, memory + tail) + (COMBINE if splits else 0)


class Schedule:
    """A split to look at: one line as its repr, a Gantt chart in a notebook.

    `tile_scheduler_metadata` and `num_splits` are what plan() returns; `tiles` [batch]."""

    def __init__(self, tile_scheduler_metadata: Any, num_splits: Any, cache_seqlens: Any) -> None:
        self.tile_scheduler_metadata = _host(tile_scheduler_metadata)
        self.num_splits = _host(num_splits)
        lengths = _host(cache_seqlens).astype(np.int64)
        self.tiles: Int64 = -(-np.maximum(lengths, 0) // TOKENS_PER_TILE)

    @classmethod
    def of(
        cls,
        cache_seqlens: Any,
        num_q_tokens_per_head_k: int,
        num_heads_k: int = 1,
        num_sms: int = 132,
    ) -> Schedule:
        """The split of these lengths on a GPU of so many multiprocessors; the arguments are those
        of get_mla_metadata()."""
        lengths = np.ascontiguousarray(_host(cache_seqlens), np.int32)
        rows = max(1, num_q_tokens_per_head_k)
        parts = num_sm_parts(num_sms, rows, num_heads_k)
        return cls(*plan(lengths, parts, rows, num_heads_k), lengths)

    def pieces(self, part: int) -> list[tuple[int, int, int]]:
        """(request, begin_tile, end_tile) of each piece of a part, requests of no tiles left out."""
        first, begin, last, end = self.tile_scheduler_metadata[part, :4].tolist()
        found = []
        for request in range(first, last + 1):
            start = begin if request == first else 0
            stop = end if request == last else int(self.tiles[request])
            if stop > start:
                found.append((request, start, stop))
        return found

    def loads(self) -> list[int]:
        """Tiles of each part."""
        return [
            sum(stop - start for _, start, stop in self.pieces(part))
            for part in range(len(self.tile_scheduler_metadata))
        ]

    def __repr__(self) -> str:
        loads = self.loads()
        longest, pieces = max(loads), int(self.num_splits[-1])
        balance = sum(loads) / (len(loads) * longest) if longest else 1.0
        return (
            f"Schedule(batch={len(self.tiles)}, {len(loads)} parts, {pieces} pieces,"
            f" makespan {longest} tiles, balance {balance:.0%})"
        )

    def _repr_svg_(self) -> str:
        """One row a part, one colour a request, as inline SVG."""
        loads = self.loads()
        width, height = 800, 6
        scale = width / max(1, *loads)
        bars = []
        for part in range(len(loads)):
            x = 0.0
            for request, start, stop in self.pieces(part):
                size = (stop - start) * scale
                hue = request * 137 % 360  # the golden angle keeps neighbours apart
                bars.append(
                    f'<rect x="{x:.1f}" y="{part * height}" width="{size:.1f}" '
                    f'height="{height - 1}" fill="hsl({hue},60%,60%)"><title>part {part}: request '
                    f"{request}, tiles {start} to {stop - 1}</title></rect>"
                )
                x += size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height * len(loads)}">{"".join(bars)}</svg>'
        )


def _host(x: Any) -> npt.NDArray[Any]:
    """An array of any framework as a NumPy array, copied from the device if need be."""
    if hasattr(x, "get"):
        x = x.get()
    if hasattr(x, "cpu"):
        x = x.cpu()
    return np.asarray(x)
