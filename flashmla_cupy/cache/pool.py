"""The array of a PagedKVCache: a new one, or one that exists already. All checks come first.

A pool is [num_pages, page_size, h_kv, 576] of bfloat16 or float16: the k_cache of
flash_mla_with_kvcache().
"""

from __future__ import annotations

import importlib
from typing import Any

from ..calls import layouts, scalars
from ..calls.arguments import FLOATS as DTYPES
from ..calls.wording import show
from ..errors import (
    ArgumentError,
    DTypeError,
    FrameworkMismatchError,
    MissingDependencyError,
    NoDeviceError,
    OptionError,
    ReadOnlyError,
    ScalarError,
    ShapeError,
)
from ..frameworks import HOST, framework, framework_of, numpy_dtype
from ..gpu.arch import arch_of
from ..sizes import HEAD_DIM, PAGE_SIZES

_SIZES = ", ".join(map(str, PAGE_SIZES))


def allocate(
    num_pages: Any, page_size: Any, dtype: Any, num_heads_kv: Any, device: Any, function: str
) -> Any:
    """A new pool, of unspecified contents. Raises an ArgumentError, as `function`, or
    NoDeviceError or MissingDependencyError."""
    num_pages = scalars.integer("num_pages", num_pages, function, least=1)
    page_size = scalars.integer("page_size", page_size, function, least=1)
    h_kv = scalars.integer("num_heads_kv", num_heads_kv, function, least=1)
    if page_size not in PAGE_SIZES:
        remedy = "FlashMLA's own page size is 64."
        raise ScalarError("page_size", f"one of {_SIZES}", f"{page_size}", remedy, function)
    name = str(getattr(dtype, "__name__", dtype))  # "float16", np.float16 and np.dtype alike
    if name not in DTYPES:
        remedy = "Pass 'bfloat16' or 'float16'."
        raise DTypeError("dtype", "bfloat16 or float16", f"{dtype!r}", remedy, function)
    _fits_int32(num_pages, page_size, function)
    place = _place(device, function)
    arrays = framework("numpy" if place == HOST else "cupy")
    with arrays.device_guard(place):
        return arrays.empty((num_pages, page_size, h_kv, HEAD_DIM), name, place)


def adopt(storage: Any, function: str) -> Any:
    """`storage` itself, if it can serve as a pool. Raises an ArgumentError, as `function`."""
    name = "storage"
    try:
        found = framework_of(storage, name)
        if found.name not in ("numpy", "cupy"):
            expected, got = "a NumPy or CuPy array", f"a {found.name} array"
            remedy = "Pass cupy.from_dlpack(storage), which shares the memory."
            raise FrameworkMismatchError(name, expected, got, remedy)
        info = found.describe(storage, name)
        got = show(info)
        # Dtypes, not their names: a byte-swapped float16 has the same name.
        if storage.dtype not in [numpy_dtype(dtype) for dtype in DTYPES]:
            remedy = "Make it of one of the two, in native byte order."
            raise DTypeError(name, "bfloat16 or float16", got, remedy)
        if len(info.shape) != 4 or 0 in info.shape or info.shape[3] != HEAD_DIM:
            expected = f"[num_pages, page_size, h_kv, {HEAD_DIM}], no axis empty"
            raise ShapeError(name, expected, got, "Reshape it to these four axes.")
        if info.shape[1] not in PAGE_SIZES:
            expected = f"a page_size (second axis) of {_SIZES}"
            raise ShapeError(name, expected, got, "Divide it into pages of such a size.")
        if info.readonly:
            remedy = "Pass an array that the cache may write."
            raise ReadOnlyError(name, "a writable array", "a read-only one", remedy)
        layouts.latent_rows(name, info)
    except ArgumentError as error:
        raise error.of(function) from None
    _fits_int32(info.shape[0], info.shape[1], function)
    return storage


def _fits_int32(num_pages: int, page_size: int, function: str) -> None:
    """The longest possible sequence, one that fills the pool, has token numbers in int32."""
    most = scalars.INT_LIMIT // page_size
    if num_pages > most:
        expected = f"at most {most} pages of {page_size} tokens"
        raise ScalarError("num_pages", expected, f"{num_pages}", "Make several caches.", function)


def _place(device: Any, function: str) -> int:
    """The CUDA device number that the argument `device` stands for, or HOST."""
    if isinstance(device, str):
        if device == "cpu":
            return HOST
        expected, remedy = "a CUDA device number, 'cpu' or None", "Pass 0 for the first GPU."
        raise OptionError("device", expected, f"{device!r}", remedy, function)
    if device is not None:
        device = scalars.integer("device", device, function)
    try:
        cuda: Any = importlib.import_module("cupy").cuda
    except ImportError as error:
        if device is None:
            return HOST
        remedy = "Install flashmla-cupy[cuda12], or pass device='cpu' for NumPy."
        message = f"{function}(): device {device} needs CuPy, which cannot be imported. {remedy}"
        raise MissingDependencyError(message) from error
    count = cuda.runtime.getDeviceCount() if cuda.is_available() else 0
    if device is None:  # the current GPU, if the kernels run on it
        current = int(cuda.Device().id) if count else HOST
        fits = count and arch_of(cuda.runtime.getDeviceProperties(current))
        return current if fits else HOST
    if device >= count:
        remedy = "Pass device='cpu' for NumPy."
        raise NoDeviceError(f"{function}(): no CUDA device {device}; CuPy sees {count}. {remedy}")
    return int(device)
