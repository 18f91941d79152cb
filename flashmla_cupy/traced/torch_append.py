"""append_mla_kv() under torch.compile, torch.export and fake tensors: an op that writes its first
argument.

    flashmla_cupy::append(k_cache, rows, slot_mapping, interleaved, cos=, sin=, positions=)
"""

from __future__ import annotations

import importlib
from typing import Any

from ..calls.append import eager, rotation, validate
from ..calls.arguments import APPEND
from . import torch_checks
from .torch_op import refuse_gradients

torch: Any = importlib.import_module("torch")

_library: Any = torch.library.Library("flashmla_cupy", "FRAGMENT")
_AXES = tuple(
    axes._replace(least=axes.most - 1) if axes.name == "rows" else axes
    for axes in torch_checks.axes_of(APPEND, "k_cache")
)


def append(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """The op; returns k_cache."""
    rows, slot_mapping, cos, sin, positions, k_cache = arrays
    (interleaved,) = options
    rotation(interleaved, cos, sin, positions)
    torch_checks.tensors(APPEND.function, _AXES, arrays)
    torch_checks.facts(APPEND, arrays, lambda known: validate(known, options))
    torch.ops.flashmla_cupy.append(k_cache, rows, slot_mapping, interleaved, cos, sin, positions)
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
