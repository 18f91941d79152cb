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
import re
import shutil
import struct
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    "-std=c++17", "-O2", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off",
    "-U_FORTIFY_SOURCE", "-Wno-attributes",
)  # fmt: skip
TENSOR_MAP = struct.Struct("Q6I4Q5I")  # TensorMap in ptx.cuh


def host_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class EmulationError(AssertionError):
    """What a kernel did wrong: a deadlock, a missing fence, ..."""


class Kernels:
    """The kernels as shared libraries in `folder`, made when they are first asked for.

    edit(name, text) -> text may change a source, for tests of what the emulator finds."""

    def __init__(self, folder: Path, edit=lambda name, text: text) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(CUDA_SRC.glob("*.cu*")):
            text = edit(path.name, path.read_text())
            # A variable of a thread block: static to C++, or the one array of machine.h.
            text = re.sub(r"^  extern __shared__", "  extern", text, flags=re.MULTILINE)
            text = re.sub(r"^  __shared__", "  static __shared__", text, flags=re.MULTILINE)
            (folder / path.name).write_text(text)
        for path in (*HERE.glob("*.h"), *HERE.glob("*.cuh"), *HERE.glob("*.cpp")):
            shutil.copy(path, folder)
        self._made: dict[str, ctypes.CDLL] = {}

    def __getitem__(self, variant: Variant):
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
            loaded.emulate.restype = ctypes.c_char_p
        return self._made[variant.name]

    def make_all(self, variants) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.__getitem__, variants))


class Emulator:
    """The part of the CUDA driver's interface that driver.py uses."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.resident = 3
        self.seed = 0
        self.framework = _Framework()
        self._handles = itertools.count(1)
        self._modules: dict[int, tuple[Variant, ctypes.CDLL]] = {}

        self.graphs = _Graphs(self._handles, self._run)

        # Functions, no methods: argtypes are given to them.
        def launch_kernel(config, function, arguments, extra):
            seen = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents
            self._run(function, seen.grid, seen.block, arguments)
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

    def _run(self, function, grid, block, arguments):
        variant, library = self._modules[function]
        message = library.emulate(
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*block),
            ctypes.c_void_p(arguments),
            self.resident,
            ctypes.c_uint64(self.seed),
        )
        if message:
            raise EmulationError(f"{variant.name}, seed {self.seed}: {message.decode()}")


class _Graphs:
    """The part of the driver that makes and launches graphs."""

    def __init__(self, handles, run) -> None:
        self.launched = 0  # graphs
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
        self.launched += 1
        for node in self._nodes[executable].values():
            self._run(node.function, node.grid, node.block, node.arguments)
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
