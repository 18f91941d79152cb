"""Which GPUs the kernels run on: compute capability 9.0, as ARCH in compiler.py says."""

from __future__ import annotations

from typing import Any

CAPABILITY = (9, 0)


def capability(properties: dict[str, Any]) -> tuple[int, int]:
    """Of a GPU, from cupy.cuda.runtime.getDeviceProperties()."""
    return properties["major"], properties["minor"]


def is_hopper(properties: dict[str, Any]) -> bool:
    """Whether it is one of them."""
    return capability(properties) == CAPABILITY
