"""The shape of an argument, before anything else is known of it."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError
from . import is_foreign
from .dlpack import from_dlpack


def shape_of(x: Any, argument: str, function: str) -> tuple[int, ...]:
    """That of an array of any framework; () for what is none, which checks will say. An array that
    DLPack can import need not have a `shape`. Raises an ArgumentError for one that it cannot."""
    shape = getattr(x, "shape", None)
    if isinstance(shape, tuple):
        return shape
    if not is_foreign(x):
        return ()
    try:
        return tuple(from_dlpack(x, argument).shape)
    except ArgumentError as error:
        raise error.of(function) from error.__cause__
