"""The timing behind `bench`: graphs of decode calls, and the ceilings of the GPU.

`bench` says what is timed and how; this file needs a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from .. import interface
from ..sizes import HEAD_DIM, HEAD_DIM_V, ceil_div
from .cases import Case
from .peers import Peers
from .problem import Problem

WARM_SECONDS, SAMPLE_SECONDS, SAMPLES = 0.1, 0.03, 7
COLD_BYTES = 400_000_000  # of all caches that the calls rotate over: eight times the L2 cache
PEERS_TABLES = 12  # beside peers, which may plan for each block table
CALLS = 24  # in a graph, at least, or nearly
READ_BYTES = 4 << 30
MATMUL_SIZE = 8192

_SOURCE = r"""
// Between two calls: neither overlaps the other, as neighbours in a model would not.
extern "C" __global__ void touch(float* element) { *element += 1.0f; }

// Reads `n` times 16 bytes. The store never happens; without it there would be no loads.
extern "C" __global__ void read_all(const uint4* data, unsigned long long n, unsigned* sink) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    unsigned sum = 0;
    #pragma unroll 8
    for (unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        uint4 x = data[i];
        sum |= x.x ^ x.y ^ x.z ^ x.w;
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}
"""


class GPUTimer:
    """Times calls on a stream of its own, on the current device."""

    def __init__(self, num_sms: int) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._num_sms = num_sms
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        module = self._cupy.RawModule(code=_SOURCE)
        touch, self._read_all = map(module.get_function, ("touch", "read_all"))
        with self._stream:
            self._element = self._cupy.zeros(1, np.float32)
        self._touch = functools.partial(touch, (1,), (1,), (self._element,))
        self._touch_us = 0.0
        self._touch_us = self._call_us([lambda: None])
        rows = np.random.default_rng(0).standard_normal((1 << 14, HEAD_DIM), np.float32)
        self._normal_values = rows.reshape(-1)

    def decode_us(self, case: Case) -> float:
        """Microseconds of one decode call of `case`."""
        us = self._call_us(self._ours(self._problem(case)))
        interface.check()
        return us

    def peers_us(self, case: Case, peers: Peers) -> tuple[float, dict[str, float | str]]:
        """The same, and that of each peer after it; of a peer that has no right result, why."""
        problem = self._problem(case, most=PEERS_TABLES)
        calls = self._ours(problem)
        us = self._call_us(calls)
        times: dict[str, float | str] = {}
        for name in peers.names:
            try:
                with self._stream, peers.on(self._stream.ptr):
                    theirs = peers.calls(name, problem)
                    calls[0]()  # writes problem.out
                    if not peers.agrees(theirs[0](), problem.out):
                        times[name] = "its result differs from ours"
                        continue
                capture = functools.partial(peers.capture, self._stream.ptr)
                times[name] = self._call_us(theirs, capture)
            except Exception as error:  # a peer's may be any; the others go on
                times[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        interface.check()
        return us, times

    def _problem(self, case: Case, most: int | None = None) -> Problem:
        """With caches of COLD_BYTES in all, but no more than `most`."""
        cupy, lengths = self._cupy, case.lengths
        cupy.get_default_memory_pool().free_all_blocks()
        pages = [ceil_div(n, case.page_size) for n in lengths]
        copies = ceil_div(COLD_BYTES, sum(pages) * case.page_size * HEAD_DIM * 2)
        copies = min(copies, most or copies)
        with self._stream:
            q = self._normal((case.batch, case.s_q, case.h_q, HEAD_DIM), ml_dtypes.bfloat16)
            return Problem(
                case=case,
                q=q,
                k_cache=self._normal(
                    (copies * sum(pages), case.page_size, 1, HEAD_DIM), ml_dtypes.bfloat16
                ),
                block_tables=[cupy.asarray(table) for table in block_tables(pages, copies)],
                cache_seqlens=cupy.asarray(np.array(lengths, np.int32)),
                out=cupy.empty((*q.shape[:3], HEAD_DIM_V), q.dtype),
                lse=cupy.empty((case.batch, case.h_q, case.s_q), np.float32),
            )

    def _ours(self, problem: Problem) -> list[Callable[[], Any]]:
        """A call for each block table."""
        p, case = problem, problem.case
        with self._stream:
            metadata = interface.get_mla_metadata(p.cache_seqlens, case.s_q * case.h_q, 1)
        return [
            functools.partial(
                interface.flash_mla_with_kvcache,
                p.q,
                p.k_cache,
                block_table,
                p.cache_seqlens,
                HEAD_DIM_V,
                *metadata,
                causal=case.causal,
                out=p.out,
                lse=p.lse,
            )
            for block_table in p.block_tables
        ]

    def read_gbps(self) -> float:
        """GB/s at which a kernel of plain 16-byte loads reads 4 GiB."""
        with self._stream:
            data = self._cupy.zeros(READ_BYTES, np.uint8)
            arguments = (data, np.uint64(READ_BYTES // 16), self._element)
            call = functools.partial(self._read_all, (self._num_sms * 64,), (256,), arguments)
            return READ_BYTES / self._call_us([call]) / 1e3

    def matmul_tflops(self) -> float | None:
        """TFLOPS of cuBLAS on two float16 matrices of 8192 x 8192; None without cuBLAS."""
        cupy, n = self._cupy, MATMUL_SIZE
        with self._stream:
            a, b = (self._normal((n, n), np.float16) for _ in range(2))
            c = cupy.empty_like(a)
            # The extras do not bring cuBLAS. CuPy says so with an ImportError or a RuntimeError.
            with contextlib.suppress(ImportError, OSError, RuntimeError):
                cupy.matmul(a, b, out=c)
                # A product takes a millisecond: launched from Python, they still queue up.
                return 2 * n**3 / self._sustained_us(lambda: cupy.matmul(a, b, out=c)) / 1e6
        return None

    def _call_us(
        self,
        calls: Sequence[Callable[[], Any]],
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> float:
        """Microseconds of one call, in a graph that rotates over `calls`."""
        rounds = max(1, CALLS // len(calls))

        def body() -> None:
            for _ in range(rounds):
                for call in calls:
                    self._touch()
                    call()

        with self._stream:
            us = self._sustained_us((capture or self._capture)(body))
        return us / (rounds * len(calls)) - self._touch_us

    def _capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Captures what `body` launches into a graph; what launches that."""
        body()  # what is compiled, loaded and allocated at a first call
        self._stream.synchronize()
        # A call's scratch memory goes back to CuPy's pool before the graph runs. Nothing else is
        # allocated on this stream until then.
        self._stream.begin_capture()
        try:
            body()
        finally:
            graph = self._stream.end_capture()
        launch: Callable[[], None] = functools.partial(graph.launch, self._stream)
        return launch

    def _sustained_us(self, launch: Callable[[], Any]) -> float:
        """Microseconds of what `launch` queues: the median of some samples under load."""
        start, stop = self._cupy.cuda.Event(), self._cupy.cuda.Event()

        def seconds(times: int) -> float:
            start.record(self._stream)
            for _ in range(times):
                launch()
            stop.record(self._stream)
            stop.synchronize()
            return float(self._cupy.cuda.get_elapsed_time(start, stop)) / 1e3

        seconds(1)  # the first launch uploads the graph
        one = seconds(1)
        seconds(math.ceil(WARM_SECONDS / one))
        times = math.ceil(SAMPLE_SECONDS / one)
        return statistics.median(seconds(times) for _ in range(SAMPLES)) / times * 1e6

    def _normal(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Normal values: power, and so speed, depends on the bits. 9.4 million, repeated, as CuPy's
        own random numbers would need cuRAND."""
        values = self._cupy.asarray(self._normal_values.astype(dtype))
        array = self._cupy.empty(shape, dtype)
        flat = array.reshape(-1)
        for start in range(0, flat.size, values.size):
            part = flat[start : start + values.size]
            part[...] = values[: part.size]
        return array


def block_tables(pages: Sequence[int], copies: int) -> list[np.ndarray[Any, Any]]:
    """`copies` block tables [batch, max_pages] for requests of so many pages, no page twice, all in
    one pool of copies * sum(pages), in scattered order."""
    order = np.random.default_rng(0).permutation(copies * sum(pages)).astype(np.int32)
    tables = []
    for share in np.split(order, copies):
        table = np.zeros((len(pages), max(pages)), np.int32)
        ends = np.cumsum(pages)
        for row, end, count in zip(table, ends, pages, strict=True):
            row[:count] = share[end - count : end]
        tables.append(table)
    return tables
