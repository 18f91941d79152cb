"""A GPU in software for tests: NumPy arrays count as device memory, and the kernels of cuda_src run
in it, compiled by a host C++ compiler against machine.h.

Everything above the driver is the library's own: checks, plans, tensor maps, launch parameters. It
knows three settings: the number of multiprocessors, how many thread blocks are resident at a time,
and the seed of the order in which threads run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import re
import shutil
import struct
import subprocess
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support.fake_device import forget_calls

from flashmla_cupy import frameworks
from flashmla_cupy.build import compiler
from flashmla_cupy.frameworks import HOST, numpy_arrays
from flashmla_cupy.gpu import driver, launch_graph
from flashmla_cupy.gpu import engine as engine_module
from flashmla_cupy.gpu.kernels import Variant, all_variants

HERE = Path(__file__).parent
CUDA_SRC = HERE.parent.parent / "cuda_src"
FLAGS = (
    "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off",
    "-U_FORTIFY_SOURCE", "-Wno-attributes",
    "-fvisibility=hidden",  # each library has a machine of its own
)  # fmt: skip
TENSOR_MAP = struct.Struct("Q6I4Q5I")  # TensorMap in ptx.cuh


def host_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class EmulationError(AssertionError):
    """What a kernel did wrong: a deadlock, a missing fence, ..."""


class Launch(NamedTuple):
    """One kernel to run."""

    function: int
    grid: Any
    block: Any
    arguments: int  # address
    shared_bytes: int  # dynamic


class Kernels:
    """The kernels as shared libraries in `folder`, made when they are first asked for.

    edit(name, text) -> text may change a source, for tests of what the emulator finds; those that
    it leaves alone are taken from `unedited`."""

    def __init__(
        self,
        folder: Path,
        edit: Callable[[str, str], str] = lambda name, text: text,
        unedited: Kernels | None = None,
    ) -> None:
        self.folder = folder
        self._unedited, self._edited = unedited, set()
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(CUDA_SRC.glob("*.cu*")):
            text = edit(path.name, path.read_text())
            if text != path.read_text():
                self._edited.add(path.name)
            # A variable of a thread block: static to C++, or the one array of machine.h.
            text = re.sub(r"^  extern __shared__", "  extern", text, flags=re.MULTILINE)
            text = re.sub(r"^  __shared__", "  static __shared__", text, flags=re.MULTILINE)
            (folder / path.name).write_text(text)
        for path in (*HERE.glob("*.h"), *HERE.glob("*.cuh"), *HERE.glob("*.cpp")):
            shutil.copy(path, folder)
        self._made: dict[str, ctypes.CDLL] = {}

    def __getitem__(self, variant: Variant):
        if self._unedited is not None and not self._edited & _closure(variant.source):
            return self._unedited[variant]
        if variant.name not in self._made:
            library = self.folder / f"{variant.name}.so"
            command = [
                host_compiler(),
                *FLAGS,
                *variant.macros,
                f'-DSOURCE="{variant.source}"',
                f"-DKERNEL={variant.entry}",
                str(self.folder / "launch.cpp"),
                "-o",
                str(library),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self._made[variant.name] = loaded = ctypes.CDLL(str(library))
            for function in (loaded.begin, loaded.release, loaded.finish):
                function.restype = ctypes.c_char_p
        return self._made[variant.name]

    def make_all(self, variants) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.__getitem__, variants))


def _closure(source: str) -> set[str]:
    """A file of cuda_src and all that it includes."""
    found, left = set(), {source}
    while left:
        found |= left
        text = "".join((CUDA_SRC / name).read_text() for name in left)
        left = set(re.findall(r'^#include "(.*)"$', text, re.MULTILINE)) - found
    return found


class Emulator:
    """The part of the CUDA driver's interface that driver.py uses.

    `ahead` may hold what a kernel ahead of the next launch does: a function, called once when those
    that are launched have come to griddepcontrol.wait. The kernels of a graph overlap as dependent
    launch permits; a kernel that is launched by itself overlaps `ahead` alone."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.resident = 3
        self.seed = 0
        self.ahead: Callable[[], object] | None = None
        self.framework = _Framework()
        self._handles = itertools.count(1)
        self._modules: dict[int, tuple[Variant, ctypes.CDLL]] = {}

        self.graphs = _Graphs(self._handles, self._run)

        # Functions, no methods: argtypes are given to them.
        def launch_kernel(config, function, arguments, extra):
            seen = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents
            self._run([Launch(function, seen.grid, seen.block, arguments, seen.shared_bytes)])
            return 0

        self.cuLaunchKernelEx = launch_kernel
        self.cuStreamIsCapturing = lambda stream, status: 0
        self.cuGraphLaunch = lambda executable, stream: self.graphs.launch(executable)
        self.cuGraphExecKernelNodeSetParams_v2 = lambda *of: self.graphs.set_parameters(*of)

    def __getattr__(self, name):
        """What _Graphs has of the driver."""
        return getattr(self.graphs, name)

    def cuModuleLoadData(self, module, cubin):
        variant = variants()[cubin.decode()]
        module._obj.value = next(self._handles)
        self._modules[module._obj.value] = variant, self.kernels[variant]
        return 0

    def cuModuleGetFunction(self, function, module, name):
        assert self._modules[module.value][0].entry == name.decode()
        function._obj.value = module.value
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode):
        return 0

    def cuTensorMapEncodeTiled(
        self, to, dtype, rank, address, dims, strides, box, steps, interleave, swizzle, l2, fill
    ):
        legal = (
            rank == 5
            and to.value % driver.TENSOR_MAP_BYTES == 0
            and address.value % 16 == 0
            and all(stride % 16 == 0 and stride < 2**40 for stride in strides)
            and all(1 <= length <= 2**32 for length in dims)
            and all(1 <= length <= 256 for length in box)
            and box[0] * 2 == 128
            and (interleave, swizzle) == (0, 3)
        )
        if not legal:
            return 1  # CUDA_ERROR_INVALID_VALUE
        encoded = TENSOR_MAP.pack(address.value, *dims, fill, *strides, *box)
        ctypes.memmove(to.value, encoded, len(encoded))
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = b"invalid argument"
        return 0

    def _run(self, launches: list[Launch]) -> None:
        """Kernels that follow one another. Each may begin when all blocks of the one before it have
        triggered, which they do before or after they wait themselves. It sees nothing of what they
        do after they wait; or, for odd seeds, what they did before the last one triggered."""
        begun = self._begin_from(launches, 0)
        if self.ahead is not None:
            ahead, self.ahead = self.ahead, None
            ahead()
        for place in range(len(launches)):
            variant, library = self._modules[launches[place].function]
            if self.seed % 2:
                self._raise(variant, library.release())
            if begun == place + 1:
                begun = self._begin_from(launches, begun)
            self._raise(variant, library.finish())

    def _begin_from(self, launches: list[Launch], first: int) -> int:
        """Begins this one, and those after it that may begin before it is released; returns how
        many have begun in all."""
        for place in range(first, len(launches)):
            function, grid, block, arguments, shared = launches[place]
            variant, library = self._modules[function]
            three = ctypes.c_uint32 * 3
            seed = ctypes.c_uint64(self.seed)
            where = ctypes.c_void_p(arguments)
            begun = library.begin(three(*grid), three(*block), where, shared, self.resident, seed)
            self._raise(variant, begun)
            if not library.has_triggered():
                return place + 1
        return len(launches)

    def _raise(self, variant: Variant, message: bytes) -> None:
        if message:
            raise EmulationError(f"{variant.name}, seed {self.seed}: {message.decode()}")


class _Graphs:
    """The part of the driver that makes and launches graphs."""

    def __init__(self, handles, run) -> None:
        self.launched = 0  # graphs
        self.last = 0  # the graph that was launched last
        self._handles, self._run = handles, run
        self._nodes: dict[int, dict[int, launch_graph._NodeParams]] = {}  # of each graph

    def cuGraphCreate(self, graph, flags):
        graph._obj.value = next(self._handles)
        self._nodes[graph._obj.value] = {}
        return 0

    def cuGraphAddKernelNode_v2(self, node, graph, dependencies, count, parameters):
        node._obj.value = next(self._handles)
        made = launch_graph._NodeParams.from_buffer_copy(parameters._obj)
        self._nodes[graph.value][node._obj.value] = made
        return 0

    def cuGraphAddDependencies_v2(self, graph, before, after, edges, count):
        *_, last_but_one, last = self._nodes[graph.value]
        edge = edges._obj
        assert (before._obj.value, after._obj.value) == (last_but_one, last)
        assert (edge.from_port, edge.to_port, edge.type, count.value) == (1, 0, 1, 1)
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = next(self._handles)
        self._nodes[executable._obj.value] = dict(self._nodes[graph.value])
        return 0

    def set_parameters(self, executable, node, address):
        """Keeps where the arguments are. A driver copies them, but here nothing is queued."""
        made = launch_graph._NodeParams.from_buffer_copy(
            ctypes.string_at(address, ctypes.sizeof(launch_graph._NodeParams))
        )
        self._nodes[executable][node] = made
        return 0

    def launch(self, executable):
        self.launched, self.last = self.launched + 1, executable
        self._run(
            [
                Launch(node.function, node.grid, node.block, node.arguments, node.shared_bytes)
                for node in self._nodes[executable].values()
            ]
        )
        return 0

    def cuGraphExecDestroy(self, executable):
        return 0

    def cuGraphDestroy(self, graph):
        return 0


@functools.cache
def variants() -> dict[str, Variant]:
    return {variant.name: variant for variant in all_variants()}


class _Framework(numpy_arrays.NumPy):
    """NumPy arrays as device memory, new ones full of NaN. Keeps what was allocated."""

    def __init__(self) -> None:
        self.allocated: list[np.ndarray] = []

    def describe(self, x, argument="array"):
        return super().describe(x, argument)._replace(device=0)

    def empty(self, shape, dtype, device):
        made = super().empty(shape, dtype, HOST)
        made.view(np.uint8)[...] = 0xFF
        self.allocated.append(made)
        return made


def guarded(array: np.ndarray, *, at_end: bool = True) -> np.ndarray:
    """A copy whose last byte, or else its first, lies next to memory that may not be touched."""
    page = mmap.PAGESIZE
    room = -(-max(1, array.nbytes) // page) * page
    whole = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    libc = ctypes.CDLL(None, use_errno=True)
    for edge in (start, start + page + room):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    offset = page + (room - array.nbytes if at_end else 0)
    copy = np.frombuffer(whole, np.uint8, array.nbytes, offset).view(array.dtype)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


def _cuda(num_sms: int) -> types.SimpleNamespace:
    """As much of `cupy.cuda` as engine.py asks for."""
    keep = []

    def malloc(size):
        keep.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(keep[-1])

    class Device(contextlib.nullcontext):
        attributes = {"MultiProcessorCount": num_sms}

    runtime = types.SimpleNamespace(
        CUDARuntimeError=RuntimeError,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda device: {"major": 9, "minor": 0, "name": b"emulated"},
        free=lambda address: None,
        malloc=malloc,
        memcpyAsync=lambda to, source, size, kind, stream: ctypes.memmove(to, source, size),
        deviceSynchronize=lambda: None,
    )
    return types.SimpleNamespace(
        runtime=runtime,
        Device=Device,
        Stream=lambda non_blocking: types.SimpleNamespace(ptr=0, synchronize=lambda: None),
        alloc_pinned_memory=lambda size: types.SimpleNamespace(ptr=malloc(size)),
    )


def install(monkeypatch, kernels: Kernels, num_sms: int) -> Emulator:
    """From now on, NumPy arrays are arrays of an emulated GPU of that size."""
    emulator = Emulator(kernels)
    monkeypatch.setattr(driver, "library", lambda: emulator)
    monkeypatch.setattr(engine_module, "cupy_cuda", lambda: _cuda(num_sms))
    monkeypatch.setattr(engine_module, "_engines", {})
    monkeypatch.setattr(
        engine_module,
        "compile_variants",
        lambda wanted: [
            compiler.Compiled(variant, variant.name.encode(), "", None, 0.0, True)
            for variant in wanted
        ],
    )
    monkeypatch.setitem(frameworks.by_type, np.ndarray, emulator.framework)
    forget_calls(monkeypatch)
    return emulator
