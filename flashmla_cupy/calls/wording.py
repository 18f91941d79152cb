"""How errors show arrays and values."""

from __future__ import annotations

from typing import Any

from ..frameworks import ArrayInfo


def show(info: ArrayInfo) -> str:
    """ "int64 (8, 16)" """
    return f"{info.dtype} {tuple(info.shape)}"


def strides(info: ArrayInfo) -> str:
    """ "strides (16, 1) for int64 (8, 16)" """
    return f"strides {tuple(info.strides)} for {show(info)}"


def kind(value: Any) -> str:
    """ "list", "float 0.5": the type of an object that is no array, and a number's value."""
    of = type(value)
    name = f"{of.__module__}.{of.__qualname__}".removeprefix("builtins.")
    if value is None:
        return "None"
    return f"{name} {value!r}" if isinstance(value, (bool, int, float, complex, str)) else name
