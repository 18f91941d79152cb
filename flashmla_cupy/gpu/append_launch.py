"""Launches of append.cu, copy_pages.cu and update_tables.cu, which change a paged cache."""

from __future__ import annotations

import threading
from typing import NamedTuple

from ..sizes import ceil_div
from .driver import Launch
from .engine import Engine
from .kernels import APPEND, COPY_PAGES, UPDATE_TABLES, Kernel, Variant
from .parameters import Arguments

_VECTOR_BYTES, _MOST_VECTORS = 16, 4  # MOST_VECTORS of the kernels
_ROTARY_VECTORS = 8  # of a row

_APPEND = APPEND.parameters.run(tuple(APPEND.parameters.letters))
_COPY = COPY_PAGES.parameters.run(tuple(COPY_PAGES.parameters.letters))
_UPDATE = UPDATE_TABLES.parameters.run(tuple(UPDATE_TABLES.parameters.letters))


class PoolGeometry(NamedTuple):
    """Where a pool has its rows; strides in bytes."""

    address: int
    layer_stride: int
    page_stride: int
    slot_stride: int
    head_stride: int
    num_pages: int
    page_size: int  # a power of two
    heads: int
    row_bytes: int  # of one head; a multiple of 16


class Rows(NamedTuple):
    """Where new rows are, [layers, batch, tokens, heads]; strides in bytes."""

    address: int
    layer_stride: int
    batch_stride: int
    token_stride: int
    head_stride: int
    layers: int
    batch: int
    tokens: int


class Rotary(NamedTuple):
    """Addresses of float32 tables [num_positions, 32] and of int64 positions [batch * tokens]."""

    cos: int
    sin: int
    positions: int
    num_positions: int
    interleaved: bool


NO_ROTATION = Rotary(0, 0, 0, 0, False)


class CacheLaunches:
    """The kernels of one GPU that change a cache, loaded, with the launches of each thread."""

    def __init__(self, engine: Engine, dtype: str) -> None:
        """dtype: "bfloat16" or "float16", of the rotation; without one either will do."""
        self._engine, self._own = engine, threading.local()
        self._functions = engine.load(
            Variant(APPEND.name, dtype, arch=engine.arch),
            Variant(COPY_PAGES.name, arch=engine.arch),
            Variant(UPDATE_TABLES.name, arch=engine.arch),
        )

    def append(
        self, stream: int, pool: PoolGeometry, rows: Rows, slots: int, rotary: Rotary = NO_ROTATION
    ) -> None:
        """The rows to where the int64 slot mapping [batch * tokens] at address `slots` says."""
        vectors = pool.row_bytes // _VECTOR_BYTES
        total = rows.batch * rows.tokens * pool.heads
        if total == 0 or rows.layers == 0:
            return
        copied, rotary_blocks = vectors, 0
        if rotary.num_positions:
            copied -= _ROTARY_VECTORS
            rotary_blocks = ceil_div(total * _ROTARY_VECTORS, APPEND.threads)
        of = self._launches()
        _APPEND.pack_into(
            of.append.arguments.buffer,
            0,
            rows.address,
            slots,
            pool.address,
            *rotary[:3],
            *rows[1:5],
            *pool[1:5],
            pool.num_pages * pool.page_size,
            rotary.num_positions,
            vectors,
            pool.heads,
            rows.tokens,
            total,
            pool.page_size.bit_length() - 1,
            rotary.interleaved,
            rotary_blocks,
        )
        of.append(stream, rotary_blocks + self._blocks(total * copied), rows.layers, 1)

    def copy_pages(
        self, stream: int, pool: PoolGeometry, layers: int, pages: int, copies: int
    ) -> None:
        """Of all layers; pages: the address of int32 [2, copies], from and to."""
        vectors = pool.row_bytes // _VECTOR_BYTES
        of = self._launches()
        _COPY.pack_into(
            of.copy.arguments.buffer,
            0,
            pool.address,
            pages,
            *pool[1:5],
            vectors,
            pool.heads,
            pool.page_size,
            copies,
        )
        total = vectors * pool.heads * pool.page_size
        of.copy(stream, ceil_div(total, 256 * _MOST_VECTORS), layers, copies)

    def update_tables(
        self,
        stream: int,
        staged: int,
        slot_mapping: int,
        cache_seqlens: int,
        block_table: int,
        sizes: tuple[int, int, int],
    ) -> None:
        """sizes: how many slots, lengths and changes of block_table are staged, in this order."""
        of = self._launches()
        _UPDATE.pack_into(
            of.update.arguments.buffer, 0, staged, slot_mapping, cache_seqlens, block_table, *sizes
        )
        of.update(stream, ceil_div(max(1, *sizes), 256), 1, 1)

    def _blocks(self, total: int) -> int:
        """That copy so many vectors: two a multiprocessor before a thread takes a second vector."""
        each = APPEND.threads
        least = ceil_div(total, each * _MOST_VECTORS)
        return max(least, min(ceil_div(total, each), 2 * self._engine.num_sms))

    def _launches(self) -> _OfThread:
        found: _OfThread | None = getattr(self._own, "launches", None)
        if found is None:
            found = self._own.launches = _OfThread(self)
        return found


class _Ready:
    """A launch with its packed arguments."""

    def __init__(self, launch: Launch, kernel: Kernel) -> None:
        self._launch, self.arguments = launch, Arguments(kernel.parameters)

    def __call__(self, stream: int, x: int, y: int, z: int) -> None:
        self._launch.config.grid[:] = (x, y, z)
        self._launch(stream, self.arguments.address)


class _OfThread:
    def __init__(self, of: CacheLaunches) -> None:
        append, copy, update = (Launch(function, (1, 1, 1)) for function in of._functions)
        self.append = _Ready(append, APPEND)
        self.copy = _Ready(copy, COPY_PAGES)
        self.update = _Ready(update, UPDATE_TABLES)
