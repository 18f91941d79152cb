"""Whether PyTorch's compiler is tracing the code that asks, without importing PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_others: set[type] = set()  # of arrays that are no tensors
_asks: Callable[[], bool] | None = None  # torch.compiler.is_dynamo_compiling, once it is known


def is_compiling(x: Any) -> bool:
    """Whether this thread is being traced by torch.compile or torch.export; x: an array of the
    call, a tensor if it is.

    Does not look at sys.modules: Dynamo would guard on all of it, and while it does so some module
    may import itself, such as cupyx, which CuPy imports lazily."""
    global _asks
    if _asks is not None:
        return _asks()
    kind = type(x)
    if kind in _others:
        return False
    if not hasattr(kind, "__torch_function__"):
        _others.add(kind)
        return False
    from torch.compiler import is_dynamo_compiling

    if is_dynamo_compiling():
        return True
    _asks = is_dynamo_compiling
    return False
