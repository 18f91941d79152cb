"""What the library asks of an array framework, and the names it uses for dtypes and devices."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from ..errors import StrideError

HOST = -1
HERE: AbstractContextManager[Any] = nullcontext()  # guards nothing: the device is current already
SPECIAL_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # those NumPy does not know by name


class ArrayInfo(NamedTuple):
    """What the checks and the kernels need to know of an array."""

    ptr: int  # address of element 0
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # NumPy's names: "bfloat16", "float16", "int32", ...
    device: int  # CUDA ordinal; HOST for host memory
    readonly: bool = False


class Framework(Protocol):
    """An adapter. Nothing here copies, and nothing waits for the device.

    An adapter whose allocator does not know of CUDA graphs has scratch_allocator(floats, device):
    a function without arguments that makes float32 scratch for one call, and returns what keeps it
    alive and its address.

    For calls that were seen before an adapter may have methods more, faster ways to the same:
    signature(*arrays) -> (facts, pointers), of all arrays of a call, None for one it lacks, where
    arrays that differ in anything but their pointers have different facts;
    allocator(shape, dtype, device) -> a function without arguments that does what empty() does; and
    pair_allocator(shapes, dtypes, device) -> one that makes two arrays.
    """

    name: str

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        """The facts of array x. Raises an ArgumentError, naming the argument, when x is not a
        dense array in host memory or on a CUDA device that the kernels may read."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        """A new contiguous array from the framework's caching allocator, on its current stream."""

    def pointer(self, x: Any) -> int:
        """The address of element 0."""

    def stream(self, device: int) -> int:
        """The CUstream that is current for this thread on this device."""

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        """Makes the device current inside a with block."""

    def to_numpy(self, x: Any) -> np.ndarray:
        """A view (never a copy) of an array in host memory."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name, bfloat16 included."""
    return SPECIAL_DTYPES.get(name) or np.dtype(name)


class _DtypeNames(dict[Any, str]):
    """Names of NumPy dtypes; np.dtype.name itself takes a microsecond."""

    def __missing__(self, dtype: np.dtype[Any]) -> str:
        self[dtype] = dtype.name
        return dtype.name


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
