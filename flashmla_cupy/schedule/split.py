"""The split of a ragged batch over `parts` columns of thread blocks.

`plan` is the definition. cuda_src/schedule.cu computes the same integers on the device,
where every decoding step makes its schedule, and is tested against it bit for bit. `view` shows the
result to people; cuda_src/metadata.cuh explains the words.

The tiles of all requests, one after the other, form a line that is cut into `parts` ranges of equal
cost, so that a long request is shared by many parts and many short ones share a part. The pieces of
a request that is cut are merged afterwards, which costs partial results and a second kernel. So a
cut near an end of a request moves to that end, and leaves no piece shorter than a limit. There are
a few limits, and one more way to cut: even pieces of at most some size, each a part of its own,
which suits requests that are about half as many as the parts. The one taken is that with the
shortest estimated time.

tile_scheduler_metadata [parts, 8] int32, one row a part:

    0  first_request   1  begin_tile: the first tile of first_request that this part computes
    2  last_request    3  end_tile: one past the last tile of last_request
    4  slot: how many split pieces all earlier parts have, in the low 16 bits. A piece is split if
       it is not all of its request. The first piece, if split, writes slot `slot`; the last one, if
       it is split and another piece, the slot after it. So the pieces of one request have
       consecutive slots. Bit 16: the first piece is the back of a pair, which is two pieces that
       neighbouring parts share; bit 17: the last piece is the front of one. The decode kernel
       merges pairs itself.
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

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..sizes import TOKENS_PER_TILE, ceil_div

# The launch of schedule.cu: each candidate has as many warps as hold the parts, 29 each.
CANDIDATES = 5  # limits: pieces of at least 1, 2, 4 tiles; no pieces; or at least 8 or so, by size
UNSPLIT = 3  # the candidate that splits nothing
BY_SIZE = 4  # the candidate that gives each request parts of its own, as many as its tiles ask for
LEAST_SIZE = 8  # tiles of a part of BY_SIZE, at most; more where the parts are too few
SIZES = 32  # how many are tried: from the least on, by sixteenths of it
WARP_PARTS = 29
MAX_PARTS = 174  # of six warps
MAX_BATCH = (1 << 20) - 1  # column 7 has 20 bits for a request
PREFIX_ENTRIES = 16384  # of the cost prefix in shared memory; larger batches keep every 2^k-th
MOST_SHARED_BYTES = 4 * (PREFIX_ENTRIES + 1)

# Column 4. metadata.cuh has them, too.
BEGINS_IN_PAIR, ENDS_IN_PAIR = 1 << 16, 1 << 17
CHECK_SHIFT, CHECK_FACTOR = 18, 0x9E3779B1

# Costs and times, in sixteenths of what a tile of 64 rows takes a multiprocessor if memory permits,
# which is 1450 ns: 1.5 us are 17. schedule.cu repeats what it needs, and a test compares the two.
UNIT = 16  # a tile
C_REQ = 8  # a request that has tiles: loading q, the epilogue
T_SPLIT = 17  # a piece of a split request: its partial result, and what comes with it
T_PAIR = 28  # what a piece of a pair takes more: floats, and the merge of the two
T_SPLIT_OF_FEW, T_PAIR_OF_FEW = 12, 16  # the same of at most FEW rows
FEW = 16
T_COMB = 22  # a combine kernel with work to do
T_MOST = (1 << 28) - 1  # longer times count as this
T_TILE_MEM = 50  # 1/256: the bytes of a tile at the memory bandwidth of the whole GPU
T_TILE_MEM_GATHERED = 32  # the same where rows are gathered, for which a tile takes longer
PARTIAL_ROWS = 36  # rows of partial out, 2048 bytes each, in the bytes of one tile
MOST_TILES = 1 << 26  # of all requests; what is longer than its even share of them counts as that

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


class Costs(NamedTuple):
    """The terms of _estimate that depend on the call."""

    tile_longer: float  # what the bytes of a tile cost beyond the tile's share of a mean part
    piece_memory: int  # 256 times what the bytes of a piece's partial result cost
    split: int  # T_SPLIT
    pair: int  # T_PAIR


def costs_of(parts: int, rows: int, h_kv: int, gathered: bool = False) -> Costs:
    """gathered: over lists of tokens or an FP8 cache. Few rows take no longer for it."""
    tile = h_kv * (T_TILE_MEM_GATHERED if gathered and rows > FEW else T_TILE_MEM)
    return Costs(
        min(tile / 256, 15.0) - UNIT / parts,
        min(rows * tile // PARTIAL_ROWS, (1 << 22) - 1),
        *((T_SPLIT_OF_FEW, T_PAIR_OF_FEW) if rows <= FEW else (T_SPLIT, T_PAIR)),
    )


class LaunchSizes(NamedTuple):
    """What a launch of schedule.cu depends on, besides addresses."""

    block: tuple[int, int, int]  # lanes, warps of a candidate, candidates
    shared_bytes: int  # dynamic: the cost prefix
    params: tuple[int, int, int, int, int, float, int, int, int]  # from `batch` on


@functools.lru_cache(maxsize=1024)
def launch_sizes(
    batch: int, parts: int, rows: int, h_kv: int, gathered: bool = False
) -> LaunchSizes:
    """batch >= 1."""
    warps = ceil_div(parts, WARP_PARTS)
    shift = max(0, (ceil_div(batch, PREFIX_ENTRIES) - 1).bit_length())  # of an entry: 2^shift
    step = 1  # a power of four, and 4 step at least the entries
    while 4 * step < ceil_div(batch, 1 << shift):
        step *= 4
    sizes = batch, parts, MOST_TILES // batch, shift, step
    return LaunchSizes(
        (32, warps, CANDIDATES),
        4 * (4 * step + 1),
        (*sizes, *costs_of(parts, rows, h_kv, gathered)),
    )


@np.errstate(all="ignore")  # whatever the caller wants to hear about its own arithmetic
def plan(
    cache_seqlens: npt.NDArray[np.int32],
    parts: int,
    rows: int,
    h_kv: int,
    gathered: bool = False,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(tile_scheduler_metadata [parts, 8], num_splits [batch + 1]) for requests of these lengths
    [batch], in tokens, where each of h_kv heads has `rows` query rows. Negative lengths count as 0.
    gathered: see costs_of."""
    batch = len(cache_seqlens)
    tiles = -(-np.maximum(cache_seqlens.astype(np.int64), 0) // TOKENS_PER_TILE)
    counted = np.minimum(tiles, MOST_TILES // max(batch, 1))
    starts = np.zeros(batch + 1, np.int64)  # cost of all requests before each
    np.cumsum(UNIT * counted + C_REQ * (tiles > 0), out=starts[1:])
    metadata = np.zeros((parts, 8), np.int32)
    metadata[:, 2] = -1
    metadata[:, 7] = MAX_BATCH
    if not batch:
        return metadata, np.zeros(1, np.int32)

    costs = costs_of(parts, rows, h_kv, gathered)
    trials = [_cut(counted, starts, parts, candidate) for candidate in range(CANDIDATES)]
    times = [_estimate(counted, starts, trial, costs) for trial in trials]
    cuts = trials[times.index(min(times))]

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
    """Ranges of equal cost, their ends rounded to tiles and moved out of the reach of the limit; of
    BY_SIZE, those of `_cut_by_size` where it can.

    schedule.cu has the same float32 arithmetic."""
    batch, total, cost = len(tiles), int(tiles.sum()), int(starts[-1])
    by_size = candidate == BY_SIZE
    if by_size and total and 1 < batch <= parts and (cuts := _cut_by_size(tiles, parts)):
        return cuts
    limit = _WHOLE if candidate == UNSPLIT else LEAST_SIZE if by_size else 1 << candidate
    used = total if candidate == UNSPLIT else total // limit
    used = min(max(used, 1), parts)  # parts that get work
    requests = int(np.count_nonzero(tiles))
    if by_size and 0 < requests <= parts:  # all requests get the same number of parts
        used = min(used, parts // requests * requests)
    share = np.float32(cost) * (np.float32(1) / np.float32(used))
    x = (np.arange(1, used, dtype=np.float32) * share).astype(np.int64)  # where the line is cut
    # The request that x lies in has a cost, since x < cost: it is the last to start by x.
    request = np.searchsorted(starts, x, side="right") - 1
    before = (x - starts[request] - C_REQ // 2 + UNIT // 2) // UNIT
    behind = tiles[request] - before
    inside = np.minimum(before, behind) >= limit
    request += ~inside & (behind < before)  # to the nearer end
    return _cuts_at(request, np.where(inside, before, 0), batch, parts)


def _cuts_at(request: Ints, tile: Ints, batch: int, parts: int) -> _Cuts:
    """With the first cut, which these follow, and those of the parts without work."""
    ends = [batch] * (parts - len(request))
    return _Cuts(
        np.concatenate([[0], request, ends]).astype(np.int64),
        np.concatenate([[0], tile, np.zeros_like(ends)]).astype(np.int64),
    )


def _cut_by_size(tiles: Ints, parts: int) -> _Cuts | None:
    """Each request in as few even pieces of at most some size as it can be, each a part; the size
    is the least of those tried for which the parts suffice. None: there is none."""
    least = max(LEAST_SIZE, ceil_div(int(tiles.sum()), parts))
    for size in (least + (least * i >> 4) for i in range(SIZES)):
        inverse = np.float32(1) / np.float32(size)
        pieces = ((tiles + size - 1).astype(np.float32) * inverse).astype(np.int64)
        pieces = np.where(tiles > 0, np.maximum(pieces, 1), 0)
        if pieces.sum() <= parts:
            break
    else:
        return None
    request = np.repeat(np.arange(len(tiles)), pieces)[1:]
    ends = np.cumsum(pieces)
    number = np.arange(1, ends[-1]) - (ends - pieces)[request]  # of the part, in its request
    return _cuts_at(request, tiles[request] * number // pieces[request], len(tiles), parts)


def _estimate(tiles: Ints, starts: Ints, cuts: _Cuts, costs: Costs) -> int:
    """How long decoding takes with these cuts, in the unit of the costs.

    The multiprocessors work for the longest part. If memory is slower, it sets the pace until a
    mean part ends, and the longest goes on from there. Partial results are written meanwhile, and
    read by the combine kernel."""
    pieces = cuts.split_pieces
    at = starts[cuts.request] + UNIT * cuts.tile
    load = at[1:] + C_REQ * (cuts.tile[1:] > 0) - at[:-1]  # a piece that ends inside pays, too
    load = np.where(cuts.busy, load, 0)
    paired = cuts.pairs[:-1].astype(np.int64) + cuts.pairs[1:]
    longest = int((load + pieces * costs.split + paired * costs.pair).max())
    split, total = int(pieces.sum()), np.float32(tiles.sum())
    partials = split * costs.piece_memory >> 8
    longer = int(total * np.float32(costs.tile_longer)) + partials
    time: int = longest + max(0, longer) + (T_COMB + partials if split else 0)
    return min(time, T_MOST)


# ---- lab notes -------------------------------------------------------------------------------
# What was tried: the setting, then each choice with its time, the one taken first. On an H100,
# microseconds of a decode call of 128 heads, unless said:
#   costs of a split  T_SPLIT 17, T_PAIR 28, T_COMB 22: one request of 256 tokens 8.2, with 16 heads
#                     7.0 | T_SPLIT 33, no T_PAIR, T_COMB 44: 10.9, 10.4
#   requests alike    EVEN is one candidate of five: 32 requests of 1024 tokens 31.4, on an H200 |
#                     always as many parts as give each as many, and no T_COMB for pairs 34.4
#   T_PAIR            28: 32 requests of 1024 tokens 29.6 | 22: then split into pairs, 31.4
#   BY_SIZE           on an H200, 64 requests of 256 to 1024 tokens, 64 rows, cut into 105 pieces of
#                     at most 8 tiles 28.8 | whole 31.2 | of at most 7 tiles 29.5 | limits 1, 2, 4:
#                     34.2, 33.1, 31.3
#   UNSPLIT           its idle parts lie between the others: 64 of 512 tokens, 32 rows, on an H200
#                     20.0 | at the end 21.3
#   .._OF_FEW         12, 16: one of 131072 tokens among 63 of 512, 16 rows, on an H200, limit 2
#                     52.9 | 17, 28: requests alike 55.8, limit 4 56.6, limit 1 54.0
#   T_TILE_MEM        50, 4.16 TB/s | 40 to 66, for faster and slower memory: another candidate in
#                     four of the 43 cases of `bench`; their estimates differ by 0.1 to 6 percent
#   .._GATHERED       25 to 36: lists of 2048 tokens of 656 bytes, 8 requests of 64 heads, on an
#                     H200 29.2, 4 of 128 heads 28.0 | 44 and 50: 31.1, 30.6. Of 18 batches, the
#                     candidate chosen is within 0.4 percent of the best; of 16-bit rows, 2.4
#   PARTIAL_ROWS      36: the same 29.6, one of 8192 tokens 15.0, 64 of 512 with 64 rows each 32.8 |
#                     72: 31.4, 16.1, 37.6
#   T_SPLIT           20: 128 requests of about 1024 tokens 94.4, of about 4096 284 | 33 without
#                     T_PAIR: 90.5, 282
