"""How errors show values that are no arrays. Imports nothing."""

from __future__ import annotations

from typing import Any

_LONGEST = 256  # bits of an integer that is written out


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


def written(value: Any) -> str:
    """As Python writes it; where it cannot, as it does not integers of thousands of digits, what
    kind it is of."""
    try:
        return repr(value)
    except ValueError:
        return kind(value)
