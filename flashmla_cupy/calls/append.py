"""append_mla_kv() of arrays with an address: its checks, what follows from them, and the launch, or
the definition for arrays in host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import reference_append
from ..errors import (
    AlignmentError,
    ArgTypeError,
    ArgumentError,
    DTypeError,
    OptionError,
    ReadOnlyError,
    ScalarError,
    ShapeError,
    StrideError,
)
from ..frameworks import HOST, Adapter, ArrayInfo, elsewhere
from ..sizes import HEAD_DIM, HEAD_DIM_ROPE, PAGE_SIZES
from . import checks, layouts
from .arguments import APPEND
from .signatures import Checked, Pointers, Signatures, pointers, spans
from .wording import kind, show, strides

if TYPE_CHECKING:
    from ..gpu.append_launch import CacheLaunches, PoolGeometry, Rows

    Target = tuple[CacheLaunches, PoolGeometry, Rows]

ROTARY = ("cos", "sin", "positions")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendCall(Checked):
    """A signature that passed the checks, and what follows from it."""

    framework: Adapter
    device: int
    target: Target | None  # None: arrays in host memory
    num_positions: int  # 0: no rotation
    interleaved: bool


_calls: Signatures[AppendCall] = Signatures(APPEND)


def eager(
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
    otherwise: Callable[..., Any] | None = None,
) -> Any:
    """append_mla_kv() of the arrays and options of `arguments.APPEND`: k_cache, written.

    otherwise(where, arrays, options) makes the call if the arrays have no address to launch with,
    where `frameworks.elsewhere` says."""
    call, at, key = _calls.find(arrays, options, type(options[0]) is bool)
    if call is None or not call.accepts(at):
        where = elsewhere(arrays)
        if where and otherwise is not None:
            return otherwise(where, arrays, options)
        call, at = _make(arrays, options, key)
    if call.target is None:
        _on_host(call, arrays)
    else:
        with call.framework.device_guard(call.device):
            launch(call, at, call.framework.stream(call.device))
    call.framework.written(arrays[-1])
    return arrays[-1]


def launch(call: AppendCall, at: Pointers, stream: int) -> None:
    """Queues the kernel for arrays on a GPU at these addresses, in the order of the table."""
    from ..gpu.append_launch import NO_ROTATION, Rotary

    if call.target is None:
        return
    launches, pool, of = call.target
    rows, slots, cos, sin, positions, k_cache = at
    rotary = NO_ROTATION
    if call.num_positions:
        rotary = Rotary(cos, sin, positions, call.num_positions, call.interleaved)
    launches.append(
        stream, pool._replace(address=k_cache), of._replace(address=rows), slots, rotary
    )


# --- what is checked ---------------------------------------------------------------------------


class Valid(NamedTuple):
    """What the checks leave of a call's arguments."""

    framework: Adapter
    infos: dict[str, ArrayInfo]
    interleaved: bool


def validate(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    """Every check, on shapes, strides and dtypes."""
    named = APPEND.named(arrays)
    (interleaved,) = options
    function = APPEND.function
    missing = rotation(interleaved, *[named[name] for name in ROTARY])
    order = ("k_cache", "rows", "slot_mapping", *(() if missing else ROTARY))
    framework, infos = checks.describe({name: named[name] for name in order}, function)
    try:
        _pool(infos["k_cache"])
        _rows(infos["rows"], infos["k_cache"])
        n = infos["rows"].shape[0]
        integers = ("int64", "int32") if framework.name == "jax" else ("int64",)
        _vector("slot_mapping", infos["slot_mapping"], n, integers)
        if not missing:
            _vector("positions", infos["positions"], n, integers)
            _angles(infos["cos"], infos["sin"])
        if framework.name != "jax":  # whose arrays have no address
            checks.aliasing(APPEND, infos)
    except ArgumentError as error:
        raise error.of(function) from error.__cause__
    return Valid(framework, infos, interleaved)


def rotation(interleaved: Any, cos: Any, sin: Any, positions: Any) -> list[str]:
    """Whether the rows are rotated, and how; which of the three arrays are not given."""
    if not isinstance(interleaved, bool):
        remedy = "Pass bool(interleaved)."
        got = kind(interleaved)
        raise ArgTypeError("interleaved", "True or False", got, remedy, APPEND.function)
    given = zip(ROTARY, (cos, sin, positions), strict=True)
    missing = [name for name, x in given if x is None]
    if 0 < len(missing) < len(ROTARY):
        remedy, expected = (
            "Pass all three to rotate the rows, or none.",
            "cos, sin and positions together",
        )
        raise OptionError(missing[0], expected, "None", remedy, APPEND.function)
    return missing


def _pool(k_cache: ArrayInfo) -> None:
    name, got = "k_cache", show(k_cache)
    _dtype(name, k_cache)
    shape = k_cache.shape
    if len(shape) != 4 or shape[3] != HEAD_DIM:
        remedy = "Pass one layer's pages: cache.layer(i) of a PagedKVCache."
        raise ShapeError(name, f"shape {APPEND[name].shape}", got, remedy)
    if shape[1] not in PAGE_SIZES:
        expected = f"a page_size of {', '.join(map(str, PAGE_SIZES))}"
        raise ScalarError(name, expected, f"{shape[1]}", "FlashMLA's own page size is 64.")
    if k_cache.readonly:
        remedy = "Pass an array that may be written."
        raise ReadOnlyError(name, "a writable array", "a read-only one", remedy)
    layouts.latent_rows(name, k_cache)


def _rows(rows: ArrayInfo, k_cache: ArrayInfo) -> None:
    name, h_kv = "rows", k_cache.shape[2]
    shape = rows.shape
    if shape[1:] != (h_kv, HEAD_DIM) and not (h_kv == 1 and shape[1:] == (HEAD_DIM,)):
        short = f"[n, {HEAD_DIM}] or " if h_kv == 1 else ""
        expected = f"shape {short}[n, {h_kv}, {HEAD_DIM}], the kv heads of k_cache"
        remedy = "A row holds 512 latent and 64 rotary columns, side by side."
        raise ShapeError(name, expected, show(rows), remedy)
    if rows.dtype != k_cache.dtype:
        remedy = "Convert the rows to the dtype of k_cache."
        raise DTypeError(name, f"{k_cache.dtype}, as k_cache is", show(rows), remedy)
    if 0 in shape:
        return
    size, copy = layouts.itemsize(rows), "Pass a contiguous copy of rows."
    if rows.strides[-1] != 1:
        raise StrideError(name, "a contiguous last axis (stride 1)", strides(rows), copy)
    outer = zip(rows.strides[:-1], shape[:-1], strict=True)
    if any(stride * size % layouts.TMA_BYTES for stride, length in outer if length > 1):
        expected = f"strides that are multiples of {layouts.TMA_BYTES} bytes"
        raise AlignmentError(name, expected, strides(rows), copy)
    layouts.aligned(name, rows, APPEND[name].alignment)


def _vector(name: str, info: ArrayInfo, n: int, dtypes: tuple[str, ...]) -> None:
    if info.dtype not in dtypes:
        remedy = f"Convert it with {name}.astype('int64'), or {name}.long() for a tensor."
        raise DTypeError(name, " or ".join(dtypes), show(info), remedy)
    if tuple(info.shape) != (n,):
        expected = f"shape ({n},), one for each of the rows"
        raise ShapeError(name, expected, show(info), f"Pass {name}.reshape(-1).")
    layouts.contiguous(name, info)
    layouts.aligned(name, info, APPEND[name].alignment)


def _angles(cos: ArrayInfo, sin: ArrayInfo) -> None:
    for name, info in (("cos", cos), ("sin", sin)):
        if info.dtype != "float32":
            remedy = "Keep the tables in float32: see deepseek.rotary_tables()."
            raise DTypeError(name, "float32", show(info), remedy)
        if len(info.shape) != 2 or info.shape[1] != HEAD_DIM_ROPE // 2 or info.shape != cos.shape:
            expected = f"shape {APPEND[name].shape}, of cos and sin alike"
            remedy = "A row has a column for each pair of the 64 rotary columns."
            raise ShapeError(name, expected, show(info), remedy)
        if info.shape[0] == 0:
            remedy = "See deepseek.rotary_tables()."
            raise ShapeError(name, "a row for each position", show(info), remedy)
        layouts.contiguous(name, info)
        layouts.aligned(name, info, APPEND[name].alignment)


def _dtype(name: str, info: ArrayInfo) -> None:
    if info.dtype not in APPEND[name].dtypes:
        remedy = "write_kv() writes to caches of other formats."
        raise DTypeError(name, "bfloat16 or float16", show(info), remedy)


def _make(
    arrays: tuple[Any, ...], options: tuple[Any, ...], key: Any
) -> tuple[AppendCall, Pointers]:
    """Every check, then the call, which is kept under the key, and the addresses of its arrays."""
    valid = validate(arrays, options)
    device = valid.infos["k_cache"].device
    call = make(valid, device if device != HOST else None)
    return _calls.keep(key, call), pointers(APPEND, valid.infos)


def make(valid: Valid, device: int | None) -> AppendCall:
    """The call for checked arguments, on a CUDA device or the host (None). Loads the kernel."""
    infos = valid.infos
    target: Target | None = None
    if device is not None:
        from ..gpu.append_launch import CacheLaunches
        from ..gpu.engine import engine_of

        target = CacheLaunches(engine_of(device), infos["k_cache"].dtype), *_geometry(infos)
    return AppendCall(
        table=APPEND,
        spans=spans(APPEND, infos),
        framework=valid.framework,
        device=HOST if device is None else device,
        target=target,
        num_positions=infos["cos"].shape[0] if "cos" in infos else 0,
        interleaved=valid.interleaved,
    )


def _geometry(infos: dict[str, ArrayInfo]) -> tuple[PoolGeometry, Rows]:
    """Where the rows come from and go to, at addresses yet to be known."""
    from ..gpu.append_launch import PoolGeometry, Rows

    k_cache, rows = infos["k_cache"], infos["rows"]
    size = layouts.itemsize(k_cache)
    num_pages, page_size, h_kv, width = k_cache.shape
    page, slot, head, _ = (stride * size for stride in k_cache.strides)
    of_rows = [stride * size for stride in rows.strides]
    row_head = of_rows[1] if len(rows.shape) == 3 else 0
    n = rows.shape[0]
    return (
        PoolGeometry(0, 0, page, slot, head, num_pages, page_size, h_kv, width * size),
        Rows(0, 0, 0, of_rows[0], row_head, 1, 1, n),
    )


# --- what is done ------------------------------------------------------------------------------


def _on_host(call: AppendCall, arrays: tuple[Any, ...]) -> None:
    """The definition, on views of the arrays."""
    view = call.framework.to_numpy
    named = {name: None if x is None else view(x) for name, x in APPEND.named(arrays).items()}
    on_host(call.interleaved, **named)


def on_host(interleaved: bool, k_cache: Any, rows: Any, slot_mapping: Any, **rotary: Any) -> None:
    """The definition, for arrays of NumPy."""
    if rows.ndim == 2:
        rows = rows[:, None]
    reference_append.append(k_cache, rows, slot_mapping, interleaved=interleaved, **rotary)
