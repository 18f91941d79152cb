"""The operations of `calls` under torch.compile, torch.export and fake tensors, as `torch_op` does
for the calls with kernels.

Each is two ops, flashmla_cupy::<name>, which returns new results, and, for a call whose outputs the
caller may give, flashmla_cupy::<name>_out, which writes into them. Their arguments follow from the
tables. There is no backward: it raises.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..calls import (
    checks,
    fp8_decode,
    paged_prefill,
    scalars,
    sparse_decode,
    sparse_metadata,
    sparse_prefill,
)
from ..calls.operation import Operation
from ..errors import ArgumentError
from ..frameworks.torch_tensors import needs_gradient
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM_V, NUM_SMS_CPU
from . import torch_checks
from .torch_op import TAGS, refuse_gradients, schedule_of

torch: Any = importlib.import_module("torch")

OPERATIONS = (
    fp8_decode.FP8,
    sparse_decode.SPARSE,
    sparse_metadata.METADATA,
    sparse_prefill.PREFILL,
    paged_prefill.PAGED_PREFILL,
)
_library: Any = torch.library.Library("flashmla_cupy", "FRAGMENT")  # ops live as long as it does
_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32")}


class _Op:
    """What a compiler traces of one operation; made beforehand, as compilers trace plain values."""

    def __init__(self, operation: Operation) -> None:
        table = operation.table
        at = {name: i for i, name in enumerate(table.names)}
        self.operation = operation
        self.required = tuple(at[array.name] for array in table.having("input", "schedule"))
        self.optional = tuple(at[array.name] for array in table.having("optional"))
        self.outputs = table.outputs
        self.options = tuple(i for i, option in enumerate(table.options) if option.schema)
        self.axes = torch_checks.axes_of(table)
        self.schedule = tuple(at[array.name] for array in table.having("schedule"))
        self.lengths = tuple(at.get(n, -1) for n in ("topk_length", "extra_topk_length"))
        self.lists = tuple(at.get(n, -1) for n in ("indices", "extra_indices_in_kvcache"))
        self.new = operation.name
        self.into = f"{operation.name}_out"


_OPS = {operation.name: _Op(operation) for operation in OPERATIONS}


# --- what the compiler traces ------------------------------------------------------------------


def run(
    operation: Operation, arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, ...]:
    """The operation as an op. The first layer that uses a SchedMeta makes it, for all of them."""
    op = _OPS[operation.name]
    tensors = list(arrays)
    try:
        values = _checked(op, tensors, options)
    except ArgumentError as error:
        raise error.of(operation.table.function) from error.__cause__
    given = [tensors[i] for i in op.outputs]
    if lazy is not None:
        _, s_q, h_q, _ = tensors[0].shape
        if s_q == 0 or h_q == 0:  # no rows, for which there is no schedule
            return _with_new(operation, tensors, values, given)
        made = schedule_of(lazy, tensors[0], lambda: _metadata(op, tensors))
        for i, array in zip(op.schedule, made, strict=True):
            tensors[i] = array
    inputs = (
        *[tensors[i] for i in op.required],
        *[values[i] for i in op.options],
        *[tensors[i] for i in op.optional],
    )
    if all(x is None for x in given):
        results: tuple[Any, ...] = getattr(torch.ops.flashmla_cupy, op.new)(*inputs)
        return results
    written = _with_new(operation, tensors, values, given)
    getattr(torch.ops.flashmla_cupy, op.into)(*inputs, *written)
    return written


def _with_new(
    operation: Operation, tensors: list[Any], values: tuple[Any, ...], given: list[Any]
) -> tuple[Any, ...]:
    """The outputs: those that the caller gave, and new ones for the rest."""
    named = dict(zip(operation.table.names, tensors, strict=True))
    outputs = operation.outputs(named, values, NUM_SMS_CPU)
    return tuple(
        tensors[0].new_empty(output.shape, dtype=_DTYPES[output.dtype]) if x is None else x
        for x, output in zip(given, outputs, strict=True)
    )


def _checked(op: _Op, tensors: list[Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses what eager calls refuse (see `torch_checks`); the options, with the softmax scale as
    a number."""
    operation, schedule = op.operation, op.schedule
    if schedule:
        metadata, num_splits = (tensors[i] for i in schedule)
        checks.metadata_kind(metadata, num_splits, is_lazy=options[-1])
    torch_checks.tensors(operation.table.function, op.axes, tensors)
    values = _values(operation.name, tensors[0], options)
    known = torch_checks.facts(
        operation.table, tensors, lambda known: operation.validate(known, options)
    )
    num_sms = 0 if known is None else torch_checks.num_sms_of(tensors[0])
    if num_sms:
        known.require_metadata(num_sms)
    return values


def _values(name: str, q: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The options, checked, with the softmax scale as a number."""
    if name == "sparse_metadata":
        return sparse_metadata.sizes(options, torch_checks.integer)
    if name.startswith("sparse_prefill"):
        scale = sparse_prefill.scale_and_width(*options[:2])
        for wide in options[2:]:
            scalars.wide_fp8(wide)
        return scale, *options[1:]
    head_dim_v, softmax_scale, flag, wide, _ = options
    scalars.head_dim_v(head_dim_v)
    if name == "fp8_decode":
        scalars.causal(flag)
    else:
        scalars.is_fp8_kvcache(flag)
    scalars.wide_fp8(wide)
    return head_dim_v, scalars.softmax_scale(softmax_scale, q.shape[-1]), *options[2:]


def _metadata(op: _Op, tensors: list[Any]) -> tuple[Any, Any]:
    """The schedule of a SchedMeta."""
    q = tensors[0]
    batch, s_q, h_q, _ = q.shape
    if op.operation.name == "fp8_decode":
        made: tuple[Any, Any] = torch.ops.flashmla_cupy.metadata(tensors[3], s_q * h_q, 1)
        return made
    indices, extra = (tensors[i] for i in op.lists)
    sizes = s_q * h_q, 1, h_q, indices.shape[2], 0 if extra is None else extra.shape[2]
    of_batch = q.new_empty((batch,), dtype=torch.int32)  # only its shape counts
    lengths = [tensors[i] for i in op.lengths]
    schedule: tuple[Any, Any] = torch.ops.flashmla_cupy.sparse_metadata(of_batch, *sizes, *lengths)
    return schedule


# --- what the ops do, and what the compiler knows of them --------------------------------------


def _named(op: _Op, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(arrays, options) of the table, from inputs in the order of the schema."""
    table = op.operation.table
    arrays: list[Any] = [None] * len(table.arrays)
    options: list[Any] = [False if o.name == "is_lazy" else HEAD_DIM_V for o in table.options]
    rest = list(inputs)
    for i in op.required:
        arrays[i] = rest.pop(0)
    for i in op.options:
        options[i] = rest.pop(0)
    for i in (*op.optional, *op.outputs):
        arrays[i] = rest.pop(0) if rest else None
    return tuple(arrays), tuple(options)


def _register(op: _Op) -> None:
    operation, results = op.operation, len(op.outputs)

    def real(*inputs: Any) -> tuple[Any, ...]:
        return operation.eager(*_named(op, inputs), is_op=True)

    def fake(*inputs: Any) -> tuple[Any, ...]:
        arrays, options = _named(op, inputs)
        named, device = dict(zip(operation.table.names, arrays, strict=True)), arrays[0].device
        num_sms = NUM_SMS_CPU
        if device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        return tuple(
            arrays[0].new_empty(output.shape, dtype=_DTYPES[output.dtype])
            for output in operation.outputs(named, options, num_sms)
        )

    def real_out(*inputs: Any) -> None:
        real(*inputs)

    def fake_out(*inputs: Any) -> None:
        refuse_gradients("q", inputs)

    def no_backward(ctx: Any, *gradients: Any) -> Any:
        raise needs_gradient("q")

    new, into = (operation.table.schema(with_outputs=w) for w in (False, True))
    returned = ", ".join(["Tensor"] * results)
    _library.define(f"{op.new}({new}) -> ({returned})", tags=TAGS)
    _library.define(f"{op.into}({into}) -> ()", tags=TAGS)
    for name, do, know in ((op.new, real, fake), (op.into, real_out, fake_out)):
        for device in ("CUDA", "CPU"):
            _library.impl(name, do, device)
        torch.library.register_fake(f"flashmla_cupy::{name}", know, lib=_library)
    if operation is not sparse_metadata.METADATA:
        torch.library.register_autograd(f"flashmla_cupy::{op.new}", no_backward, lib=_library)


for _op in _OPS.values():
    _register(_op)
