"""Attention over rows that are gathered one by one, made ready: FP8 caches, and lists of tokens.

With lists, each query token is a request of its own for the kernels, `group` of them to a request
of the call (see schedule/lists.py). A GatherLaunch only launches; all that compiles, loads or
allocates is done when it is made, by `Engine.gather`, because a graph capture forbids it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import NamedTuple

from ..schedule.split import launch_sizes
from ..sizes import ROWS_PER_BLOCK, TOKENS_PER_TILE, ceil_div
from .combine_grid import blocks_of
from .driver import TENSOR_MAP_BYTES, Function, Launch
from .gather_geometry import GatherAddresses, GatherGeometry
from .gather_kernels import (
    COMBINE_GATHERED,
    FEW_ROWS,
    FEW_ROWS_V32,
    GATHER_16BIT,
    GATHER_16BIT_512,
    LIST_LENGTHS,
    PARAMETERS,
    gather_kernel,
)
from .kernels import SCHEDULE, Kernel, Variant
from .parameters import Arguments
from .reports import Reports
from .schedule_launch import ScheduleAhead, ScheduleLaunch
from .tensor_maps import COLUMN_BLOCK, Box, Maps, MapsByAddress

LOG2_E = 1.4426950408889634
# Column blocks of q that are loaded first (sm90_gather_shared.cuh); over FP8 caches, 4
# (sm90_fp8_queries.cuh).
_Q_FIRST_BLOCKS = {GATHER_16BIT.name: 5, GATHER_16BIT_512.name: 6}
_FIRST = PARAMETERS.run(
    (
        "tile_scheduler_metadata",
        "cache_seqlens",
        "block_table",
        "out",
        "lse",
        "out_partial",
        "row_partial",
        "pairs",
        "epoch",
    )
)
_OTHERS = PARAMETERS.run(
    (
        "cache",
        "extra_cache",
        "extra_indices",
        "topk_length",
        "extra_topk_length",
        "attn_sink",
        "descale_q",
        "descale_k",
        "max_logits",
        "q",
    )
)
_NO_MAPS = Maps(ctypes.create_string_buffer(TENSOR_MAP_BYTES))


def _kernel_of(g: GatherGeometry) -> Kernel:
    return gather_kernel(g.cache_format, g.q_dtype, g.slab_rows, wide_fp8=g.wide_fp8)


def _box_of_q(kernel: Kernel, column_blocks: int) -> Box:
    """What a kernel loads of q at once."""
    if kernel.source == FEW_ROWS_V32.source:
        return Box(FEW_ROWS, (column_blocks,))
    first = _Q_FIRST_BLOCKS.get(kernel.name, 4)
    return Box(ROWS_PER_BLOCK, (first, column_blocks - first))


class GatherKernels(NamedTuple):
    """The loaded kernels of a call."""

    list_lengths: Function
    schedule: Function
    gather: Function
    combine: Function

    @staticmethod
    def variants(geometry: GatherGeometry, arch: str) -> tuple[Variant, ...]:
        """What has to be compiled for it."""
        return (
            Variant(LIST_LENGTHS.name, arch=arch),
            Variant(SCHEDULE.name, arch=arch),
            Variant(_kernel_of(geometry).name, geometry.dtype, arch=arch),
            Variant(COMBINE_GATHERED.name, geometry.dtype, arch=arch),
        )


class GatherLaunch:
    """Launches the kernels of one geometry on one GPU: those of the schedule if there is none yet,
    the gather kernel and, where requests may be split, combine_gathered."""

    def __init__(
        self,
        geometry: GatherGeometry,
        kernels: GatherKernels,
        num_sms: int,
        reports: Reports,
        epochs: Iterator[int],
    ) -> None:
        g = self.geometry = geometry
        self._own = threading.local()
        self.kernels, self.reports, self.epochs = kernels, reports, epochs
        self.row = _kernel_of(g)
        self.grid = (g.slabs * g.slab_blocks, 1, g.parts)
        most_tiles = ceil_div(g.max_length, TOKENS_PER_TILE)
        self.combine_grid = (
            blocks_of(g.requests, g.parts, most_tiles, g.slab_rows, g.rows, num_sms),
            1,
            1,
        )
        self.parameters = {
            "refusal": reports.refusal,
            "refused": reports.refused,
            "table_stride": g.table_stride,
            "batch": g.requests,
            "s_q": g.positions,
            "h_q": g.h_q,
            "group": g.h_q,
            "slab_rows": g.slab_rows,
            "blocks": g.slab_blocks,
            "num_pages": g.pool.num_pages,
            "max_length": g.max_length,
            "slots": g.slots,
            "page_bytes": g.pool.page_bytes,
            "extra_page_bytes": g.extra_pool.page_bytes,
            "extra_stride": g.extra_stride,
            "length_group": ceil_div(1 << 40, g.length_group),
            "page_size": g.pool.page_size,
            "extra_page_size": g.extra_pool.page_size,
            "extra_num_pages": g.extra_pool.num_pages,
            "page_shift": g.pool.shift,
            "extra_page_shift": g.extra_pool.shift,
            "topk": g.topk,
            "extra_topk": g.extra_topk,
            "lse_group": g.group,
            "outside_is_none": g.outside_is_none,
        }
        batch, position, head, _ = g.q_strides
        self.q_maps: MapsByAddress | None = None
        if g.q_dtype != g.dtype:  # e4m3, which is read without tensor maps
            self.parameters |= {
                "q_batch_stride": batch,
                "q_position_stride": position,
                "q_head_stride": head,
            }
            return
        # Over q as [batch, slab or query token, column block, head or row, 64].
        together = g.slabs == 1 and not g.topk
        self.q_maps = MapsByAddress(
            g.dtype,
            (
                COLUMN_BLOCK,
                g.rows if together else g.h_q,
                g.column_blocks,
                1 if together else g.s_q,
                g.batch,
            ),
            (head, COLUMN_BLOCK, position, batch),
            box=_box_of_q(self.row, g.column_blocks),
            nan_outside=False,
        )

    def __call__(
        self,
        stream: int,
        addresses: GatherAddresses,
        softmax_scale: float,
        causal: bool,
        num_splits: int = 0,
    ) -> None:
        """Launches into a stream of the current device. num_splits: its address, if it and the
        metadata are to be made first; without an address of the metadata, both are made in
        scratch. Raises ForkedProcessError."""
        if not addresses.tile_scheduler_metadata:
            g, scratch = self.geometry, addresses.scratch
            addresses = addresses._replace(tile_scheduler_metadata=scratch + g.metadata_offset)
            num_splits = scratch + g.num_splits_offset
        if self.reports.forked:
            self.reports.require_unforked()
        try:
            own: _OfThread = self._own.launches
        except AttributeError:
            own = self._own.launches = _OfThread(self)
        own.start(stream, addresses, softmax_scale, causal, num_splits)


class _OfThread:
    """The launches by one thread, and room for their parameters."""

    def __init__(self, of: GatherLaunch) -> None:
        self._of = of
        g, kernels = of.geometry, of.kernels
        arguments = self._arguments = Arguments(PARAMETERS)
        arguments.pack(**of.parameters)
        self._gather = Launch(kernels.gather, of.grid, of.row.shared_bytes)
        self._combine_arguments = Arguments(COMBINE_GATHERED.parameters, arguments)
        self._combine_arguments.pack(words=g.pair_words, parts=g.parts)
        self._combine = Launch(kernels.combine, of.combine_grid)
        sizes = launch_sizes(g.requests, g.parts, g.rows, 1, gathered=True)
        self._schedule = ScheduleAhead(kernels.schedule, sizes, arguments)
        self._lengths_arguments = Arguments(LIST_LENGTHS.parameters, arguments)
        blocks = ceil_div(g.requests, LIST_LENGTHS.threads)
        self._lengths = Launch(kernels.list_lengths, (blocks, 1, 1))
        self._options: tuple[float, bool] | None = None
        self._maps: Maps | None = None  # lest another thread's call should free them

    def start(
        self,
        stream: int,
        addresses: GatherAddresses,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
    ) -> None:
        of, arguments, a = self._of, self._arguments, addresses
        g = of.geometry
        if self._options != (softmax_scale, causal):
            self._options = softmax_scale, causal
            arguments.pack(causal=causal, scale_log2=softmax_scale * LOG2_E)
        maps = self._maps = _NO_MAPS if of.q_maps is None else of.q_maps[a.q]
        arguments.set_q_maps(maps.addresses)
        _FIRST.pack_into(
            arguments.buffer,
            _FIRST.offset,
            a.tile_scheduler_metadata,
            a.scratch + g.lengths_offset if g.topk else a.cache_seqlens,
            a.table,
            a.out,
            a.lse,
            a.scratch,
            a.scratch + g.out_partial_bytes,
            a.scratch + g.partial_bytes,
            next(of.epochs),
        )
        _OTHERS.pack_into(
            arguments.buffer,
            _OTHERS.offset,
            a.cache,
            a.extra_cache,
            a.extra_indices,
            a.topk_length,
            a.extra_topk_length,
            a.attn_sink,
            a.descale_q,
            a.descale_k,
            a.max_logits,
            a.q,
        )
        if num_splits:
            if g.topk:
                self._lengths(stream, self._lengths_arguments.address)
            self._schedule.set_num_splits(num_splits)
            self._schedule.launch(stream, self._schedule.arguments.address)
        self._gather(stream, arguments.address)
        if g.slots:
            self._combine(stream, self._combine_arguments.address)


class ListSchedule:
    """list_lengths and schedule by themselves: the metadata of lists ahead of the calls with them,
    launched by any thread."""

    def __init__(
        self,
        lengths: Function,
        schedule: Function,
        sizes: tuple[int, int, int, int],
        parts: int,
        h_q: int,
        reports: Reports,
    ) -> None:
        """The two kernels; query tokens, at least one, how many share a length, topk,
        extra_topk."""
        self._lengths, self._schedule, self._reports = lengths, schedule, reports
        requests, length_group, topk, extra_topk = sizes
        self._parameters = {
            "length_group": ceil_div(1 << 40, length_group),
            "batch": requests,
            "topk": topk,
            "extra_topk": extra_topk,
        }
        self._blocks = ceil_div(requests, LIST_LENGTHS.threads)
        self._sizes = launch_sizes(requests, parts, h_q, 1, gathered=True)
        self._own = threading.local()

    def __call__(
        self, stream: int, lengths: tuple[int, int], scratch: int, results: tuple[int, int]
    ) -> None:
        """Addresses: of topk_length and extra_topk_length, or 0; of int32 [query tokens] that
        nobody else uses; of tile_scheduler_metadata and num_splits. Raises ForkedProcessError."""
        if self._reports.forked:
            self._reports.require_unforked()
        try:
            launches: tuple[Arguments, Launch, ScheduleLaunch] = self._own.launches
        except AttributeError:
            launches = self._own.launches = self._of_thread()
        arguments, of_lengths, of_schedule = launches
        topk_length, extra_topk_length = lengths
        arguments.pack(
            topk_length=topk_length, extra_topk_length=extra_topk_length, cache_seqlens=scratch
        )
        of_lengths(stream, arguments.address)
        of_schedule(stream, self._sizes, scratch, *results)

    def _of_thread(self) -> tuple[Arguments, Launch, ScheduleLaunch]:
        """The launches by one thread, and room for their parameters."""
        arguments = Arguments(LIST_LENGTHS.parameters)
        arguments.pack(**self._parameters)
        return (
            arguments,
            Launch(self._lengths, (self._blocks, 1, 1)),
            ScheduleLaunch(self._schedule),
        )
