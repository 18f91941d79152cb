"""The engine of one GPU: its loaded kernels, and the launches that are made of them.

Everything that allocates, compiles or loads happens in `engine_of()` and `Engine.prepare()`, before
the first launch of a kind, because a graph capture forbids it. What they make only launches, and
`raise_pending` only looks at host memory.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from typing import Any

from ..build.compiler import Compiled, compile_variant, compile_variants
from ..build.nvrtc import cupy_cuda
from ..errors import KernelLoadError, NoDeviceError, UnsupportedArchError
from ..locks import Lock
from ..schedule.split import launch_sizes
from . import arch
from .decode_launch import DecodeKernels, DecodeLaunch
from .driver import Function, RelaxedCapture
from .gather_geometry import GatherGeometry
from .gather_kernels import LIST_LENGTHS
from .gather_launch import GatherKernels, GatherLaunch, ListSchedule
from .geometry import Geometry
from .kernels import SCHEDULE, Variant
from .reports import Reports
from .schedule_launch import ScheduleLaunch

_engines: dict[int, Engine] = {}
_lock = Lock()


def engine_of(device: int) -> Engine:
    """The engine of a CUDA device, made at first use.

    Raises MissingDependencyError without CuPy or NVRTC, NoDeviceError, UnsupportedArchError,
    KernelCompileError, KernelLoadError, ForkedProcessError."""
    found = _engines.get(device)
    if found is None:
        with _lock:
            found = _engines.get(device)
            if found is None:
                found = _engines[device] = Engine(device)
    return found


def engines() -> list[Engine]:
    """Those made so far."""
    return list(_engines.values())


class Engine:
    """The kernels of one GPU. It must be the current device of the thread for launches."""

    def __init__(self, device: int) -> None:
        self._cuda: Any = cupy_cuda()
        self.device = device
        properties = self._properties()
        self.arch = _arch_of(device, properties)
        self._programmatic = arch.launches_programmatically(properties)
        self._kernels: dict[Variant, Function] = {}
        self._load_lock = Lock()
        self._own = threading.local()
        with self._cuda.Device(device):
            self._cuda.runtime.free(0)  # makes the context
            self.num_sms: int = self._cuda.Device(device).attributes["MultiProcessorCount"]
            self._reports = Reports(self._cuda, device)
        self.raise_pending = self._reports.raise_pending
        self.check = self._reports.check
        # Scratch memory holds anything, but hardly a number of this launch.
        self._epochs = itertools.count(random.SystemRandom().getrandbits(60))
        (self._schedule,) = self.load(Variant(SCHEDULE.name, arch=self.arch))

    def _properties(self) -> dict[str, Any]:
        runtime = self._cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            raise NoDeviceError(
                f"CUDA does not work here ({error}). Check the driver with nvidia-smi, or pass"
                " NumPy arrays to compute on the CPU."
            ) from error
        if self.device >= count:
            raise NoDeviceError(f"There is no CUDA device {self.device}; CUDA sees {count}.")
        properties: dict[str, Any] = runtime.getDeviceProperties(self.device)
        return properties

    def load(self, *variants: Variant) -> list[Function]:
        """The kernels of these variants, compiled and loaded at their first use.

        Raises what compile_variant raises, KernelLoadError, ForkedProcessError."""
        self._reports.require_unforked()
        with self._load_lock, RelaxedCapture(), self._cuda.Device(self.device):
            missing = [variant for variant in variants if variant not in self._kernels]
            for compiled in compile_variants(missing):
                try:
                    function = self._function(compiled)
                except KernelLoadError:
                    # Perhaps the cached cubin is damaged, or for a newer driver than this one.
                    function = self._function(compile_variant(compiled.variant, refresh=True))
                self._kernels[compiled.variant] = function
        return [self._kernels[variant] for variant in variants]

    def _function(self, compiled: Compiled) -> Function:
        row = compiled.variant.row
        return Function(
            compiled.cubin,
            compiled.variant.entry,
            block=row.threads,
            max_shared=row.shared_bytes,
            programmatic=self._programmatic,
        )

    def prepare(self, geometry: Geometry) -> DecodeLaunch:
        """What launches decode calls of this geometry: keep it, and call it."""
        kernels = DecodeKernels(*self.load(*DecodeKernels.variants(geometry, self.arch)))
        return DecodeLaunch(geometry, kernels, self.num_sms, self._reports, self._epochs)

    def gather(self, geometry: GatherGeometry) -> GatherLaunch:
        """What launches calls that gather rows, of this geometry: keep it, and call it."""
        kernels = GatherKernels(*self.load(*GatherKernels.variants(geometry, self.arch)))
        return GatherLaunch(geometry, kernels, self.num_sms, self._reports, self._epochs)

    def list_schedule(self, sizes: tuple[int, int, int, int], parts: int, h_q: int) -> ListSchedule:
        """What makes the metadata of lists: of query tokens, how many share a length, topk and
        extra_topk."""
        variants = (Variant(kernel.name, arch=self.arch) for kernel in (LIST_LENGTHS, SCHEDULE))
        lengths, schedule = self.load(*variants)
        return ListSchedule(lengths, schedule, sizes, parts, h_q, self._reports)

    def schedule(
        self,
        stream: int,
        cache_seqlens: int,
        batch: int,
        parts: int,
        rows: int,
        h_kv: int,
        tile_scheduler_metadata: int,
        num_splits: int,
    ) -> None:
        """Launches schedule.cu on addresses; batch >= 1."""
        if self._reports.forked:
            self._reports.require_unforked()
        try:
            own: ScheduleLaunch = self._own.schedule
        except AttributeError:
            own = self._own.schedule = ScheduleLaunch(self._schedule)
        sizes = launch_sizes(batch, parts, rows, h_kv)
        own(stream, sizes, cache_seqlens, tile_scheduler_metadata, num_splits)


def _arch_of(device: int, properties: dict[str, Any]) -> str:
    found = arch.arch_of(properties)
    if found is None:
        major, minor = arch.capability(properties)
        raise UnsupportedArchError(
            f"CUDA device {device}, {properties['name'].decode()}, has compute capability"
            f" {major}.{minor}; the kernels need {arch.CAPABILITIES} ({arch.GPUS}). Pass NumPy"
            " arrays to compute on the CPU."
        )
    return found


def _after_fork() -> None:
    for engine in _engines.values():
        engine._reports.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
