"""How errors show an object that came in the place of another."""

from __future__ import annotations

from typing import Any

import numpy as np

_PLAIN = (bool, int, float, complex, str)  # and no classes made of them, whose words may fail
_LONGEST = 64  # of a text in characters, of an integer in bits: what a sentence can hold


def said(value: Any) -> str:
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
    size, unit = 0, ""
    if of is int:
        size, unit = value.bit_length(), "bits"
    elif of is str:
        size, unit = len(value), "characters"
    return f"{name} {value!r}" if size <= _LONGEST else f"{name} of {size} {unit}"
