"""Calls over FP8 caches and lists of tokens on a GPU: the launch of a checked call, and its
addresses.

`operation` makes one `GpuWork` for a signature and calls it with the addresses of each call.
"""

from __future__ import annotations

from typing import Any

from ..errors import StrideError
from ..formats.cache_format import format_of
from ..frameworks import HOST, Adapter, ArrayInfo
from ..gpu.engine import engine_of
from ..gpu.gather_geometry import GatherAddresses, GatherGeometry, Pool
from ..schedule.sched_meta import Configuration, SchedMeta, bind_lock
from ..sizes import METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts
from .arguments import out_dtype
from .layouts import plain
from .wording import strides

Infos = dict[str, ArrayInfo]


def num_sms_of(device: int) -> int:
    """What schedules for arrays there are made for."""
    return NUM_SMS_CPU if device == HOST else engine_of(device).num_sms


class GpuWork:
    """What a GPU does for the calls of one signature."""

    def __init__(
        self,
        framework: Adapter,
        geometry: GatherGeometry,
        device: int,
        options: tuple[float, bool],
        names: tuple[str, str],
    ) -> None:
        """options: softmax_scale and causal; names: of the arrays that are the cache and its
        table."""
        self._framework, self._device, self._options = framework, device, options
        self._cache, self._table = names
        self.engine = engine_of(device)
        self._launch = self.engine.gather(geometry)
        self.scratch_floats = geometry.scratch_floats
        if framework.name == "jax":  # whose memory XLA allocates: see `launch`
            return
        self._new_scratch = framework.scratch_allocator(geometry.scratch_floats, device)
        parts, requests = geometry.parts, geometry.requests
        self._new_schedule = (
            framework.allocator((parts, METADATA_COLUMNS), "int32", device),
            framework.allocator((requests + 1,), "int32", device),
        )

    def __call__(
        self, at: dict[str, int], lazy: SchedMeta | None, configuration: Configuration | None
    ) -> None:
        """Launches on the current device, with the addresses of the arrays by name."""
        if lazy is None or configuration is None:
            self._start(at, at.get("tile_scheduler_metadata", 0))
            return
        pointer = self._framework.pointer
        if lazy.bound is None:
            with bind_lock:  # to the end: the stream has to see this call before others
                if lazy.bound is None:
                    made = [new() for new in self._new_schedule]
                    self._start(at, *map(pointer, made))
                    lazy.bind(configuration, *made)
                    return
        lazy.require(configuration)
        self._start(at, pointer(lazy.tile_scheduler_metadata))

    def _start(self, at: dict[str, int], metadata: int, num_splits: int = 0) -> None:
        _room, scratch = self._new_scratch()  # freed at the end, in the order of the stream
        stream = self._framework.stream(self._device)
        self.launch(stream, at, scratch, metadata, num_splits)

    def launch(
        self, stream: int, at: dict[str, int], scratch: int, metadata: int = 0, num_splits: int = 0
    ) -> None:
        """Launches with scratch of the caller's, [scratch_floats] float32, on the current device;
        without metadata it makes a schedule of its own there."""
        get = at.get
        addresses = GatherAddresses(
            at["q"],
            at[self._cache],
            at[self._table],
            get("cache_seqlens", 0),
            metadata,
            at["out"],
            at["lse"],
            scratch,
            get("extra_k_cache", 0),
            get("extra_indices_in_kvcache", 0),
            get("topk_length", 0),
            get("extra_topk_length", 0),
            get("attn_sink", 0),
            get("descale_q", 0),
            get("descale_k", 0),
            get("max_logits", 0),
        )
        self._launch(stream, addresses, *self._options, num_splits)


class ListMetadataWork:
    """What a GPU does for get_mla_metadata() with topk."""

    def __init__(
        self,
        framework: Adapter,
        device: int,
        sizes: tuple[int, int, int, int],
        h_q: int,
    ) -> None:
        """sizes: query tokens, how many share a length, topk, extra_topk."""
        self._framework, self._device = framework, device
        self.engine = engine_of(device)
        parts = num_sm_parts(self.engine.num_sms, h_q, 1)
        self._schedule = self.engine.list_schedule(sizes, parts, h_q)
        self.scratch_floats = max(1, sizes[0])
        if framework.name != "jax":
            self._new_scratch = framework.scratch_allocator(self.scratch_floats, device)

    def __call__(
        self, at: dict[str, int], lazy: SchedMeta | None, configuration: Configuration | None
    ) -> None:
        """The same for the metadata alone."""
        _room, scratch = self._new_scratch()
        self.launch(self._framework.stream(self._device), at, scratch)

    def launch(self, stream: int, at: dict[str, int], scratch: int) -> None:
        """Launches with the caller's scratch, [scratch_floats] float32, on the current device."""
        self._schedule(
            stream,
            (at.get("topk_length", 0), at.get("extra_topk_length", 0)),
            scratch,
            (at["tile_scheduler_metadata"], at["num_splits"]),
        )


Work = GpuWork | ListMetadataWork


def pool_of(cache: ArrayInfo) -> Pool:
    """Of [num_pages, page_size, 1, width]."""
    itemsize = 2 if cache.dtype in ("bfloat16", "float16") else 1
    stride = cache.strides[0] if cache.shape[0] > 1 else cache.shape[1] * cache.shape[3]
    return Pool(cache.shape[0], cache.shape[1], stride * itemsize)


def rows_of(table: ArrayInfo) -> int:
    """Elements from a row of [batch, columns] to the next."""
    return table.strides[0] if table.shape[0] > 1 else table.shape[1]


def even_rows(name: str, lists: ArrayInfo) -> int:
    """Elements from one list of [batch, s_q, topk] to the next. Raises StrideError unless all lie
    evenly behind one another."""
    batch, s_q, topk = lists.shape
    request, token, _ = lists.strides
    if s_q == 1:
        return request if batch > 1 else topk
    if batch > 1 and request != s_q * token:
        raise StrideError(
            name,
            "on a GPU, lists that lie evenly behind one another",
            strides(lists),
            f"Pass a contiguous copy of {name}.",
        )
    return token


def geometry_of(cache: ArrayInfo, q: ArrayInfo, **of: Any) -> GatherGeometry:
    """q as [batch, s_q, h_q, d_qk], and a cache of some format."""
    found = format_of(cache.dtype, cache.shape[-1])
    assert found is not None
    batch, s_q, h_q, d_qk = q.shape
    return GatherGeometry(
        cache_format=found.name,
        q_dtype=q.dtype,
        dtype=out_dtype(q.dtype),
        batch=batch,
        s_q=s_q,
        h_q=h_q,
        d_qk=d_qk,
        q_strides=tuple(plain(q).strides),
        pool=pool_of(cache),
        **of,
    )
