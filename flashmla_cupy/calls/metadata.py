"""get_mla_metadata() of arrays with an address: its checks, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..frameworks import HERE, HOST, Adapter, ArrayInfo, elsewhere
from ..gpu.engine import engine_of
from ..schedule import split
from ..sizes import METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts
from . import checks, scalars
from .arguments import METADATA
from .signatures import Checked, Signatures, spans

if TYPE_CHECKING:
    from ..gpu.engine import Engine

Results = tuple[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataCall(Checked):
    """A signature that passed the checks, and what follows from it."""

    framework: Adapter
    engine: Engine | None  # None: arrays in host memory
    device: int
    batch: int
    parts: int
    rows: int
    h_kv: int
    new: Callable[[], Results]

    def __call__(self, cache_seqlens: Any, address: int) -> Results:
        """(tile_scheduler_metadata [parts, 8], num_splits [batch + 1]), int32, for cache_seqlens
        [batch] int32 at this address, beside it; queued on the current stream."""
        guard = self.framework.device_guard(self.device)
        if guard is HERE:  # the usual case; entering a context that does nothing takes time
            return self._queue(cache_seqlens, address)
        with guard:
            return self._queue(cache_seqlens, address)

    def _queue(self, cache_seqlens: Any, address: int) -> Results:
        framework, engine, batch = self.framework, self.engine, self.batch
        metadata, num_splits = self.new()
        if engine is None:
            view = framework.to_numpy
            view(metadata)[:], view(num_splits)[:] = split.plan(
                view(cache_seqlens), self.parts, self.rows, self.h_kv
            )
        elif batch:
            pointer = framework.pointer
            engine.schedule(
                framework.stream(self.device),
                address,
                batch,
                self.parts,
                self.rows,
                self.h_kv,
                pointer(metadata),
                pointer(num_splits),
            )
        else:  # nothing to plan, and no launch of nothing
            metadata[...] = 0
            num_splits[...] = 0
        return metadata, num_splits


_calls: Signatures[MetadataCall] = Signatures(METADATA)


def eager(
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
    otherwise: Callable[..., Results] | None = None,
) -> Results:
    """get_mla_metadata() of the arrays and options of `arguments.METADATA`.

    otherwise(where, arrays, options) makes the call if the arrays have no address to launch with,
    where `frameworks.elsewhere` says."""
    rows, h_kv, h_q = options
    is_usual = type(rows) is int and type(h_kv) is int and (h_q is None or type(h_q) is int)
    call, pointers, key = _calls.find(arrays, options, is_usual)
    if call is None or not call.accepts(pointers):
        where = elsewhere(arrays)
        if where and otherwise is not None:
            return otherwise(where, arrays, options)
        framework, lengths, rows, h_kv = validate(arrays, options)
        call, pointers = make(framework, lengths, rows, h_kv), (lengths.ptr,)
        _calls.keep(key, call)
    return call(arrays[0], pointers[0])


def validate(
    arrays: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[Adapter, ArrayInfo, int, int]:
    """Every check: (framework, cache_seqlens, num_q_tokens_per_head_k, num_heads_k)."""
    name = "cache_seqlens"
    try:
        framework, infos = checks.describe({name: arrays[0]}, METADATA.function)
        checks.lengths(infos[name], None)
    except ArgumentError as error:
        raise error.of(METADATA.function) from error.__cause__
    return framework, infos[name], *sizes(options)


def sizes(
    options: tuple[Any, ...], of_shapes: Callable[..., int] = scalars.integer
) -> tuple[int, int]:
    """(num_q_tokens_per_head_k, num_heads_k), checked; what may follow from shapes, by that
    function."""
    num_q_tokens_per_head_k, num_heads_k, num_heads_q = options
    rows = of_shapes("num_q_tokens_per_head_k", num_q_tokens_per_head_k, METADATA.function, least=1)
    h_kv = scalars.integer("num_heads_k", num_heads_k, METADATA.function, least=1)
    if num_heads_q is not None:
        of_shapes("num_heads_q", num_heads_q, METADATA.function, least=1)
    return rows, h_kv


def make(framework: Adapter, lengths: ArrayInfo, rows: int, h_kv: int) -> MetadataCall:
    """The call for checked arguments."""
    device, batch, rows = lengths.device, lengths.shape[0], max(1, rows)
    engine = None if device == HOST else engine_of(device)
    parts = num_sm_parts(NUM_SMS_CPU if engine is None else engine.num_sms, rows, h_kv)
    shapes = (parts, METADATA_COLUMNS), (batch + 1,)
    return MetadataCall(
        table=METADATA,
        spans=spans(METADATA, {"cache_seqlens": lengths}),
        framework=framework,
        engine=engine,
        device=device,
        batch=batch,
        parts=parts,
        rows=rows,
        h_kv=h_kv,
        new=framework.pair_allocator(shapes, ("int32", "int32"), device),
    )
