"""Checks of the arrays that a checkpoint's layers are computed from."""

from __future__ import annotations

import importlib
import math
import numbers
from typing import Any

import numpy as np

from .calls.wording import kind
from .errors import ArgTypeError, ScalarError, ShapeError
from .frameworks.numpy_arrays import masked


def last_axis(x: Any, argument: str, rank: int, function: str) -> int:
    """The length of the last axis of an array of so many axes."""
    namespace(x, function, argument)
    if len(x.shape) != rank:
        expected, remedy = f"an array of {rank} axes", "See the docstring for what they are."
        raise ShapeError(argument, expected, f"{tuple(x.shape)}", remedy, function)
    return int(x.shape[-1])


def check_angles(cos: Any, sin: Any, pairs: int | None, lead: Any, function: str) -> None:
    """Columns for so many pairs in both, and rows for these leading axes; pairs None: for any
    number."""
    for argument, table in (("cos", cos), ("sin", sin)):
        namespace(table, function, argument)
        found = tuple(table.shape)
        if not found or found[-1] != (cos.shape[-1] if pairs is None else pairs):
            expected = "a column for each pair of rotary columns, the same of cos and sin"
            remedy = "Pass rows of rotary_tables(); other libraries' tables have each angle twice."
            raise ShapeError(argument, expected, f"{found}", remedy, function)
        rows = tuple(lead)
        rows = (1,) * (len(found) - 1 - len(rows)) + rows
        for length, row in zip(reversed(found[:-1]), reversed(rows), strict=False):
            if length not in (1, row):
                expected = f"rows for the leading axes {tuple(lead)}, or an axis of 1 for one"
                remedy = "Take the tables at the positions of these rows: cos[positions]."
                raise ShapeError(argument, expected, f"{found}", remedy, function)


def check_eps(eps: Any, function: str) -> None:
    """A finite number that is not negative."""
    is_number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not is_number:
        raise ArgTypeError("eps", "a real number", kind(eps), "Pass a Python float.", function)
    if not 0 <= eps < math.inf:
        remedy = "Pass rms_norm_eps of the configuration, or 1e-6."
        raise ScalarError("eps", "a number from 0 on", kind(eps), remedy, function)


def namespace(x: Any, function: str, argument: str) -> Any:
    """The module of x's functions, which all have stack, concatenate, matmul and sqrt."""
    if isinstance(x, np.ndarray):
        if hasattr(x, "mask"):
            raise masked(x, argument).of(function)
        return np
    root = type(x).__module__.partition(".")[0]
    module = {"cupy": "cupy", "torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}.get(root)
    if module is None:
        expected = "an array of NumPy, CuPy, PyTorch or JAX"
        remedy = "Put the data into an array first."
        raise ArgTypeError(argument, expected, type(x).__qualname__, remedy, function)
    return importlib.import_module(module)
