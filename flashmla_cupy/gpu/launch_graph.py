"""Kernels that are launched one after the other, as one CUDA graph.

One call of the driver starts it, which costs the host a third of what two launches do: 3 us
instead of 11 on the host of an H100, and 2 more where parameters differ from those of the last
call and have to be set. What is queued already keeps its own. A graph of two takes 112 KB of GPU
memory.

A graph cannot be launched into a stream that is being captured: there, and where the driver makes
no such graphs, the kernels are launched one by one.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

from . import driver
from .driver import NEVER_CAPTURED, Launch, RelaxedCapture

_WHEN_TRIGGERED, _PROGRAMMATIC = 1, 1  # CU_GRAPH_KERNEL_NODE_PORT_, CU_GRAPH_DEPENDENCY_TYPE_


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


class _Edge(ctypes.Structure):  # CUgraphEdgeData
    _fields_ = (
        ("from_port", ctypes.c_uint8),
        ("to_port", ctypes.c_uint8),
        ("type", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 5),
    )


class LaunchGraph:
    """A graph of launches. Not for two threads at once.

    Its nodes are added one by one, since no thread may wait for the device during a capture."""

    def __init__(self, launches: Sequence[tuple[Launch, int]]) -> None:
        """Each launch with the address of its arguments. Needs a current context. Raises
        RuntimeError if the driver does not make the graph."""
        library = driver.library()
        handles = self._executable, self._graph = ctypes.c_void_p(), ctypes.c_void_p()
        weakref.finalize(self, _destroy, library, handles).atexit = False
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
        self._programmatic = [launch.programmatic for launch, _ in launches]
        try:
            with RelaxedCapture():
                nodes = self._make(library)
            self._set = library.cuGraphExecKernelNodeSetParams_v2
            self._start = library.cuGraphLaunch
        except AttributeError as error:
            raise RuntimeError(f"The driver is too old for such graphs: {error}.") from error
        self._set.argtypes = (ctypes.c_void_p,) * 3
        self._start.argtypes = (ctypes.c_void_p,) * 2
        self._handle = self._executable.value
        addresses = map(ctypes.addressof, self._parameters)
        self._updates = list(zip(nodes, addresses, strict=True))

    def _make(self, library: ctypes.CDLL) -> list[int]:
        """Makes the graph, each node behind the one before, and returns the nodes."""
        _must(library.cuGraphCreate(ctypes.byref(self._graph), 0))
        nodes: list[ctypes.c_void_p] = []
        for parameters, programmatic in zip(self._parameters, self._programmatic, strict=True):
            node, none = ctypes.c_void_p(), ctypes.c_size_t(0)
            made, values = ctypes.byref(node), ctypes.byref(parameters)
            _must(library.cuGraphAddKernelNode_v2(made, self._graph, None, none, values))
            if nodes:
                ends = ctypes.byref(nodes[-1]), made
                edge = _Edge(_WHEN_TRIGGERED, 0, _PROGRAMMATIC) if programmatic else _Edge()
                one = ctypes.c_size_t(1)
                _must(
                    library.cuGraphAddDependencies_v2(self._graph, *ends, ctypes.byref(edge), one)
                )
            nodes.append(node)
        made = ctypes.byref(self._executable)
        _must(library.cuGraphInstantiateWithFlags(made, self._graph, ctypes.c_uint64(0)))
        return [node.value or 0 for node in nodes]

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
        if stream in NEVER_CAPTURED:
            return False
        code: int = self._ask(stream, self._address)
        return code != 0 or self._status.value != 0
