"""How errors show arrays and values."""

from __future__ import annotations

from typing import Any

from ..frameworks import ArrayInfo

_LONGEST = 256  # bits of an integer that is written out


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
    if isinstance(value, int) and value.bit_length() > _LONGEST:
        return f"{name} of {value.bit_length()} bits"
    return f"{name} {value!r}" if isinstance(value, (bool, int, float, complex, str)) else name


def digits(number: int) -> str:
    """ "12"; of a number that is too long for a sentence, and maybe for Python to write, its
    size."""
    size = number.bit_length()
    return f"{number}" if size <= _LONGEST else f"one of {size} bits"
