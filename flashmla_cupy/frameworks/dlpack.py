"""Arrays of any other framework, through DLPack: CuPy views of those on a GPU, NumPy's otherwise.

The producer orders its pending work before CuPy's current stream, which is where the kernels run.
The import shares the memory and may drop a read-only mark on a GPU (CuPy knows none), so the views
of inputs are never written. DLPack needs no package: it is a protocol of the arrays themselves.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from ..errors import ArgTypeError, DeviceMismatchError, MissingDependencyError
from .base import SPECIAL_DTYPES

_ON_HOST = (1, 3, 11)  # kDLCPU, kDLCUDAHost, kDLROCMHost
_ON_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_UINT, _BFLOAT = 1, 4  # kDLUInt, kDLBfloat


def from_dlpack(x: Any, argument: str) -> Any:
    """A view of x. Raises ArgTypeError for what cannot be exported, DeviceMismatchError for a
    device that is neither the host nor a CUDA GPU, MissingDependencyError without CuPy."""
    try:
        kind = int(x.__dlpack_device__()[0])
        if kind in _ON_HOST:
            return _to_numpy(x)
        if kind in _ON_CUDA:
            return _cupy(argument).from_dlpack(x)
    except (AttributeError, BufferError, NotImplementedError, TypeError, ValueError) as error:
        raise ArgTypeError(
            argument,
            "an array that exports itself through DLPack",
            f"{_name(x)} ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
            if str(error)
            else f"{_name(x)} ({type(error).__name__})",
            "Convert it to a NumPy or CuPy array first.",
        ) from error
    raise DeviceMismatchError(
        argument,
        "an array on a CUDA device, or on the CPU",
        f"{_name(x)} on DLPack device type {kind}",
        "Move it to an NVIDIA GPU, or to the host.",
    )


def _name(x: Any) -> str:
    of = type(x)
    return f"{of.__module__}.{of.__qualname__}"


def _cupy(argument: str) -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise MissingDependencyError(
            f"{argument} lies on a GPU, which needs CuPy. Install flashmla-cupy[cuda12]."
        ) from error


def _to_numpy(x: Any) -> np.ndarray:
    try:
        view: np.ndarray = np.from_dlpack(x)
        return view
    except (BufferError, RuntimeError, TypeError):  # NumPy's ways to refuse bfloat16
        relabelled = _Relabelled(x)
        view = np.from_dlpack(relabelled)
        return view.view(SPECIAL_DTYPES["bfloat16"]) if relabelled.was_bfloat16 else view


class _Relabelled:
    """Another array's export with bfloat16 called uint16, which NumPy imports."""

    def __init__(self, x: Any) -> None:
        self._x = x
        self.was_bfloat16 = False

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._x.__dlpack__()  # unversioned: DLManagedTensor, which begins with DLTensor
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = get(capsule, b"dltensor")
        # DLTensor: void* data, DLDevice {i32, i32}, i32 ndim, DLDataType {u8 code, u8 bits, u16}.
        code = ctypes.c_uint8.from_address(address + 20)
        bits = ctypes.c_uint8.from_address(address + 21)
        self.was_bfloat16 = code.value == _BFLOAT and bits.value == 16
        if self.was_bfloat16:
            code.value = _UINT
        return capsule
