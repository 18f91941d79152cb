"""How errors show values that came in the place of others."""

from __future__ import annotations

from typing import Any

import numpy as np

_PLAIN = (bool, int, float, complex, str)  # and no classes made of them, whose words may fail
_LONGEST = {int: 256, str: 64}  # bits and characters that a sentence can hold


def kind(value: Any) -> str:
    """ "list", "float 0.5", "str of 300 characters": the type of an object, and a short plain
    value. Nothing is asked of other objects, whose own words may be long, or fail."""
    of = type(value)
    if value is None:
        return "None"
    name = f"{of.__module__}.{of.__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.number):
        return f"{name} {value}"
    if of not in _PLAIN:
        return name
    if of is int and value.bit_length() > _LONGEST[int]:
        return f"{name} of {value.bit_length()} bits"
    if of is str and len(value) > _LONGEST[str]:
        return f"{name} of {len(value)} characters"
    return f"{name} {value!r}"


def digits(number: int) -> str:
    """ "12"; of a number that is too long for a sentence, and maybe for Python to write, its
    size."""
    size = number.bit_length()
    return f"{number}" if size <= _LONGEST[int] else f"one of {size} bits"


def written(value: Any) -> str:
    """As Python writes it; where it cannot, as it does not integers of thousands of digits, what
    kind it is of."""
    try:
        return repr(value)
    except ValueError:
        return kind(value)
