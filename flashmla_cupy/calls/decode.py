"""flash_mla_with_kvcache() of arrays with an address: its checks, what follows from them, and the
launch, or the reference for arrays in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import reference
from ..errors import DeviceCheckError
from ..frameworks import HERE, HOST, Adapter, ArrayInfo, elsewhere
from ..gpu.engine import engine_of
from ..gpu.geometry import Addresses, Geometry
from ..schedule.sched_meta import Configuration, SchedMeta, bind_lock, stale_requests
from ..sizes import HEAD_DIM_V, NUM_SMS_CPU, num_sm_parts
from . import checks, layouts, metadata, refusals, scalars
from .arguments import DECODE
from .signatures import Checked, Pointers, Signatures, pointers, spans

if TYPE_CHECKING:
    from ..gpu.decode_launch import DecodeLaunch
    from ..gpu.engine import Engine
    from .metadata import MetadataCall

Results = tuple[Any, Any]
METADATA = DECODE.names.index("tile_scheduler_metadata")
OUT, LSE = DECODE.outputs
_addresses = functools.partial(tuple.__new__, Addresses)  # in a third of the time of Addresses()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCall(Checked):
    """A signature that passed the checks, and what follows from it."""

    framework: Adapter
    device: int
    configuration: Configuration
    engine: Engine | None  # None: arrays in host memory
    launch: DecodeLaunch | None  # None: no engine, or nothing to do
    softmax_scale: float
    causal: bool
    is_empty: bool
    new_out: Callable[[], Any]
    new_lse: Callable[[], Any]
    new_results: Callable[[], Results]  # both
    new_scratch: Callable[[], tuple[Any, int]] | None  # with its address; None: no need
    schedule: MetadataCall | None  # makes the metadata of a SchedMeta; None: there is none


_calls: Signatures[DecodeCall] = Signatures(DECODE)


def eager(
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
    lazy: SchedMeta | None = None,
    otherwise: Callable[..., Results] | None = None,
    *,
    is_op: bool = False,
) -> Results:
    """flash_mla_with_kvcache() of the arrays and options of `arguments.DECODE`; lazy: the SchedMeta
    that stands for the two arrays of the schedule.

    otherwise(where, arrays, options, lazy) makes the call if the arrays have no address to launch
    with, where `frameworks.elsewhere` says. is_op: a compiled program makes the call, in which a
    bad length in host memory is reported later, as on a GPU, and does not raise."""
    head_dim_v, softmax_scale, causal, _ = options
    is_usual = type(head_dim_v) is int and type(causal) is bool
    is_usual = is_usual and (softmax_scale is None or type(softmax_scale) is float)
    call, pointers, key = _calls.find(arrays, options, is_usual)
    if call is None or not (pointers in call.accepted or call.accepts(pointers)):
        where = elsewhere(arrays)
        if where and otherwise is not None:
            return otherwise(where, arrays, options, lazy)
        call, pointers = _make(arrays, options, key)
    engine, framework = call.engine, call.framework
    if engine is None:
        refusals.raise_host()
        return _on_host(call, arrays, lazy, is_op)
    engine.raise_pending()
    guard = framework.device_guard(call.device)
    if guard is HERE:  # the usual case; entering a context that does nothing takes time
        if lazy is None:
            return _launch(call, arrays, pointers)
        return _launch_lazy(call, arrays, pointers, lazy)
    with guard:
        if lazy is None:
            return _launch(call, arrays, pointers)
        return _launch_lazy(call, arrays, pointers, lazy)


# --- what is checked ---------------------------------------------------------------------------


class Valid(NamedTuple):
    """What the checks leave of a call's arguments."""

    framework: Adapter
    infos: dict[str, ArrayInfo]  # of the arrays that the call has
    softmax_scale: float
    causal: bool
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Query rows of one kv head."""
        _, s_q, h_q, _ = self.infos["q"].shape
        return max(1, s_q * h_q // self.h_kv)

    @property
    def h_kv(self) -> int:
        return self.infos["k_cache"].shape[2]

    def parts(self, num_sms: int) -> int:
        """Rows of tile_scheduler_metadata on a GPU with so many multiprocessors."""
        return num_sm_parts(num_sms, self.rows, self.h_kv)

    def require_metadata(self, parts: int) -> None:
        """Checks the two arrays of the schedule, whose size depends on the device."""
        splits, batch = self.infos["num_splits"], self.infos["q"].shape[0]
        checks.metadata(self.infos["tile_scheduler_metadata"], splits, batch, parts)


def validate(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    """Every check but that of the metadata's size, which depends on the device."""
    head_dim_v, softmax_scale, causal, is_lazy = options
    scalars.head_dim_v(head_dim_v)
    softmax_scale = scalars.softmax_scale(softmax_scale)
    causal = scalars.causal(causal)
    named = DECODE.named(arrays)
    checks.metadata_kind(named["tile_scheduler_metadata"], named["num_splits"], is_lazy)
    given = {
        array.name: named[array.name]
        for array in DECODE.arrays
        if array.role == "input" or named[array.name] is not None
    }
    framework, infos = checks.describe(given, DECODE.function)

    q, k_cache = infos["q"], infos["k_cache"]
    checks.query(q)
    checks.cache(k_cache, q)
    batch, s_q, h_q, _ = q.shape
    checks.table(infos["block_table"], batch, k_cache.shape[1])
    checks.lengths(infos["cache_seqlens"], batch)
    checks.metadata_dtypes(infos)
    out_shape, lse_shape = (batch, s_q, h_q, HEAD_DIM_V), (batch, h_q, s_q)
    if "out" in infos:
        checks.output("out", infos["out"], out_shape, q.dtype)
    if "lse" in infos:
        checks.output("lse", infos["lse"], lse_shape, "float32")
    checks.aliasing(DECODE, infos)
    return Valid(framework, infos, softmax_scale, causal, out_shape, lse_shape)


def _make(
    arrays: tuple[Any, ...], options: tuple[Any, ...], key: Any
) -> tuple[DecodeCall, Pointers]:
    """Every check, then the call, which is kept under the key, and the addresses of its arrays."""
    valid = validate(arrays, options)
    framework, infos, softmax_scale, causal, out_shape, lse_shape = valid
    q, k_cache, is_lazy = infos["q"], infos["k_cache"], options[-1]
    batch, s_q, h_q, _ = q.shape

    engine = None if q.device == HOST else engine_of(q.device)
    parts = valid.parts(NUM_SMS_CPU if engine is None else engine.num_sms)
    if not is_lazy:
        valid.require_metadata(parts)

    launch, scratch_floats = None, 0
    is_empty = 0 in out_shape
    if engine is not None and not is_empty:
        plain = layouts.plain
        launch = engine.prepare(Geometry.of(plain(q), plain(k_cache), infos["block_table"], parts))
        scratch_floats = launch.scratch_floats

    schedule = None
    if is_lazy:
        schedule = metadata.make(framework, infos["cache_seqlens"], valid.rows, valid.h_kv)

    configuration = Configuration(
        framework.name, q.device, batch, s_q, h_q, valid.h_kv, k_cache.shape[1], causal
    )
    shapes, dtypes = (out_shape, lse_shape), (q.dtype, "float32")
    new_scratch = None
    if scratch_floats:
        new_scratch = framework.scratch_allocator(scratch_floats, q.device)
    call = DecodeCall(
        table=DECODE,
        spans=spans(DECODE, infos),
        framework=framework,
        device=q.device,
        configuration=configuration,
        engine=engine,
        launch=launch,
        softmax_scale=softmax_scale,
        causal=causal and s_q > 1,
        is_empty=is_empty,
        new_out=framework.allocator(out_shape, q.dtype, q.device),
        new_lse=framework.allocator(lse_shape, "float32", q.device),
        new_results=framework.pair_allocator(shapes, dtypes, q.device),
        new_scratch=new_scratch,
        schedule=schedule,
    )
    return _calls.keep(key, call), pointers(DECODE, infos)[: len(arrays)]


# --- what is done ------------------------------------------------------------------------------


def _launch_lazy(
    call: DecodeCall, arrays: tuple[Any, ...], pointers: Pointers, lazy: SchedMeta
) -> Results:
    """With the metadata of a SchedMeta: its first call makes it, in the same graph of kernels, and
    binds it."""
    if call.schedule is None or call.launch is None:  # nothing to compute
        return _launch(call, arrays, pointers)
    pointer = call.framework.pointer
    if lazy.bound is None:
        with bind_lock:  # to the end: the stream has to see this call before any other one
            if lazy.bound is None:
                made = call.schedule.new()
                results = _launch(call, arrays, pointers, *map(pointer, made))
                lazy.bind(call.configuration, *made)
                return results
    lazy.require(call.configuration)
    return _launch(call, arrays, pointers, pointer(lazy.tile_scheduler_metadata))


def _launch(
    call: DecodeCall,
    arrays: tuple[Any, ...],
    pointers: Pointers,
    schedule: int = 0,
    new_splits: int = 0,
) -> Results:
    """Allocates what is missing and launches; nothing here waits for the device. schedule: the
    address of tile_scheduler_metadata if it is not among the pointers; new_splits: that of
    num_splits, if both are yet to be made."""
    framework = call.framework
    pointer = framework.pointer
    if len(arrays) <= OUT:  # the usual case: neither is given
        out, lse = call.new_results()
        out_pointer, lse_pointer = pointer(out), pointer(lse)
    else:
        out, lse = _results(call, arrays[OUT], arrays[LSE])
        out_pointer = pointers[OUT] or pointer(out)
        lse_pointer = pointers[LSE] or pointer(lse)
    if call.launch is None:  # the results are empty
        return out, lse
    scratch = 0
    if call.new_scratch is not None:  # freed at the end of this call, in the order of the stream
        _room, scratch = call.new_scratch()
    q, k_cache, table, cache_seqlens, *_ = pointers
    call.launch(
        framework.stream(call.device),
        _addresses(
            (
                q,
                k_cache,
                schedule or pointers[METADATA],
                cache_seqlens,
                table,
                out_pointer,
                lse_pointer,
                scratch,
            )
        ),
        call.softmax_scale,
        call.causal,
        new_splits,
    )
    return out, lse


def _results(call: DecodeCall, out: Any, lse: Any) -> Results:
    """New arrays for those that the caller did not give; the framework learns of the others."""
    if out is None:
        out = call.new_out()
    else:
        call.framework.written(out)
    if lse is None:
        lse = call.new_lse()
    else:
        call.framework.written(lse)
    return out, lse


def _on_host(
    call: DecodeCall, arrays: tuple[Any, ...], lazy: SchedMeta | None, is_op: bool
) -> Results:
    """The reference, on views of the arrays."""
    view, named = call.framework.to_numpy, DECODE.named(arrays)
    lengths, pages = view(named["cache_seqlens"]), view(named["block_table"])
    if not (is_op or call.is_empty):
        refused = reference.bad_length(lengths, pages, call.configuration.page_size)
        if refused >= 0:
            raise DeviceCheckError(refused, -1, "length", is_earlier=False)
    out, lse = _results(call, named["out"], named["lse"])
    if call.is_empty:
        return out, lse
    schedule = named["tile_scheduler_metadata"]
    if lazy is not None and call.schedule is not None:
        with bind_lock:
            if lazy.bound is None:
                lazy.bind(call.configuration, *call.schedule(named["cache_seqlens"], 0))
        lazy.require(call.configuration)
        schedule = lazy.tile_scheduler_metadata
    result = reference.decode(
        view(named["q"]),
        view(named["k_cache"]),
        pages,
        lengths,
        call.softmax_scale,
        call.causal,
        stale=stale_requests(view(schedule), lengths),
        out=view(out),
        lse=view(lse),
    )
    refusals.report(result.violation)
    return out, lse
