"""PyTorch tensors: launched on torch's current stream, results by torch.empty.

torch's allocator knows about CUDA graphs, so a call can be captured by torch.cuda.graph. Tensors
that a compiler traces have no memory; `torch_op` takes those.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import ArgTypeError, ArgumentError, DeviceMismatchError, OptionError
from .base import HERE, HOST, Adapter, ArrayInfo
from .torch_guards import Facts, Guards

_FAKE = ("FakeTensor", "FunctionalTensor")  # subclasses that traces are made of


class Torch(Adapter):
    name = "torch"

    def __init__(self) -> None:
        torch: Any = importlib.import_module("torch")
        self._empty = torch.empty
        self.pointer = torch.Tensor.data_ptr
        # Autograd notices by the version that a tensor it has saved is not the same any more.
        self.written = torch.autograd.graph.increment_version
        self._cuda = torch.cuda
        self._int16 = torch.int16
        self._int32 = torch.int32
        self._bfloat16 = torch.bfloat16
        self._uint8, self._float8 = torch.uint8, getattr(torch, "float8_e4m3fn", None)
        self._dtypes = {
            name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32")
        }
        self._names = {dtype: name for name, dtype in self._dtypes.items()}
        self._devices = {HOST: torch.device("cpu")}
        self._torch_device = torch.device
        compiled_code = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        self._empty_strided = getattr(compiled_code, "_empty_strided_cuda", None)
        self._guards = Guards(getattr(compiled_code, "TensorGuards", None))
        # Dispatch modes of this thread: FakeTensorMode, make_fx, a profiler of operations, ...
        self._modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _no_modes)
        self._jit_traces: Callable[[], bool] = getattr(torch._C, "_is_tracing", _not)
        self._grad_enabled: Callable[[], bool] = torch.is_grad_enabled
        self._forward_ad: Any = importlib.import_module("torch.autograd.forward_ad")
        # The public current_stream() builds an object and takes 3.5 us; this one takes 0.1 us.
        self.stream = getattr(torch._C, "_cuda_getCurrentRawStream", self._public_stream)
        self._current_device: Callable[[], int] = getattr(
            torch._C, "_cuda_getDevice", torch.cuda.current_device
        )

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        if self._jit_traces():
            raise _jit_trace(argument)
        try:
            if x.is_nested:  # one tensor of several, which has no strides
                raise no_memory(x, argument, "nested")
            dtype = x.dtype
            name = self._names.get(dtype) or str(dtype).removeprefix("torch.")
            if dtype is not self._int32:
                self._refuse_gradient(x, argument)
            ptr = x.data_ptr() or self._null(x, argument)
            if x.is_neg():
                raise _negated(argument)
            if x.is_cuda:
                return ArrayInfo(ptr, x.shape, x.stride(), name, x.get_device())
            if x.is_cpu:
                return ArrayInfo(ptr, x.shape, x.stride(), name, HOST)
        except RuntimeError as error:  # sparse and functorch tensors have no memory to read
            raise no_memory(x, argument, str(error).splitlines()[0]) from error
        raise no_kernels(x, argument)

    def signature(self, arrays: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
        """Facts that are cheap to read. Devices are numbers, but for the first one's: no build of
        torch has two kinds of GPU."""
        if self._modes():  # of a trace, or of anything else that has to see the call
            raise ValueError("a dispatch mode is active")
        if self._in_forward_ad():
            raise ValueError("tensors may have tangents")
        guards = self._guards
        known = guards.found.get(len(arrays))
        if known is not None:
            try:
                for x in arrays:
                    if x.is_nested:
                        raise ValueError("a nested tensor, about which a guard must not be asked")
                if known[0](*arrays):
                    guards.last = None
                    addresses = tuple(map(self.pointer, arrays))
                    if 0 not in addresses:
                        return known[1], addresses
            except AttributeError:  # one of them is absent
                pass
        if self._jit_traces():  # under which no guard holds: tensors have another dispatch key
            raise ValueError("torch.jit.trace is active")
        facts: tuple[Any, ...] = (self, arrays[0].device)
        pointers = []
        complete = True
        for x in arrays:
            if x is None:
                facts, complete = (*facts, None), False
                pointers.append(0)
                continue
            if x.requires_grad:
                if self._grad_enabled():
                    raise needs_gradient("a tensor")
                complete = False  # a guard is blind to the mode
            if x.is_neg():
                raise _negated("a tensor")
            facts += (x.shape, x.stride(), x.dtype, x.get_device())
            pointers.append(x.data_ptr() or self._no_address())
        found = Facts(facts)
        if complete:
            self._guards.remember(arrays, found)
        return found, tuple(pointers)

    def is_fake(self, x: Any) -> bool:
        return type(x).__name__ in _FAKE

    def is_traced(self, x: Any) -> bool:
        return self.is_fake(x) or self._modes() > 0

    def _no_address(self) -> int:
        """Of an empty tensor, or of a wrapper without memory: `describe` tells which."""
        raise ValueError("a tensor without an address")

    def _in_forward_ad(self) -> bool:
        """Whether this process is inside of torch.autograd.forward_ad.dual_level()."""
        return getattr(self._forward_ad, "_current_level", -1) >= 0

    def _refuse_gradient(self, x: Any, argument: str) -> None:
        if x.requires_grad and self._grad_enabled():
            raise needs_gradient(argument)
        if self._in_forward_ad() and self._forward_ad.unpack_dual(x).tangent is not None:
            raise needs_gradient(argument, "one with a tangent")

    def _null(self, x: Any, argument: str) -> int:
        """0, the address of an empty tensor; a wrapper such as DTensor has it too, of no use."""
        if x.numel() and not x.is_meta:
            raise no_memory(x, argument, f"on {x.device}, without an address")
        return 0

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        place = self._devices.get(device)
        if place is None:
            place = self._devices[device] = self._torch_device("cuda", device)
        return self._empty(shape, dtype=self._dtypes[dtype], device=place)

    def allocator(self, shape: tuple[int, ...], dtype: str, device: int) -> Callable[[], Any]:
        """torch.empty without the detour through the dispatcher, if there is a GPU: what the code
        that torch.compile writes calls, in a third of the time. It takes the current device."""
        fast = self._empty_strided
        if device == HOST or fast is None:
            return functools.partial(self.empty, shape, dtype, device)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return functools.partial(fast, shape, tuple(strides), self._dtypes[dtype])

    def _public_stream(self, device: int) -> int:
        return 0 if device == HOST else int(self._cuda.current_stream(device).cuda_stream)

    def device_guard(self, device: int) -> AbstractContextManager[Any]:
        if device == HOST or self._current_device() == device:
            return HERE
        guard: AbstractContextManager[Any] = self._cuda.device(device)
        return guard

    def to_numpy(self, x: Any) -> np.ndarray:
        x = x.detach()
        if x.dtype == self._bfloat16:  # torch hands no bfloat16 to NumPy; the bits do travel
            bits: np.ndarray = x.view(self._int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        if x.dtype == self._float8:
            codes: np.ndarray = x.view(self._uint8).numpy()
            return codes.view(ml_dtypes.float8_e4m3fn)
        view: np.ndarray = x.numpy()
        return view


def _no_modes() -> int:
    return 0


def _not() -> bool:
    return False


def needs_gradient(argument: str, got: str = "one with requires_grad=True") -> ArgumentError:
    """For a tensor that autograd would have to follow."""
    return OptionError(
        argument,
        "a tensor that needs no gradient, since decoding has no backward pass",
        got,
        f"Call it under torch.no_grad() or torch.inference_mode(), or pass {argument}.detach().",
    )


def _jit_trace(argument: str) -> ArgumentError:
    """For a call that a graph of torch.jit would lack: it records what goes through the
    dispatcher, which calls do not."""
    return OptionError(
        argument,
        "a tensor that torch.jit.trace does not follow, since its graphs cannot hold the call",
        "one inside of torch.jit.trace",
        "Compile the model with torch.compile, or export it with torch.export.",
    )


def _negated(argument: str) -> ArgumentError:
    """For a view such as the imaginary part of a conjugate: its memory has the opposite values."""
    return OptionError(
        argument,
        "a tensor whose memory holds its values",
        "one with the negative bit set",
        f"Pass {argument}.resolve_neg().",
    )


def no_kernels(x: Any, argument: str) -> ArgumentError:
    """For a tensor on a device that is neither."""
    return DeviceMismatchError(
        argument,
        "a tensor on a CUDA device, or on the CPU",
        f"one on {x.device}",
        "Move it with .cuda().",
    )


def no_memory(x: Any, argument: str, why: str) -> ArgumentError:
    """For a tensor that is not a strided one."""
    return ArgTypeError(
        argument,
        "a dense tensor with memory of its own",
        f"{type(x).__name__} ({why})",
        "Pass a plain strided torch.Tensor; of a DTensor, its to_local().",
    )
