"""NumPy arrays: host memory, computed by `reference`. bfloat16 is that of ml_dtypes."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .base import (
    HOST,
    Adapter,
    ArrayInfo,
    dtype_names,
    element_strides,
    no_whole_strides,
    numpy_dtype,
)


class NumPy(Adapter):
    name = "numpy"
    pointer = staticmethod(operator.attrgetter("ctypes.data"))

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
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
