"""The array of a PagedKVCache: a new one, or one that exists already. All checks come first.

A pool has a page axis, a layer axis if the cache has several, and then [page_size, h_kv, 576] of
bfloat16 or float16, or [page_size, h_kv, row_bytes] of uint8 for rows of another format. Its view
of one layer is the k_cache of flash_mla_with_kvcache(), strided as it may be.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np

from ..calls import layouts, scalars
from ..calls.arguments import FLOATS as DTYPES
from ..calls.wording import kind, show, strides, written
from ..errors import (
    AlignmentError,
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    FrameworkMismatchError,
    OptionError,
    ReadOnlyError,
    ScalarError,
    ShapeError,
    StrideError,
)
from ..formats.cache_format import format_of
from ..frameworks import HOST, Adapter, ArrayInfo, framework, framework_of, numpy_dtype
from ..sizes import HEAD_DIM, PAGE_SIZES
from .place import framework_at, named_place, place_of
from .views import BITS, bits_of, view_as

_SIZES = ", ".join(map(str, PAGE_SIZES))
_FRAMEWORKS = ("numpy", "cupy", "torch")


class Layout(NamedTuple):
    """The shape of a pool."""

    num_pages: int
    num_layers: int
    page_size: int
    num_heads_kv: int
    width: int  # elements of a row
    dtype: str
    layer_axis: int | None  # 0 or 1; None: one layer, and no axis for it

    @property
    def shape(self) -> tuple[int, ...]:
        pages = [self.num_pages]
        if self.layer_axis is not None:
            pages.insert(self.layer_axis, self.num_layers)
        return (*pages, self.page_size, self.num_heads_kv, self.width)


class Pool:
    """The array, and its views in every framework."""

    def __init__(self, storage: Any, layout: Layout) -> None:
        self.storage, self.layout = storage, layout
        self.framework = framework_of(storage, "storage")
        info = self.framework.describe(storage)
        self.place, self.address = info.device, info.ptr
        self.format = format_of(layout.dtype, layout.width)  # None: bytes that nobody knows
        self.is_fp8 = self.format is not None and self.format.is_fp8
        # Whether a row is something of its own, and can be moved by vectors of 16 bytes.
        self.takes_rows = layout.width * layouts.itemsize(info) % layouts.TMA_BYTES == 0
        bits = bits_of(storage, self.framework)
        if layout.layer_axis is None:
            bits = bits[:, None]
        elif layout.layer_axis == 0:
            bits = bits.swapaxes(0, 1)
        self.bits = bits  # [num_pages, num_layers, page_size, h_kv, width]
        self.xp: Any = importlib.import_module("numpy" if self.place == HOST else "cupy")
        self._layers: dict[tuple[int, str], Any] = {}

    def layer(self, i: int, name: str) -> Any:
        """[num_pages, page_size, h_kv, width] of one layer, an array of the framework `name`."""
        found = self._layers.get((i, name))
        if found is None:
            if name == self.framework.name:
                axis = self.layout.layer_axis
                found = self.storage if axis is None else self.storage[(slice(None),) * axis + (i,)]
            else:
                found = view_as(self.bits[:, i], self.layout.dtype, name)
            self._layers[i, name] = found
        return found


class Given(NamedTuple):
    """What a cache is asked for; None: nothing was said."""

    num_pages: Any
    page_size: Any
    num_heads_kv: Any
    dtype: Any
    device: Any
    framework: Any


def allocate(given: Given, num_layers: Any, layer_axis: Any, function: str) -> Pool:
    """A new pool, of unspecified contents. Raises an ArgumentError, as `function`, or NoDeviceError
    or MissingDependencyError."""
    num_pages = scalars.integer("num_pages", given.num_pages, function, least=1)
    asked = 64 if given.page_size is None else given.page_size
    page_size = scalars.integer("page_size", asked, function, least=1)
    num_layers = scalars.integer("num_layers", num_layers, function, least=1)
    asked = 1 if given.num_heads_kv is None else given.num_heads_kv
    h_kv = scalars.integer("num_heads_kv", asked, function, least=1)
    _page_size(page_size, function)
    dtype_name = "bfloat16" if given.dtype is None else _dtype(given.dtype, function)
    _fits_int32(num_pages, page_size, function)
    axis = _layer_axis(layer_axis, function)
    place = place_of(given.device, given.framework, function)
    arrays = framework(framework_at(given.framework, place, function))
    layer_axis = None if num_layers == 1 else axis
    layout = Layout(num_pages, num_layers, page_size, h_kv, HEAD_DIM, dtype_name, layer_axis)
    with arrays.device_guard(place):
        return Pool(arrays.empty(layout.shape, dtype_name, place), layout)


def adopt(storage: Any, num_layers: Any, layer_axis: Any, function: str) -> Pool:
    """A pool of `storage` itself, if it can serve. Raises an ArgumentError, as `function`."""
    name = "storage"
    num_layers = scalars.integer("num_layers", num_layers, function, least=1)
    layer_axis = _layer_axis(layer_axis, function)
    try:
        found = framework_of(storage, name)
        if found.name not in _FRAMEWORKS:
            expected, got = "a NumPy or CuPy array or a torch.Tensor", f"a {found.name} array"
            remedy = (
                "A JAX array cannot be written in place: keep it, and write it with"
                " append_mla_kv(), which takes a donated array."
            )
            raise FrameworkMismatchError(name, expected, got, remedy)
        info = found.describe(storage, name)
        got = show(info)
        _storage_dtype(storage, found, info.dtype, got)
        axes = 4 if num_layers == 1 and len(info.shape) != 5 else 5
        axis = None if axes == 4 else layer_axis
        raw = info.dtype == "uint8"
        columns = "row_bytes" if raw else f"{HEAD_DIM}"
        tail = f"page_size, h_kv, {columns}]"
        if axis is None:
            expected = f"[num_pages, {tail}, no axis empty"
        else:
            lead = ["num_pages"]
            lead.insert(axis, str(num_layers))
            expected = f"[{', '.join(lead)}, {tail}, no axis empty"
        width = info.shape[-1] if info.shape else 0
        fits = raw or width == HEAD_DIM
        if len(info.shape) != axes or 0 in info.shape or not fits:
            raise ShapeError(name, expected, got, f"Reshape it to these {axes} axes.")
        if axis is not None and info.shape[axis] != num_layers:
            remedy = "Pass its number of layers as num_layers, and their axis as layer_axis."
            raise ShapeError(name, expected, got, remedy)
        page_size, h_kv = info.shape[-3:-1]
        if page_size not in PAGE_SIZES:
            expected = f"a page_size ({'second' if axes == 4 else 'third'} axis) of {_SIZES}"
            raise ShapeError(name, expected, got, "Divide it into pages of such a size.")
        if info.readonly:
            remedy = "Pass an array that the cache may write."
            raise ReadOnlyError(name, "a writable array", "a read-only one", remedy)
        pages = info.shape[0 if axis != 0 else 1]
        _strides(name, info, axis, pages)
    except ArgumentError as error:
        raise error.of(function) from None
    _fits_int32(pages, page_size, function)
    return Pool(storage, Layout(pages, num_layers, page_size, h_kv, width, info.dtype, axis))


def require_same(pool: Pool, given: Given, function: str) -> None:
    """Raises an ArgumentError if something was asked for that the adopted array is not."""
    layout = pool.layout
    for name in ("num_pages", "page_size", "num_heads_kv"):
        asked, has = getattr(given, name), getattr(layout, name)
        if asked is not None and scalars.integer(name, asked, function) != has:
            raise _differs(ScalarError, name, f"{has}", f"{asked}", function)
    if given.dtype is not None and _dtype_name(given.dtype) != layout.dtype:
        raise _differs(DTypeError, "dtype", layout.dtype, written(given.dtype), function)
    if given.device is not None:
        has = "'cpu'" if pool.place == HOST else f"{pool.place}"
        if named_place(given.device, function) != pool.place:
            raise _differs(DeviceMismatchError, "device", has, f"{given.device}", function)
    if given.framework is not None:
        has = pool.framework.name
        if not isinstance(given.framework, str) or given.framework != has:
            raise _differs(OptionError, "framework", f"'{has}'", kind(given.framework), function)


def _differs(
    error: type[ArgumentError], name: str, has: str, got: str, function: str
) -> ArgumentError:
    return error(name, f"{has}, as storage has, or None", got, f"Leave {name} out.", function)


def _strides(name: str, info: ArrayInfo, axis: int | None, pages: int) -> None:
    """A layer that a tensor map can read, and layers that do not overlap; of bytes whole pages."""
    if info.dtype == "uint8":
        _whole_pages(name, info)
    elif axis is None:
        layouts.latent_rows(name, info)
    else:
        of_layer = (info.strides[1 - axis], *info.strides[2:])
        layouts.latent_rows(name, info._replace(shape=(pages, *info.shape[2:]), strides=of_layer))
    if axis is None:
        return
    reach = info.shape[-1]
    for stride, length in sorted(zip(info.strides[:-1], info.shape[:-1], strict=True)):
        if length > 1 and stride < reach:
            copy = "Pass a contiguous array."
            raise StrideError(name, "layers that do not overlap", strides(info), copy)
        reach += (length - 1) * stride
    if info.strides[axis] * layouts.itemsize(info) % layouts.TMA_BYTES:
        expected = f"strides that are multiples of {layouts.TMA_BYTES} bytes"
        raise AlignmentError(name, expected, strides(info), "Pass a contiguous array.")


def _whole_pages(name: str, info: ArrayInfo) -> None:
    """Pages of bytes, each contiguous and at an address that is a multiple of 16."""
    _, heads, width = info.shape[-3:]
    token, head, byte = info.strides[-3:]
    if byte != 1 or token != heads * width or (heads > 1 and head != width):
        raise StrideError(name, "contiguous pages", strides(info), "Pass a contiguous array.")
    if any(stride % layouts.TMA_BYTES for stride in info.strides[:-3]):
        expected = f"pages at multiples of {layouts.TMA_BYTES} bytes"
        raise AlignmentError(name, expected, strides(info), "Pass a contiguous array.")
    layouts.aligned(name, info, layouts.TMA_BYTES)


# --- arguments ---------------------------------------------------------------------------------


def _page_size(page_size: int, function: str) -> None:
    if page_size not in PAGE_SIZES:
        remedy = "FlashMLA's own page size is 64."
        raise ScalarError("page_size", f"one of {_SIZES}", f"{page_size}", remedy, function)


def _dtype_name(dtype: Any) -> str:
    """Of "float16", np.float16, np.dtype and torch.float16 alike."""
    if isinstance(dtype, int):  # which may be too long for Python to write
        return ""
    return str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")


def _dtype(dtype: Any, function: str) -> str:
    name = _dtype_name(dtype)
    if name not in DTYPES:
        remedy = (
            "Pass 'bfloat16' or 'float16'; for an FP8 cache pass storage, an array of uint8 "
            "[num_pages, page_size, 1, bytes of a token]."
        )
        raise DTypeError("dtype", "bfloat16 or float16", written(dtype), remedy, function)
    return name


def _storage_dtype(storage: Any, found: Adapter, dtype: str, got: str) -> None:
    # NumPy's dtypes, not their names: a byte-swapped float16 has the same name.
    swapped = found.name != "torch" and storage.dtype not in [numpy_dtype(name) for name in BITS]
    if dtype not in BITS or swapped:
        remedy = "Make it of one of the two, in native byte order, or of uint8 for other formats."
        raise DTypeError("storage", "bfloat16 or float16", got, remedy)


def _layer_axis(layer_axis: Any, function: str) -> int:
    is_integer = isinstance(layer_axis, (int, np.integer)) and not isinstance(layer_axis, bool)
    if not is_integer or layer_axis not in (0, 1):
        remedy = "0 is [num_layers, num_pages, ...], 1 is [num_pages, num_layers, ...]."
        raise OptionError("layer_axis", "0 or 1", kind(layer_axis), remedy, function)
    return int(layer_axis)


def _fits_int32(num_pages: int, page_size: int, function: str) -> None:
    """The longest possible sequence, one that fills the pool, has token numbers in int32."""
    most = scalars.INT_LIMIT // page_size
    if num_pages > most:
        expected = f"at most {most} pages of {page_size} tokens"
        raise ScalarError("num_pages", expected, f"{num_pages}", "Make several caches.", function)
