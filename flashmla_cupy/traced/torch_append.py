"""append_mla_kv() under torch.compile, torch.export and fake tensors: an op that writes its first
argument.

    flashmla_cupy::append(k_cache, rows, slot_mapping, interleaved, cos=, sin=, positions=)
"""

from __future__ import annotations

import importlib
from typing import Any

from ..calls.append import eager
from ..calls.arguments import APPEND
from ..errors import ShapeError
from .torch_op import refuse_gradients

torch: Any = importlib.import_module("torch")

_library: Any = torch.library.Library("flashmla_cupy", "FRAGMENT")
_RANKS = tuple((array.name, len(array.axes), array.shape) for array in APPEND.arrays)


def append(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """The op; returns k_cache."""
    rows, slot_mapping, cos, sin, positions, k_cache = arrays
    for x, (name, rank, shape) in zip(arrays, _RANKS, strict=True):
        if x is not None and x.dim() != rank and not (name == "rows" and x.dim() == rank - 1):
            remedy = "See append_mla_kv() for the shapes."
            raise ShapeError(name, f"shape {shape}", f"{tuple(x.shape)}", remedy, APPEND.function)
    torch.ops.flashmla_cupy.append(k_cache, rows, slot_mapping, *options, cos, sin, positions)
    return k_cache


def _append(
    k_cache: Any,
    rows: Any,
    slot_mapping: Any,
    interleaved: bool,
    cos: Any = None,
    sin: Any = None,
    positions: Any = None,
) -> None:
    eager((rows, slot_mapping, cos, sin, positions, k_cache), (interleaved,))


def _fake_append(*inputs: Any, **rotary: Any) -> None:
    refuse_gradients("rows", (*inputs, *rotary.values()))


def _register() -> None:
    tags = tuple(
        getattr(torch.Tag, name)
        for name in ("needs_exact_strides", "pt2_compliant_tag")
        if hasattr(torch.Tag, name)
    )
    others = APPEND.schema(with_outputs=False)
    _library.define(f"append(Tensor(a!) k_cache, {others}) -> ()", tags=tags)
    for device in ("CUDA", "CPU"):
        _library.impl("append", _append, device)
    torch.library.register_fake("flashmla_cupy::append", _fake_append, lib=_library)


_register()
