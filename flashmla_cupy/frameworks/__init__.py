"""The array frameworks: which one an array is of, and what the library needs to know of it.

    framework_of(x)    its adapter: NumPy, CuPy, PyTorch or JAX
    is_foreign(x)      whether it is of another framework, which DLPack can import (see `dlpack`)
    elsewhere(arrays)  who makes a call whose arrays have no address to launch with

The adapter is found by the type of x among the frameworks that are imported already, so nothing is
imported that the caller has not imported. An adapter describes an array (pointer, shape, strides,
dtype, device) by its attributes, allocates with the caller's own caching allocator, and knows the
caller's current stream. DLPack is the way in only for other frameworks: it costs ten times the
attributes and carries no bfloat16 into NumPy.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any, Literal

from ..errors import ArgTypeError, FrameworkMismatchError
from ..values import kind
from .base import HERE, HOST, Adapter, ArrayInfo, numpy_dtype
from .numpy_arrays import masked

__all__ = [
    "EXPECTED",
    "HERE",
    "HOST",
    "Adapter",
    "ArrayInfo",
    "by_type",
    "elsewhere",
    "framework",
    "framework_of",
    "is_foreign",
    "name_of",
    "numpy_dtype",
]

_ADAPTERS = {  # name: (class of its arrays, module and class of the adapter)
    "numpy": ("ndarray", "numpy_arrays", "NumPy"),
    "cupy": ("ndarray", "cupy_arrays", "CuPy"),
    "torch": ("Tensor", "torch_tensors", "Torch"),
    "jax": ("Array", "jax_arrays", "Jax"),
}
EXPECTED = "a NumPy array, a CuPy array, a torch.Tensor or a JAX array"
_instances: dict[str, Adapter] = {}
by_type: dict[type, Adapter] = {}  # of the arrays that were seen


def framework(name: str) -> Adapter:
    """The adapter called "numpy", "cupy", "torch" or "jax": one object, whichever of several
    threads asks first, as frameworks are told apart by it."""
    found = _instances.get(name)
    if found is None:
        _, module, adapter = _ADAPTERS[name]
        made = getattr(importlib.import_module(f".{module}", __name__), adapter)()
        found = _instances.setdefault(name, made)
    return found


def framework_of(x: Any, argument: str) -> Adapter:
    """The adapter for array x. Raises ArgTypeError or FrameworkMismatchError, naming the argument,
    for anything that is not an array of one of the four."""
    found = by_type.get(type(x))
    return found if found is not None else _find(x, argument)


def is_foreign(x: Any) -> bool:
    """Whether x is an array of none of the four frameworks that speaks DLPack."""
    of = type(x)
    return of not in by_type and hasattr(of, "__dlpack__") and not name_of(x)


def elsewhere(arrays: Iterable[Any]) -> Literal["torch", "foreign", "jax", ""]:
    """Who makes a call with such arrays: "torch" if tensors are fake or are being traced, "foreign"
    if one has to be imported through DLPack, "jax" for JAX arrays and tracers. "": they have
    addresses to launch with, or are no arrays, which the checks will say."""
    given = [x for x in arrays if x is not None]
    names = [name_of(x) for x in given]
    if "torch" in names and any(map(framework("torch").is_traced, given)):
        return "torch"
    if any(map(is_foreign, given)):
        return "foreign"
    return "jax" if names[:1] == ["jax"] else ""


def name_of(x: Any) -> str:
    """The name of the adapter for x, of a trace too; "" if it is no array of the four."""
    for name, (array_class, _, _) in _ADAPTERS.items():
        module = sys.modules.get(name)
        if module is not None and isinstance(x, getattr(module, array_class, ())):
            return name
    return ""


def _find(x: Any, argument: str) -> Adapter:
    name = name_of(x)
    of = type(x)
    shown = kind(x)
    if name and framework(name).is_fake(x):  # its address is not to be asked for
        remedy = "Pass tensors that all have memory, or all of one trace."
        raise ArgTypeError(argument, "a tensor with memory of its own", shown, remedy)
    if name == "numpy" and hasattr(x, "mask"):
        raise masked(x, argument)
    if name:
        found = by_type[of] = framework(name)
        return found
    if hasattr(of, "__dlpack__"):
        raise FrameworkMismatchError(
            argument,
            EXPECTED,
            shown,
            "Pass cupy.from_dlpack(x) or numpy.from_dlpack(x), which share the memory.",
        )
    remedy = "Put the data into an array first."
    if x is None:
        remedy = f"This call needs {argument}: pass it."
    raise ArgTypeError(argument, EXPECTED, shown, remedy)
