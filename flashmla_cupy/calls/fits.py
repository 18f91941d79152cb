"""Whether arrays are what the table of their call says: dtypes, axes, memory. One named error for
each mistake.

Axes of one name have one length, that of the first array that has it; an axis that is a number has
that length. What is not in the table is checked where the call is made (`sparse_decode`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import (
    AlignmentError,
    DTypeError,
    OptionError,
    ReadOnlyError,
    ShapeError,
    StrideError,
)
from ..formats.cache_format import CacheFormat, format_of
from ..frameworks import Adapter, ArrayInfo
from ..schedule.split import MAX_BATCH
from ..sizes import HEAD_DIM_V, NUM_SMS_CPU
from . import checks, scalars
from .arguments import FLOATS, Array, Table, out_dtype
from .layouts import aligned, contiguous, latent_rows
from .operation import Output
from .scalars import INT_LIMIT
from .wording import show, strides

Sizes = dict[str, int]


def described(table: Table, arrays: tuple[Any, ...]) -> tuple[Adapter, dict[str, ArrayInfo], Sizes]:
    """The framework of the arrays that the call has, what each is, and the lengths of their axes.

    Everything is checked but the outputs, the schedule and what tables do not say."""
    given = {
        array.name: x
        for array, x in zip(table.arrays, arrays, strict=True)
        if array.role == "input" or x is not None
    }
    framework, infos = checks.describe(given, table.function)
    checks.metadata_dtypes(infos)
    sizes: Sizes = {}
    origins: dict[str, str] = {}
    for array in table.having("input", "optional"):
        if array.name in infos:
            _fits(array, infos[array.name], sizes, origins)
    for array in table.having("input", "optional"):
        if array.name in infos:
            _lies_right(array, infos[array.name])
    return framework, infos, sizes


def _fits(array: Array, info: ArrayInfo, sizes: Sizes, origins: dict[str, str]) -> None:
    """Dtype, rank and axes."""
    name, got = array.name, show(info)
    if info.dtype not in array.dtypes:
        remedy = f"Convert {name} to one of them."
        if array.dtypes == ("int32",):
            remedy = f"Convert it with {name}.astype('int32'), or {name}.int() for a tensor."
        elif array.dtypes == ("float32",):
            remedy = f"Convert it with {name}.astype('float32'), or {name}.float() for a tensor."
        raise DTypeError(name, _either(array.dtypes), got, remedy)
    rank = len(array.axes)
    if not rank - array.may_lack_axes <= len(info.shape) <= rank:
        expected = f"shape {array.shape}"
        if array.may_lack_axes:
            expected += f" or [{', '.join(map(str, array.axes[: -array.may_lack_axes]))}]"
        raise ShapeError(name, expected, got, "Give it these axes.")
    for i, (axis, length) in enumerate(zip(array.axes, info.shape, strict=False)):
        if isinstance(axis, int):
            if length != axis:
                expected = f"shape {array.shape}"
                remedy = f"Axis {i} has to be of length {axis}, not {length}."
                raise ShapeError(name, expected, got, remedy)
        elif sizes.setdefault(axis, length) != length:
            expected = f"shape {array.shape} with {axis} = {sizes[axis]}, as {origins[axis]} has"
            raise ShapeError(name, expected, got, f"Pass the {name} of the same call.")
        else:
            origins.setdefault(str(axis), name)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _lies_right(array: Array, info: ArrayInfo) -> None:
    """Rows of 16-byte pieces for what a kernel copies so, rows of lists, else all in one piece; a
    cache has its own rules (see `cache`)."""
    if "width" in array.axes:
        return
    if array.alignment == 16:
        latent_rows(array.name, info)
    elif len(array.axes) == 1 or array.may_lack_axes:
        contiguous(array.name, info)
        aligned(array.name, info, array.alignment)
    else:
        _list_rows(array.name, info)
        aligned(array.name, info, array.alignment)


def _list_rows(name: str, info: ArrayInfo) -> None:
    """Rows in the last axis; the others may lie anyhow, but not backwards."""
    if 0 in info.shape:
        return
    copy = f"Pass a contiguous copy of {name}."
    if info.shape[-1] > 1 and info.strides[-1] != 1:
        raise StrideError(name, "a contiguous last axis (stride 1)", strides(info), copy)
    outer = zip(info.shape[:-1], info.strides[:-1], strict=True)
    if any(stride < 0 for length, stride in outer if length > 1):
        raise StrideError(name, "no reversed axis (negative stride)", strides(info), copy)


def cache(name: str, info: ArrayInfo) -> CacheFormat:
    """The format of a cache whose tokens are gathered: those of a page lie behind one another."""
    found = format_of(info.dtype, info.shape[3])
    if found is None:
        expected = "a last axis of 656 (V3.2), 584 (V4) or 576 bytes a token (one scale for all)"
        if info.dtype in FLOATS:
            expected = "a last axis of 576 columns, or of 512 where the rotary ones are among them"
        remedy = "quantize_kv() makes a cache of a format; see CacheFormat."
        raise ShapeError(name, expected, show(info), remedy)
    num_pages, page_size, _, width = info.shape
    if num_pages * page_size > INT_LIMIT:
        expected = f"at most {INT_LIMIT} slots, so that their numbers fit int32"
        raise ShapeError(name, expected, show(info), "Make several caches.")
    if page_size > 1 and 0 not in info.shape and info.strides[1] != width:
        expected = f"tokens of a page behind one another, the second stride {width}"
        remedy = f"Pass a contiguous copy of {name}; pages may lie at any distance."
        raise StrideError(name, expected, strides(info), remedy)
    if found.tail_bytes:  # a token of the array is none of the page: only pages have to be aligned
        if 0 not in info.shape and info.strides[3] != 1:
            copy = f"Pass a contiguous copy of {name}."
            raise StrideError(name, "a contiguous last axis (stride 1)", strides(info), copy)
        if num_pages > 1 and info.strides[0] % 16:
            expected = "pages that begin at multiples of 16 bytes"
            remedy = "Pad them: quantize_kv() makes pages of a multiple of 576 bytes."
            raise AlignmentError(name, expected, strides(info), remedy)
        page = (num_pages, page_size * width), (info.strides[0], 1)
        info = info._replace(shape=page[0], strides=page[1])
    latent_rows(name, info)
    return found


def query(
    info: ArrayInfo, cache_format: CacheFormat, cache_dtype: str, cache_name: str = "k_cache"
) -> None:
    """q has the columns of the cache's keys, and a dtype that goes with the cache's."""
    name, got = "q", show(info)
    if info.shape[-1] != cache_format.d_qk:
        expected = f"a last axis of {cache_format.d_qk}, the columns of a key in {cache_name}"
        remedy = (
            f"The format {cache_format.name} has keys of {cache_format.d_qk} columns: concatenate "
            "as many of the latent part and the rotary part of the query."
        )
        raise ShapeError(name, expected, got, remedy)
    if not cache_format.is_fp8 and info.dtype != cache_dtype:
        remedy = f"Convert q to the dtype of {cache_name}, or make the cache in that of q."
        raise DTypeError(name, f"{cache_dtype}, the dtype of {cache_name}", got, remedy)
    if info.dtype not in FLOATS and not cache_format.has_descale:
        remedy = "Convert q to bfloat16."
        expected = "bfloat16 or float16; float8_e4m3fn goes with a cache of one scale alone"
        raise DTypeError(name, expected, got, remedy)


def wide_fp8(
    value: Any, q: ArrayInfo, cache_format: CacheFormat, cache_name: str = "k_cache"
) -> None:
    """Products in bfloat16 are of queries in bfloat16. A cache of one scale has no need of them."""
    scalars.wide_fp8(value)
    if not value or cache_format.has_descale:
        return
    if not cache_format.is_fp8:
        expected = f"False, since {cache_name}, of the format {cache_format.name}, is no FP8 cache"
        raise OptionError("wide_fp8", expected, "True", "Leave it out.")
    if q.dtype != "bfloat16":
        remedy = "Convert q to bfloat16, or leave wide_fp8 out."
        raise DTypeError("q", "bfloat16, with wide_fp8", show(q), remedy)


def requests(name: str, info: ArrayInfo, count: int) -> None:
    """Query tokens are requests of the split."""
    if count > MAX_BATCH:
        expected = f"at most {MAX_BATCH} query tokens in all"
        raise ShapeError(name, expected, show(info), "Split the batch.")


def same_s_q(infos: Mapping[str, ArrayInfo], s_q: int) -> None:
    """Lengths a query token, where they are given so, are of as many as the call has."""
    for name in ("topk_length", "extra_topk_length"):
        if name in infos and len(infos[name].shape) == 2 and infos[name].shape[1] != s_q:
            expected = f"shape [batch] or [batch, {s_q}], num_q_tokens_per_head_k / num_heads_q"
            raise ShapeError(name, expected, show(infos[name]), "Pass one for each query token.")


def descales(
    infos: Mapping[str, ArrayInfo], cache_format: CacheFormat, cache_name: str = "k_cache"
) -> None:
    """descale_q and descale_k go with a cache that has no scales of its own."""
    for name in ("descale_q", "descale_k"):
        if name in infos and not cache_format.has_descale:
            expected = f"None, since {cache_name}, of the format {cache_format.name}, needs none"
            raise OptionError(name, expected, show(infos[name]), "Leave it out.")


def decode_outputs(
    named: Mapping[str, Any], options: tuple[Any, ...], num_sms: int = NUM_SMS_CPU
) -> tuple[Output, ...]:
    """What a decode call over gathered rows gives, by its q: out, and lse. The options and the
    multiprocessors, which other operations ask about, do not matter."""
    q = named["q"]
    batch, s_q, h_q, _ = q.shape
    dtype = out_dtype(str(q.dtype).removeprefix("torch."))
    return Output((batch, s_q, h_q, HEAD_DIM_V), dtype), Output((batch, h_q, s_q), "float32")


def outputs(
    table: Table, infos: Mapping[str, ArrayInfo], expected: tuple[tuple[tuple[int, ...], str], ...]
) -> None:
    """The outputs that the caller gave: exactly of this shape and dtype, contiguous, writable, and
    apart from everything else."""
    for array, (shape, dtype) in zip(table.having("output"), expected, strict=True):
        name, info = array.name, infos.get(array.name)
        if info is None:
            continue
        make = f"Allocate it with shape {shape} and dtype {dtype}, or leave {name} out."
        if info.shape != shape:
            raise ShapeError(name, f"shape {shape}", show(info), make)
        if info.dtype != dtype:
            raise DTypeError(name, dtype, show(info), make)
        if info.readonly:
            raise ReadOnlyError(name, "a writable array", "a read-only one", make)
        contiguous(name, info)
        aligned(name, info, array.alignment)
    checks.aliasing(table, infos)
