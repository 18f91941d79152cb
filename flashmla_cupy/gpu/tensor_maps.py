"""The tensor maps of the arrays that decode kernels read by TMA, made once for an address."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ..bounded import Bounded
from ..sizes import HEAD_DIM, ROWS_PER_BLOCK, TOKENS_PER_TILE
from .driver import tensor_map
from .geometry import Geometry
from .kernels import FEW_ROWS_DECODE, ROWS_PER_BLOCK_OF_FEW, Kernel

COLUMN_BLOCK = 64  # elements: 128 bytes
COLUMN_BLOCKS = HEAD_DIM // COLUMN_BLOCK
HALVES = (4, 5)  # of dense_decode: column blocks in each half of a stage of the ring
SLOT_TOKENS = 32  # of few_rows_decode, of a slot of the ring

MAX_MAPS = 8192  # of one geometry, a bound; a model has as many caches as layers


class Box(NamedTuple):
    """What one instruction loads: so many rows of so many column blocks; a tensor map each."""

    rows: int
    column_blocks: tuple[int, ...]


class Boxes(NamedTuple):
    """Of a decode kernel."""

    q: Box
    k_cache: Box


def boxes_of(kernel: Kernel, g: Geometry) -> Boxes:
    """What a kernel loads of q and k_cache at once."""
    if kernel is FEW_ROWS_DECODE:
        whole = (COLUMN_BLOCKS,)
        return Boxes(Box(ROWS_PER_BLOCK_OF_FEW, whole), Box(min(g.page_size, SLOT_TOKENS), whole))
    # A box for each half of a stage or, of small pages, for each column block.
    tokens = min(g.page_size, TOKENS_PER_TILE)
    counts = HALVES if tokens == TOKENS_PER_TILE else (1,)
    return Boxes(Box(ROWS_PER_BLOCK, HALVES), Box(tokens, counts))


class Maps:
    """The tensor maps of one array: one, or two for the halves of a stage."""

    def __init__(self, *maps: ctypes.Array[ctypes.c_char]) -> None:
        self._maps = maps
        self.addresses = ctypes.addressof(maps[0]), ctypes.addressof(maps[-1])


class MapsByAddress(Bounded[int, Maps]):
    """Address -> the tensor maps of an array there, made when they are first asked for.

    dims and strides in elements, the innermost dimension first, strides without it."""

    def __init__(
        self,
        dtype: str,
        dims: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        box: Box,
        nan_outside: bool,
    ) -> None:
        super().__init__(MAX_MAPS)
        self._dtype, self._dims, self._nan_outside = dtype, dims, nan_outside
        # Along a dimension of one element any stride will do, and NumPy's rule lets it be odd.
        self._strides = [
            2 * stride if length > 1 else 2 * HEAD_DIM
            for stride, length in zip(strides, dims[1:], strict=True)
        ]
        self._boxes = [(COLUMN_BLOCK, box.rows, count, 1, 1) for count in box.column_blocks]

    def __missing__(self, address: int) -> Maps:
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


def maps_of_q(g: Geometry, box: Box) -> MapsByAddress:
    """Over q as [batch, slab, column block, head or row, 64]; rows past the last are zero."""
    batch, position, head, _ = g.q_strides
    heads = g.h_q if g.slabs == g.s_q else g.s_q * g.h_q
    return MapsByAddress(
        g.dtype,
        (COLUMN_BLOCK, heads, COLUMN_BLOCKS, g.slabs, g.batch),
        (head, COLUMN_BLOCK, position, batch),
        box=box,
        nan_outside=False,
    )


def maps_of_k_cache(g: Geometry, box: Box) -> MapsByAddress:
    """Over k_cache as [page, kv head, column block, token, 64]; pages outside are NaN."""
    page, token, head, _ = g.k_strides
    return MapsByAddress(
        g.dtype,
        (COLUMN_BLOCK, g.page_size, COLUMN_BLOCKS, g.h_kv, g.num_pages),
        (token, COLUMN_BLOCK, head, page),
        box=box,
        nan_outside=True,
    )
