"""Adapters for the array frameworks: NumPy, CuPy and PyTorch, by attributes and without copies.

`framework_of(x)` finds the adapter by the name of the module that defines x's type, so nothing is
imported that the caller has not imported already. An adapter describes an array (pointer, shape,
strides, dtype, device), allocates with the caller's own caching allocator, and knows the caller's
current stream. DLPack is not the way in: it costs ten times the attributes and carries neither
bfloat16 into NumPy nor a stream without ordering work (each adapter reads what it needs instead).

`describe` runs for every argument of every call, so it is a handful of attribute reads.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from .errors import ArgTypeError, DeviceMismatchError, FrameworkMismatchError, StrideError

HOST = -1
_HERE: AbstractContextManager[Any] = nullcontext()
_NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class ArrayInfo(NamedTuple):
    """What the checks and the kernels need to know of an array."""

    ptr: int  # address of element 0
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # NumPy's names: "bfloat16", "float16", "int32", ...
    device: int  # CUDA ordinal; HOST for host memory
    readonly: bool = False


class Framework(Protocol):
    """What the library asks of an array framework."""

    name: str

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        """The facts of array x. Raises ArgTypeError, StrideError or DeviceMismatchError, naming
        the argument, when x is not a dense array in host memory or on a CUDA device."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        """A new contiguous array from the framework's caching allocator, on its current stream."""

    def pointer(self, x: Any) -> int:
        """The address of element 0."""

    def stream(self, device: int) -> int:
        """The CUstream that is current for this thread on this device."""

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        """Makes the device current inside a with block."""

    def to_numpy(self, x: Any) -> np.ndarray:
        """A view (never a copy) of an array in host memory."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name, bfloat16 included."""
    return _NUMPY_DTYPES.get(name) or np.dtype(name)


class _DtypeNames(dict[Any, str]):
    """Names of NumPy dtypes; np.dtype.name itself takes a microsecond."""

    def __missing__(self, dtype: np.dtype[Any]) -> str:
        self[dtype] = dtype.name
        return dtype.name


class _ElementStrides(dict[tuple[tuple[int, ...], int], tuple[int, ...]]):
    """(strides in bytes, itemsize) -> strides in elements; () where they are no whole number."""

    def __missing__(self, key: tuple[tuple[int, ...], int]) -> tuple[int, ...]:
        strides, itemsize = key
        elements = tuple(stride // itemsize for stride in strides)
        if any(stride % itemsize for stride in strides):
            elements = ()
        if len(self) < 4096:
            self[key] = elements
        return elements


_dtype_names = _DtypeNames()
_element_strides = _ElementStrides()


def _no_whole_strides(x: Any, argument: str) -> StrideError:
    return StrideError(
        argument,
        "strides that are multiples of the itemsize",
        f"strides {x.strides} bytes with itemsize {x.dtype.itemsize}",
        "Pass a contiguous copy, not a field of a structured array.",
    )


class NumPy:
    name = "numpy"

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        dtype = x.dtype
        strides = _element_strides[x.strides, dtype.itemsize or 1]
        if len(strides) != x.ndim:
            raise _no_whole_strides(x, argument)
        return ArrayInfo(
            x.ctypes.data, x.shape, strides, _dtype_names[dtype], HOST, not x.flags.writeable
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def pointer(self, x: Any) -> int:
        return int(x.ctypes.data)

    def stream(self, device: int) -> int:
        return 0

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        return _HERE

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)


class CuPy:
    name = "cupy"

    def __init__(self) -> None:
        cupy: Any = importlib.import_module("cupy")
        self._empty = cupy.empty
        self._device = cupy.cuda.Device
        self._current_device = cupy.cuda.runtime.getDevice
        self._current_stream = cupy.cuda.get_current_stream

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        dtype = x.dtype
        data = x.data
        strides = _element_strides[x.strides, dtype.itemsize]
        if len(strides) != x.ndim:
            raise _no_whole_strides(x, argument)
        return ArrayInfo(data.ptr, x.shape, strides, _dtype_names[dtype], data.device_id)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._empty(shape, _NUMPY_DTYPES.get(dtype, dtype))

    def pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def stream(self, device: int) -> int:
        return int(self._current_stream(device).ptr)

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        if self._current_device() == device:
            return _HERE
        guard: AbstractContextManager[Any] = self._device(device)
        return guard

    def to_numpy(self, x: Any) -> np.ndarray:
        raise TypeError("A CuPy array is not in host memory.")


class Torch:
    name = "torch"

    def __init__(self) -> None:
        torch: Any = importlib.import_module("torch")
        self._empty = torch.empty
        self._cuda = torch.cuda
        self._int16 = torch.int16
        self._bfloat16 = torch.bfloat16
        self._dtypes = {
            name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32")
        }
        self._names = {dtype: name for name, dtype in self._dtypes.items()}
        self._devices = {HOST: torch.device("cpu")}
        self._torch_device = torch.device
        # The public current_stream() builds an object and takes 3.5 us; this one takes 0.1 us.
        self._raw_stream: Callable[[int], int] = getattr(
            torch._C, "_cuda_getCurrentRawStream", self._public_stream
        )
        self._current_device: Callable[[], int] = getattr(
            torch._C, "_cuda_getDevice", torch.cuda.current_device
        )

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        try:
            dtype = x.dtype
            name = self._names.get(dtype) or str(dtype).removeprefix("torch.")
            if x.is_cuda:
                return ArrayInfo(x.data_ptr(), x.shape, x.stride(), name, x.get_device())
            if x.is_cpu:
                return ArrayInfo(x.data_ptr(), x.shape, x.stride(), name, HOST)
        except RuntimeError as error:  # sparse, fake and functorch tensors have no memory to read
            raise ArgTypeError(
                argument,
                "a dense tensor with memory of its own",
                f"{type(x).__name__} ({str(error).splitlines()[0]})",
                "Pass a plain strided torch.Tensor.",
            ) from error
        raise DeviceMismatchError(
            argument,
            "a tensor on a CUDA device, or on the CPU",
            f"one on {x.device}",
            "Move it with .cuda().",
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        place = self._devices.get(device)
        if place is None:
            place = self._devices[device] = self._torch_device("cuda", device)
        return self._empty(shape, dtype=self._dtypes[dtype], device=place)

    def pointer(self, x: Any) -> int:
        return int(x.data_ptr())

    def _public_stream(self, device: int) -> int:
        return int(self._cuda.current_stream(device).cuda_stream)

    def stream(self, device: int) -> int:
        return self._raw_stream(device)

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        if device == HOST or self._current_device() == device:
            return _HERE
        guard: AbstractContextManager[Any] = self._cuda.device(device)
        return guard

    def to_numpy(self, x: Any) -> np.ndarray:
        x = x.detach()
        if x.dtype == self._bfloat16:  # torch hands no bfloat16 to NumPy; the bits do travel
            bits: np.ndarray = x.view(self._int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        view: np.ndarray = x.numpy()
        return view


_CLASSES: dict[str, Callable[[], Framework]] = {"numpy": NumPy, "cupy": CuPy, "torch": Torch}
_instances: dict[str, Framework] = {}
_by_type: dict[type, Framework] = {}


def framework(name: str) -> Framework:
    """The adapter called "numpy", "cupy" or "torch"."""
    if name not in _instances:
        _instances[name] = _CLASSES[name]()
    return _instances[name]


def framework_of(x: Any, argument: str) -> Framework:
    """The adapter for array x. Raises ArgTypeError or FrameworkMismatchError, naming the argument,
    for anything that is not a NumPy array, a CuPy array or a PyTorch tensor."""
    found = _by_type.get(type(x))
    return found if found is not None else _find(x, argument)


def _find(x: Any, argument: str) -> Framework:
    for name, array_class in (("numpy", "ndarray"), ("cupy", "ndarray"), ("torch", "Tensor")):
        module = sys.modules.get(name)
        if module is not None and isinstance(x, getattr(module, array_class, ())):
            found = _by_type[type(x)] = framework(name)
            return found
    kind = type(x)
    shown = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    package = kind.__module__.partition(".")[0]
    if package in ("jax", "jaxlib"):
        raise FrameworkMismatchError(
            argument,
            "a NumPy array, a CuPy array or a torch.Tensor",
            f"a JAX array ({shown})",
            "JAX arrays are not supported yet; pass cupy.from_dlpack(x), which shares the memory.",
        )
    if hasattr(kind, "__dlpack__"):
        raise FrameworkMismatchError(
            argument,
            "a NumPy array, a CuPy array or a torch.Tensor",
            shown,
            "Pass cupy.from_dlpack(x) or torch.from_dlpack(x), which share the memory.",
        )
    raise ArgTypeError(
        argument,
        "a NumPy array, a CuPy array or a torch.Tensor",
        shown,
        "Put the data into an array first.",
    )
