"""The engine of one GPU: loaded kernels, tensor maps, launches, and what the device refused.

Everything that allocates, compiles or loads happens in `engine_of()` and `Engine.scratch_floats()`,
before the first launch of a kind, because a graph capture forbids it. `schedule`, `decode` and
`raise_pending` only launch or look at host memory; what `decode` makes for a thread's later calls
(see `launches`) it makes outside of captures.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import random
import threading
from typing import Any

from ..build.compiler import Compiled, Variant, compile_variant, compile_variants
from ..build.nvrtc import binding
from ..errors import (
    DeviceCheckError,
    ForkedProcessError,
    KernelLoadError,
    NoDeviceError,
    UnsupportedArchError,
)
from ..schedule import split as schedule_module
from ..sizes import TOKENS_PER_TILE
from .arch import is_hopper
from .driver import Function, RelaxedCapture
from .geometry import Addresses, Geometry
from .launches import DECODE_SHARED_BYTES, DECODE_THREADS, ScheduleLaunch
from .prepared import COMBINE_THREADS, Prepared

SCHEDULE = Variant("schedule")
REASONS = ("length", "stale metadata", "page id", "foreign metadata")  # Reason in work.cuh
NOTHING_REFUSED = (1 << 64) - 1
MAX_GEOMETRIES = 1024  # a bound, not a policy

_engines: dict[int, Engine] = {}
_lock = threading.Lock()


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


class Engine:
    """The kernels of one GPU. It must be the current device of the thread for launches."""

    def __init__(self, device: int) -> None:
        binding()  # says what to install if CuPy is missing
        self._cuda: Any = importlib.import_module("cupy").cuda
        self.device = device
        self._require_hopper()
        with self._cuda.Device(device):
            self._cuda.runtime.free(0)  # makes the context
            attributes = self._cuda.Device(device).attributes
            self.num_sms: int = attributes["MultiProcessorCount"]
            self._kernels: dict[Variant, Function] = {}
            self._load([SCHEDULE])
            self._key = self._cuda.runtime.malloc(8)
            self._stream = self._cuda.Stream(non_blocking=True)
            self._host = self._cuda.alloc_pinned_memory(16)
            self._refused = ctypes.c_uint32.from_address(self._host.ptr)
            self._host_key = ctypes.c_uint64.from_address(self._host.ptr + 8)
            self._refused.value = 0
            self._status = self._key, self._host.ptr
            self._forget()
        self._prepared: dict[int, Prepared] = {}
        self._load_lock = threading.Lock()
        self._own = threading.local()
        # Scratch memory holds anything, but hardly a number of this launch.
        self._epochs = itertools.count(random.SystemRandom().getrandbits(60))

    def _require_hopper(self) -> None:
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
        properties = runtime.getDeviceProperties(self.device)
        if not is_hopper(properties):
            raise UnsupportedArchError(
                f"CUDA device {self.device}, {properties['name'].decode()}, has compute capability"
                f" {properties['major']}.{properties['minor']}; the kernels need 9.0 (H100, H200,"
                " H800, GH200). Pass NumPy arrays to compute on the CPU."
            )

    # ---- loading -----------------------------------------------------------------------------

    def _load(self, variants: list[Variant]) -> None:
        missing = [variant for variant in variants if variant not in self._kernels]
        for compiled in compile_variants(missing):
            try:
                function = _function(compiled)
            except KernelLoadError:
                # Perhaps the cached cubin is damaged, or made for a newer driver than this one.
                function = _function(compile_variant(compiled.variant, refresh=True))
            self._kernels[compiled.variant] = function

    def scratch_floats(self, geometry: Geometry) -> int:
        """float32 of scratch that a decode launch needs. Compiles and loads its kernels."""
        page_size = min(geometry.page_size, TOKENS_PER_TILE)
        decode = Variant("dense_decode", geometry.dtype, page_size)
        combine = Variant("combine", geometry.dtype)
        with self._load_lock, RelaxedCapture(), self._cuda.Device(self.device):
            self._load([decode, combine])
            if len(self._prepared) >= MAX_GEOMETRIES:
                self._prepared.clear()
            self._prepared[id(geometry)] = Prepared(
                geometry,
                self._kernels[SCHEDULE],
                self._kernels[decode],
                self._kernels[combine],
                self.num_sms,
            )
        return geometry.scratch_floats

    # ---- launches ----------------------------------------------------------------------------

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
        made = self._schedule_launch()
        sizes = schedule_module.launch_sizes(batch, parts, rows, h_kv)
        made.pack(sizes, cache_seqlens, tile_scheduler_metadata, num_splits)
        made.launch(stream, made.arguments.address)

    def decode(
        self,
        stream: int,
        addresses: Addresses,
        geometry: Geometry,
        softmax_scale: float,
        causal: bool,
        num_splits: int = 0,
    ) -> None:
        """Launches dense_decode.cu and, where requests may be split, combine.cu; before them, with
        an address of num_splits, schedule.cu."""
        prepared = self._prepared.get(id(geometry))
        if prepared is None:
            self.scratch_floats(geometry)
            prepared = self._prepared[id(geometry)]
        prepared.launches().start(
            stream, addresses, softmax_scale, causal, num_splits, self._status, self._epochs
        )

    def _schedule_launch(self) -> ScheduleLaunch:
        """Of this thread."""
        found: ScheduleLaunch | None = getattr(self._own, "schedule", None)
        if found is None:
            found = self._own.schedule = ScheduleLaunch(self._kernels[SCHEDULE])
        return found

    # ---- what the device refused -------------------------------------------------------------

    def raise_pending(self) -> None:
        """Raises DeviceCheckError if the device is known to have refused a request; no waiting."""
        if self._refused.value:
            self._report()

    def check(self) -> None:
        """Waits for the device, then the same."""
        with self._cuda.Device(self.device):
            self._cuda.runtime.deviceSynchronize()
        self.raise_pending()

    def _report(self) -> None:
        with RelaxedCapture(), self._cuda.Device(self.device):
            self._refused.value = 0
            self._copy(self._host_key_address, self._key, 2)
            key = self._host_key.value
            self._forget()
        if key != NOTHING_REFUSED:
            reason = REASONS[key >> 32 & 3]
            column = key & 0xFFFFFFFF if reason == "page id" else -1
            request = -1 if reason == "foreign metadata" else key >> 34
            raise DeviceCheckError(request, column, reason)

    def _forget(self) -> None:
        self._host_key.value = NOTHING_REFUSED
        self._copy(self._key, self._host_key_address, 1)

    @property
    def _host_key_address(self) -> int:
        address: int = self._host.ptr + 8
        return address

    def _copy(self, to: int, source: int, kind: int) -> None:
        self._cuda.runtime.memcpyAsync(to, source, 8, kind, self._stream.ptr)
        self._stream.synchronize()


def _function(compiled: Compiled) -> Function:
    variant = compiled.variant
    block, shared = {
        "dense_decode": (DECODE_THREADS, DECODE_SHARED_BYTES),
        "combine": (COMBINE_THREADS, 0),
        "schedule": (32, schedule_module.MOST_SHARED_BYTES),  # a launch says how many threads
    }[variant.kernel]
    return Function(compiled.cubin, variant.entry, block=block, max_shared=shared)


class _Forked(Engine):
    """An engine in a forked child: CUDA cannot go on there."""

    def _refuse(self, *_: object) -> None:
        raise ForkedProcessError(
            "This process was forked after its parent had used the GPU. Start workers with the"
            " spawn method: multiprocessing.set_start_method('spawn')."
        )

    schedule = decode = _refuse  # type: ignore[assignment]
    raise_pending = check = _refuse
    scratch_floats = _refuse  # type: ignore[assignment]


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for made in _engines.values():
        made.__class__ = _Forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
