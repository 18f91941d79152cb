"""A decode launch made ready: what follows from its geometry alone, and room for its parameters.

Grids, sizes in the kernels' order, and the tensor maps of each array that a geometry has met.
"""

from __future__ import annotations

import ctypes
import struct
import threading

from .driver import Function, Launch, tensor_map
from .geometry import HEAD_DIM, HEAD_DIM_V, ROWS_PER_BLOCK, TOKENS_PER_TILE, Geometry, ceil_div

# dense_decode.cu
DECODE_THREADS = 384
DECODE_SHARED_BYTES = 232296  # SHARED_BYTES in ring.cuh
PARAMS = struct.Struct("11Qq12if4x")  # Params in work.cuh
CALL_PARAMS = struct.Struct("9Q")  # those of them that differ from call to call, the first ones
HALVES = (4, 5)  # column blocks in each half of a ring slot
COLUMN_BLOCK = 64  # elements: 128 bytes
COLUMN_BLOCKS = HEAD_DIM // COLUMN_BLOCK
# combine.cu
COMBINE_THREADS = 256
COMBINE_WARPS = 8
COMBINE_PARAMS = struct.Struct("6Q7i")
COMBINE_CALL_PARAMS = struct.Struct("6Q")
LOG2_E = 1.4426950408889634

MAX_MAPS = 8192  # of one geometry, a bound; a model has as many caches as layers


class Arguments:
    """The packed parameters of a kernel, and the array of their addresses that a launch takes."""

    def __init__(self, layout: struct.Struct, *, tensor_maps: int = 0) -> None:
        self.buffer = ctypes.create_string_buffer(layout.size)
        start = ctypes.addressof(self.buffer)
        offsets = [0] if tensor_maps else list(_offsets(layout.format))
        addresses = [0] * tensor_maps + [start + offset for offset in offsets]
        self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._maps: tuple[Maps, Maps] | None = None

    def set_maps(self, q_maps: Maps, k_maps: Maps) -> None:
        """The first four pointers; those of another call often are the same."""
        if self._maps != (q_maps, k_maps):
            self._maps = q_maps, k_maps
            pointers = self.pointers
            pointers[0], pointers[1] = q_maps.addresses
            pointers[2], pointers[3] = k_maps.addresses


def _offsets(layout: str) -> list[int]:
    """Byte offset of every field of a struct format such as "6Q6i"."""
    offsets, offset, count = [], 0, ""
    for letter in layout:
        if letter.isdigit():
            count += letter
            continue
        size = struct.calcsize(letter)
        for _ in range(int(count or 1)):
            offset = -(-offset // size) * size
            offsets.append(offset)
            offset += size
        count = ""
    return offsets


class Maps:
    """The tensor maps of one array, for the two halves of a ring slot."""

    def __init__(self, *maps: ctypes.Array[ctypes.c_char]) -> None:
        self._maps = maps
        self.addresses = ctypes.addressof(maps[0]), ctypes.addressof(maps[-1])


class Launches:
    """The launches of one geometry by one thread."""

    def __init__(self, prepared: Prepared) -> None:
        self.decode = Launch(prepared.decode, prepared.grid, DECODE_SHARED_BYTES)
        self.decode_arguments = Arguments(PARAMS, tensor_maps=4)
        self.combine_arguments = Arguments(COMBINE_PARAMS)
        zeros = (0,) * 6
        COMBINE_PARAMS.pack_into(self.combine_arguments.buffer, 0, *zeros, *prepared.combine_sizes)
        self._prepared = prepared
        self._options: tuple[float, bool] | None = None
        self.combine = None
        if prepared.geometry.partial_slots:
            self.combine = Launch(prepared.combine, prepared.combine_grid)

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


class Prepared:
    """What follows from a geometry: grids, sizes in the kernels' order, and tensor maps."""

    def __init__(
        self, geometry: Geometry, decode: Function, combine: Function, num_sms: int
    ) -> None:
        g = self.geometry = geometry
        self.decode, self.combine = decode, combine
        blocks = ceil_div(g.slab_rows, ROWS_PER_BLOCK)
        self.grid = (g.slabs * blocks, g.h_kv, g.parts)
        self.sizes = (
            g.table_stride,
            g.batch,
            g.s_q,
            g.h_q,
            g.group,
            g.slab_rows,
            blocks,
            g.num_pages,
            max(0, (g.page_size // TOKENS_PER_TILE).bit_length() - 1),
            min(g.max_pages * g.page_size, 2**31 - 1),
            g.partial_slots,
        )
        self.causal_tiles = 1 + ceil_div(g.s_q - 1, TOKENS_PER_TILE)
        rows = g.s_q * g.h_q
        self.out_partial_bytes = g.partial_slots * rows * HEAD_DIM_V * 4
        self.partial_bytes = g.partial_slots * rows * (HEAD_DIM_V + 1) * 4
        words = g.parts * g.row_blocks
        # Few rows: eight warps each, or most of the GPU would idle.
        warps_per_row = COMBINE_WARPS if g.batch * rows < num_sms * COMBINE_WARPS else 1
        self.combine_grid = (
            ceil_div(rows * warps_per_row, COMBINE_WARPS),
            min(g.batch, g.parts - 1),
            1,
        )
        self.combine_sizes = (words, g.batch, g.s_q, g.h_q, g.group, g.partial_slots, warps_per_row)
        self._own = threading.local()
        self._q_maps: dict[int, Maps] = {}
        self._k_maps: dict[int, Maps] = {}

    def launches(self) -> Launches:
        found: Launches | None = getattr(self._own, "launches", None)
        if found is None:
            found = self._own.launches = Launches(self)
        return found

    def q_maps(self, address: int) -> Maps:
        """Over q as [batch, slab, column block, head or row, 64]."""
        found = self._q_maps.get(address)
        if found is None:
            g = self.geometry
            batch, position, head, _ = g.q_strides
            heads = g.h_q if g.slabs == g.s_q else g.s_q * g.h_q
            dims = (COLUMN_BLOCK, heads, COLUMN_BLOCKS, g.slabs, g.batch)
            found = self._remember(
                self._q_maps, address, dims, (head, COLUMN_BLOCK, position, batch), False
            )
        return found

    def k_maps(self, address: int) -> Maps:
        """Over k_cache as [page, kv head, column block, token, 64]; pages outside are NaN."""
        found = self._k_maps.get(address)
        if found is None:
            g = self.geometry
            page, token, head, _ = g.k_strides
            dims = (COLUMN_BLOCK, g.page_size, COLUMN_BLOCKS, g.h_kv, g.num_pages)
            found = self._remember(
                self._k_maps, address, dims, (token, COLUMN_BLOCK, head, page), True
            )
        return found

    def _remember(
        self,
        maps: dict[int, Maps],
        address: int,
        dims: tuple[int, ...],
        strides: tuple[int, ...],
        nan_outside: bool,
    ) -> Maps:
        # Along a dimension of one element any stride will do, and NumPy's rule lets it be odd.
        in_bytes = [
            2 * stride if length > 1 else 2 * HEAD_DIM
            for stride, length in zip(strides, dims[1:], strict=True)
        ]
        rows = min(dims[1], 64) if nan_outside else 64
        counts = HALVES if rows == TOKENS_PER_TILE else (1,)
        if len(maps) >= MAX_MAPS:
            maps.clear()
        made = maps[address] = Maps(
            *(
                tensor_map(
                    address,
                    self.geometry.dtype,
                    dims,
                    in_bytes,
                    (COLUMN_BLOCK, rows, count, 1, 1),
                    nan_outside=nan_outside,
                )
                for count in counts
            )
        )
        return made
