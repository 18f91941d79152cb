"""The checks of the array arguments: one named error for each mistake.

Nothing here reads device memory, allocates or launches. Each function checks one argument and
raises on the first thing that is wrong: argument, expected, got, what to do. Sizes are limited by
what the kernels address: page sizes, head dimensions, and 31-bit token and row numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import (
    AliasingError,
    ArgTypeError,
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    FrameworkMismatchError,
    OptionError,
    ReadOnlyError,
    ShapeError,
    StaleMetadataError,
    StrideError,
)
from ..frameworks import HOST, Adapter, ArrayInfo, framework_of
from ..schedule.split import MAX_BATCH
from ..sizes import HEAD_DIM, METADATA_COLUMNS, PAGE_SIZES
from .arguments import DECODE, Array, Table
from .layouts import aligned, contiguous, latent_rows, span
from .scalars import INT_LIMIT
from .wording import kind, show, strides

_FP8_BYTES = (655, 656, 657)  # FlashMLA's fp8 layout has 656 bytes a token
_COLUMNS = f"a last axis of {HEAD_DIM} (512 latent and 64 rotary columns)"
_PADDING = (
    "Smaller parts can be padded with zeros, to 512 and 64 columns, in q and k_cache alike: pass"
    " the model's softmax_scale then, and drop the padding of out."
)


def describe(arrays: Mapping[str, Any], function: str) -> tuple[Adapter, dict[str, ArrayInfo]]:
    """The framework all arrays share, and what each array is. One framework, one device."""
    first, *_ = arrays
    infos: dict[str, ArrayInfo] = {}
    try:
        framework = framework_of(arrays[first], first)
        for name, array in arrays.items():
            other = framework_of(array, name)
            if other is not framework:
                raise FrameworkMismatchError(
                    name,
                    f"a {framework.name} array, as {first} is",
                    f"a {other.name} array",
                    f"Convert {name} to {framework.name}; a call takes arrays of one framework.",
                )
            info = infos[name] = framework.describe(array, name)
            here, there = infos[first].device, info.device
            if here != there:
                raise DeviceMismatchError(
                    name,
                    f"an array on {_place(here)}, where {first} is",
                    f"one on {_place(there)}",
                    f"Move {name} to {_place(here)}; a call takes arrays of one device.",
                )
    except ArgumentError as error:
        raise error.of(function) from error.__cause__
    return framework, infos


def _place(device: int) -> str:
    return "the CPU" if device == HOST else f"CUDA device {device}"


# --- the inputs of flash_mla_with_kvcache ------------------------------------------------------


_ADDS_AN_AXIS = {
    "q": "q[:, None] adds an s_q of 1",
    "k_cache": "k_cache[:, :, None] adds an h_kv of 1",
}


def four_axes(array: Array, shape: Sequence[Any], got: str) -> None:
    """q and k_cache have four axes."""
    if len(shape) != len(array.axes):
        remedy = f"Give it four axes: {_ADDS_AN_AXIS[array.name]}."
        raise ShapeError(array.name, f"four axes, {array.shape}", got, remedy)


def query(q: ArrayInfo) -> None:
    """q [batch, s_q, h_q, 576] bfloat16 or float16."""
    four_axes(DECODE["q"], q.shape, show(q))
    if q.dtype not in DECODE["q"].dtypes:
        remedy = "Convert q and k_cache to one of the two."
        raise DTypeError("q", "bfloat16 or float16", show(q), remedy)
    if q.shape[3] != HEAD_DIM:
        remedy = f"Concatenate the latent part and the rotary part of the query. {_PADDING}"
        raise ShapeError("q", _COLUMNS, show(q), remedy)
    if q.shape[0] * q.shape[1] * q.shape[2] > INT_LIMIT:
        raise ShapeError(
            "q", f"batch * s_q * h_q of at most {INT_LIMIT}", show(q), "Split the batch."
        )
    latent_rows("q", q)


def cache(k_cache: ArrayInfo, q: ArrayInfo) -> None:
    """k_cache [num_pages, page_size, h_kv, 576] of q's dtype; q has been checked."""
    name = "k_cache"
    four_axes(DECODE[name], k_cache.shape, show(k_cache))
    num_pages, _, h_kv, head_dim = k_cache.shape
    got, dtype = show(k_cache), f"{q.dtype}, the dtype of q"
    if k_cache.dtype.startswith("float8") or head_dim in _FP8_BYTES:
        remedy = "Pass is_fp8_kvcache=True for an fp8 cache, or dequantize_kv() it."
        raise DTypeError(name, dtype, f"{got}, an fp8 cache", remedy)
    if k_cache.dtype != q.dtype:
        remedy = "Convert q to the dtype of k_cache, or make the cache in that of q."
        raise DTypeError(name, dtype, got, remedy)
    if head_dim != HEAD_DIM:
        remedy = f"Store the latent part and the rotary part of a token side by side. {_PADDING}"
        raise ShapeError(name, _COLUMNS, got, remedy)
    page_size(k_cache)
    if h_kv < 1:
        remedy = "Make the cache with the kv heads of the model; DeepSeek's have one."
        raise ShapeError(name, "an h_kv (third axis) of at least 1", got, remedy)
    if q.shape[2] % h_kv:
        remedy = "Pass h_q // h_kv query heads for each kv head, kv head by kv head."
        expected = f"an h_kv (third axis) that divides h_q = {q.shape[2]}"
        raise ShapeError(name, expected, got, remedy)
    if num_pages < 1 and 0 not in q.shape:
        raise ShapeError(name, "at least one page", got, "Make the cache with num_pages >= 1.")
    latent_rows(name, k_cache)


def page_size(k_cache: ArrayInfo, is_divisible: bool = True) -> None:
    """k_cache [num_pages, page_size, ...] with pages that a table can name; is_divisible: whether
    parts of pages are pages."""
    size = k_cache.shape[1]
    if size not in PAGE_SIZES:
        sizes = ", ".join(map(str, PAGE_SIZES))
        remedy = "Make the cache with one of these page sizes."
        remedy += _smaller_pages(size) if is_divisible else ""
        raise ShapeError("k_cache", f"a page_size (second axis) of {sizes}", show(k_cache), remedy)


def _smaller_pages(page_size: int) -> str:
    """What to do with pages that are a whole number of supported ones."""
    fitting = [size for size in PAGE_SIZES if page_size and page_size % size == 0]
    if not fitting:
        return ""
    size = fitting[-1]
    return (
        f" Pages of {page_size} tokens can be viewed as pages of {size}:"
        f" k_cache.reshape(-1, {size}, *k_cache.shape[2:]), with {page_size // size} entries of"
        f" block_table, {page_size // size} * page + i, for each page."
    )


def table(block_table: ArrayInfo, batch: int, page_size: int) -> None:
    """block_table [batch, max_pages] int32; rows may lie at any distance."""
    name, got = "block_table", show(block_table)
    _int32(name, block_table)
    if len(block_table.shape) != 2:
        remedy = "Pass one row of page numbers a request: block_table.reshape(batch, -1)."
        raise ShapeError(name, f"two axes, ({batch}, max_pages)", got, remedy)
    if block_table.shape[0] != batch:
        remedy = f"Take the rows of the requests in q: block_table[:{batch}]."
        raise ShapeError(name, f"one row for each of the {batch} requests of q", got, remedy)
    width, copy = block_table.shape[1], "Pass a contiguous copy of block_table."
    if width * page_size > INT_LIMIT:
        expected = f"at most {INT_LIMIT // page_size} columns, so that token numbers fit int32"
        raise ShapeError(name, expected, got, "Cut the unused columns off.")
    if batch and width > 1 and block_table.strides[1] != 1:
        raise StrideError(name, "a contiguous last axis (stride 1)", strides(block_table), copy)
    if batch > 1 and width and block_table.strides[0] < 0:
        raise StrideError(name, "a row stride of at least 0", strides(block_table), copy)
    aligned(name, block_table, DECODE[name].alignment)


def lengths(cache_seqlens: ArrayInfo, batch: int | None) -> None:
    """cache_seqlens [batch] int32, contiguous; any batch if None."""
    name, shape = "cache_seqlens", cache_seqlens.shape
    _int32(name, cache_seqlens)
    if len(shape) != 1 or (batch is not None and shape[0] != batch):
        expected = f"shape ({'batch' if batch is None else batch},), one length a request"
        remedy = "Pass the number of tokens of each request, the new ones included."
        raise ShapeError(name, expected, show(cache_seqlens), remedy)
    if shape[0] > MAX_BATCH:
        expected = f"at most {MAX_BATCH} requests"
        raise ShapeError(name, expected, show(cache_seqlens), "Split the batch.")
    contiguous(name, cache_seqlens)
    aligned(name, cache_seqlens, DECODE[name].alignment)


def _int32(name: str, info: ArrayInfo) -> None:
    if info.dtype != "int32":
        remedy = f"Convert it with {name}.astype('int32'), or {name}.int() for a tensor."
        raise DTypeError(name, "int32", show(info), remedy)


# --- scheduling metadata -----------------------------------------------------------------------


def metadata_kind(metadata: Any, num_splits: Any, is_lazy: bool) -> None:
    """The two results of get_mla_metadata(), of either style, belong together."""
    name, expected = "tile_scheduler_metadata", "the first result of get_mla_metadata()"
    of = type(metadata)
    if is_lazy:
        if num_splits is not None:
            remedy = "Leave num_splits out, or call get_mla_metadata() with cache_seqlens."
            raise OptionError(
                "num_splits", "None, as get_mla_metadata() returned it", kind(num_splits), remedy
            )
    elif of.__name__ == "FlashMLASchedMeta":
        got = f"{kind(metadata)}, of another package"
        remedy = "Import get_mla_metadata from flashmla_cupy too."
        raise ArgTypeError(name, expected, got, remedy)
    elif isinstance(metadata, tuple):
        remedy = "Unpack it: metadata, num_splits = get_mla_metadata(...)."
        raise ArgTypeError(name, expected, "both results in a tuple", remedy)
    elif metadata is None:
        raise ArgTypeError(name, expected, "None", "Call get_mla_metadata() first.")
    elif num_splits is None:
        remedy = "Pass both results of the get_mla_metadata() call."
        raise ArgTypeError("num_splits", "the second result of get_mla_metadata()", "None", remedy)


def metadata_dtypes(infos: Mapping[str, ArrayInfo]) -> None:
    """Both are int32, those of them that are among the arrays: all that can be said of them before
    the device is known."""
    for array in DECODE.having("schedule"):
        if array.name in infos:
            _int32(array.name, infos[array.name])


def metadata(
    tile_scheduler_metadata: ArrayInfo, num_splits: ArrayInfo, batch: int, num_sm_parts: int
) -> None:
    """tile_scheduler_metadata [num_sm_parts, 8] and num_splits [batch + 1], contiguous."""
    again = (
        "Call get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv) for this batch; where there "
        "are indices, with num_heads_q and topk as well."
    )
    name, info = "tile_scheduler_metadata", tile_scheduler_metadata
    if len(info.shape) != 2 or info.shape[1] != METADATA_COLUMNS:
        raise ShapeError(name, f"shape ({num_sm_parts}, {METADATA_COLUMNS})", show(info), again)
    if info.shape[0] != num_sm_parts:
        expected = f"{num_sm_parts} rows, for the s_q, h_q and h_kv of this call and this device"
        got = f"{show(info)}, made for another configuration or GPU"
        raise StaleMetadataError(name, expected, got, again)
    contiguous(name, info)
    aligned(name, info, DECODE[name].alignment)
    name, info = "num_splits", num_splits
    if len(info.shape) != 1:
        raise ShapeError(name, f"shape ({batch + 1},)", show(info), again)
    if info.shape[0] != batch + 1:
        got = f"{show(info)}, made for another batch size"
        expected = f"batch + 1 = {batch + 1} entries (with indices, batch counts query tokens)"
        raise StaleMetadataError(name, expected, got, again)
    contiguous(name, info)
    aligned(name, info, DECODE[name].alignment)


# --- the outputs -------------------------------------------------------------------------------


def output(name: str, info: ArrayInfo, shape: tuple[int, ...], dtype: str) -> None:
    """A caller's output: exactly this shape and dtype, contiguous, writable."""
    make = f"Allocate it with shape {shape} and dtype {dtype}, or leave {name} out."
    if info.shape != shape:
        raise ShapeError(name, f"shape {shape}", show(info), make)
    if info.dtype != dtype:
        raise DTypeError(name, dtype, show(info), make)
    if info.readonly:
        raise ReadOnlyError(name, "a writable array", "a read-only one", make)
    contiguous(name, info)
    aligned(name, info, DECODE[name].alignment)


def aliasing(table: Table, infos: Mapping[str, ArrayInfo]) -> None:
    """The outputs share no byte with another argument. Compares byte spans, gaps included."""
    spans = {}
    for name, info in infos.items():
        low, high = span(info)
        spans[name] = info.ptr + low, info.ptr + high
    for written in (array.name for array in table.having("output")):
        begin, end = spans.get(written, (0, 0))
        for name, (other_begin, other_end) in spans.items():
            if name != written and begin < other_end and other_begin < end:
                raise AliasingError(
                    written,
                    f"memory of its own, apart from {name}",
                    f"[{begin:#x}, {end:#x}), which overlaps [{other_begin:#x}, {other_end:#x})",
                    f"Allocate {written} separately, or leave it out.",
                )
