"""Arrays of any other framework, through DLPack: CuPy views of those on a GPU, NumPy's otherwise.

The producer orders its pending work before CuPy's current stream, which is where the kernels run.
The import shares the memory and may drop a read-only mark on a GPU (CuPy knows none), so the views
of inputs are never written. DLPack needs no package: it is a protocol of the arrays themselves.
Struct layouts and numbers are those of dlpack.h.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from ..errors import ArgTypeError, DeviceMismatchError, MissingDependencyError, NoDeviceError
from .base import SPECIAL_DTYPES

_ON_HOST = (1, 3, 11)  # kDLCPU, kDLCUDAHost, kDLROCMHost
_ON_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_UINT, _BFLOAT = 1, 4  # kDLUInt, kDLBfloat
# Bytes before the DLTensor: in a DLManagedTensor none, in a DLManagedTensorVersioned those of
# version, context, deleter and flags.
_CAPSULES = {b"dltensor": 0, b"dltensor_versioned": 32}
_DTYPE = 20  # of a DLTensor: data, device and rank come before; code and bits are a byte each


def from_dlpack(x: Any, argument: str, *, writable: bool = False) -> Any:
    """A view of x; writable: one that may be written, unless x itself says that it is read-only.

    Raises ArgTypeError for what cannot be exported, DeviceMismatchError for a device that is
    neither the host nor a CUDA GPU, MissingDependencyError without CuPy, NoDeviceError without a
    driver."""
    try:
        kind = int(x.__dlpack_device__()[0])
        if kind in _ON_HOST:
            return _to_numpy(x, writable)
    except Exception as error:  # whatever a producer raises
        raise _no_export(x, argument, error) from error
    if kind not in _ON_CUDA:
        raise DeviceMismatchError(
            argument,
            "an array on a CUDA device, or on the CPU",
            f"{_name(x)} on DLPack device type {kind}",
            "Move it to an NVIDIA GPU, or to the host.",
        )
    cupy = _cupy(argument)
    if not cupy.cuda.is_available():
        raise NoDeviceError(
            f"{argument} lies on a CUDA device, but CUDA does not work here. Check the driver with"
            " nvidia-smi, or pass an array in host memory."
        )
    try:
        return cupy.from_dlpack(x)
    except Exception as error:
        raise _no_export(x, argument, error) from error


def _no_export(x: Any, argument: str, error: Exception) -> ArgTypeError:
    why = type(error).__name__
    if str(error):
        why += f": {str(error).splitlines()[0][:200]}"
    remedy = "Convert it to a NumPy or CuPy array first."
    expected = "an array that exports itself through DLPack"
    return ArgTypeError(argument, expected, f"{_name(x)} ({why})", remedy)


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


def _to_numpy(x: Any, writable: bool) -> np.ndarray:
    export = _Export(x)
    view: np.ndarray = np.from_dlpack(export)
    if export.was_bfloat16:
        view = view.view(SPECIAL_DTYPES["bfloat16"])
    if writable and not view.flags.writeable and not export.is_versioned:
        view = np.asarray(_Writable(view)).view(view.dtype)
    return view


class _Export:
    """Another array's export, with bfloat16 called uint16, which NumPy imports."""

    def __init__(self, x: Any) -> None:
        self._x = x
        self.was_bfloat16 = False
        self.is_versioned = False  # so that it says whether it may be written

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        try:
            capsule = self._x.__dlpack__(max_version=options.get("max_version"))
        except TypeError:  # a producer of the protocol's first version takes no such option
            capsule = self._x.__dlpack__()
        get, is_valid = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_IsValid
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
        for name, offset in _CAPSULES.items():
            if is_valid(capsule, name):
                self.is_versioned = offset > 0
                self._relabel(get(capsule, name) + offset + _DTYPE)
        return capsule

    def _relabel(self, address: int) -> None:
        code, bits = ctypes.c_uint8.from_address(address), ctypes.c_uint8.from_address(address + 1)
        self.was_bfloat16 = code.value == _BFLOAT and bits.value == 16
        if self.was_bfloat16:
            code.value = _UINT


class _Writable:
    """The memory of an array whose producer does not say whether it may be written: the caller
    does, who passes it as an output."""

    def __init__(self, view: np.ndarray) -> None:
        raw = view.view(np.uint16) if view.dtype.name == "bfloat16" else view
        self._keeps = view
        interface = dict(raw.__array_interface__)
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
