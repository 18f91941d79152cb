"""The array frameworks: which one an array is of, and what the library needs to know of it.

    framework_of(x)    its adapter: NumPy, CuPy, PyTorch or JAX
    is_foreign(x)      whether it is of another framework, which DLPack can import (see `dlpack`)

The adapter is found by the type of x among the frameworks that are imported already, so nothing is
imported that the caller has not imported. An adapter describes an array (pointer, shape, strides,
dtype, device) by its attributes, allocates with the caller's own caching allocator, and knows the
caller's current stream. DLPack is the way in only for other frameworks: it costs ten times the
attributes and carries no bfloat16 into NumPy.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ArgTypeError, FrameworkMismatchError
from .base import HERE, HOST, ArrayInfo, Framework, numpy_dtype

__all__ = [
    "HERE",
    "HOST",
    "ArrayInfo",
    "Framework",
    "allocator",
    "framework",
    "framework_of",
    "is_foreign",
    "numpy_dtype",
    "pair_allocator",
]

_ADAPTERS = {  # name: (class of its arrays, module and class of the adapter)
    "numpy": ("ndarray", "numpy_arrays", "NumPy"),
    "cupy": ("ndarray", "cupy_arrays", "CuPy"),
    "torch": ("Tensor", "torch_tensors", "Torch"),
    "jax": ("Array", "jax_arrays", "Jax"),
}
_EXPECTED = "a NumPy array, a CuPy array, a torch.Tensor or a JAX array"
_instances: dict[str, Framework] = {}
_by_type: dict[type, Framework] = {}


def framework(name: str) -> Framework:
    """The adapter called "numpy", "cupy", "torch" or "jax"."""
    if name not in _instances:
        _, module, adapter = _ADAPTERS[name]
        _instances[name] = getattr(importlib.import_module(f".{module}", __name__), adapter)()
    return _instances[name]


def framework_of(x: Any, argument: str) -> Framework:
    """The adapter for array x. Raises ArgTypeError or FrameworkMismatchError, naming the argument,
    for anything that is not an array of one of the four."""
    found = _by_type.get(type(x))
    return found if found is not None else _find(x, argument)


def allocator(
    framework: Framework, shape: tuple[int, ...], dtype: str, device: int
) -> Callable[[], Any]:
    """A function that makes such an array: the adapter's own, or empty() with these arguments."""
    own = getattr(framework, "allocator", None)
    if own is None:
        return functools.partial(framework.empty, shape, dtype, device)
    made: Callable[[], Any] = own(shape, dtype, device)
    return made


def pair_allocator(
    framework: Framework,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    dtypes: tuple[str, str],
    device: int,
) -> Callable[[], tuple[Any, Any]]:
    """The same for two arrays that come together."""
    own = getattr(framework, "pair_allocator", None)
    if own is None:
        first, second = (
            allocator(framework, shape, dtype, device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return lambda: (first(), second())
    made: Callable[[], tuple[Any, Any]] = own(shapes, dtypes, device)
    return made


def is_foreign(x: Any) -> bool:
    """Whether x is an array of none of the four frameworks that speaks DLPack."""
    kind = type(x)
    return kind not in _by_type and hasattr(kind, "__dlpack__") and not _adapter_name(x)


def _adapter_name(x: Any) -> str:
    for name, (array_class, _, _) in _ADAPTERS.items():
        module = sys.modules.get(name)
        if module is not None and isinstance(x, getattr(module, array_class, ())):
            return name
    return ""


def _find(x: Any, argument: str) -> Framework:
    name = _adapter_name(x)
    kind = type(x)
    shown = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if name == "torch" and kind.__name__ == "FakeTensor":  # whose address is not to be asked for
        remedy = "Fake tensors give fake results, if q is one."
        raise ArgTypeError(argument, "a tensor with memory of its own", shown, remedy)
    if name:
        found = _by_type[kind] = framework(name)
        return found
    if hasattr(kind, "__dlpack__"):
        raise FrameworkMismatchError(
            argument,
            _EXPECTED,
            shown,
            "Pass cupy.from_dlpack(x) or numpy.from_dlpack(x), which share the memory.",
        )
    if isinstance(x, (bool, int, float, complex, str)):
        shown += f" {x!r}"
    raise ArgTypeError(argument, _EXPECTED, shown, "Put the data into an array first.")
