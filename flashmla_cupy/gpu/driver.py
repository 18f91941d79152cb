"""The CUDA driver through ctypes: what CuPy does not offer.

Tensor maps, launches with programmatic dependent launch, and loading a cubin. Everything else of
CUDA goes through CuPy. Struct layouts and numbers are those of cuda.h.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence

from ..errors import KernelLoadError, NoDeviceError

TENSOR_MAP_BYTES = 128  # and their alignment
TENSOR_MAP_DTYPES = {"float16": 6, "bfloat16": 9}

_INTERLEAVE_NONE, _SWIZZLE_128B = 0, 3
# How much of memory a miss of TMA in the L2 cache asks for. A row of a box is 128 bytes, and its
# neighbours in memory are asked for by other boxes or none. Tried, on an H200; microseconds of a
# decode call in bfloat16, and percent of what a plain read reaches (4615 GB/s):
#                                      256 B        | 128 B        | 64 B
#   16 heads, 64 requests of ~16384    307.7 84.5 % | 280.2 92.8 % | 280.3 92.7 %
#   16 heads, 16 of 65536              304.2 86.1 % | 274.6 95.4 % | 275.0 95.3 %
#   16 heads, 128 of 4096              157.8 83.6 % | 143.7 91.8 % | 143.9 91.7 %
#   64 heads, 64 of ~16384             334.4 78.2 % | 304.9 85.7 % | 309.2 84.5 %
#   128 heads, 32 of 8192              129.8        | 130.1        | 129.9
# On an H100, whose memory is slower, all are the same.
_L2_PROMOTION_128B = 2
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_CAPTURE_MODE_RELAXED = 2
NEVER_CAPTURED = (0, 1)  # the legacy default stream

_Three = ctypes.c_uint32 * 3


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("value", ctypes.c_uint32 * 16),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", _Three),
        ("block", _Three),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The driver. Raises NoDeviceError."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NoDeviceError(
            f"The NVIDIA driver ({name}) cannot be loaded: {error}. Install a driver, or pass NumPy"
            " arrays to compute on the CPU."
        ) from error


def version() -> int:
    """CUDA version that the driver supports, such as 12040; 0 without a driver."""
    number = ctypes.c_int()
    try:
        failed = library().cuDriverGetVersion(ctypes.byref(number))
    except NoDeviceError:
        return 0
    return 0 if failed else number.value


def message(code: int) -> str:
    """What an error code of the driver means."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(code, ctypes.byref(text))
    return f"CUDA error {code}, {(text.value or b'unknown').decode()}"


def _must(code: int, what: str) -> None:
    if code:
        raise KernelLoadError(f"{what} failed: {message(code)}.")


class Function:
    """A kernel of a loaded cubin."""

    def __init__(
        self, cubin: bytes, entry: str, *, block: int, max_shared: int = 0, programmatic: bool
    ) -> None:
        """programmatic: it may start before the kernel ahead of it ends, which its
        griddepcontrol.wait waits for. Needs a current context. Raises KernelLoadError."""
        cuda, module, function = library(), ctypes.c_void_p(), ctypes.c_void_p()
        _must(cuda.cuModuleLoadData(ctypes.byref(module), cubin), f"Loading {entry}")
        name = entry.encode()
        _must(cuda.cuModuleGetFunction(ctypes.byref(function), module, name), f"Finding {entry}")
        # Also makes the driver load the code now: a graph capture would forbid it later.
        _must(
            cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, max_shared),
            f"Setting the shared memory of {entry}",
        )
        self.handle = function.value or 0
        self.entry = entry
        self.block = block
        self.programmatic = programmatic


class Launch:
    """A reusable launch of one kernel. Not for two threads at once."""

    def __init__(self, function: Function, grid: Sequence[int], shared_bytes: int = 0) -> None:
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self.config = _Config(
            _Three(*grid),
            _Three(function.block, 1, 1),
            shared_bytes,
            None,
            ctypes.addressof(self._attribute),
            int(function.programmatic),
        )
        self._stream: int | None = None
        self._address = ctypes.addressof(self.config)
        self.function = function.handle
        self.programmatic = function.programmatic
        self._entry = function.entry
        self._start = library().cuLaunchKernelEx
        self._start.argtypes = (ctypes.c_void_p,) * 4

    def set_size(self, block: Sequence[int], shared_bytes: int) -> None:
        self.config.block[:] = block
        self.config.shared_bytes = shared_bytes

    def __call__(self, stream: int, arguments: int) -> None:
        """Launches with the array at address `arguments`, of addresses of the parameters. (Numbers
        all of them: ctypes takes those fastest.)"""
        if stream != self._stream:
            self.config.stream = self._stream = stream
        code = self._start(self._address, self.function, arguments, None)
        if code:
            raise RuntimeError(f"Launching {self._entry} failed: {message(code)}.")


def tensor_map(
    address: int,
    dtype: str,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    nan_outside: bool,
) -> ctypes.Array[ctypes.c_char]:
    """An encoded CUtensorMap with 128-byte swizzle, at an address aligned as launches need.

    dims and box in elements, the innermost dimension first; strides in bytes, without the
    innermost. What lies outside of dims reads as NaN, or else as zero.
    """
    rank = len(dims)
    room = ctypes.create_string_buffer(2 * TENSOR_MAP_BYTES)
    aligned = -(-ctypes.addressof(room) // TENSOR_MAP_BYTES) * TENSOR_MAP_BYTES
    code = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        TENSOR_MAP_DTYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_128B,
        int(nan_outside),
    )
    if code:
        raise RuntimeError(
            f"A tensor map of {tuple(dims)} elements, strides {tuple(strides)}, at {address:#x}"
            f" cannot be made: {message(code)}."
        )
    return (ctypes.c_char * TENSOR_MAP_BYTES).from_buffer(room, aligned - ctypes.addressof(room))


def capture_id(stream: int) -> int:
    """The number of the graph capture that a capturing stream takes part in."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    library().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value


class RelaxedCapture:
    """Lets this thread make any CUDA call while another stream is being captured."""

    def __init__(self, cuda: ctypes.CDLL | None = None) -> None:
        self._exchange = (cuda or library()).cuThreadExchangeStreamCaptureMode

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self._exchange(ctypes.byref(self._mode))

    def __exit__(self, *_: object) -> None:
        self._exchange(ctypes.byref(self._mode))
