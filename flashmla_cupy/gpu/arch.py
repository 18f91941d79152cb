"""Which GPUs the kernels run on, and for which architecture they are compiled there."""

from __future__ import annotations

from typing import Any

# Compute capability -> the architecture that kernels are compiled for; the table in kernels.py
# says which kernels there are for each.
ARCHS = {(9, 0): "sm_90a"}
GPUS = "H100, H200, H800, H20, GH200"  # those of ARCHS, as messages name them
CAPABILITIES = ", ".join(f"{major}.{minor}" for major, minor in ARCHS)


def capability(properties: dict[str, Any]) -> tuple[int, int]:
    """Of a GPU, from cupy.cuda.runtime.getDeviceProperties()."""
    return properties["major"], properties["minor"]


def arch_of(properties: dict[str, Any]) -> str | None:
    """What kernels are compiled for on this GPU; None if it is not supported."""
    return ARCHS.get(capability(properties))


def launches_programmatically(properties: dict[str, Any]) -> bool:
    """Whether kernels can start before the one ahead of them ends (griddepcontrol)."""
    return capability(properties) >= (9, 0)
