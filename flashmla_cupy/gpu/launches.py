"""The launches of one geometry by one thread, and room for their parameters.

`engine` starts them with the addresses of a call; what else they need is in `prepared`. From the
second call on, kernels that follow one another are one graph (see `launch_graph`).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..schedule.split import LaunchSizes
from .driver import Function, Launch
from .geometry import Addresses
from .launch_graph import CaptureStatus, LaunchGraph

if TYPE_CHECKING:
    from .prepared import Maps, Prepared

DECODE_THREADS = 384  # dense_decode.cu
DECODE_SHARED_BYTES = 232304  # SHARED_BYTES in ring.cuh
PARAMS = struct.Struct("11Qq12if4x")  # Params in work.cuh
CALL_PARAMS = struct.Struct("9Q")  # those of them that differ from call to call, the first ones
COMBINE_ARRAYS = (0, 5, 6, 3, 4, 7)  # the first parameters of combine.cu: places in CALL_PARAMS
COMBINE_SIZES = struct.Struct("8i")  # the others
SCHEDULE_PARAMS = struct.Struct("Q5ifi2Q")  # schedule.cu
LOG2_E = 1.4426950408889634


class Arguments:
    """The packed parameters of a kernel, and the array of their addresses that a launch takes."""

    def __init__(
        self, layout: struct.Struct, *, elsewhere: Sequence[int] = (), is_struct: bool = False
    ) -> None:
        """elsewhere: addresses of parameters ahead of the packed ones; is_struct: these are one."""
        self.buffer = ctypes.create_string_buffer(layout.size)
        self.start = ctypes.addressof(self.buffer)
        offsets = [0] if is_struct else _offsets(layout.format)
        addresses = [*elsewhere, *(self.start + offset for offset in offsets)]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self._pointers)

    def set_maps(self, q_maps: Maps, k_maps: Maps) -> None:
        """The first four pointers."""
        pointers = self._pointers
        pointers[0], pointers[1] = q_maps.addresses
        pointers[2], pointers[3] = k_maps.addresses


def _offsets(layout: str) -> list[int]:
    """Byte offset of every field of a struct format such as "6Q6i"."""
    fields = "".join(
        letter * int(count or 1) for count, letter in re.findall(r"(\d*)([a-zA-Z])", layout)
    )
    # A repeat count of 0 adds nothing but alignment.
    return [struct.calcsize(f"{fields[:i]}0{field}") for i, field in enumerate(fields)]


class ScheduleLaunch:
    """schedule.cu. Not for two threads at once."""

    def __init__(self, function: Function) -> None:
        self.launch = Launch(function, (1, 1, 1))
        self.arguments = Arguments(SCHEDULE_PARAMS)

    def pack(self, sizes: LaunchSizes, cache_seqlens: int, metadata: int, num_splits: int) -> None:
        """What the next launch is for."""
        self.launch.set_size(sizes.block, sizes.shared_bytes)
        SCHEDULE_PARAMS.pack_into(
            self.arguments.buffer, 0, cache_seqlens, *sizes.params, metadata, num_splits
        )


class _Chain:
    """Kernels that follow one another; as one graph if the driver makes it."""

    def __init__(self, launches: list[tuple[Launch, int]]) -> None:
        """Each launch with the address of its arguments."""
        self.launches = launches
        self.graph: LaunchGraph | None = None
        self.may_have_graph = len(launches) > 1
        self.in_graph: tuple[Addresses, float, bool, int] | None = None  # the call that it has


class Launches:
    """The launches of one geometry by one thread: schedule if the call has no metadata yet,
    dense_decode and, where requests may be split, combine."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        decode = Launch(prepared.decode, prepared.grid, DECODE_SHARED_BYTES)
        self._arguments = Arguments(PARAMS, elsewhere=(0,) * 4, is_struct=True)
        launches = [(decode, self._arguments.address)]
        if prepared.geometry.partial_slots:
            # The arrays of combine are parameters of dense_decode, too: one packing for both.
            arrays = [self._arguments.start + 8 * place for place in COMBINE_ARRAYS]
            self._combine_arguments = Arguments(COMBINE_SIZES, elsewhere=arrays)
            COMBINE_SIZES.pack_into(self._combine_arguments.buffer, 0, *prepared.combine_sizes)
            # (An attribute, since a launch knows of its arguments only the address.)
            combine = Launch(prepared.combine, prepared.combine_grid)
            launches.append((combine, self._combine_arguments.address))
        schedule = self._schedule = ScheduleLaunch(prepared.schedule)
        self._chain = _Chain(launches)
        self._chain_with_schedule = _Chain(
            [(schedule.launch, schedule.arguments.address), *launches]
        )
        self._is_capturing = CaptureStatus()
        self._options: tuple[float, bool] | None = None

    def start(
        self,
        stream: int,
        addresses: Addresses,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
        status: tuple[int, int],
        epochs: Iterator[int],
    ) -> None:
        """Launches the kernels, schedule among them unless num_splits is 0. `status`: the addresses
        that they report to; `epochs`: numbers of launches. The number of a graph may stay the
        same, since combine clears the words that hold it (pair.cuh)."""
        call = addresses, softmax_scale, causal, num_splits
        chain = self._chain_with_schedule if num_splits else self._chain
        graph = chain.graph
        if graph is not None and not self._is_capturing(stream):
            if call != chain.in_graph:
                chain.in_graph = None
                self._pack(*call, status, next(epochs))
                graph.set_arguments()
                chain.in_graph = call
            graph(stream)
            return
        chain.in_graph = None
        self._pack(*call, status, next(epochs))
        if chain.may_have_graph and not self._is_capturing(stream):  # for the calls to come
            chain.may_have_graph = False
            with contextlib.suppress(RuntimeError):
                chain.graph = LaunchGraph(chain.launches)
        for launch, arguments in chain.launches:
            launch(stream, arguments)

    def _pack(
        self,
        addresses: Addresses,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
        status: tuple[int, int],
        epoch: int,
    ) -> None:
        prepared, arguments = self._prepared, self._arguments
        if num_splits:
            self._schedule.pack(
                prepared.schedule_sizes,
                addresses.cache_seqlens,
                addresses.tile_scheduler_metadata,
                num_splits,
            )
        if self._options != (softmax_scale, causal):
            self._options = softmax_scale, causal
            PARAMS.pack_into(
                arguments.buffer,
                0,
                *(0,) * 9,
                *status,
                *prepared.sizes,
                causal,
                prepared.causal_tiles if causal else 1,
                softmax_scale * LOG2_E,
            )
        q, k_cache, *parameters, scratch = addresses
        arguments.set_maps(prepared.q_maps[q], prepared.k_maps[k_cache])
        CALL_PARAMS.pack_into(
            arguments.buffer,
            0,
            *parameters,
            scratch,
            scratch + prepared.out_partial_bytes,
            scratch + prepared.partial_bytes,
            epoch,
        )
