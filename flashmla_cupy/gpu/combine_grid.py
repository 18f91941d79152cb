"""How many thread blocks combine.cu is launched with."""

from __future__ import annotations

from ..sizes import TOKENS_PER_TILE, ceil_div
from .geometry import Geometry
from .kernels import COMBINE

FEW_ROWS = 16  # of a slab: partial results are floats
COMBINE_UNITS = 4, 2  # of a row: floats, halves
COMBINE_AT_ONCE = 10 * COMBINE.threads // 32  # pieces of a unit that a block loads at once


def combine_blocks(geometry: Geometry, num_sms: int) -> int:
    """Of a launch of dense_decode."""
    g = geometry
    tiles = ceil_div(g.max_pages * g.page_size, TOKENS_PER_TILE)
    return blocks_of(g.batch, g.parts, tiles, g.slab_rows, g.s_q * g.h_q, num_sms)


def blocks_of(batch: int, parts: int, tiles: int, slab_rows: int, rows: int, num_sms: int) -> int:
    """Blocks of combine.cu, for as many split requests and pieces as there may be of requests of at
    most so many tiles, with so many rows each.

    As many as load everything at once, but two a multiprocessor at most, and no more for little
    work, since launching 132 takes a microsecond. A request has two pieces at least, and so a
    block."""
    requests = min(batch, parts - 1)
    pieces = min(parts - 1 + requests, requests * tiles)
    units = COMBINE_UNITS[slab_rows > FEW_ROWS] * rows
    blocks = max(ceil_div(units * pieces, COMBINE_AT_ONCE), num_sms)
    blocks = min(blocks, units * requests, 2 * num_sms)
    return blocks if requests == 1 else max(blocks, parts - 1)
