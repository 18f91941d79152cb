"""What XLA calls back at run time: the launches on a GPU, the reference on the CPU.

XLA calls on a thread and with a stream of its choice, perhaps under graph capture. So nothing here
allocates, loads, synchronises or touches another stream; the buffers live only during the call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import interface, reference
from ..gpu.geometry import Addresses, Geometry
from ..schedule import split as schedule
from ..schedule.sched_meta import stale_requests

if TYPE_CHECKING:
    from ..gpu.decode_launch import DecodeLaunch
    from ..gpu.engine import Engine

_CPU = 1  # kDLCPU


class Config(NamedTuple):
    """What is static in one traced call, besides shapes and dtypes."""

    softmax_scale: float
    causal: bool
    on_gpu: bool
    with_metadata: bool  # False: the op makes its own schedule


@contextmanager
def device_guard(ordinal: int) -> Iterator[None]:
    """Makes the device's context current, on a thread that may be new to CUDA's runtime, and
    restores the device after it, since the thread may be the user's."""
    runtime: Any = importlib.import_module("cupy").cuda.runtime
    before = runtime.getDevice()
    runtime.setDevice(ordinal)
    try:
        yield
    finally:
        if before != ordinal:
            runtime.setDevice(before)


def engine_of(ordinal: int) -> Engine:
    """The engine of a CUDA device; made, if it is new, at trace time."""
    return interface._engines.get(ordinal) or interface._engine(ordinal)


@functools.cache
def launch_of(engine: Engine, geometry: Geometry) -> DecodeLaunch:
    """What launches such a call on an engine's device; made, if it is new, at trace time."""
    return engine.prepare(geometry)


def _pointer(buffer: Any) -> int:
    return int(buffer.__cuda_array_interface__["data"][0])


@functools.cache  # one object a configuration: JAX compiles again for another callback
def decode_callback(config: Config, geometry: Geometry) -> Callable[..., None]:
    def flashmla_decode(ctx: Any, results: Any, *operands: Any) -> None:
        kind, ordinal = map(int, operands[0].__dlpack_device__())
        if kind == _CPU:
            _decode_on_host(
                config, [np.asarray(x) for x in operands], *map(np.asarray, results[:2])
            )
            return
        if not config.on_gpu:
            raise RuntimeError(
                "A call that was traced for the CPU runs on a GPU. Make the GPU JAX's default"
                " backend: put cuda first in JAX_PLATFORMS, or leave it unset."
            )
        launch, stream = launch_of(engine_of(ordinal), geometry), ctx.stream
        out, lse, scratch, *made = map(_pointer, results)
        q, k_cache, table, lengths, *given = map(_pointer, operands)
        metadata, num_splits = made or (given[0], 0)
        addresses = Addresses(q, k_cache, metadata, lengths, table, out, lse, scratch)
        with device_guard(ordinal):
            launch(stream, addresses, config.softmax_scale, config.causal, num_splits)

    return flashmla_decode


def _decode_on_host(config: Config, operands: list[Any], out: Any, lse: Any) -> None:
    q, k_cache, table, lengths, *given = operands
    result = reference.decode(
        q,
        k_cache,
        table,
        lengths,
        config.softmax_scale,
        config.causal,
        stale=stale_requests(given[0], lengths) if given else None,
        out=out,
        lse=lse,
    )
    interface.report(result.violation)


@functools.cache
def metadata_callback(parts: int, rows: int, h_kv: int) -> Callable[..., None]:
    def flashmla_metadata(ctx: Any, results: Any, cache_seqlens: Any) -> None:
        kind, ordinal = map(int, cache_seqlens.__dlpack_device__())
        if kind == _CPU:
            views = map(np.asarray, results)
            made = schedule.plan(np.asarray(cache_seqlens), parts, rows, h_kv)
            for view, array in zip(views, made, strict=True):
                view[...] = array
            return
        (batch,) = cache_seqlens.shape
        lengths, metadata, num_splits = map(_pointer, (cache_seqlens, *results))
        with device_guard(ordinal):
            engine_of(ordinal).schedule(
                ctx.stream, lengths, batch, parts, rows, h_kv, metadata, num_splits
            )

    return flashmla_metadata
