"""What a cache and its steps do with a pool: they write rows and attend to them, in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calls import scalars
from ..calls.wording import kind as kind_of
from ..calls.wording import show
from ..errors import (
    ArgTypeError,
    ArgumentError,
    DeviceMismatchError,
    ScalarError,
    ShapeError,
    StepError,
)
from ..formats.write import write_kv
from ..frameworks import HOST, Adapter, framework_of, is_foreign, numpy_dtype
from ..frameworks.dlpack import from_dlpack
from ..interface import flash_mla_with_kvcache
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM_V
from .fences import CudaEvents, Fences, NoEvents, StreamEvents
from .page_states import PageStates
from .page_table import PageTable, Reservation
from .pool import Pool
from .prefix import PrefixIndex
from .sequence import Sequence
from .tables import FreshTables, LastingTables, Tables
from .views import array_of, current_stream
from .writer import DeviceWriter, HostWriter

if TYPE_CHECKING:
    from ..gpu.append_launch import CacheLaunches


class Core:
    """A pool with its books."""

    def __init__(self, of: Pool) -> None:
        self.pool, self.layout, self.place = of, of.layout, of.place
        self.framework = of.framework
        self.dtype: np.dtype[Any] = numpy_dtype(of.layout.dtype)
        on_host = of.place == HOST
        self.events: StreamEvents = NoEvents() if on_host else CudaEvents(of.xp.cuda, of.place)
        self.fences = Fences(self.events)
        index = PrefixIndex(of.layout.num_pages, of.layout.page_size)
        self.states = PageStates(of.layout.num_pages, index, self.fences)
        self.table = PageTable(self.states, of.layout.page_size)
        self._writer: HostWriter | DeviceWriter | None = None
        self.lasting: LastingTables | None = None
        self.lasting_step: object = None  # the open step that has those
        self.captured: list[SchedMeta] = []  # of graphs, which write to their arrays

    @property
    def writer(self) -> HostWriter | DeviceWriter:
        """Made, and its kernels compiled, when something is first written."""
        if self._writer is None:
            made = HostWriter if self.place == HOST else DeviceWriter
            self._writer = made(self.pool)
        return self._writer

    def launches(self) -> CacheLaunches:
        """The kernels that change the pool, on a GPU."""
        assert isinstance(self.writer, DeviceWriter)
        return self.writer.launches

    # --- streams -------------------------------------------------------------------------------

    def stream(self) -> int:
        """The stream that is current for the cache's framework; work is going to be launched
        there."""
        stream = self.stream_of(self.framework)
        self.fences.use(stream)
        return stream

    def stream_of(self, adapter: Adapter) -> int:
        """The stream that is current for a framework."""
        return current_stream(adapter, self.place)

    def use(self, adapter: Adapter, since: int) -> None:
        """Work is going to be launched on the stream that is current for a framework, behind what
        was launched on the stream `since`."""
        stream = self.stream_of(adapter)
        if stream == since:
            self.fences.use(stream)
        elif not self.is_capturing(stream):  # a graph runs where its owner says
            self.fences.use(stream)
            self.events.order(stream, self.events.record(since))

    def is_capturing(self, stream: int) -> bool:
        """Whether what is launched on a stream becomes part of a graph."""
        if self.place == HOST:
            return False
        return bool(self.pool.xp.cuda.runtime.streamIsCapturing(stream)) if stream > 1 else False

    # --- arguments -----------------------------------------------------------------------------

    def layer(self, layer: Any, function: str) -> int:
        """A layer's number. Raises an ArgumentError."""
        layer = int(scalars.integer("layer", layer, function))
        if layer >= self.layout.num_layers:
            expected = f"at most {self.layout.num_layers - 1}, the last of the cache"
            remedy = "Make the cache with the num_layers of the model."
            raise ScalarError("layer", expected, f"{layer}", remedy, function)
        return int(layer)

    # --- what is launched ----------------------------------------------------------------------

    def open(self, made: Reservation, stream: int) -> None:
        """Copies the pages that a reservation is going to write but that others hold, too."""
        if len(made.copied):
            self.writer.copy_pages(made.source, made.target, stream)

    def write(self, rows: Any, adapter: Adapter, slots: Any, layers: slice) -> None:
        """rows [layers, batch, n, h_kv, width] to slots [batch, n]; to a cache of FP8 also numbers,
        [layers, batch, n, h_kv, d_qk], which are quantised."""
        if not rows.shape[1] or not rows.shape[2]:
            return
        if adapter.describe(rows).dtype == self.layout.dtype:
            self.writer.write(rows, adapter, slots, layers)
            return
        with adapter.device_guard(self.place):
            flat = slots.reshape(-1)
            for i, layer in enumerate(range(*layers.indices(self.layout.num_layers))):
                k_cache = self.pool.layer(layer, adapter.name)
                write_kv(k_cache, rows[i].reshape(-1, *rows.shape[3:]), flat)

    def append(self, made: Reservation, rows: Any, adapter: Adapter, stream: int) -> None:
        """Opens a reservation, writes rows [layers, batch, n, h_kv, width] and keeps them; if that
        fails, the reservation is undone."""
        try:
            self.open(made, stream)
            self.use(adapter, stream)
            slots = array_of(made.slots, adapter.name, self.place)
            self.write(rows, adapter, slots, slice(None))
        except BaseException:
            self.table.settle(made, np.zeros(len(made.rows), np.int32))
            raise
        self.table.settle(made, None)

    def attend(
        self,
        q: Any,
        layer: int,
        batch: int,
        tables_of: Callable[[Adapter], Tables],
        metadata: dict[Any, SchedMeta],
        softmax_scale: Any,
        causal: Any,
        function: str,
    ) -> tuple[Any, Any]:
        """flash_mla_with_kvcache() of q over a batch."""
        try:
            if is_foreign(q) or framework_of(q, "q").name == "jax":
                view = from_dlpack(q, "q")
                results = self.attend(
                    view, layer, batch, tables_of, metadata, softmax_scale, causal, function
                )
                return _given_back(results, q)
            adapter = framework_of(q, "q")
        except ArgumentError as error:
            raise error.of(function) from None
        if len(q.shape) and q.shape[0] != batch:
            expected = f"a first axis of {batch}, the number of sequences"
            remedy = "Pass the queries of seqs[i] as q[i]; without seqs, of cache.sequences[i]."
            raise ShapeError("q", expected, show(adapter.describe(q, "q")), remedy, function)
        host = ("numpy", "torch", "jax") if self.place == HOST else ("cupy", "torch", "jax")
        if adapter.name not in host:
            where = "the CPU" if self.place == HOST else f"CUDA device {self.place}"
            remedy = f"Move q to {where}, where the pool is."
            got = f"a {adapter.name} array"
            raise DeviceMismatchError("q", f"an array on {where}", got, remedy, function)
        tables = tables_of(adapter)
        key: Any = (tuple(q.shape), scalars.causal(causal), adapter.name)
        if self.lasting is not None and self.is_capturing(self.stream_of(adapter)):
            made = SchedMeta()  # so that the graph makes it anew with each replay
            key = (*key, self._capture(adapter))
            if key not in metadata:
                self.captured.append(made)
            found = metadata.setdefault(key, made)
        else:
            found = metadata.setdefault(key, SchedMeta())
        return flash_mla_with_kvcache(
            q,
            self.pool.layer(layer, adapter.name),
            tables.block_table,
            tables.cache_seqlens,
            HEAD_DIM_V,
            found,
            softmax_scale=softmax_scale,
            causal=causal,
            is_fp8_kvcache=self.pool.is_fp8,
        )

    def _capture(self, adapter: Adapter) -> int:
        from ..gpu.driver import capture_id

        return capture_id(adapter.stream(self.place))

    def fresh(self, tables: FreshTables, adapter: Adapter, function: str) -> Tables:
        """The arrays of a framework. Raises StepError if they would be copied in a capture."""
        if not tables.has(adapter) and self.is_capturing(self.stream_of(adapter)):
            raise StepError(
                f"{function}(): the stream is being captured, and a graph needs tables that last."
                " Make the cache with max_seqs, and capture write() and attend() of a step."
            )
        return tables.of(adapter)

    def require_uncaptured(self, stream: int, function: str) -> None:
        """Raises StepError on a stream that is being captured: a graph would not do it again."""
        if self.is_capturing(stream):
            raise StepError(
                f"{function}(): the stream is being captured. Reserve before the capture, and"
                " capture write() and attend() of the step alone."
            )


def _given_back(results: tuple[Any, Any], like: Any) -> tuple[Any, Any]:
    """The results as arrays of the framework of `like`, which is neither of CuPy nor of NumPy."""
    if framework_name(like) == "jax":
        jnp: Any = importlib.import_module("jax.numpy")
        back = jnp.asarray if isinstance(results[0], np.ndarray) else jnp.from_dlpack
        out, lse = (back(x) for x in results)
        return out, lse
    return results


def framework_name(x: Any) -> str:
    """The top package of the type of x."""
    root = type(x).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def handle_list(seqs: Any, function: str) -> tuple[Any, ...]:
    """seqs as a tuple. Raises ArgTypeError for what is no list of handles."""
    try:
        handles = tuple(seqs)
    except TypeError:
        expected, remedy = "a list of sequence handles", "Put a single one into a list: [seq]."
        raise ArgTypeError("seqs", expected, kind_of(seqs), remedy, function) from None
    for kind in set(map(type, handles)) - {Sequence}:
        remedy = "Pass what add() or begin() returned."
        raise ArgTypeError("seq", "a sequence handle", kind.__qualname__, remedy, function)
    return handles
