"""A pretended GPU: arrays that are only facts, a framework that counts, an engine that records.

It shows, without a GPU, what `interface` hands to the engine and that it hands over nothing when
the arguments are bad. The numbers are the business of tests/gpu.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flashmla_cupy.calls import arguments, decode, metadata
from flashmla_cupy.calls.signatures import Signatures
from flashmla_cupy.frameworks import Adapter, ArrayInfo, numpy_dtype
from flashmla_cupy.gpu import engine

STREAM = 0x5EA
_addresses = itertools.count(1)


@dataclass(eq=False)
class FakeArray:
    """An array on a pretended device, contiguous unless strides are given."""

    shape: tuple[int, ...]
    dtype: str
    device: int = 0
    strides: tuple[int, ...] | None = None
    ptr: int = 0
    readonly: bool = False

    def __post_init__(self):
        if self.strides is None:
            inner = [1]
            for length in reversed(self.shape[1:]):
                inner.insert(0, inner[0] * length)
            self.strides = tuple(inner) if self.shape else ()
        self.ptr = self.ptr or next(_addresses) << 36  # apart from all others
        self.itemsize = numpy_dtype(self.dtype).itemsize
        self.filled = None

    def but(self, **changes) -> FakeArray:
        """The same array with other facts."""
        return replace(self, **changes)

    def __setitem__(self, index, value):
        self.filled = value


class FakeFramework(Adapter):
    """Describes FakeArrays, and keeps a list of what it allocated and on which device."""

    name = "fake"

    def __init__(self):
        self.allocated: list[FakeArray] = []
        self.guards: list[int] = []
        self.current = 0

    def describe(self, x, argument="array"):
        return ArrayInfo(x.ptr, x.shape, x.strides, x.dtype, x.device, x.readonly)

    def empty(self, shape, dtype, device):
        assert self.current == device, "allocated outside the device guard"
        self.allocated.append(FakeArray(shape, dtype, device))
        return self.allocated[-1]

    def pointer(self, x):
        return x.ptr

    def stream(self, device):
        return STREAM + device

    @contextmanager
    def device_guard(self, device):
        self.guards.append(device)
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    def to_numpy(self, x):
        raise AssertionError("device memory was read on the host")


class FakeLaunch:
    """Records a decode launch, with its geometry, in its engine."""

    scratch_floats = 1000

    def __init__(self, engine: FakeEngine, geometry):
        self.engine, self.geometry = engine, geometry

    def __call__(self, stream, addresses, *options):
        self.engine.launches.append(("decode", stream, addresses, self.geometry, *options))


class FakeEngine:
    """Records launches. `pending` is what raise_pending() and check() raise, once."""

    num_sms = 132

    def __init__(self):
        self.launches: list[tuple] = []
        self.pending: Exception | None = None

    def prepare(self, geometry):
        return FakeLaunch(self, geometry)

    def schedule(self, *args):
        self.launches.append(("schedule", *args))

    def raise_pending(self):
        pending, self.pending = self.pending, None
        if pending is not None:
            raise pending

    check = raise_pending


@dataclass
class FakeDevice:
    framework: FakeFramework
    engines: dict[int, FakeEngine]

    @property
    def launches(self) -> list[tuple]:
        return [launch for engine in self.engines.values() for launch in engine.launches]

    def arguments(self, *, device=0, batch=3, s_q=2, h_q=16, h_kv=2, page_size=64) -> dict:
        """Valid arguments of flash_mla_with_kvcache, outputs included."""
        parts = max(1, 132 // (h_kv * -(-s_q * h_q // h_kv // 64)))

        def array(shape, dtype="int32"):
            return FakeArray(shape, dtype, device)

        return {
            "q": array((batch, s_q, h_q, 576), "bfloat16"),
            "k_cache": array((20, page_size, h_kv, 576), "bfloat16"),
            "block_table": array((batch, 5)),
            "cache_seqlens": array((batch,)),
            "head_dim_v": 512,
            "tile_scheduler_metadata": array((parts, 8)),
            "num_splits": array((batch + 1,)),
            "softmax_scale": None,
            "causal": True,
            "out": array((batch, s_q, h_q, 512), "bfloat16"),
            "lse": array((batch, h_q, s_q), "float32"),
        }


def forget_calls(monkeypatch) -> None:
    """No signature was seen before."""
    monkeypatch.setattr(decode, "_calls", Signatures(arguments.DECODE))
    monkeypatch.setattr(metadata, "_calls", Signatures(arguments.METADATA))


def install(monkeypatch) -> FakeDevice:
    """Makes FakeArrays arrays of a framework with engines for devices 0 and 1."""
    from flashmla_cupy import frameworks

    fake = FakeDevice(FakeFramework(), {0: FakeEngine(), 1: FakeEngine()})
    monkeypatch.setitem(frameworks.by_type, FakeArray, fake.framework)
    monkeypatch.setattr(engine, "_engines", dict(fake.engines))
    forget_calls(monkeypatch)
    return fake
