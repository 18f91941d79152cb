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
from .base import HERE, HOST, ArrayInfo
from .torch_guards import Facts, Guards

# What absent arguments add to the addresses of a call's tensors, for the sets of arguments that
# most calls have: with a SchedMeta; with metadata; with out and lse as well.
_ABSENT = {0: (0,) * 4, 1: (0,) * 2, 7: ()}


class Torch:
    name = "torch"

    def __init__(self) -> None:
        torch: Any = importlib.import_module("torch")
        self._empty = torch.empty
        self._address_of: Callable[[Any], int] = torch.Tensor.data_ptr
        self._cuda = torch.cuda
        self._int16 = torch.int16
        self._int32 = torch.int32
        self._bfloat16 = torch.bfloat16
        self._dtypes = {
            name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32")
        }
        self._names = {dtype: name for name, dtype in self._dtypes.items()}
        self._devices = {HOST: torch.device("cpu")}
        self._torch_device = torch.device
        compiled_code = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        self._empty_strided = getattr(compiled_code, "_empty_strided_cuda", None)
        self._guards = Guards(getattr(compiled_code, "TensorGuards", None))
        self._grad_enabled: Callable[[], bool] = torch.is_grad_enabled
        # The public current_stream() builds an object and takes 3.5 us; this one takes 0.1 us.
        self._raw_stream: Callable[[int], int] = getattr(
            torch._C, "_cuda_getCurrentRawStream", self._public_stream
        )
        self._current_device: Callable[[], int] = getattr(
            torch._C, "_cuda_getDevice", torch.cuda.current_device
        )

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        try:
            dtype = x.dtype
            name = self._names.get(dtype) or str(dtype).removeprefix("torch.")
            if dtype is not self._int32:
                self._refuse_gradient(x, argument)
            ptr = x.data_ptr() or self._null(x, argument)
            if x.is_cuda:
                return ArrayInfo(ptr, x.shape, x.stride(), name, x.get_device())
            if x.is_cpu:
                return ArrayInfo(ptr, x.shape, x.stride(), name, HOST)
        except RuntimeError as error:  # sparse and functorch tensors have no memory to read
            raise _no_memory(x, argument, str(error).splitlines()[0]) from error
        raise DeviceMismatchError(
            argument,
            "a tensor on a CUDA device, or on the CPU",
            f"one on {x.device}",
            "Move it with .cuda().",
        )

    def signature(
        self,
        q: Any,
        k_cache: Any,
        table: Any,
        lengths: Any,
        metadata: Any,
        splits: Any,
        out: Any,
        lse: Any,
    ) -> tuple[Any, tuple[int, ...]]:
        """Facts that are cheap to read. Devices are numbers, but for q's: no build of torch has
        two kinds of GPU. Arrays that have to be contiguous need no strides."""
        tensors: tuple[Any, ...] = (q, k_cache, table, lengths)
        arguments = 0
        if metadata is not None:
            tensors, arguments = (q, k_cache, table, lengths, metadata, splits), 1
        if out is not None:
            tensors, arguments = (*tensors, out), arguments | 2
        if lse is not None:
            tensors, arguments = (*tensors, lse), arguments | 4
        known = self._guards.find(arguments, tensors)
        if known is not None:
            addresses = tuple(map(self._address_of, tensors))
            if 0 not in addresses:
                return known, addresses + _ABSENT[arguments]
        if (q.requires_grad or k_cache.requires_grad) and self._grad_enabled():
            raise needs_gradient("q")
        facts: tuple[Any, ...] = (
            self, q.device,
            q.shape, q.stride(), q.dtype,
            k_cache.shape, k_cache.stride(), k_cache.dtype, k_cache.get_device(),
            table.shape, table.stride(), table.dtype, table.get_device(),
            lengths.shape, lengths.is_contiguous(), lengths.dtype, lengths.get_device(),
        )  # fmt: skip
        q_pointer, k_pointer = q.data_ptr(), k_cache.data_ptr()
        t_pointer, n_pointer = table.data_ptr(), lengths.data_ptr()
        m_pointer = s_pointer = out_pointer = lse_pointer = 0
        some = q_pointer and k_pointer and t_pointer and n_pointer
        if metadata is not None:
            facts += (
                metadata.shape, metadata.is_contiguous(), metadata.dtype, metadata.get_device(),
                splits.shape, splits.is_contiguous(), splits.dtype, splits.get_device(),
            )  # fmt: skip
            m_pointer, s_pointer = metadata.data_ptr(), splits.data_ptr()
            some = some and m_pointer and s_pointer
        if out is not None:
            self._refuse_gradient(out, "out")
            facts += ("out", out.shape, out.stride(), out.dtype, out.get_device())
            out_pointer = out.data_ptr()
            some = some and out_pointer
        if lse is not None:
            self._refuse_gradient(lse, "lse")
            facts += ("lse", lse.shape, lse.stride(), lse.dtype, lse.get_device())
            lse_pointer = lse.data_ptr()
            some = some and lse_pointer
        if not some:  # empty, or a wrapper without memory: `describe` tells which
            raise ValueError("a tensor without an address")
        pointers = (
            q_pointer, k_pointer, t_pointer, n_pointer,
            m_pointer, s_pointer, out_pointer, lse_pointer,
        )  # fmt: skip
        found = Facts(facts)
        if arguments in _ABSENT and not any(x.requires_grad for x in tensors):
            self._guards.remember(arguments, tensors, found)
        return found, pointers

    def _refuse_gradient(self, x: Any, argument: str) -> None:
        if x.requires_grad and self._grad_enabled():
            raise needs_gradient(argument)

    def _null(self, x: Any, argument: str) -> int:
        """0, the address of an empty tensor; a wrapper such as DTensor has it too, of no use."""
        if x.numel() and not x.is_meta:
            raise _no_memory(x, argument, f"on {x.device}, without an address")
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

    def pointer(self, x: Any) -> int:
        pointer: int = x.data_ptr()
        return pointer

    def _public_stream(self, device: int) -> int:
        return int(self._cuda.current_stream(device).cuda_stream)

    def stream(self, device: int) -> int:
        return self._raw_stream(device)

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
        view: np.ndarray = x.numpy()
        return view


def needs_gradient(argument: str) -> ArgumentError:
    """For a tensor that autograd would have to follow."""
    return OptionError(
        argument,
        "a tensor that needs no gradient, since decoding has no backward pass",
        "one with requires_grad=True",
        f"Call it under torch.no_grad() or torch.inference_mode(), or pass {argument}.detach().",
    )


def _no_memory(x: Any, argument: str, why: str) -> ArgumentError:
    return ArgTypeError(
        argument,
        "a dense tensor with memory of its own",
        f"{type(x).__name__} ({why})",
        "Pass a plain strided torch.Tensor; of a DTensor, its to_local().",
    )
