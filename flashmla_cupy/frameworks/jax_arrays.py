"""JAX arrays and tracers: shapes and dtypes only.

XLA owns the memory, the streams and the order of work, so an address means nothing outside a
traced function. `jax_op` makes the calls; this adapter lets the same checks run at trace time and
mixed frameworks be named.
"""

from __future__ import annotations

import importlib
from typing import Any

from .base import HOST, Adapter, ArrayInfo, dtype_names


class Jax(Adapter):
    name = "jax"

    def __init__(self) -> None:
        jax: Any = importlib.import_module("jax")
        self._array = jax.Array  # the class of tracers, too

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        """Row-major, as XLA hands it over, at no address and on no device in particular."""
        if not isinstance(x, self._array):  # NumPy's arrays have all that is read here
            raise TypeError(f"{argument} is no JAX array")
        shape = x.shape
        strides = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            strides[axis - 1] = strides[axis] * shape[axis]
        return ArrayInfo(0, shape, tuple(strides), dtype_names[x.dtype], HOST)

    def signature(self, arrays: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
        raise TypeError("The memory of a JAX array belongs to XLA.")
