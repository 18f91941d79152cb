"""A decode launch made ready: what follows from its geometry alone, and room for its parameters.

Grids, sizes in the kernels' order, and the tensor maps of each array that a geometry has met.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Sequence

from .driver import Function, Launch, tensor_map
from .geometry import HEAD_DIM, ROWS_PER_BLOCK, TOKENS_PER_TILE, Geometry, ceil_div

# dense_decode.cu
DECODE_THREADS = 384
DECODE_SHARED_BYTES = 232304  # SHARED_BYTES in ring.cuh
PARAMS = struct.Struct("11Qq12if4x")  # Params in work.cuh
CALL_PARAMS = struct.Struct("9Q")  # those of them that differ from call to call, the first ones
HALVES = (4, 5)  # column blocks in each half of a ring slot
COLUMN_BLOCK = 64  # elements: 128 bytes
COLUMN_BLOCKS = HEAD_DIM // COLUMN_BLOCK
# combine.cu
COMBINE_THREADS = 256
FEW_ROWS = 32  # of a slab: partial results are floats
COMBINE_UNITS = 4, 2  # of a row: floats, halves
COMBINE_AT_ONCE = 10 * COMBINE_THREADS // 32  # pieces of a unit that a block loads at once
COMBINE_ARRAYS = (0, 5, 6, 3, 4, 7)  # its first six parameters: places in CALL_PARAMS
COMBINE_SIZES = struct.Struct("8i")  # the others
LOG2_E = 1.4426950408889634

MAX_MAPS = 8192  # of one geometry, a bound; a model has as many caches as layers


class Arguments:
    """The packed parameters of a kernel, and the array of their addresses that a launch takes."""

    def __init__(
        self, layout: struct.Struct, *, elsewhere: Sequence[int] = (), is_struct: bool = False
    ) -> None:
        """elsewhere: addresses of parameters ahead of the packed ones; is_struct: these are one."""
        self.buffer = ctypes.create_string_buffer(layout.size)
        self.start = ctypes.addressof(self.buffer)
        offsets = [0] if is_struct else _offsets(layout.format)
        addresses = [*elsewhere, *(self.start + offset for offset in offsets)]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self._pointers)
        self._maps: tuple[Maps, Maps] | None = None

    def set_maps(self, q_maps: Maps, k_maps: Maps) -> None:
        """The first four pointers; those of another call often are the same."""
        if self._maps != (q_maps, k_maps):
            self._maps = q_maps, k_maps
            pointers = self._pointers
            pointers[0], pointers[1] = q_maps.addresses
            pointers[2], pointers[3] = k_maps.addresses


def _offsets(layout: str) -> list[int]:
    """Byte offset of every field of a struct format such as "6Q6i"."""
    fields = "".join(
        letter * int(count or 1) for count, letter in re.findall(r"(\d*)([a-zA-Z])", layout)
    )
    # A repeat count of 0 adds nothing but alignment.
    return [struct.calcsize(f"{fields[:i]}0{field}") for i, field in enumerate(fields)]


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


class Launches:
    """The launches of one geometry by one thread."""

    def __init__(self, prepared: Prepared) -> None:
        self.decode = Launch(prepared.decode, prepared.grid, DECODE_SHARED_BYTES)
        self.decode_arguments = Arguments(PARAMS, elsewhere=(0,) * 4, is_struct=True)
        self._prepared = prepared
        self._options: tuple[float, bool] | None = None
        self.combine = None
        if prepared.geometry.partial_slots:
            self.combine = Launch(prepared.combine, prepared.combine_grid)
        # Its arrays are also parameters of dense_decode, so one packing serves both.
        arrays = [self.decode_arguments.start + 8 * place for place in COMBINE_ARRAYS]
        self.combine_arguments = Arguments(COMBINE_SIZES, elsewhere=arrays)
        COMBINE_SIZES.pack_into(self.combine_arguments.buffer, 0, *prepared.combine_sizes)

    def set_options(self, softmax_scale: float, causal: bool, status: tuple[int, int]) -> None:
        """What is the same in most calls: the parameters after CALL_PARAMS."""
        if self._options != (softmax_scale, causal):
            self._options = softmax_scale, causal
            PARAMS.pack_into(
                self.decode_arguments.buffer,
                0,
                *(0,) * 9,
                *status,
                *self._prepared.sizes,
                causal,
                self._prepared.causal_tiles if causal else 1,
                softmax_scale * LOG2_E,
            )


def combine_blocks(geometry: Geometry, num_sms: int) -> int:
    """Blocks of combine.cu, for as many split requests and pieces as there may be.

    As many as load everything at once, but two a multiprocessor at most, and no more of little work,
    since launching 132 takes a microsecond. A request has two pieces at least, and so has a block."""
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
        self, geometry: Geometry, decode: Function, combine: Function, num_sms: int
    ) -> None:
        g = self.geometry = geometry
        self.decode, self.combine = decode, combine
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
