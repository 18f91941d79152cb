"""What XLA calls back at run time: the launches on a GPU, the reference on the CPU.

XLA calls on a thread and with a stream of its choice, perhaps under graph capture. So nothing here
allocates, loads, synchronises or touches another stream; the buffers live only during the call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import reference
from ..calls.refusals import report
from ..gpu.engine import engine_of
from ..gpu.geometry import Addresses, Geometry
from ..schedule import split
from ..schedule.sched_meta import stale_requests

if TYPE_CHECKING:
    from ..gpu.decode_launch import DecodeLaunch

CPU = 1  # kDLCPU


class Config(NamedTuple):
    """What is static in one traced call, besides shapes and dtypes."""

    softmax_scale: float
    causal: bool
    on_gpu: bool
    operands: tuple[str, ...]  # names of the arrays, in their order

    @property
    def has_metadata(self) -> bool:
        """False: the op makes its own schedule."""
        return "tile_scheduler_metadata" in self.operands


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


def pointer_of(buffer: Any) -> int:
    return int(buffer.__cuda_array_interface__["data"][0])


class DecodeCallback:
    """What XLA calls for flash_mla_with_kvcache() of one configuration and geometry."""

    __name__ = "flashmla_decode"  # what profiles show

    def __init__(self, config: Config, geometry: Geometry) -> None:
        self._config, self._geometry = config, geometry
        self._launches: dict[int, DecodeLaunch] = {}

    def prepare(self, ordinals: Iterable[int]) -> int:
        """Makes the launch ready on these GPUs; the scratch that it needs, in float32."""
        for ordinal in ordinals:
            if ordinal not in self._launches:
                self._launches[ordinal] = engine_of(ordinal).prepare(self._geometry)
        return max(launch.scratch_floats for launch in self._launches.values())

    def __call__(self, ctx: Any, results: Any, *operands: Any) -> None:
        config = self._config
        kind, ordinal = map(int, operands[0].__dlpack_device__())
        if kind == CPU:
            _decode_on_host(
                config, [np.asarray(x) for x in operands], *map(np.asarray, results[:2])
            )
            return
        if not config.on_gpu:
            raise RuntimeError(
                "A call that was traced for the CPU runs on a GPU. Make the GPU JAX's default"
                " backend: put cuda first in JAX_PLATFORMS, or leave it unset."
            )
        self.prepare([ordinal])
        out, lse, scratch, *made = map(pointer_of, results)
        at = dict(zip(config.operands, map(pointer_of, operands), strict=True))
        metadata, num_splits = made or (at["tile_scheduler_metadata"], 0)
        inputs = at["q"], at["k_cache"], metadata, at["cache_seqlens"], at["block_table"]
        addresses = Addresses(*inputs, out, lse, scratch)
        with device_guard(ordinal):
            self._launches[ordinal](
                ctx.stream, addresses, config.softmax_scale, config.causal, num_splits
            )


@functools.cache  # one object a configuration: JAX compiles again for another callback
def decode_callback(config: Config, geometry: Geometry) -> DecodeCallback:
    return DecodeCallback(config, geometry)


def _decode_on_host(config: Config, operands: list[Any], out: Any, lse: Any) -> None:
    named = dict(zip(config.operands, operands, strict=True))
    schedule, lengths = named.get("tile_scheduler_metadata"), named["cache_seqlens"]
    result = reference.decode(
        named["q"],
        named["k_cache"],
        named["block_table"],
        lengths,
        config.softmax_scale,
        config.causal,
        stale=None if schedule is None else stale_requests(schedule, lengths),
        out=out,
        lse=lse,
    )
    report(result.violation)


@functools.cache
def metadata_callback(parts: int, rows: int, h_kv: int) -> Callable[..., None]:
    def flashmla_metadata(ctx: Any, results: Any, cache_seqlens: Any) -> None:
        kind, ordinal = map(int, cache_seqlens.__dlpack_device__())
        if kind == CPU:
            views = map(np.asarray, results)
            made = split.plan(np.asarray(cache_seqlens), parts, rows, h_kv)
            for view, array in zip(views, made, strict=True):
                view[...] = array
            return
        (batch,) = cache_seqlens.shape
        lengths, metadata, num_splits = map(pointer_of, (cache_seqlens, *results))
        with device_guard(ordinal):
            engine_of(ordinal).schedule(
                ctx.stream, lengths, batch, parts, rows, h_kv, metadata, num_splits
            )

    return flashmla_metadata
