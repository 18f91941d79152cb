"""What the library asks of an array framework, and the names it uses for dtypes and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import StrideError

HOST = -1
HERE: AbstractContextManager[Any] = nullcontext()  # guards nothing: the device is current already
SPECIAL_DTYPES = {  # those NumPy does not know by name
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


class ArrayInfo(NamedTuple):
    """What the checks and the kernels need to know of an array."""

    ptr: int  # address of element 0
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # NumPy's names: "bfloat16", "float16", "int32", ...
    device: int  # CUDA ordinal; HOST for host memory
    readonly: bool = False


def _no_stream(device: int) -> int:
    return 0


def _untold(x: Any) -> None:
    return None


class Adapter:
    """A framework. Nothing here copies, and nothing waits for the device.

    An adapter has to say `describe`, and where the library computes on its arrays also `empty`,
    `pointer`, and what differs of the rest from NumPy's ways. It may know faster ways to do the
    others for calls that were seen before."""

    name: str
    # Functions, not methods: a framework's own takes half the time without a method around it.
    pointer: Callable[[Any], int]  # the address of element 0
    stream: Callable[[int], int] = staticmethod(_no_stream)  # the CUstream of this thread there
    # Tells the framework that a call writes into an array of the caller's.
    written: Callable[[Any], None] = staticmethod(_untold)

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        """The facts of array x. Raises an ArgumentError, naming the argument, when x is not a
        dense array in host memory or on a CUDA device that the kernels may read."""
        raise NotImplementedError

    def signature(self, arrays: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
        """(facts, addresses) of the arrays of a call, None for one it lacks, with 0 for its
        address. Arrays that differ in anything but their addresses have different facts. Raises
        anything for arrays that the checks may not pass."""
        infos = [None if x is None else self.describe(x) for x in arrays]
        facts = self, *[None if info is None else info[1:] for info in infos]
        return facts, tuple([0 if info is None else info[0] for info in infos])

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        """A new contiguous array from the framework's caching allocator, on its current stream."""
        raise NotImplementedError

    def allocator(self, shape: tuple[int, ...], dtype: str, device: int) -> Callable[[], Any]:
        """A function that does what empty() does with these arguments."""
        return functools.partial(self.empty, shape, dtype, device)

    def pair_allocator(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], device: int
    ) -> Callable[[], tuple[Any, Any]]:
        """The same for two arrays that come together."""
        first, second = (
            self.allocator(shape, dtype, device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return lambda: (first(), second())

    def scratch_allocator(self, floats: int, device: int) -> Callable[[], tuple[Any, int]]:
        """A function that makes float32 scratch for one call: what keeps it alive, and its
        address. Scratch is freed at the end of the call, in the order of the stream."""
        make, pointer = self.allocator((floats,), "float32", device), self.pointer

        def scratch() -> tuple[Any, int]:
            room = make()
            return room, pointer(room)

        return scratch

    def is_fake(self, x: Any) -> bool:
        """Whether x only stands for an array, and has no memory."""
        return False

    def is_traced(self, x: Any) -> bool:
        """Whether a call with x has to become part of a trace."""
        return False

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        """Makes the device current inside a with block."""
        return HERE

    def to_numpy(self, x: Any) -> np.ndarray:
        """A view (never a copy) of an array in host memory."""
        raise NotImplementedError


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name, bfloat16 included."""
    return SPECIAL_DTYPES.get(name) or np.dtype(name)


class _DtypeNames(dict[Any, str]):
    """Names of NumPy dtypes; np.dtype.name itself takes a microsecond. One of the other byte order
    has a name of its own, ">f2", since its bits are not those of float16."""

    def __missing__(self, dtype: np.dtype[Any]) -> str:
        name = self[dtype] = dtype.name if dtype.isnative else dtype.str
        return name


class _ElementStrides(dict[tuple[tuple[int, ...], int], tuple[int, ...]]):
    """(strides in bytes, itemsize) -> strides in elements; () where they are no whole number."""

    def __missing__(self, key: tuple[tuple[int, ...], int]) -> tuple[int, ...]:
        strides, itemsize = key
        elements = tuple(stride // itemsize for stride in strides)
        if any(stride % itemsize for stride in strides):
            elements = ()
        if len(self) < 4096:
            self[key] = elements
        return elements


dtype_names = _DtypeNames()
element_strides = _ElementStrides()


def no_whole_strides(x: Any, argument: str) -> StrideError:
    """For an array whose strides are no multiples of its itemsize."""
    return StrideError(
        argument,
        "strides that are multiples of the itemsize",
        f"strides {x.strides} bytes with itemsize {x.dtype.itemsize}",
        "Pass a contiguous copy, not a field of a structured array.",
    )
