"""Everything that writes to a pool: new rows, copies of pages, tables of a step.

HostWriter does it by NumPy, DeviceWriter by append.cu, copy_pages.cu and update_tables.cu, on the
stream that is current for the framework whose rows are given. Rows are moved as bits, so that a
NaN stays what it is.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..frameworks import Adapter, ArrayInfo, framework
from .pool import Pool
from .views import bits_of, stream_of

Int32 = npt.NDArray[np.int32]

_MOST_ELEMENTS = 2**26


class HostWriter:
    """For a pool in host memory."""

    def __init__(self, pool: Pool) -> None:
        self._bits = pool.bits
        self._page_size = pool.layout.page_size

    def write(self, rows: Any, adapter: Adapter, slots: Any, layers: slice) -> None:
        """rows [layers, batch, n, h_kv, width] to slots [batch, n], both of one framework; negative
        ones are skipped."""
        bits, slots = bits_of(rows, adapter), adapter.to_numpy(slots)
        kept = slots >= 0
        page, slot = slots[kept] // self._page_size, slots[kept] % self._page_size
        for layer, of_layer in zip(range(*layers.indices(self._bits.shape[1])), bits, strict=True):
            self._bits[page, layer, slot] = of_layer[kept]

    def copy_pages(self, source: Int32, target: Int32, stream: int) -> None:
        self._bits[target] = self._bits[source]

    def save(self, pages: Int32, stream: int) -> Any:
        """The contents of some pages, [pages, layers, ...]."""
        return self._bits[pages]

    def restore(self, saved: Any, pages: Int32, stream: int) -> None:
        self._bits[pages] = saved


class DeviceWriter:
    """For a pool on a GPU."""

    def __init__(self, pool: Pool) -> None:
        from ..gpu.append_launch import CacheLaunches, PoolGeometry
        from ..gpu.engine import engine_of

        self._pool, self._bits, layout = pool, pool.bits, pool.layout
        self._cupy: Any = importlib.import_module("cupy")
        page, layer, slot, head, element = self._bits.strides
        self.geometry = PoolGeometry(
            pool.address,
            layer,
            page,
            slot,
            head,
            layout.num_pages,
            layout.page_size,
            layout.num_heads_kv,
            layout.width * element,
        )
        self._of_pages = self.geometry
        if layout.dtype == "uint8":  # a page may be more than its rows
            whole = layout.page_size * layout.num_heads_kv * layout.width
            self._of_pages = self.geometry._replace(page_size=1, heads=1, row_bytes=whole)
        dtype = layout.dtype if layout.dtype != "uint8" else "bfloat16"
        self.launches = CacheLaunches(engine_of(pool.place), dtype)

    def write(self, rows: Any, adapter: Adapter, slots: Any, layers: slice) -> None:
        """rows as for a HostWriter; slots: int64 [batch, n] on the GPU, of the same framework."""
        from ..gpu.append_launch import Rows

        info = adapter.describe(rows, "rows")
        if not _is_plain(info):
            rows = rows.contiguous() if adapter.name == "torch" else self._contiguous(rows)
            info = adapter.describe(rows, "rows")
        size = self._bits.dtype.itemsize
        layer, row, token, head = (stride * size for stride in info.strides[:4])
        count, batch, n = info.shape[:3]
        first = layers.indices(self._bits.shape[1])[0]
        geometry = self.geometry
        if first:
            address = geometry.address + first * geometry.layer_stride
            geometry = geometry._replace(address=address)
        of = Rows(info.ptr, layer, row, token, head, count, batch, n)
        with adapter.device_guard(self._pool.place):
            stream = adapter.stream(self._pool.place)
            self.launches.append(stream, geometry, of, adapter.pointer(slots))

    def copy_pages(self, source: Int32, target: Int32, stream: int) -> None:
        cuda = self._cupy.cuda
        with cuda.Device(self._pool.place), stream_of(cuda, stream, self._pool.place):
            pages = self._cupy.asarray(np.stack([source, target]))
            layers = self._bits.shape[1]
            self.launches.copy_pages(stream, self._of_pages, layers, pages.data.ptr, len(source))

    def save(self, pages: Int32, stream: int) -> Any:
        """A copy in host memory, made by the time that the call returns."""
        cuda = self._cupy.cuda
        saved = np.empty((len(pages), *self._bits.shape[1:]), self._bits.dtype)
        with cuda.Device(self._pool.place), stream_of(cuda, stream, self._pool.place):
            for some in self._parts(len(pages)):
                saved[some] = self._bits[self._cupy.asarray(pages[some])].get()
        return saved

    def restore(self, saved: Any, pages: Int32, stream: int) -> None:
        cuda = self._cupy.cuda
        with cuda.Device(self._pool.place), stream_of(cuda, stream, self._pool.place):
            for some in self._parts(len(pages)):
                self._bits[self._cupy.asarray(pages[some])] = self._cupy.asarray(saved[some])

    def _parts(self, pages: int) -> list[slice]:
        """Of so many pages, so few at a time that CuPy can count their elements in 32 bits."""
        step = max(1, _MOST_ELEMENTS // math.prod(self._bits.shape[1:]))
        return [slice(start, start + step) for start in range(0, pages, step)]

    def _contiguous(self, rows: Any) -> Any:
        with framework("cupy").device_guard(self._pool.place):
            return self._cupy.ascontiguousarray(rows)


def _is_plain(info: ArrayInfo) -> bool:
    """Whether rows can be read by vectors of 16 bytes."""
    if info.strides[-1] != 1 or info.ptr % 16:
        return False
    size = 1 if info.dtype == "uint8" else 2
    return all(
        stride * size % 16 == 0 or length == 1
        for stride, length in zip(info.strides[:-1], info.shape[:-1], strict=True)
    )
