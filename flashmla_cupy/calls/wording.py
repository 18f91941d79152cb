"""How errors show arrays and values."""

from __future__ import annotations

from ..frameworks import ArrayInfo
from ..values import digits, kind, written

__all__ = ["digits", "kind", "show", "strides", "written"]


def show(info: ArrayInfo) -> str:
    """ "int64 (8, 16)" """
    return f"{info.dtype} {tuple(info.shape)}"


def strides(info: ArrayInfo) -> str:
    """ "strides (16, 1) for int64 (8, 16)" """
    return f"strides {tuple(info.strides)} for {show(info)}"
