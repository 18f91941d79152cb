"""CuPy arrays: launched on CuPy's current stream, results from CuPy's memory pool."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..gpu.driver import NEVER_CAPTURED, RelaxedCapture, capture_id
from .base import (
    HERE,
    Adapter,
    ArrayInfo,
    dtype_names,
    element_strides,
    no_whole_strides,
    numpy_dtype,
)

ALIGNMENT = 512  # of an array, as of allocations in CuPy's pool

_facts = operator.attrgetter("shape", "strides", "dtype", "data.device_id")
_pointer = operator.attrgetter("data.ptr")


class CuPy(Adapter):
    name = "cupy"
    pointer = staticmethod(_pointer)

    def __init__(self) -> None:
        cupy: Any = importlib.import_module("cupy")
        self._empty = cupy.empty
        self._alloc = cupy.cuda.alloc
        self._ndarray = cupy.ndarray
        self._device = cupy.cuda.Device
        self._asynchronous = cupy.cuda.MemoryAsync  # memory of cudaMallocAsync
        self._new_stream = cupy.cuda.Stream
        self._side_streams: dict[int, Any] = {}
        self._current_device = cupy.cuda.runtime.getDevice
        self._current_stream = cupy.cuda.get_current_stream
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        self.stream = self._stream_of
        self._graph_scratch: dict[tuple[int, int], list[Any]] = {}

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        dtype = x.dtype
        data = x.data
        strides = element_strides[x.strides, dtype.itemsize]
        if len(strides) != x.ndim:
            raise no_whole_strides(x, argument)
        return ArrayInfo(data.ptr, x.shape, strides, dtype_names[dtype], data.device_id)

    def signature(self, arrays: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
        try:
            return (self, *map(_facts, arrays)), tuple(map(_pointer, arrays))
        except AttributeError:  # one of them is absent
            facts = [None if x is None else _facts(x) for x in arrays]
            return (self, *facts), tuple([0 if x is None else _pointer(x) for x in arrays])

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._empty(shape, numpy_dtype(dtype))

    def allocator(self, shape: tuple[int, ...], dtype: str, device: int) -> Callable[[], Any]:
        kind = numpy_dtype(dtype)
        new, array, size = self._alloc, self._ndarray, math.prod(shape) * kind.itemsize

        def one() -> Any:
            memory = new(size)
            if type(memory.mem) is self._asynchronous:
                memory = self._not_of_a_graph(memory, size, device)
            return array(shape, kind, memory)

        return one

    def pair_allocator(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], device: int
    ) -> Callable[[], tuple[Any, Any]]:
        """The two share an allocation, which lives as long as either."""
        first, second = ((s, numpy_dtype(d)) for s, d in zip(shapes, dtypes, strict=True))
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in (first, second)]
        offset = -(-sizes[0] // ALIGNMENT) * ALIGNMENT
        new, array, size = self._alloc, self._ndarray, offset + sizes[1]
        asynchronous = self._asynchronous

        def pair() -> tuple[Any, Any]:
            memory = new(size)
            if type(memory.mem) is asynchronous:
                memory = self._not_of_a_graph(memory, size, device)
            return array(*first, memory), array(*second, memory + offset)

        return pair

    def scratch_allocator(self, floats: int, device: int) -> Callable[[], tuple[Any, int]]:
        """Scratch returns to the pool after a call, in the order of the stream. A graph, though,
        writes to it in every replay, and CuPy's pool does not know: so what a capture is given is
        kept, once for all calls on the same stream in the same capture."""
        new, size = self._alloc, 4 * floats

        def scratch() -> tuple[Any, int]:
            stream = self.stream(device)
            if stream in NEVER_CAPTURED or not self._is_capturing(stream):
                memory = new(size)
                return memory, memory.ptr
            kept = self._graph_scratch.setdefault((capture_id(stream), stream), [])
            if not kept or kept[-1].mem.size < size:
                memory = new(size)
                if type(memory.mem) is self._asynchronous:
                    memory = self._not_of_a_graph(memory, size, device)
                kept.append(memory)
            return kept[-1], kept[-1].ptr

        return scratch

    def _not_of_a_graph(self, memory: Any, size: int, device: int) -> Any:
        """`memory`, which cudaMallocAsync gave for the current stream, if that is not captured.

        Else a graph would own it, and not be launched again while the array lives. So it is given
        back, within the graph, and taken on a stream that is not captured."""
        stream = self.stream(device)
        if stream in NEVER_CAPTURED or not self._is_capturing(stream):
            return memory
        with RelaxedCapture():
            side = self._side_streams.get(device)
            if side is None:
                side = self._side_streams[device] = self._new_stream(non_blocking=True)
            with side:
                made = self._alloc(size)
            side.synchronize()  # the graph need not wait for it
        return made

    def _stream_of(self, device: int) -> int:
        stream: int = self._current_stream(device).ptr
        return stream

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        if self._current_device() == device:
            return HERE
        guard: AbstractContextManager[Any] = self._device(device)
        return guard

    def to_numpy(self, x: Any) -> np.ndarray:
        raise TypeError("A CuPy array is not in host memory.")
