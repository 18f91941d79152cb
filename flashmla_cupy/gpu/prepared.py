"""A decode launch made ready: what follows from its geometry alone.

Grids, sizes in the kernels' order, and the tensor maps of each array that a geometry has met.
"""

from __future__ import annotations

import ctypes
import threading

from ..schedule.split import launch_sizes
from ..sizes import HEAD_DIM, ROWS_PER_BLOCK, TOKENS_PER_TILE, ceil_div
from .driver import Function, tensor_map
from .geometry import Geometry
from .launches import Launches

# dense_decode.cu
HALVES = (4, 5)  # column blocks in each half of a ring slot
COLUMN_BLOCK = 64  # elements: 128 bytes
COLUMN_BLOCKS = HEAD_DIM // COLUMN_BLOCK
# combine.cu
COMBINE_THREADS = 256
FEW_ROWS = 32  # of a slab: partial results are floats
COMBINE_UNITS = 4, 2  # of a row: floats, halves
COMBINE_AT_ONCE = 10 * COMBINE_THREADS // 32  # pieces of a unit that a block loads at once

MAX_MAPS = 8192  # of one geometry, a bound; a model has as many caches as layers


class Maps:
    """The tensor maps of one array, for the two halves of a ring slot."""

    def __init__(self, *maps: ctypes.Array[ctypes.c_char]) -> None:
        self._maps = maps
        self.addresses = ctypes.addressof(maps[0]), ctypes.addressof(maps[-1])


class MapsByAddress(dict[int, Maps]):
    """Address -> the tensor maps of an array there, made when they are first asked for.

    dims and strides in elements, the innermost dimension first, strides without it."""

    def __init__(
        self,
        dtype: str,
        dims: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        box_rows: int,
        nan_outside: bool,
    ) -> None:
        super().__init__()
        self._dtype, self._dims, self._nan_outside = dtype, dims, nan_outside
        # Along a dimension of one element any stride will do, and NumPy's rule lets it be odd.
        self._strides = [
            2 * stride if length > 1 else 2 * HEAD_DIM
            for stride, length in zip(strides, dims[1:], strict=True)
        ]
        # A box for each half of a slot, or, of small pages, for each column block.
        counts = HALVES if box_rows == TOKENS_PER_TILE else (1,)
        self._boxes = [(COLUMN_BLOCK, box_rows, count, 1, 1) for count in counts]

    def __missing__(self, address: int) -> Maps:
        if len(self) >= MAX_MAPS:
            self.clear()
        made = self[address] = Maps(
            *(
                tensor_map(
                    address,
                    self._dtype,
                    self._dims,
                    self._strides,
                    box,
                    nan_outside=self._nan_outside,
                )
                for box in self._boxes
            )
        )
        return made


def combine_blocks(geometry: Geometry, num_sms: int) -> int:
    """Blocks of combine.cu, for as many split requests and pieces as there may be.

    As many as load everything at once, but two a multiprocessor at most, and no more for little
    work, since launching 132 takes a microsecond. A request has two pieces at least, and so a
    block."""
    g = geometry
    requests = min(g.batch, g.parts - 1)
    tiles = ceil_div(g.max_pages * g.page_size, TOKENS_PER_TILE)
    pieces = min(g.parts - 1 + requests, requests * tiles)
    units = COMBINE_UNITS[g.slab_rows > FEW_ROWS] * g.s_q * g.h_q
    blocks = max(ceil_div(units * pieces, COMBINE_AT_ONCE), num_sms)
    blocks = min(blocks, units * requests, 2 * num_sms)
    return blocks if requests == 1 else max(blocks, g.parts - 1)


class Prepared:
    """What follows from a geometry: grids, sizes in the kernels' order, and tensor maps."""

    def __init__(
        self,
        geometry: Geometry,
        schedule: Function,
        decode: Function,
        combine: Function,
        num_sms: int,
    ) -> None:
        g = self.geometry = geometry
        self.schedule, self.decode, self.combine = schedule, decode, combine
        self.schedule_sizes = launch_sizes(g.batch, g.parts, g.rows, g.h_kv)
        self.grid = (g.slabs * g.slab_blocks, g.h_kv, g.parts)
        self.sizes = (
            g.table_stride,
            g.batch,
            g.s_q,
            g.h_q,
            g.group,
            g.slab_rows,
            g.slab_blocks,
            g.num_pages,
            max(0, (g.page_size // TOKENS_PER_TILE).bit_length() - 1),
            min(g.max_pages * g.page_size, 2**31 - 1),
            g.partial_slots,
        )
        self.causal_tiles = 1 + ceil_div(g.s_q - 1, TOKENS_PER_TILE)
        self.out_partial_bytes, self.partial_bytes = g.out_partial_bytes, g.partial_bytes
        self.combine_grid = (combine_blocks(g, num_sms), 1, 1)
        self.combine_sizes = (
            g.pair_words,
            g.batch,
            g.s_q,
            g.h_q,
            g.group,
            g.partial_slots,
            g.parts,
            g.slab_rows,
        )
        self._own = threading.local()
        batch, position, head, _ = g.q_strides
        # Over q as [batch, slab, column block, head or row, 64]; rows past the last are zero.
        heads = g.h_q if g.slabs == g.s_q else g.s_q * g.h_q
        self.q_maps = MapsByAddress(
            g.dtype,
            (COLUMN_BLOCK, heads, COLUMN_BLOCKS, g.slabs, g.batch),
            (head, COLUMN_BLOCK, position, batch),
            box_rows=ROWS_PER_BLOCK,
            nan_outside=False,
        )
        page, token, head, _ = g.k_strides
        # Over k_cache as [page, kv head, column block, token, 64]; pages outside are NaN.
        self.k_maps = MapsByAddress(
            g.dtype,
            (COLUMN_BLOCK, g.page_size, COLUMN_BLOCKS, g.h_kv, g.num_pages),
            (token, COLUMN_BLOCK, head, page),
            box_rows=min(g.page_size, TOKENS_PER_TILE),
            nan_outside=True,
        )

    def launches(self) -> Launches:
        found: Launches | None = getattr(self._own, "launches", None)
        if found is None:
            found = self._own.launches = Launches(self)
        return found
