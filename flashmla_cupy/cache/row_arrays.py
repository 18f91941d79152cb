"""The rows that a cache is given: what they have to be, and where the pool can be reached.

Arrays come from any framework and place that can reach the pool: NumPy, PyTorch on the CPU and JAX
for a pool in host memory; CuPy, PyTorch and JAX on its GPU for a pool there, and rows from host
memory as well. JAX's arrays and those of other frameworks pass through DLPack.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ..calls.wording import show
from ..errors import ArgumentError, DeviceMismatchError, DTypeError, ShapeError
from ..frameworks import HOST, Adapter, framework, framework_of, is_foreign, numpy_dtype
from ..frameworks.dlpack import from_dlpack
from .pool import Pool

_NUMBERS = ("bfloat16", "float16", "float32")  # what a cache of FP8 quantises


def checked(
    pool: Pool, name: str, rows: Any, axes: int, function: str, *, one_layer: bool = False
) -> tuple[Any, Adapter]:
    """(rows [layers, ..., h_kv, width], with `axes` axes but for the first and the last two, where
    the pool can be reached; their adapter). Raises an ArgumentError."""
    rows, adapter = _reachable(pool, name, rows, function)
    info = adapter.describe(rows, name)
    layout, got = pool.layout, show(info)
    width = _width(pool, name, info.dtype, got, adapter, function)
    one_head, layered = layout.num_heads_kv == 1, layout.num_layers > 1 and not one_layer
    full, missing = rows, axes + 2 + layered - len(info.shape)
    if one_head and missing == 1:
        full = rows[..., None, :]
    if not layered:
        full = full[None]
    ends = layout.num_heads_kv, width
    layers = layout.num_layers if layered else 1
    if len(full.shape) != axes + 3 or full.shape[-2:] != ends or full.shape[0] != layers:
        lead = "n" if axes == 1 else "batch, n"
        if layered:
            lead = f"{layers}, {lead}"
        expected = f"[{lead}, {layout.num_heads_kv}, {width}]"
        if one_head:
            expected = f"[{lead}, {width}] or {expected}"
        remedy = "A row holds latent and rotary columns, side by side."
        raise ShapeError(name, expected, got, remedy, function)
    return full, adapter


def _width(pool: Pool, name: str, dtype: str, got: str, adapter: Adapter, function: str) -> int:
    """How long rows of this dtype have to be."""
    layout, format = pool.layout, pool.format
    has_tail = format is not None and format.tail_bytes > 0
    if dtype == layout.dtype and not has_tail and pool.takes_rows:
        return layout.width
    if format is not None and format.is_fp8 and dtype in _NUMBERS:
        return format.d_qk
    convert = f"to(torch.{layout.dtype})" if adapter.name == "torch" else "astype(cache.dtype)"
    expected, remedy = (
        f"{layout.dtype}, the dtype of the cache",
        f"Convert it with {name}.{convert}.",
    )
    if format is not None and format.is_fp8:
        expected, remedy = "bfloat16, float16 or float32", "The cache quantises it."
    elif layout.dtype == "uint8" and not pool.takes_rows:
        expected = "nothing: rows of this width cannot be written one by one"
        remedy = "Write the pages yourself, where slot_mapping of a step says."
    raise DTypeError(name, expected, got, remedy, function)


def _reachable(pool: Pool, name: str, rows: Any, function: str) -> tuple[Any, Adapter]:
    try:
        if is_foreign(rows):
            rows = from_dlpack(rows, name)
        adapter = framework_of(rows, name)
        if adapter.name == "jax":
            rows = from_dlpack(rows, name)
            adapter = framework_of(rows, name)
        device = adapter.describe(rows, name).device
    except ArgumentError as error:
        raise error.of(function) from None
    if device == pool.place:
        return rows, adapter
    if device == HOST:
        return _upload(rows, adapter, pool.place), framework("cupy")
    where = "the CPU" if pool.place == HOST else f"CUDA device {pool.place}"
    expected = f"an array on {where}, where the pool is"
    remedy = f"Move {name} to {where}."
    raise DeviceMismatchError(name, expected, f"one on CUDA device {device}", remedy, function)


def _upload(rows: Any, adapter: Adapter, place: int) -> Any:
    view = np.ascontiguousarray(adapter.to_numpy(rows))
    with framework("cupy").device_guard(place):
        raw = importlib.import_module("cupy").asarray(view.view(np.uint8))
    return raw.view(numpy_dtype(view.dtype.name))
