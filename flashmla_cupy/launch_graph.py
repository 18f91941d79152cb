"""Kernels that are launched one behind the other, as one CUDA graph.

One call of the driver starts it, which costs the host a third of what two launches do. Other
parameters are set where they differ from those of the last call; what is queued already keeps its
own. A graph cannot be launched into a stream that is being captured: there, and where the driver
makes no such graphs, the kernels are launched one by one.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

from . import driver
from .driver import Launch, RelaxedCapture

_NON_BLOCKING, _CAPTURE_RELAXED = 1, 2
_NEVER_CAPTURED = (0, 1)  # the legacy default stream


class _NodeParams(ctypes.Structure):  # CUDA_KERNEL_NODE_PARAMS_v2
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class LaunchGraph:
    """A graph of launches, made by capturing them. Not for two threads at once."""

    def __init__(self, launches: Sequence[tuple[Launch, int]]) -> None:
        """Each launch with the address of its arguments. Needs a current context. Raises
        RuntimeError if the driver does not make the graph."""
        library = driver.library()
        handles = self._executable, self._graph = ctypes.c_void_p(), ctypes.c_void_p()
        weakref.finalize(self, _destroy, library, handles).atexit = False
        with RelaxedCapture():
            self._capture(library, launches)
            made = ctypes.byref(self._executable)
            _must(library.cuGraphInstantiateWithFlags(made, self._graph, ctypes.c_uint64(0)))
            nodes = self._nodes(library, len(launches))
        self._parameters = [
            _NodeParams(
                launch.function,
                launch.config.grid,
                launch.config.block,
                launch.config.shared_bytes,
                arguments,
            )
            for launch, arguments in launches
        ]
        self._updates = [
            (nodes[launch.function], ctypes.addressof(parameters))
            for (launch, _), parameters in zip(launches, self._parameters, strict=True)
        ]
        self._set = library.cuGraphExecKernelNodeSetParams_v2
        self._start = library.cuGraphLaunch
        self._set.argtypes = (ctypes.c_void_p,) * 3
        self._start.argtypes = (ctypes.c_void_p,) * 2
        self._handle = self._executable.value

    def _capture(self, library: ctypes.CDLL, launches: Sequence[tuple[Launch, int]]) -> None:
        stream = ctypes.c_void_p()
        _must(library.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING))
        try:
            _must(library.cuStreamBeginCapture_v2(stream, _CAPTURE_RELAXED))
            try:
                for launch, arguments in launches:
                    launch(stream.value or 0, arguments)
            finally:
                code = library.cuStreamEndCapture(stream, ctypes.byref(self._graph))
            _must(code)
        finally:
            library.cuStreamDestroy_v2(stream)

    def _nodes(self, library: ctypes.CDLL, count: int) -> dict[int, int]:
        """The nodes of the graph by the functions that they launch."""
        size, nodes = ctypes.c_size_t(count), (ctypes.c_void_p * count)()
        _must(library.cuGraphGetNodes(self._graph, nodes, ctypes.byref(size)))
        found: dict[int, int] = {}
        for node in map(int, nodes):
            parameters = _NodeParams()
            _must(
                library.cuGraphKernelNodeGetParams_v2(
                    ctypes.c_void_p(node), ctypes.byref(parameters)
                )
            )
            found[parameters.function] = node
        if len(found) != count:
            raise RuntimeError("A graph of other nodes was captured.")
        return found

    def set_arguments(self) -> None:
        """What now lies at the addresses of the arguments is for the launches to come."""
        for node, parameters in self._updates:
            code = self._set(self._handle, node, parameters)
            if code:
                raise RuntimeError(f"Setting a graph's parameters failed: {driver.message(code)}.")

    def __call__(self, stream: int) -> None:
        code = self._start(self._handle, stream)
        if code:
            raise RuntimeError(f"Launching a graph failed: {driver.message(code)}.")


def _destroy(library: ctypes.CDLL, handles: tuple[ctypes.c_void_p, ctypes.c_void_p]) -> None:
    executable, graph = handles
    with RelaxedCapture(library):  # what is still running is freed as it ends
        if executable:
            library.cuGraphExecDestroy(executable)
        if graph:
            library.cuGraphDestroy(graph)


def _must(code: int) -> None:
    if code:
        raise RuntimeError(f"The driver makes no graph: {driver.message(code)}.")


class CaptureStatus:
    """Tells whether what is launched into a stream becomes part of a graph. For one thread."""

    def __init__(self) -> None:
        self._status = ctypes.c_int()
        self._address = ctypes.addressof(self._status)
        self._ask = driver.library().cuStreamIsCapturing
        self._ask.argtypes = (ctypes.c_void_p,) * 2

    def __call__(self, stream: int) -> bool:
        if stream in _NEVER_CAPTURED:
            return False
        code: int = self._ask(stream, self._address)
        return code != 0 or self._status.value != 0
