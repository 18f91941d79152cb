"""The split of a ragged batch over `parts` columns of thread blocks: on the host, and for people.

`plan` is the definition. cuda_src/schedule.cu computes the same integers on the device, where every
decoding step makes its schedule, and is tested against it bit for bit.

The tiles of all requests, one after the other, form a line that is cut into `parts` ranges of
equal cost, so that a long request is shared by many parts and many short ones share a part. A
request that is cut has its pieces merged afterwards, which costs partial results and a second
kernel. So cuts near the end of a request move to it, leaving no piece shorter than a limit; one of
a few limits is chosen by estimating how long each would take.

tile_scheduler_metadata [parts, 8] int32, one row a part:

    0  first_request   1  begin_tile: the first tile of first_request that this part computes
    2  last_request    3  end_tile: one past the last tile of last_request
    4  slot: split pieces in all earlier parts, in the low 16 bits. A piece is split if it is not
       all of its request. The first piece, if split, writes slot `slot`; the last one, if split
       and another piece, the slot after it. So the pieces of one request have consecutive slots.
       Bit 16: the first piece is the second of two that neighbouring parts share; bit 17: the last
       one is the first of two. The decode kernel merges these itself.
       The upper 14 bits: a check of the row, its part and the batch (see `sealed`)
    5  tiles of first_request   6  tiles of last_request: a later length differs from them, and the
       decode kernel sees that the metadata is stale
    7  of row i, whatever its part: the i-th split request, request | first slot << 20; the rows
       after the last one hold request 2^20 - 1 and the number of slots

A part without work has last_request -1 and zeros before column 7. A request without tiles lies in
the range of one part. num_splits [batch + 1] int32 is the prefix sum of the pieces of each request,
at least one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .geometry import NUM_SMS_CPU, TOKENS_PER_TILE, num_sm_parts

# Launch facts of the schedule kernel.
MOST_THREADS = 1024
FEW_THREADS = 256  # for as many parts and a batch eight times as large
MAX_PARTS = 1024  # a thread each
MAX_BATCH = (1 << 20) - 1  # column 7 has 20 bits for a request
PREFIX_ENTRIES = 8192  # of the cost prefix in shared memory; larger batches keep every 2^k-th

# Tuning constants. schedule.cu repeats them, and a test compares the two.
UNIT = 8  # cost units of a tile
C_REQ = 4  # cost units of a request that has tiles: loading q, the epilogue
CANDIDATES = 7  # limits: pieces of at least 1, 2, 4, ... 32 tiles; the last: nothing is split
BEGINS_IN_PAIR, ENDS_IN_PAIR = 1 << 16, 1 << 17  # column 4
CHECK_SHIFT, CHECK_FACTOR = 18, 0x9E3779B1  # column 4; metadata.cuh has them, too
T_TILE = 14500  # 0.1 ns: one tile of 64 rows on one multiprocessor, memory permitting
T_TILE_MEM = 178  # 0.1 ns: the bytes of one tile at the memory bandwidth of the whole GPU
T_SPLIT = 15000  # 0.1 ns: a piece of a split request: its partial result, what comes with it
T_PAIR = 25000  # 0.1 ns: what a piece of a pair takes more: floats, and the merge of the two
T_COMB = 20000  # 0.1 ns: a combine kernel with work to do
T_GAIN = 1000  # 0.1 ns: a later candidate must be better by more than this
PARTIAL_ROWS = 36  # rows of partial out, 2048 bytes each, in the bytes of one tile
# Tried, on an H100; microseconds of a decode call of 128 heads, as it is first:
#   T_SPLIT 30000, no T_PAIR, T_COMB 40000
#                             one request of 256 tokens 8.2 | 10.9, with 16 heads 7.0 | 10.4
#   as many parts as give requests alike the same number of them, and no T_COMB for pairs
#                             32 requests of 1024 tokens 31.4 | 34.4, on an H200
#   T_PAIR 20000              32 requests of 1024 tokens, then split into pairs, 29.6 | 31.4
#   PARTIAL_ROWS 72           that 29.6 | 31.4, one of 8192 15.0 | 16.1, 64 of 512 with 64 rows each
#                             32.8 | 37.6
#   T_SPLIT 18000 | 30000, no T_PAIR
#                             128 of about 1024 94.4 | 90.5, of about 4096 284 | 282

_WHOLE = 1 << 30  # more tiles than any piece has

Ints = npt.NDArray[np.int64]


class _Cuts(NamedTuple):
    """Part p computes from (request[p], tile[p]) up to, not including, (request, tile)[p + 1]."""

    request: Ints
    tile: Ints

    @property
    def busy(self) -> npt.NDArray[np.bool_]:
        """[parts]: which parts have a range that is not empty."""
        step = np.diff(self.request)
        busy: npt.NDArray[np.bool_] = (step > 0) | ((step == 0) & (np.diff(self.tile) > 0))
        return busy

    @property
    def pairs(self) -> npt.NDArray[np.bool_]:
        """[parts + 1]: which cuts are the only one of their request, between neighbours."""
        pair = np.zeros(len(self.tile), np.bool_)
        request, inside = self.request[1:-1], self.tile[1:-1] > 0
        before = (self.request[:-2] < request) | (self.tile[:-2] == 0)
        pair[1:-1] = inside & before & (self.request[2:] > request)
        return pair

    @property
    def begins_inside(self) -> npt.NDArray[np.bool_]:
        """[parts]: which parts begin with a later piece of a split request."""
        return self.busy & (self.tile[:-1] > 0)

    @property
    def starts_split(self) -> npt.NDArray[np.bool_]:
        """[parts]: which parts end with the first piece of a split request."""
        middle = (self.request[:-1] == self.request[1:]) & (self.tile[:-1] > 0)
        starts: npt.NDArray[np.bool_] = self.busy & (self.tile[1:] > 0) & ~middle
        return starts

    @property
    def split_pieces(self) -> Ints:
        """[parts]: split pieces of each part; a piece cut at both ends counts once."""
        return self.begins_inside.astype(np.int64) + self.starts_split


def shared_bytes(batch: int, parts: int = MAX_PARTS) -> int:
    """Dynamic shared memory of the schedule kernel: the cost prefix, and the cuts."""
    entries = batch
    while entries > PREFIX_ENTRIES:
        entries = (entries + 1) // 2
    return 8 * (entries + 1) + 16 * CANDIDATES * (parts + 1)


def threads(batch: int, parts: int) -> int:
    """Of the schedule kernel."""
    few = parts <= FEW_THREADS and batch <= 8 * FEW_THREADS
    return FEW_THREADS if few else MOST_THREADS


def plan(
    cache_seqlens: npt.NDArray[np.int32], parts: int, rows: int, h_kv: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(tile_scheduler_metadata, num_splits) for lengths [batch], `rows` query rows of a kv head.

    Negative lengths count as 0. Nothing overflows for lengths up to 2^31 - 1 and 65536 requests."""
    batch = len(cache_seqlens)
    tiles = -(-np.maximum(cache_seqlens.astype(np.int64), 0) // TOKENS_PER_TILE)
    starts = np.zeros(batch + 1, np.int64)  # cost of all requests before each
    np.cumsum(UNIT * tiles + C_REQ * (tiles > 0), out=starts[1:])
    metadata = np.zeros((parts, 8), np.int32)
    metadata[:, 2] = -1
    metadata[:, 7] = MAX_BATCH
    if not batch:
        return metadata, np.zeros(1, np.int32)

    best, cuts = 0, None
    for candidate in range(CANDIDATES):
        trial = _cut(tiles, starts, parts, candidate)
        time = _estimate(tiles, starts, trial, rows, h_kv)
        if cuts is None or time < best - T_GAIN:
            best, cuts = time, trial
    assert cuts is not None

    first, begin = cuts.request[:-1], cuts.tile[:-1]
    last = np.where(cuts.tile[1:] > 0, cuts.request[1:], cuts.request[1:] - 1)
    end = np.where(cuts.tile[1:] > 0, cuts.tile[1:], tiles[last])
    slot = np.cumsum(cuts.split_pieces) - cuts.split_pieces
    first_tiles = tiles[np.minimum(first, batch - 1)]  # empty parts may begin past the batch
    pair = cuts.pairs
    flags = pair[:-1] * BEGINS_IN_PAIR + pair[1:] * ENDS_IN_PAIR
    columns = np.stack([first, begin, last, end, slot | flags, first_tiles, tiles[last]], axis=1)
    busy = cuts.busy
    metadata[busy, :7] = columns[busy]

    splits = cuts.starts_split
    first_slot = (slot + cuts.begins_inside)[splits]
    metadata[:, 7] |= int(cuts.split_pieces.sum()) << 20
    metadata[: len(first_slot), 7] = first_slot << 20 | last[splits]

    # A request is in one piece more than there are parts that begin inside it.
    pieces = np.ones(batch, np.int64)
    np.add.at(pieces, first[cuts.begins_inside], 1)
    return sealed(metadata, batch), np.concatenate([[0], np.cumsum(pieces)]).astype(np.int32)


def sealed(metadata: npt.NDArray[np.int32], batch: int) -> npt.NDArray[np.int32]:
    """The metadata with the check of each row, which the decode kernel looks at.

    The check is the upper 14 bits of the sum of F^(c + 1) row[c] over the columns c, F^9 part and
    F^10 batch, modulo 2^32, where F is CHECK_FACTOR and row[4] is without the check."""
    parts = len(metadata)
    values = np.empty((parts, 10), np.uint32)
    values[:, :8] = metadata.view(np.uint32)
    values[:, 4] &= (1 << CHECK_SHIFT) - 1
    values[:, 8], values[:, 9] = np.arange(parts), batch
    factors = np.array([pow(CHECK_FACTOR, c + 1, 1 << 32) for c in range(10)], np.uint32)
    check = (values * factors).sum(axis=1, dtype=np.uint32) >> CHECK_SHIFT << CHECK_SHIFT
    made = metadata.copy()
    made[:, 4] = (values[:, 4] | check).view(np.int32)
    return made


def _cut(tiles: Ints, starts: Ints, parts: int, candidate: int) -> _Cuts:
    """Ranges of equal cost, their ends rounded to tiles and moved out of the reach of the limit."""
    batch, total, cost = len(tiles), int(tiles.sum()), int(starts[-1])
    splits = candidate < CANDIDATES - 1
    limit = 1 << candidate if splits else _WHOLE
    used = min(max(total >> (candidate if splits else 0), 1), parts)  # parts that get work
    p = np.arange(1, used)
    x = cost * p // used  # where the line is cut
    # The request that x lies in has a cost, since cost[p] < cost: it is the last to start by x.
    request = np.searchsorted(starts, x, side="right") - 1
    tile = (x - starts[request] - C_REQ // 2 + UNIT // 2) // UNIT
    near_start = tile < limit
    near_end = ~near_start & (tiles[request] - tile < limit)
    request += near_end
    tile[near_start | near_end] = 0
    ends = [batch] * (parts + 1 - used)
    return _Cuts(
        np.concatenate([[0], request, ends]).astype(np.int64),
        np.concatenate([[0], tile, np.zeros_like(ends)]).astype(np.int64),
    )


def _estimate(tiles: Ints, starts: Ints, cuts: _Cuts, rows: int, h_kv: int) -> int:
    """How long decoding takes with these cuts, in 0.1 ns.

    The multiprocessors work for the longest part. If memory is slower, it sets the pace until a
    mean part ends, and the longest goes on from there. Partial results are written meanwhile and
    read by the combine kernel."""
    total, pieces, parts = int(tiles.sum()), cuts.split_pieces, len(cuts.request) - 1
    at = starts[cuts.request] + UNIT * cuts.tile
    load = at[1:] + C_REQ * (cuts.tile[1:] > 0) - at[:-1]  # a piece that ends inside pays, too
    load = np.where(cuts.busy, load, 0)
    paired = cuts.pairs[:-1].astype(np.int64) + cuts.pairs[1:]
    longest = int((load * T_TILE // UNIT + pieces * T_SPLIT + paired * T_PAIR).max())
    split = int(pieces.sum())
    partials = split * rows * h_kv * T_TILE_MEM // PARTIAL_ROWS
    memory = total * h_kv * T_TILE_MEM + partials
    decode = max(longest, memory + longest - total * T_TILE // parts)
    return decode + (T_COMB + partials if split else 0)


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
