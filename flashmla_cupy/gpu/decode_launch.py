"""A decode call made ready: what follows from its geometry, and its launches.

Everything that compiles, loads or allocates is done when a DecodeLaunch is made, by
`Engine.prepare`, because a graph capture forbids it. Calling it only launches; what it makes for a
thread's later calls it makes outside of captures. From the second call on, kernels that follow one
another are one graph (see `launch_graph`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

from ..schedule.split import launch_sizes
from ..sizes import TOKENS_PER_TILE, ceil_div
from .combine_grid import combine_blocks
from .driver import Function, Launch
from .geometry import Addresses, Geometry
from .kernels import COMBINE, DECODE_PARAMETERS, SCHEDULE, Variant, decode_kernel, select
from .launch_graph import CaptureStatus, LaunchGraph
from .parameters import Arguments
from .reports import Reports
from .schedule_launch import ScheduleAhead
from .tensor_maps import Maps, boxes_of, maps_of_k_cache, maps_of_q

LOG2_E = 1.4426950408889634

# What differs from call to call: arrays of the caller, then what lies in scratch, then the launch.
_CALL = DECODE_PARAMETERS.run(
    (*Addresses._fields[2:-1], "out_partial", "row_partial", "pairs", "epoch")
)


class DecodeKernels(NamedTuple):
    """The loaded kernels of a decode call."""

    schedule: Function
    decode: Function
    combine: Function

    @staticmethod
    def variants(geometry: Geometry, arch: str) -> tuple[Variant, Variant, Variant]:
        """What has to be compiled for it."""
        dtype, page_size = geometry.dtype, geometry.page_size
        schedule, decode, combine = (
            select(kernel.name, arch, dtype, page_size)
            for kernel in (SCHEDULE, decode_kernel(geometry.slab_rows), COMBINE)
        )
        return schedule, decode, combine


class DecodeLaunch:
    """Launches schedule.cu if the call has no metadata yet, the decode kernel and, where requests
    may be split, combine.cu, for arrays of one geometry on one GPU."""

    def __init__(
        self,
        geometry: Geometry,
        kernels: DecodeKernels,
        num_sms: int,
        reports: Reports,
        epochs: Iterator[int],
    ) -> None:
        """epochs: numbers of launches, each another one."""
        g = self.geometry = geometry
        self.scratch_floats = geometry.scratch_floats  # float32 of scratch that a call needs
        self.kernels, self.reports, self.epochs = kernels, reports, epochs
        self.grid = (g.slabs * g.slab_blocks, g.h_kv, g.parts)
        self.combine_grid = (combine_blocks(g, num_sms), 1, 1)
        self.parameters = {
            "refusal": reports.refusal,
            "refused": reports.refused,
            "table_stride": g.table_stride,
            "batch": g.batch,
            "s_q": g.s_q,
            "h_q": g.h_q,
            "group": g.group,
            "slab_rows": g.slab_rows,
            "blocks": g.slab_blocks,
            "num_pages": g.num_pages,
            "page_tiles_log2": max(0, (g.page_size // TOKENS_PER_TILE).bit_length() - 1),
            "max_length": min(g.max_pages * g.page_size, 2**31 - 1),
            "slots": g.partial_slots,
        }
        self.causal_tiles = 1 + ceil_div(g.s_q - 1, TOKENS_PER_TILE)
        self.out_partial_bytes, self.partial_bytes = g.out_partial_bytes, g.partial_bytes
        decode = decode_kernel(g.slab_rows)
        self.shared_bytes = decode.shared_bytes
        boxes = boxes_of(decode, g)
        self.q_maps, self.k_maps = maps_of_q(g, boxes.q), maps_of_k_cache(g, boxes.k_cache)
        self._own = threading.local()

    def __call__(
        self,
        stream: int,
        addresses: Addresses,
        softmax_scale: float,
        causal: bool,
        num_splits: int = 0,
    ) -> None:
        """Launches into a stream of the current device. num_splits: its address, if it and the
        metadata are to be made first. Raises ForkedProcessError."""
        if self.reports.forked:
            self.reports.require_unforked()
        try:
            own: _OfThread = self._own.launches
        except AttributeError:
            own = self._own.launches = _OfThread(self)
        own.start(stream, addresses, softmax_scale, causal, num_splits)


class _Chain:
    """Kernels that follow one another; as one graph if the driver makes it."""

    def __init__(self, launches: list[tuple[Launch, int]]) -> None:
        """Each launch with the address of its arguments."""
        self.launches = launches
        self.graph: LaunchGraph | None = None
        self.may_have_graph = len(launches) > 1
        self.in_graph: tuple[Addresses, float, bool, int] | None = None  # the call that it has


class _OfThread:
    """The launches by one thread, and room for their parameters."""

    def __init__(self, of: DecodeLaunch) -> None:
        self._of = of
        g, kernels = of.geometry, of.kernels
        self._arguments = Arguments(DECODE_PARAMETERS)
        self._arguments.pack(**of.parameters)
        decode = Launch(kernels.decode, of.grid, of.shared_bytes)
        launches = [(decode, self._arguments.address)]
        if g.partial_slots:
            # (An attribute, since a launch knows of its arguments only the address.)
            self._combine_arguments = Arguments(COMBINE.parameters, self._arguments)
            self._combine_arguments.pack(words=g.pair_words, parts=g.parts)
            combine = Launch(kernels.combine, of.combine_grid)
            launches.append((combine, self._combine_arguments.address))
        sizes = launch_sizes(g.batch, g.parts, g.rows, g.h_kv)
        schedule = self._schedule = ScheduleAhead(kernels.schedule, sizes, self._arguments)
        self._chain = _Chain(launches)
        self._chain_with_schedule = _Chain(
            [(schedule.launch, schedule.arguments.address), *launches]
        )
        self._is_capturing = CaptureStatus()
        self._options: tuple[float, bool] | None = None
        self._maps: tuple[Maps, Maps] | None = None  # lest another thread's call should free them

    def start(
        self,
        stream: int,
        addresses: Addresses,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
    ) -> None:
        """Launches the kernels. The number of a graph may stay the same, since combine clears the
        words that hold it (sm90_pair.cuh)."""
        call = addresses, softmax_scale, causal, num_splits
        chain = self._chain_with_schedule if num_splits else self._chain
        graph = chain.graph
        if graph is not None and not self._is_capturing(stream):
            if call != chain.in_graph:
                chain.in_graph = None
                self._pack(*call)
                graph.set_arguments()
                chain.in_graph = call
            graph(stream)
            return
        chain.in_graph = None
        self._pack(*call)
        if chain.may_have_graph and not self._is_capturing(stream):  # for the calls to come
            chain.may_have_graph = False
            with contextlib.suppress(RuntimeError):
                chain.graph = LaunchGraph(chain.launches)
        for launch, arguments in chain.launches:
            launch(stream, arguments)

    def _pack(
        self, addresses: Addresses, softmax_scale: float, causal: bool, num_splits: int
    ) -> None:
        of, arguments = self._of, self._arguments
        if num_splits:
            self._schedule.set_num_splits(num_splits)
        if self._options != (softmax_scale, causal):
            self._options = softmax_scale, causal
            arguments.pack(
                causal=causal,
                border_tiles=of.causal_tiles if causal else 1,
                scale_log2=softmax_scale * LOG2_E,
            )
        q, k_cache, *parameters, scratch = addresses
        q_maps, k_maps = self._maps = of.q_maps[q], of.k_maps[k_cache]
        arguments.set_maps(q_maps.addresses, k_maps.addresses)
        _CALL.pack_into(
            arguments.buffer,
            _CALL.offset,
            *parameters,
            scratch,
            scratch + of.out_partial_bytes,
            scratch + of.partial_bytes,
            next(of.epochs),
        )
