"""Calls with arrays of frameworks that this library does not know: imported through DLPack, as
views, and then made like calls with CuPy's or NumPy's own arrays."""

from __future__ import annotations

from typing import Any

from ..calls.append import eager as eager_append
from ..calls.arguments import APPEND, DECODE, METADATA, Table
from ..calls.decode import eager as eager_decode
from ..calls.metadata import eager as eager_metadata
from ..calls.operation import Operation
from ..errors import ArgumentError
from ..frameworks import is_foreign
from ..frameworks.dlpack import from_dlpack
from ..schedule.sched_meta import SchedMeta


def decode(
    arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, Any]:
    """flash_mla_with_kvcache(); outputs that the caller gave are returned as they are."""
    results = eager_decode(_imported(DECODE, arrays), options, lazy)
    named = DECODE.named(arrays)
    given = named["out"], named["lse"]
    out, lse = (r if x is None else x for r, x in zip(results, given, strict=True))
    return out, lse


def metadata(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Any]:
    """get_mla_metadata()."""
    return eager_metadata(_imported(METADATA, arrays), options)


def append(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """append_mla_kv(): k_cache as it was given, written."""
    eager_append(_imported(APPEND, arrays), options)
    return arrays[-1]


def run(
    operation: Operation, arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, ...]:
    """An operation; outputs that the caller gave are returned as they are."""
    results = operation.eager(_imported(operation.table, arrays), options, lazy)
    given = (arrays[i] for i in operation.table.outputs)
    return tuple(r if x is None else x for r, x in zip(results, given, strict=True))


def _imported(table: Table, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Views of the arrays that are of another framework."""
    writes = {array.name: array.role == "output" for array in table.arrays}
    return tuple(
        _view(table, name, x, writes[name]) if is_foreign(x) else x
        for name, x in zip(table.names, arrays, strict=False)
    )


def _view(table: Table, name: str, x: Any, writes: bool) -> Any:
    try:
        return from_dlpack(x, name, writable=writes)
    except ArgumentError as error:
        raise error.of(table.function) from error.__cause__
