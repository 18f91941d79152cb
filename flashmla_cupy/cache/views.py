"""One memory as arrays of several frameworks, without a copy.

What a cache keeps is NumPy's in host memory and CuPy's on a GPU; PyTorch's tensors of it are views,
made through DLPack once. bfloat16 travels as 16-bit integers, which every framework takes.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..frameworks import HOST, Adapter, framework, numpy_dtype

BITS = {"bfloat16": "uint16", "float16": "uint16", "uint8": "uint8"}  # what rows are moved as


def bits_of(x: Any, adapter: Adapter) -> Any:
    """The memory of x, of bfloat16, float16 or uint8, as NumPy's or CuPy's integers.

    A JAX array's view is for reading only; it is made on the host by NumPy."""
    if adapter.name == "torch":
        torch: Any = importlib.import_module("torch")
        if x.dtype != torch.uint8:
            x = x.detach().view(torch.int16)
        raw = importlib.import_module("cupy").from_dlpack(x) if x.is_cuda else x.numpy()
        return raw.view("uint16") if raw.dtype.itemsize == 2 else raw
    if adapter.name == "jax":
        x = importlib.import_module("numpy").asarray(x)
    return x.view(BITS[x.dtype.name])


def view_as(x: Any, dtype: str, name: str) -> Any:
    """The memory of x, NumPy's or CuPy's integers, as an array of dtype of the framework `name`."""
    if name != "torch":
        return x if x.dtype.name == dtype else x.view(numpy_dtype(dtype))
    torch: Any = importlib.import_module("torch")
    signed = x.view("int16") if x.dtype.name == "uint16" else x
    tensor = torch.from_dlpack(signed) if hasattr(x, "get") else torch.from_numpy(signed)
    return tensor if tensor.dtype == getattr(torch, dtype) else tensor.view(getattr(torch, dtype))


def current_stream(adapter: Adapter, device: int) -> int:
    """The stream that is current for a framework on a device. PyTorch has none on the host."""
    return 0 if device == HOST and adapter.name == "torch" else adapter.stream(device)


def array_of(x: Any, name: str, device: int) -> Any:
    """A copy, on the device, of a NumPy array, of the framework `name`; in host memory its view.
    Queued on the framework's current stream."""
    if name == "numpy":
        return x.view()
    if name == "torch":
        torch: Any = importlib.import_module("torch")
        return torch.from_numpy(x).to(torch.device("cuda", device) if device >= 0 else "cpu")
    if name == "jax":
        return importlib.import_module("jax.numpy").asarray(x)
    with framework("cupy").device_guard(device):
        return importlib.import_module("cupy").asarray(x)


class _Stream:
    """What CuPy takes for a stream of others."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def stream_of(cuda: Any, pointer: int, device: int) -> Any:
    """CuPy's object for a stream, a context in which it is current."""
    made = getattr(cuda.Stream, "from_external", None)
    return cuda.ExternalStream(pointer, device) if made is None else made(_Stream(pointer))
