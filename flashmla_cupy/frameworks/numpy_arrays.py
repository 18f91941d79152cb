"""NumPy arrays: host memory, computed by `reference`. bfloat16 is that of ml_dtypes."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ..errors import ArgTypeError
from .base import (
    HOST,
    Adapter,
    ArrayInfo,
    dtype_names,
    element_strides,
    no_whole_strides,
    numpy_dtype,
)


def masked(x: Any, argument: str) -> ArgTypeError:
    """Of numpy.ma, or of anything else that keeps a mask."""
    kind = type(x)
    remedy = "Pass numpy.ma.getdata(x), or x.filled(value): a mask cannot be kept."
    shown = f"{kind.__module__}.{kind.__qualname__}"
    return ArgTypeError(argument, "an array without a mask", shown, remedy)


class NumPy(Adapter):
    name = "numpy"
    pointer = staticmethod(operator.attrgetter("ctypes.data"))

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        if type(x) is not np.ndarray and hasattr(x, "mask"):
            raise masked(x, argument)
        dtype = x.dtype
        strides = element_strides[x.strides, dtype.itemsize or 1]
        if len(strides) != x.ndim:
            raise no_whole_strides(x, argument)
        return ArrayInfo(
            x.ctypes.data, x.shape, strides, dtype_names[dtype], HOST, not x.flags.writeable
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)
