"""Launches of schedule.cu, which makes the metadata of a batch."""

from __future__ import annotations

from ..schedule.split import LaunchSizes
from .driver import Function, Launch
from .kernels import SCHEDULE
from .parameters import Arguments

_SIZES = (
    *("batch", "parts", "most_tiles", "shift", "step"),
    *("tile_longer", "piece_memory", "split_time", "pair_time"),
)
_ALL = SCHEDULE.parameters.run(("cache_seqlens", *_SIZES, "tile_scheduler_metadata", "num_splits"))
_BATCH = SCHEDULE.parameters.run(_SIZES)
_NUM_SPLITS = SCHEDULE.parameters.run(("num_splits",))


class ScheduleLaunch:
    """A reusable launch of schedule.cu by itself. Not for two threads at once."""

    def __init__(self, function: Function) -> None:
        self._launch = Launch(function, (1, 1, 1))
        self._arguments = Arguments(SCHEDULE.parameters)

    def __call__(
        self, stream: int, sizes: LaunchSizes, cache_seqlens: int, metadata: int, num_splits: int
    ) -> None:
        """For arrays at these addresses."""
        self._launch.set_size(sizes.block, sizes.shared_bytes)
        _ALL.pack_into(
            self._arguments.buffer, _ALL.offset, cache_seqlens, *sizes.params, metadata, num_splits
        )
        self._launch(stream, self._arguments.address)


class ScheduleAhead:
    """A launch of schedule.cu ahead of dense_decode: the addresses of cache_seqlens and of the
    metadata are parameters of both. For batches of one size."""

    def __init__(self, function: Function, sizes: LaunchSizes, others: Arguments) -> None:
        self.launch = Launch(function, (1, 1, 1))
        self.launch.set_size(sizes.block, sizes.shared_bytes)
        self.arguments = Arguments(SCHEDULE.parameters, others)
        _BATCH.pack_into(self.arguments.buffer, _BATCH.offset, *sizes.params)

    def set_num_splits(self, address: int) -> None:
        """Where num_splits is to be written."""
        _NUM_SPLITS.pack_into(self.arguments.buffer, _NUM_SPLITS.offset, address)
